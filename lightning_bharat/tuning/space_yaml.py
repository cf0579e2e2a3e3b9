"""A search space from YAML."""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lightning_bharat.tuning.parameters import SpaceError, When

_SECTIONS = ("parameters", "constraints")
_FIELDS = ("low", "high", "log", "step", "choices", "when")


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also takes 1e-4 for a number, as people mean it, and refuses a key that is twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise SpaceError(f"{key} is there twice, the second time in line {key_node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


Space = tuple[dict[str, "BaseDistribution | When"], list[str]]


def read(path: Path) -> Space:
    """Parameters and constraints of a file.

    Raises:
        SpaceError: names the key and the reason.
        OSError: the file can't be read.
    """
    try:
        return of(yaml.load(path.read_text(), _Loader))  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpaceError(f"this is no YAML: {' '.join(str(error).split())}") from None


def of(content: Any) -> Space:
    """The same of what YAML holds: parameters by key, or ``parameters`` and ``constraints``.

    Raises:
        SpaceError: names the key and the reason.
    """
    if not isinstance(content, Mapping):
        raise SpaceError("expected keys such as model.lr, each with low and high, or choices")
    if not set(_SECTIONS) & content.keys():
        content = {"parameters": content}
    _refuse_others(content, _SECTIONS, "the file")
    parameters, constraints = content.get("parameters"), content.get("constraints") or []
    if not isinstance(parameters, Mapping):
        raise SpaceError("parameters: expected keys such as model.lr, each with low and high, or choices")
    if not isinstance(constraints, list) or not all(isinstance(each, str) for each in constraints):
        raise SpaceError("constraints: expected a list of expressions, as in - model.width <= 512")
    return {key: _parameter(str(key), given) for key, given in parameters.items()}, constraints


def _parameter(key: str, given: Any) -> BaseDistribution | When:
    if isinstance(given, list):
        given = {"choices": given}
    if not isinstance(given, Mapping):
        raise SpaceError(f"{key}: expected low and high, or choices, and found {given!r}")
    _refuse_others(given, _FIELDS, key)
    made = _choices(key, given) if "choices" in given else _range(key, given)
    if "when" not in given:
        return made
    if not isinstance(given["when"], str):
        raise SpaceError(f"{key}: when: expected another key, or an expression, and found {given['when']!r}")
    return When(given["when"], made)


def _choices(key: str, given: Mapping[str, Any]) -> BaseDistribution:
    choices = given["choices"]
    if set(given) & {"low", "high", "log", "step"}:
        raise SpaceError(f"{key}: choices have no low, high, log or step; write one or the other")
    if not isinstance(choices, list) or not choices:
        raise SpaceError(f"{key}: choices: expected a list of at least one value, and found {choices!r}")
    return CategoricalDistribution(choices)


def _range(key: str, given: Mapping[str, Any]) -> BaseDistribution:
    numbers = {name: _number(f"{key}: {name}", given[name]) for name in ("low", "high", "step") if name in given}
    for name in ("low", "high"):
        if name not in numbers:
            raise SpaceError(f"{key}: {name} is missing; write low and high, or choices")
    log = given.get("log", False)
    if not isinstance(log, bool):
        raise SpaceError(f"{key}: log: expected true or false, and found {log!r}")
    whole = all(isinstance(number, int) for number in numbers.values())
    options = {**numbers, "log": log}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # that a step does not end at high
            return IntDistribution(**options) if whole else FloatDistribution(**options)  # type: ignore[arg-type]
    except (ValueError, UserWarning) as error:
        raise SpaceError(f"{key}: {error}") from None


def _number(what: str, value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SpaceError(f"{what}: expected a number, and found {value!r}")
    return value


def _refuse_others(given: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"write {near[0]}" if near else f"there are {', '.join(known)}"
            raise SpaceError(f"{where}: {name} is not known; {hint}")
