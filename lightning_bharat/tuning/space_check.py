"""A search space against the options of a project: before anything runs, and without building any of it."""

from __future__ import annotations

import difflib
import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from itertools import zip_longest
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from lightning_bharat.tuning.space import SearchSpace, SpaceError
from lightning_bharat.tuning.study_config import StudyCLI
from lightning_bharat.tuning.trial_run import words_of

Parse = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def check(space: SearchSpace, words: Sequence[str]) -> None:
    """See :meth:`SearchSpace.check`."""
    for key in space.distributions:
        if any(word == f"--{key}" or word.startswith(f"--{key}=") for word in words):
            raise SpaceError(f"{key} is searched, and --{key} sets it as well; leave out one of the two")
    cli = StudyCLI(words)

    def parse(values: Mapping[str, Any]) -> Mapping[str, Any]:
        return _flat(cli.parser.parse_args([*words, *words_of(values)]))

    ends = {key: _ends(distribution) for key, distribution in space.distributions.items()}
    known = _flat(cli.config)
    _check_all(ends, parse, known)
    for key, distribution in space.distributions.items():
        if isinstance(distribution, IntDistribution) and isinstance(parse({key: distribution.low}).get(key), float):
            raise SpaceError(
                f"{key} takes any number, and {distribution.low} to {distribution.high} are whole ones; write "
                f"{float(distribution.low)} and {float(distribution.high)}, or choices"
            )


def _check_all(ends: Mapping[str, Sequence[Any]], parse: Parse, known: Mapping[str, Any]) -> None:
    """Parse one value of each key together; only where that is refused, each alone to see which it was."""
    missing = object()
    for together in zip_longest(*ends.values(), fillvalue=missing):
        values = {key: value for key, value in zip(ends, together, strict=True) if value is not missing}
        if _refused(parse, values) is None:
            continue
        for key, value in values.items():
            if (why := _refused(parse, {key: value})) is not None:
                raise SpaceError(_because(key, value, why, known))


def _refused(parse: Parse, values: Mapping[str, Any]) -> str | None:
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            parse(values)
    except SystemExit:
        return said.getvalue().strip()
    return None


def _because(key: str, value: Any, why: str, known: Mapping[str, Any]) -> str:
    if key not in known:
        near = difflib.get_close_matches(key, known, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {_some(key, known)}"
        return f"{key} is no option of this project{hint}"
    return f"{key} does not take {value!r}: {why.partition('error: ')[2] or why}"


def _some(key: str, known: Mapping[str, Any]) -> str:
    prefix = key.split(".")[0]
    return ", ".join(sorted(name for name in known if name.startswith(f"{prefix}.")) or sorted(known)[:10])


def _ends(distribution: BaseDistribution) -> list[Any]:
    """Values whose acceptance says that the others are accepted too."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    return [distribution.low, distribution.high]  # type: ignore[attr-defined]


def _flat(config: Any) -> dict[str, Any]:
    """Options by their keys on the command line, which leave out ``init_args``."""
    return {key.replace(".init_args", ""): value for key, value in config.items(branches=False)}
