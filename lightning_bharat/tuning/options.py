"""A sampler, a pruner or a rule that is named in a configuration: which class is meant, and whether its options fit."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean "x"?``, or nothing when no known name is like it."""
    close = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f' Did you mean "{close[0]}"?' if close else ""


def named(argument: str, given: Any, known: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Read ``"tpe"`` or ``{"name": "tpe", "n_startup_trials": 5}``.

    Args:
        argument: what the user calls it: ``"sampler"``.
        given: what the user wrote.
        known: the names that there are.

    Returns:
        The name and its options.

    Raises:
        TypeError: neither a name nor a mapping.
        ValueError: a mapping without a name, or a name that is not known.
    """
    options = dict(given) if isinstance(given, Mapping) else {"name": given}
    if "name" not in options:
        raise ValueError(f'{argument}={given!r} has no name: write {{"name": "{next(iter(known))}", ...}}')
    name = options.pop("name")
    if not isinstance(name, str):
        raise TypeError(f"{argument}={given!r}: expected one of {', '.join(known)}, or a dict with a name and options")
    if name not in known:
        raise ValueError(f'{argument}="{name}" is not one of {", ".join(known)}.{nearest(name, known)}')
    return name, options


def check(argument: str, name: str, make: Callable[..., Any], options: Mapping[str, Any], ours: Iterable[str]) -> None:
    """Whether ``make`` takes ``options``, and has all that it needs.

    Args:
        argument: what the user calls it.
        name: which sampler, pruner or rule it is.
        make: its class, or a function that builds it.
        options: what the user gives it.
        ours: parameters of ``make`` that are not the user's to give.

    Raises:
        ValueError: an option that there is not, or one that is missing.
    """
    there = {key: value for key, value in inspect.signature(make).parameters.items() if key not in set(ours)}
    for option in options:
        if option not in there:
            raise ValueError(
                f'{argument} "{name}" has no option {option!r}.{nearest(option, there)} '
                f"Its options: {', '.join(there) or 'none'}"
            )
    missing = [key for key, value in there.items() if value.default is value.empty and key not in options]
    if missing:
        wanted = ", ".join(f'"{key}": ...' for key in missing)
        raise ValueError(f'{argument} "{name}" needs {", ".join(missing)}: write {{"name": "{name}", {wanted}}}')
