"""A step of a window that has been computed, computed once more: it draws what it drew and counts for nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any, TypeVar

from lightning.pytorch.strategies import Strategy

from lightning_bharat.strategies._torch import innermost_function_mode, without_innermost_function_mode
from lightning_bharat.strategies.hybrid import HybridStrategy
from lightning_bharat.strategies.whole_norms import WholeNorms

Result = TypeVar("Result")


def as_held(function: Callable[..., Result], *args: Any) -> Result:
    """Call it where a hook sees what this rank holds of gradients, and a step computes what it computes outside of
    hooks."""
    if isinstance(innermost_function_mode(), WholeNorms):
        with without_innermost_function_mode():
            return function(*args)
    return function(*args)


@contextmanager
def again(strategy: Strategy, batches: int) -> Iterator[None]:
    """In here the last ``batches`` batches are computed again; what the strategy counts is as before afterwards."""
    if not isinstance(strategy, HybridStrategy):
        yield
        return
    tokens, kept = strategy._tokens, dict[str, Any]()
    pipeline = strategy._pipeline.pipeline if strategy._pipeline is not None else None
    if tokens is not None:
        kept = copy(vars(tokens))
        tokens.stepped()
    steps = pipeline.steps if pipeline is not None else 0
    if pipeline is not None:
        pipeline.steps = steps - batches
    try:
        yield
    finally:
        if tokens is not None:
            vars(tokens).update(kept)
        if pipeline is not None:
            pipeline.steps = steps
