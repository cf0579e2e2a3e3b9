"""Conditions that a person writes as text, over named values: constraints and conditions of a search space, gates.

``simpleeval`` evaluates them; what it may meet is cut down here to names, plain values and operators. No text can call,
reach into an object, or take more than a moment.
"""

from __future__ import annotations

import ast
import difflib
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

LONGEST = 1000  # characters: also what bounds the depth of a tree and the size of a product
_WIDEST = 4096  # bits of a power of whole numbers

_SHAPES = (ast.Constant, ast.Name, ast.Attribute, ast.UnaryOp, ast.BinOp, ast.BoolOp, ast.Compare, ast.IfExp)
_LISTS = (ast.Tuple, ast.List)  # of what a value may be in
_SCALARS = (bool, int, float, str, type(None))
_ALLOWED = "names, numbers, text, True, False, None, + - * / // % **, comparisons, and, or, not, in, A if B else C"
_SPELLED = {"true": "True", "false": "False", "null": "None", "none": "None"}  # as in YAML
_REFUSED: dict[type[ast.AST], str] = {
    ast.Call: "a call",
    ast.Subscript: "an index",
    ast.Lambda: "a lambda",
    ast.NamedExpr: "an assignment",
    ast.JoinedStr: "an f-string",
    ast.Dict: "a dict",
    ast.Set: "a set",
    ast.Starred: "a star",
    ast.ListComp: "a comprehension",
    ast.GeneratorExp: "a comprehension",
    ast.SetComp: "a comprehension",
    ast.DictComp: "a comprehension",
    ast.Is: "is (write ==)",
    ast.IsNot: "is not (write !=)",
}


class ExpressionError(ValueError):
    """A text that is no expression, or one that has no value for these names; the message says which and why."""


class Expression:
    """A condition or formula over named values, such as ``"model.width * model.depth <= 4096"``.

    Args:
        text: names with dots, numbers, strings, ``True``, ``False`` and ``None``, arithmetic, comparisons, ``and``,
            ``or``, ``not``, ``in`` (a list or a string) and ``A if B else C``. At most 1000 characters.

    Attributes:
        text: as it was given.
        names: the names in it, each once, as they come.

    Raises:
        ExpressionError: it is not one, or has something else in it.
        ModuleNotFoundError: ``simpleeval`` is not installed.
    """

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise ExpressionError(f"{text!r} is no expression; write text, as in 'model.width * model.depth <= 4096'")
        self.text = text
        self._tree = _parsed(text)
        found: dict[str, None] = {}
        try:
            _look(self._tree, found)
        except ExpressionError as error:
            raise ExpressionError(f"{_short(text)}: {error}; write {_ALLOWED}") from None
        except RecursionError:
            raise ExpressionError(f"{_short(text)} is nested too deeply; write it in several") from None
        self.names = tuple(found)
        _engine({})  # else a missing extra would be said only when a value is asked for

    def value(self, values: Mapping[str, Any]) -> Any:
        """What it gives.

        Args:
            values: one for each of :attr:`names`, under the name with its dots.

        Raises:
            ExpressionError: a name is not there, an operator does not fit its values, or the result is out of bounds.
        """
        for name in self.names:
            if name not in values:
                raise ExpressionError(f"{_short(self.text)} names {unknown(name, values)}")
        try:
            return _engine({name: values[name] for name in self.names}).eval(self.text, self._tree)
        except (ArithmeticError, TypeError, ExpressionError, RecursionError) as error:
            given = ", ".join(f"{name}={values[name]!r}" for name in self.names)
            at = f" at {given}" if given else ""
            raise ExpressionError(f"{_short(self.text)} has no value{at}: {error}") from None

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether it is true, as :meth:`value` and Python see it.

        Raises:
            ExpressionError: as :meth:`value`; also for a result that is NaN, which is neither.
        """
        result = self.value(values)
        if isinstance(result, float) and math.isnan(result):
            raise ExpressionError(f"{_short(self.text)} is NaN, neither true nor false")
        return bool(result)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expression) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"Expression({self.text!r})"


def unknown(name: str, known: Iterable[str]) -> str:
    """``name`` with the nearest of the names that there are.

    >>> unknown("model.widht", ["model.width", "model.depth"])
    "'model.widht', which is not there; nearest: model.width"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 1, 0.6)
    if near:
        return f"{name!r}, which is not there; nearest: {near[0]}"
    shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    return f"{name!r}, which is not there; there {'is' if len(names) == 1 else 'are'} {shown or 'none'}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:199]}…")


def _parsed(text: str) -> ast.expr:
    if len(text) > LONGEST:
        raise ExpressionError(f"{_short(text)} has {len(text)} characters; write at most {LONGEST}")
    if not text.strip():
        raise ExpressionError(f"{text!r} is empty; write a condition, as in 'model.width <= 512'")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ExpressionError(f"{_short(text)} is no expression: {error.msg}{_hint(text)}") from None
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes; brackets in brackets
        raise ExpressionError(f"{_short(text)} is no expression: {error or 'nested too deeply'}") from None


def _hint(text: str) -> str:
    """What people write who come from other languages."""
    for theirs, ours in (("&&", "and"), ("||", "or"), ("!", "not")):
        if theirs in text.replace("!=", ""):
            return f"; write {ours} for {theirs}"
    return "; write == to compare" if "=" in text else ""


def _look(node: ast.AST, found: dict[str, None]) -> None:
    """Collect names; refuse what is not allowed."""
    if isinstance(node, (ast.Name, ast.Attribute)):
        name = _dotted(node)
        if name in _SPELLED:
            raise ExpressionError(f"{name} is not allowed (write {_SPELLED[name]})")
        found.setdefault(name)
        return
    if isinstance(node, ast.Constant):
        if not isinstance(node.value, _SCALARS):
            raise ExpressionError(f"{node.value!r} is not allowed")
        return
    if not isinstance(node, _SHAPES):
        raise ExpressionError(f"{_REFUSED.get(type(node), type(node).__name__)} is not allowed")
    if isinstance(node, ast.Compare):
        _look_at_comparison(node, found)
        return
    _look_at_operators([node.op] if isinstance(node, (ast.UnaryOp, ast.BinOp)) else [])
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            _look(child, found)


def _look_at_comparison(node: ast.Compare, found: dict[str, None]) -> None:
    _look_at_operators(node.ops)
    _look(node.left, found)
    for op, right in zip(node.ops, node.comparators, strict=True):
        if isinstance(op, (ast.In, ast.NotIn)) and isinstance(right, _LISTS):
            for item in right.elts:
                _look(item, found)
        else:
            _look(right, found)


def _look_at_operators(operators: Iterable[ast.AST]) -> None:
    for op in operators:
        if type(op) not in _OPERATORS:
            raise ExpressionError(f"{_REFUSED.get(type(op), f'the operator {type(op).__name__}')} is not allowed")


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    raise ExpressionError("a dot after something that is no name is not allowed")


def _numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` on numbers alone: text times a number, or text with % in it, can fill the memory."""

    def checked(*operands: Any) -> Any:
        for operand in operands:
            if not isinstance(operand, (int, float)):
                raise ExpressionError(f"{operand!r} is not a number")
        return function(*operands)

    return checked


def _power(base: float, exponent: float) -> float:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > _WIDEST:
        raise ExpressionError(f"a power of more than {_WIDEST} bits is too large")
    result = base**exponent
    if isinstance(result, complex):
        raise ExpressionError("a root of a negative number is not a real number")
    return result


_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: _numbers(operator.add),
    ast.Sub: _numbers(operator.sub),
    ast.Mult: _numbers(operator.mul),
    ast.Div: _numbers(operator.truediv),
    ast.FloorDiv: _numbers(operator.floordiv),
    ast.Mod: _numbers(operator.mod),
    ast.Pow: _numbers(_power),
    ast.USub: _numbers(operator.neg),
    ast.UAdd: _numbers(operator.pos),
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, group: item in group,
    ast.NotIn: lambda item, group: item not in group,
}


def _engine(values: Mapping[str, Any]) -> Any:
    """simpleeval with these names, and without the rest of what it can do."""
    try:
        from simpleeval import EvalWithCompoundTypes
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "expressions need simpleeval; write: pip install 'lightning-bharat[tune]'", name=error.name
        ) from error
    engine = EvalWithCompoundTypes(operators=_OPERATORS, functions={}, names={})
    engine.nodes = {shape: engine.nodes[shape] for shape in (*_SHAPES, *_LISTS)}
    engine.nodes[ast.Name] = engine.nodes[ast.Attribute] = lambda node: values[_dotted(node)]
    return engine
