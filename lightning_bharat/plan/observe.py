"""What a training step does with its modules, seen in one dry run on fake tensors: nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import resolve_name
from torch.utils._pytree import tree_leaves, tree_map

from lightning_bharat.plan.alone import Alone
from lightning_bharat.plan.answers import VALUES, Answers
from lightning_bharat.plan.blocks import UNCUT, PlanError, block_list, block_names, kinds_of
from lightning_bharat.plan.copies import copy_around_tensors, copy_module
from lightning_bharat.plan.exchange import OnePeer
from lightning_bharat.plan.fake_mode import FakeMode
from lightning_bharat.plan.flops import FlopCounter
from lightning_bharat.plan.sources import FromBlock, Sources
from lightning_bharat.plan.vocabulary import VocabularyShard, watch_gathers

Step = Callable[[Any, Any], Any]


@dataclass
class Call:
    """How a block was called: fake tensors in their places, everything else as the first block got it."""

    args: tuple
    kwargs: dict[str, Any]

    def copied(self, of_tensor: Callable[[Tensor], Tensor]) -> Call:
        """A copy, with ``of_tensor(tensor)`` for each tensor."""

        def one(x: Any) -> Any:
            return of_tensor(x) if isinstance(x, Tensor) else copy_around_tensors(x, of_tensor)

        return Call(*tree_map(one, (self.args, self.kwargs)))


@dataclass(frozen=True)
class Attention:
    """One ``scaled_dot_product_attention``: query and key-value heads and the size of a head."""

    heads: int
    kv_heads: int
    size: int


@dataclass
class Observation:
    """What one dry run showed.

    Attributes:
        shell: the copy of the model on fake tensors that was run.
        names, kinds: of the blocks, in order.
        calls: of the first block of each kind.
        hidden: where a block takes the hidden state: a position or a keyword.
        between: "" where each block reads just what the block before it returned, else what was seen.
        order: names of modules with parameters of their own, as they ran; blocks appear by their own name.
        attention: by the name of the block in which it ran.
        read_outside: parameter name -> where it was read outside its module's ``forward``.
        random: whether blocks draw random numbers in training.
        heads: names of linears after the blocks whose width is the vocabulary.
        gathers: functions that needed whole logits.
        program: the functions called in blocks, in order, each with its block.
        needs: parameter name -> blocks that need it though it is not theirs (the depth: what comes after the blocks).
        apart: "" where nothing but the hidden state goes from block to block, else what does.
        outputs: how many values a block returns in a tuple; 0 for a bare tensor.
        wire: type of the hidden state between blocks.
        costs: floating-point operations before the blocks, in each, and after them.
    """

    shell: nn.Module
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    calls: dict[str, Call] = field(default_factory=dict)
    hidden: int | str | None = None
    between: str = ""
    order: list[str] = field(default_factory=list)
    attention: dict[str, Attention] = field(default_factory=dict)
    read_outside: dict[str, str] = field(default_factory=dict)
    random: bool = False
    heads: tuple[str, ...] = ()
    gathers: list[str] = field(default_factory=list)
    program: list[tuple[str, Callable]] = field(default_factory=list)
    needs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    apart: str = ""
    outputs: int = 0
    wire: torch.dtype = torch.float32
    costs: tuple[int, ...] = ()
    mode: FakeMode = field(default_factory=FakeMode)

    @property
    def before(self) -> tuple[str, ...]:
        """Modules with parameters that ran before the first block."""
        return tuple(dict.fromkeys(self.order[: self.order.index(self.names[0])]))

    @property
    def after(self) -> tuple[str, ...]:
        """Modules with parameters that ran after the last block."""
        last = len(self.order) - self.order[::-1].index(self.names[-1])
        return tuple(dict.fromkeys(self.order[last:]))


def fake_copy(module: nn.Module, mode: FakeMode, alike: Iterable[tuple[nn.Module, nn.Module]] = ()) -> nn.Module:
    """A copy of ``module`` whose parameters and buffers are fake tensors on the CPU; no data is copied. Of each two
    modules ``alike`` that have parameters of their own, the first gets those of the second."""
    memo: dict[int, Any] = {}
    same = {id(p): q for one, other in alike for p, q in zip(one.parameters(), other.parameters(), strict=True)}
    with mode:
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) in same:
                continue
            blank = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(blank, requires_grad=tensor.requires_grad) if is_parameter else blank
    memo |= {name: memo[id(q)] for name, q in same.items()}
    return copy_module(module, memo)


def vocabulary_heads(module: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """Linears outside the blocks that are as wide as an embedding outside the blocks has rows; subclasses that keep
    torch's ``forward`` too."""

    def outside(name: str) -> bool:
        return not any(name == block or name.startswith(f"{block}.") for block in names)

    rows = {m.num_embeddings for n, m in module.named_modules() if isinstance(m, nn.Embedding) and outside(n)}
    linears = ((n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear))
    as_torchs = ((n, m) for n, m in linears if type(m).forward is nn.Linear.forward)
    return tuple(n for n, m in as_torchs if m.out_features in rows and outside(n))


def observe(module: nn.Module, step: Step, batch: Any, multiple: int = 1) -> Observation:
    """Run ``step(copy of module, batch)`` once on fake tensors and write down what happens.

    Args:
        module: real or on ``meta``; it is not changed.
        step: the training step; gets the copy and a batch of fake tensors.
        batch: a batch as the loader gives it; two samples and a short sequence of it are used where blocks do the same
            with them.
        multiple: the short sequence's length is a multiple of this.

    Raises:
        PlanError: the step fails on fake tensors, or its blocks do not run.
    """
    whole, short = observe_twice(module, step, batch, multiple)
    return short if short is not None and short.program == whole.program else whole


def observe_twice(
    module: nn.Module, step: Step, batch: Any, multiple: int = 1
) -> tuple[Observation, Observation | None]:
    """As :func:`observe`: what was seen with the batch, and with the short one if the step takes it."""
    names = block_names(module)
    kinds = kinds_of([module.get_submodule(name) for name in names])
    try:
        whole = _observe(module, step, batch, names, kinds)
    except PlanError:
        raise
    except Exception as error:
        raise PlanError(
            f"the training step could not be run on fake tensors: {type(error).__name__}: {error}. "
            "A model is cut over tensor ranks or stages only where one dry run of the step shows what it does: keep "
            f"values out of control flow in the step, or {UNCUT}"
        ) from error
    try:
        short = _observe(module, step, _shorten(batch, multiple), names, kinds)
    except Exception:  # a fixed length is needed
        return whole, None
    short.costs = whole.costs  # attention's grow with the square of the time
    return whole, short


def _observe(module: nn.Module, step: Step, batch: Any, names: tuple[str, ...], kinds: tuple[str, ...]) -> Observation:
    mode = FakeMode()
    seen = Observation(fake_copy(module, mode), names, kinds, heads=vocabulary_heads(module, names), mode=mode)
    seen.shell.train()
    watch = _Watch(seen)
    buffers = {name: (buffer, buffer._version) for name, buffer in seen.shell.named_buffers()}
    with mode:
        fake = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, batch)
        with watch_gathers() as gathers, watch.counter, watch, Alone():
            out = step(seen.shell, fake)
            watch.finish(out)
    watch.remove()
    seen.gathers = gathers
    for name, buffer in seen.shell.named_buffers():
        was, version = buffers.get(name, (None, -1))
        if was is not buffer or version != buffer._version:
            seen.apart = seen.apart or f"the buffer {name} changes in the training step"
    ran = [name for name in names if name in seen.order]
    if len(ran) != len(names):
        raise PlanError(_not_run(block_list(module), next(name for name in names if name not in ran)))
    return seen


def _not_run(blocks: str | None, missing: str) -> str:
    if blocks is None:
        called = f"the training step does not call {missing!r}" if missing else "the training step is not in one module"
        return (
            f"the model can't be cut: it has no list of two or more blocks of one class, and {called}, which holds all "
            "parameters. Put the layers into one nn.Module that the step calls, or repeated ones into an "
            f"nn.ModuleList; or {UNCUT}"
        )
    return (
        f"the model can't be cut: block {missing!r} of {blocks!r} does not run in the training step, so it can't be "
        f"known what it does. Call it, or {UNCUT}"
    )


class _Watch(Answers):
    """Follows which module runs and what it reads, as well."""

    def __init__(self, seen: Observation) -> None:
        super().__init__(seen.shell)
        self.seen, self.stack = seen, [""]
        self.owners: dict[int, set[str]] = {}
        self.names: dict[int, str] = {}
        self.outputs: dict[int, tuple[int, Tensor]] = {}
        self.given: dict[int, tuple[Any, Any]] = {}  # by id, with its copy; the original is kept so that ids stay
        self.inside: int | None = None
        self.entered: Tensor | None = None
        self.counter, self.counted = FlopCounter(), [0] * (len(seen.names) + 1)
        self.sources = Sources(seen.names)
        blocks = {name: i for i, name in enumerate(seen.names)}
        for name, module in seen.shell.named_modules(remove_duplicate=False):
            block = next((i for b, i in blocks.items() if name == b or name.startswith(f"{b}.")), None)
            for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                self.sources.own(parameter, f"{name}.{leaf}".lstrip("."), block)
        for name, module in seen.shell.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                self.owners.setdefault(id(parameter), set()).add(name)
                self.names.setdefault(id(parameter), f"{name}.{leaf}".lstrip("."))
            self.handles += [
                module.register_forward_pre_hook(self._entering(name, module, blocks.get(name)), with_kwargs=True),
                module.register_forward_hook(self._leaving(name, blocks.get(name)), always_call=False),
            ]

    def _entering(self, name: str, module: nn.Module, block: int | None) -> Callable:
        inside = any(name.startswith(f"{b}.") for b in self.seen.names)
        noted = block is not None or (not inside and next(module.parameters(recurse=False), None) is not None)

        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            self.stack.append(name)
            if noted:
                self.seen.order.append(name)
            if block is not None:
                self._enter_block(block, args, kwargs)

        return hook

    def _enter_block(self, i: int, args: tuple, kwargs: dict) -> None:
        seen = self.seen
        self.inside = i
        if i == 0:
            self.counted[0] = self.counter.total
        self.entered = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if seen.kinds[i] not in seen.calls:
            seen.calls[seen.kinds[i]] = Call(*tree_map(self._as_given, (args, kwargs)))
        places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        if i == 0:
            first = (place for place, x in places if isinstance(x, Tensor) and x.is_floating_point())
            seen.hidden = next(first, None)
            return
        came = [place for place, x in places if self.outputs.get(id(x), (None,))[0] == i - 1]
        if not came:
            seen.between = seen.between or f"{seen.names[i]} does not read what {seen.names[i - 1]} returned"
        elif came[0] != seen.hidden:
            seen.hidden = came[0]

    def _as_given(self, x: Any) -> Any:
        """A tensor itself; of all else a copy as it was before the first block changed it (a key-value cache)."""
        if isinstance(x, Tensor):
            return x
        if id(x) not in self.given:
            self.given[id(x)] = x, copy_around_tensors(x, _same)
        return copy_around_tensors(self.given[id(x)][1], _same)

    def _leaving(self, name: str, block: int | None) -> Callable:
        def hook(_: nn.Module, args: tuple, out: Any) -> Any:
            self.stack.pop()
            if block is not None:
                self._leave_block(block, out)
                hidden = out[0] if isinstance(out, (tuple, list)) else out
                if not isinstance(hidden, Tensor):
                    self.seen.between = (
                        f"{name} returns a {type(out).__name__}, not a tensor or a tuple that starts with one"
                    )
                else:
                    self.outputs[id(hidden)] = block, hidden
            if name in self.seen.heads and isinstance(out, Tensor):
                shard = VocabularyShard(out, OnePeer())
                self.sources.mark(shard, self.sources.of(out))
                return shard
            return None

        return hook

    def _leave_block(self, i: int, out: Any) -> None:
        """Only the hidden state may be read further on."""
        self.inside = None
        self.counted[i + 1] = self.counter.total
        several = isinstance(out, (tuple, list))
        self.seen.outputs = len(out) if several else 0
        self.sources.mark(out, frozenset({FromBlock(i, extra=True)}))
        hidden = out[0] if several and out else out
        self.sources.mark(hidden, frozenset({FromBlock(i)}))
        if isinstance(hidden, Tensor):
            self.seen.wire = hidden.dtype
            if self.entered is not None and hidden.shape != self.entered.shape:
                self.seen.apart = f"{self.seen.names[i]} changes the shape of the hidden state"

    def finish(self, out: Any) -> None:
        """The step has returned ``out``."""
        self.sources.read(self.sources.of(out), (len(self.seen.names),))
        self.seen.needs = {name: tuple(sorted(blocks)) for name, blocks in self.sources.needs.items()}
        totals = [0, *self.counted, self.counter.total]
        self.seen.costs = tuple(max(after - before, 0) for before, after in pairwise(totals))
        twice = [name for name in self.seen.names if self.seen.order.count(name) > 1]
        again = f"{twice[0]} runs more than once in a step" if twice else ""
        self.seen.apart = again or self.sources.skips or self.seen.apart

    def _looked_at(self, value: Tensor) -> None:
        """The step asks for a value: what runs outside of blocks runs everywhere, or after them."""
        depth = len(self.seen.names)
        begun = self.seen.names[0] in self.seen.order
        by = (self.inside,) if self.inside is not None else (depth,) if begun else range(depth + 1)
        self.sources.read(self.sources.of(value, self.inside), by)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        kwargs = kwargs or {}
        if name in VALUES and args and isinstance(args[0], Tensor):
            self._looked_at(args[0])
            return super().__torch_function__(func, types, args, kwargs)
        if name not in ("__get__", "__set__") and func not in _QUESTIONS:
            self._read(func, args, kwargs)
        out = super().__torch_function__(func, types, args, kwargs)
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        self.sources.follow((*args, kwargs), out, in_place, self.inside)
        return out

    def _read(self, func: Callable, args: tuple, kwargs: dict) -> None:
        seen, here = self.seen, self.stack[-1]
        block = next((b for b in seen.names if any(s == b for s in self.stack)), None)
        for x in tree_leaves((args, kwargs)):
            if id(x) in self.owners and here not in self.owners[id(x)]:
                seen.read_outside.setdefault(self.names[id(x)], here or "the training step")
            i, _ = self.outputs.get(id(x), (len(seen.names), None))
            if block is None and i < len(seen.names) - 1:
                seen.between = seen.between or f"{resolve_name(func) or func} reads the output of {seen.names[i]}"
        if block is None:
            return
        seen.program.append((block, func))
        if func is F.scaled_dot_product_attention:
            q, k = args[0], args[1] if len(args) > 1 else kwargs["key"]
            if q.ndim >= 3 and block not in seen.attention:
                seen.attention[block] = Attention(q.shape[-3], k.shape[-3], q.shape[-1])
            seen.random |= bool(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0))
        elif func in _RANDOM:
            p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
            training = kwargs.get("training", args[2] if len(args) > 2 else True)
            seen.random |= bool(p) and bool(training)


def _same(tensor: Tensor) -> Tensor:
    return tensor


_RANDOM = {F.dropout, torch.dropout, F.alpha_dropout, F.dropout1d, F.dropout2d, torch.bernoulli, Tensor.bernoulli_}
_QUESTIONS = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.stride, Tensor.requires_grad_}


def _shorten(batch: Any, multiple: int) -> Any:
    """Two samples of a batch, and where it holds token ids of shape (batch, time), a short time of them."""
    ids = [x for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim == 2 and not x.is_floating_point()]
    time = ids[0].shape[1] if ids else 0
    short = min(time, multiple * max(2, -(-12 // multiple)))

    def cut(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.ndim:
            return x
        x = x[:2]
        return x[:, :short] if ids and x.ndim >= 2 and x.shape[1] == time and not x.is_floating_point() else x

    return tree_map(cut, batch)
