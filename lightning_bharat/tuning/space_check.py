"""A search space against the options of a project: before anything runs, and without building any of it."""

from __future__ import annotations

import difflib
import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from lightning_bharat.expressions import unknown
from lightning_bharat.tuning.parameters import SpaceError
from lightning_bharat.tuning.study_config import StudyCLI
from lightning_bharat.tuning.trial_run import words_of

if TYPE_CHECKING:
    from lightning_bharat.tuning.space import SearchSpace

_DRAWS = 300
Parse = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def check(space: SearchSpace, words: Sequence[str]) -> dict[str, Any]:
    """See :meth:`SearchSpace.check`; returns the values of options that expressions name and that are not searched."""
    given = {word.split("=", 1)[0].replace(".init_args", "") for word in words if word.startswith("--")}
    for key in space.distributions:
        if f"--{key.replace('.init_args', '')}" in given:
            raise SpaceError(f"{key} is searched, and --{key} sets it as well; leave out one of the two")
    cli = StudyCLI(words)

    def parse(values: Mapping[str, Any]) -> Mapping[str, Any]:
        return _flat(cli.parser.parse_args([*words, *words_of(values)]))

    known = _flat(cli.config)
    fixed = {}
    for name in space.outside:
        if name not in known:
            raise SpaceError(f"an expression of the space names {unknown(name, [*space.distributions, *known])}")
        fixed[name] = known[name]
    ends = {key: _ends(distribution) for key, distribution in space.distributions.items()}
    always = {key: values for key, values in ends.items() if not space.is_conditional(key)}
    _check_all(always, parse, known)
    points = _points(space.with_fixed(fixed), [key for key in ends if key not in always])
    for key, point in points.items():
        for value in ends[key]:
            if (why := _refused(parse, {**point, key: value})) is not None:
                raise SpaceError(_because(key, value, why, known))
    for key, distribution in space.distributions.items():
        if isinstance(distribution, IntDistribution):
            found = parse({**points.get(key, {}), key: distribution.low}).get(key)
            if isinstance(found, float):
                raise SpaceError(
                    f"{key} takes any number, and {distribution.low} to {distribution.high} are whole ones; write "
                    f"{float(distribution.low)} and {float(distribution.high)}, or choices"
                )
    return fixed


def _points(space: SearchSpace, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For each of ``keys`` a point that has it, up to it.

    Raises:
        SpaceError: no random point has it.
    """
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found: dict[str, dict[str, Any]] = {}
    for _ in range(_DRAWS):
        if len(found) == len(keys):
            break
        values = space.suggest(study.ask())
        for key in keys:
            if key in values and key not in found:
                names = list(values)
                found[key] = {name: values[name] for name in names[: names.index(key)]}
    for key in keys:
        if key not in found:
            raise SpaceError(f"{key}: none of {_DRAWS} random points had it: can its condition hold?")
    return found


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
