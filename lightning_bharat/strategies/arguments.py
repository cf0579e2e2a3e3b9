"""Which values each argument of HybridStrategy takes, and what to write instead of any other."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from functools import wraps
from typing import Any, TypeVar, cast

import torch.distributed as dist

from lightning_bharat.plan.model_plan import ModelPlan
from lightning_bharat.plan.propose import STYLES
from lightning_bharat.plan.work import MODES
from lightning_bharat.strategies.schedule import KINDS

REDUCED = ("bfloat16", "float32")  # types in which data ranks may average gradients: those with float32's range

_Init = TypeVar("_Init", bound=Callable[..., None])
Rule = tuple[Callable[[Any], bool], str]


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_size_or(other: Any) -> Callable[[Any], bool]:
    return lambda value: _is_size(value) or (type(value) is type(other) and value == other)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_flag_or_auto(value: Any) -> bool:
    return isinstance(value, bool) or value == "auto"


def _one_of(words: Iterable[str | None]) -> Callable[[Any], bool]:
    known = tuple(words)
    return lambda value: (value is None or isinstance(value, str)) and value in known


def _is_plan(value: Any) -> bool:
    if value is None or isinstance(value, ModelPlan):
        return True
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value) and not _unknown_styles(value)


def _unknown_styles(plan: Mapping) -> list[Any]:
    return [style for style in plan.values() if not isinstance(style, str) or style not in STYLES]


def _wrong_part(value: Any) -> Any:
    """Of a plan for many modules, what is wrong with it."""
    if not isinstance(value, Mapping):
        return value
    wrong = _unknown_styles(value)
    return {name: style for name, style in value.items() if not isinstance(name, str) or style in wrong}


def _are_weights(value: Any) -> bool:
    return value is None or isinstance(value, (str, os.PathLike, Mapping))


def _is_backend(value: Any) -> bool:
    """``"gloo"``, or one for each kind of device: ``"cpu:gloo,cuda:nccl"``."""
    if not isinstance(value, str):
        return value is None
    return all(part.split(":")[-1] in dist.Backend.backend_list for part in value.split(","))


def _is_time(value: Any) -> bool:
    return value is None or (isinstance(value, timedelta) and value > timedelta())


_SIZE: Rule = (_is_size, "a whole number from 1 up")
_AUTO_SIZE: Rule = (_is_size_or("auto"), 'a whole number from 1 up, or "auto"')
_FLAG: Rule = (_is_flag, "True or False")
_AUTO_FLAG: Rule = (_is_flag_or_auto, 'True, False or "auto"')

RULES: dict[str, Rule] = {
    "data_parallel_size": _AUTO_SIZE,
    "tensor_parallel_size": _AUTO_SIZE,
    "pipeline_parallel_size": _AUTO_SIZE,
    "context_parallel_size": _SIZE,
    "expert_parallel_size": _SIZE,
    "replicate_size": _SIZE,
    "num_microbatches": (_is_size_or(None), "a whole number from 1 up, or None"),
    "schedule": (_one_of([*KINDS, "auto"]), f"one of {', '.join(KINDS)} or auto"),
    "sequence_parallel": _AUTO_FLAG,
    "loss_parallel": _AUTO_FLAG,
    "token_weighted": _FLAG,
    "microbatch_fn": (lambda value: value is None or callable(value), "a function of a batch and a number, or None"),
    "plan": (
        _is_plan,
        "a ModelPlan, None, or a dict of module names (with * for the number of a block) to some of "
        f"{', '.join(sorted(STYLES))}",
    ),
    "reshard_after_forward": (
        lambda value: value is None or _is_flag(value) or _is_size(value),
        "True, False, None or a number of ranks from 1 up",
    ),
    "reduce_dtype": (_one_of((None, *REDUCED)), f"one of {', '.join(REDUCED)}, or None"),
    "gradient_compression": (_one_of((None, "int8")), '"int8" or None'),
    "activation_checkpointing": (_one_of(MODES), '"full", "selective" or None'),
    "offload": _FLAG,
    "compile": (
        lambda value: _is_flag(value) or isinstance(value, Mapping),
        """True, False, or torch.compile's arguments by name, such as {"backend": "eager"}""",
    ),
    "weights": (_are_weights, "a path, a state dict or None"),
    "save_distributed_checkpoint": _FLAG,
    "checkpoint_read_back": _FLAG,
    "checkpoint_compression": (_one_of((None, "zstd")), '"zstd" or None'),
    "process_group_backend": (_is_backend, 'None, "gloo", "nccl" or another backend that torch.distributed knows'),
    "timeout": (_is_time, "a datetime.timedelta above 0, or None"),
}


def check(arguments: Mapping[str, Any]) -> None:
    """Refuse a value that an argument does not take.

    Raises:
        ValueError: names the argument, its value and what to write instead.
    """
    for name, value in arguments.items():
        fits, wanted = RULES[name]
        if not fits(value):
            raise ValueError(f"{name}={_wrong_part(value)!r}: write {wanted}")
    _check_context(arguments)
    if arguments["gradient_compression"] is not None and arguments["replicate_size"] == 1:
        raise ValueError(
            f"gradient_compression={arguments['gradient_compression']!r} with replicate_size=1: what is compressed is "
            "what copies of the divided parameters exchange; write replicate_size=<hosts> too, or leave "
            "gradient_compression out"
        )
    if arguments["reduce_dtype"] is not None and arguments["pipeline_parallel_size"] not in ("auto", 1):
        raise ValueError(
            f"reduce_dtype={arguments['reduce_dtype']!r} with pipeline_parallel_size="
            f"{arguments['pipeline_parallel_size']}: gradients of micro-batches would be added up in that type; "
            "leave reduce_dtype out"
        )


def _check_context(arguments: Mapping[str, Any]) -> None:
    size = arguments["context_parallel_size"]
    if size > 1 and arguments["sequence_parallel"] is True:
        raise ValueError(
            f"context_parallel_size={size} with sequence_parallel=True: context ranks divide the sequence in blocks, "
            'and tensor ranks do not divide it again; leave sequence_parallel at "auto"'
        )
    if size > 1 and arguments["compile"] is not False:
        raise ValueError(
            f"context_parallel_size={size} with compile={arguments['compile']!r}: compiled blocks can't exchange parts "
            "of a sequence in this version; leave compile out"
        )


def refuse_unknown(strategy: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names of arguments that ``strategy`` does not have.

    Raises:
        TypeError: names the nearest.
    """
    names = list(known)
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, 3, 0.5)
            instead = " or ".join(near) if near else f"one of {', '.join(names)}"
            raise TypeError(f"{strategy} has no argument {name!r}; write {instead}")


def known_arguments(init: _Init) -> _Init:
    """For the ``__init__`` that has these arguments: refuses others, and names the nearest.

    Raises:
        TypeError: from what it returns.
    """

    @wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        refuse_unknown("HybridStrategy", kwargs, RULES)
        init(self, *args, **kwargs)

    return cast(_Init, checked)
