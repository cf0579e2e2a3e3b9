"""Points of a search space, given by people: read from a CSV, and checked against the space key by key."""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

VALUE = "value"  # the column of results


@dataclass(frozen=True)
class Point:
    """Values for some or all parameters.

    Attributes:
        where: it was written, for errors.
        params: by the parameters' dotted keys.
        value: what it came to, where that is known.
        text: all are text, taken for what they say, as in a CSV.
    """

    where: str
    params: Mapping[str, Any]
    value: float | None = None
    text: bool = False


def read_csv(path: str | Path) -> list[Point]:
    """A point a row. Columns are dotted keys, and ``value`` if results are known; an empty cell is not given.

    Raises:
        ValueError: there is no such file or no row in it, a row is longer than the head, a column is there twice, or a
            value is no number.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"points={str(path)!r} is no file; write the path of a CSV whose columns are dotted keys")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        head = reader.fieldnames or []
        if twice := next((name for name in head if head.count(name) > 1), None):
            raise ValueError(f"{path}: the column {twice!r} is there twice; leave one out")
        points = [_row(f"{path}, line {reader.line_num}", row) for row in reader]
    if not points:
        raise ValueError(f"{path} has no rows; write one for each point below the line of keys")
    return points


def _row(where: str, row: dict[Any, Any]) -> Point:
    if None in row:
        raise ValueError(f"{where}: it has more cells than the head has columns: {row[None]!r} is left over")
    given = {key: cell.strip() for key, cell in row.items() if cell is not None and cell.strip()}
    text = given.pop(VALUE, None)
    if text is None:
        return Point(where, given, text=True)
    try:
        return Point(where, given, _number(text, text=True), text=True)
    except ValueError as error:
        raise ValueError(f"{where}: value={text!r} {error}; leave it empty where it is not known") from None


def check_point(point: Point, space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """``point.params`` as Optuna takes them.

    Raises:
        ValueError: with a line for each key that is unknown, or whose value does not fit.
    """
    if not point.params:
        raise ValueError(f"{point.where}: it has no values; write some, or leave it out")
    checked, wrong = {}, []
    for key, value in point.params.items():
        if key not in space:
            near = difflib.get_close_matches(key, space, 1)
            wrong.append(f"{point.where}: {key}: no parameter of the space; {_hint(near, space)}")
            continue
        try:
            checked[key] = fitted(value, space[key], point.text)
        except ValueError as error:
            wrong.append(f"{point.where}: {key}={value!r} {error}")
    if wrong:
        raise ValueError("\n".join(wrong))
    return checked


def _hint(near: Sequence[str], space: Mapping[str, BaseDistribution]) -> str:
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(space)}"


def fitted(value: Any, distribution: BaseDistribution, text: bool = False) -> Any:
    """``value`` in the type of ``distribution``; if it is ``text``, what that says.

    Raises:
        ValueError: it has another type, or lies outside; the rest of a sentence that begins with the value.
    """
    if isinstance(distribution, CategoricalDistribution):
        return _choice(value, distribution, text)
    if not isinstance(distribution, (FloatDistribution, IntDistribution)):
        raise ValueError(f"can't be checked against {type(distribution).__name__}")
    number = _number(value, text)
    whole = isinstance(distribution, IntDistribution)
    if whole and not number.is_integer():
        raise ValueError("is no whole number")
    if not distribution.low <= number <= distribution.high:
        raise ValueError(f"is outside of [{distribution.low}, {distribution.high}]")
    if distribution.step is not None:
        steps = (number - distribution.low) / distribution.step
        if not math.isclose(steps, round(steps), abs_tol=1e-8):
            raise ValueError(f"is not {distribution.low} plus a multiple of the step {distribution.step}")
    return int(number) if whole else number


def _number(value: Any, text: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, str if text else (int, float)):
        raise ValueError("is text, where a number is expected" if isinstance(value, str) else "is no number")
    try:
        number = float(value)
    except ValueError:
        raise ValueError("is no number") from None
    if not math.isfinite(number):
        raise ValueError("is no finite number")
    return number


def _choice(value: Any, distribution: CategoricalDistribution, text: bool) -> Any:
    if text:
        same = [choice for choice in distribution.choices if value in (str(choice), _as_yaml(choice))]
    else:
        same = [choice for choice in distribution.choices if type(choice) is type(value) and choice == value]
    if not same:
        raise ValueError(f"is none of the choices {', '.join(map(repr, distribution.choices))}")
    if len(same) > 1:
        raise ValueError(f"may be any of {', '.join(map(repr, same))}; give points as a list of dicts")
    return same[0]


def _as_yaml(choice: Any) -> str:
    """How a choice stands in a configuration: ``null``, ``true``."""
    return yaml.safe_dump(choice).removesuffix("\n").removesuffix("\n...")
