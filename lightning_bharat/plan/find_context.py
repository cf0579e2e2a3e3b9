"""From a module and its training step to a proven :class:`ContextCut`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from lightning_bharat.plan.blocks import block_list
from lightning_bharat.plan.cut_context import ContextCut, ContextFlow, Place, divide_block
from lightning_bharat.plan.cut_modules import SEQUENCE_DIM
from lightning_bharat.plan.exchange import Peers
from lightning_bharat.plan.observe import Call, Observation, Step, observe_twice
from lightning_bharat.plan.prove import Sample
from lightning_bharat.plan.whole_attention import ContextError

WHOLE = -1
TOLERANCE = 1e-6  # some norms sum up gradients in float32 whatever they get, here in another order
# By one number they decide of a whole row or channel, of which context ranks hold parts.
_APART = (
    *(torch.rand, torch.rand_like, torch.randn, torch.randn_like, torch.randint, torch.bernoulli, torch.normal),
    *(Tensor.bernoulli_, Tensor.uniform_, Tensor.normal_, Tensor.random_, torch.multinomial),
    *(F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout),
)
UNCUT = "write context_parallel_size=1, and use data_parallel_size or tensor_parallel_size"


@torch.random.fork_rng(devices=[])  # the run that is planned for starts from the random numbers it would have had
def find_context_cut(module: nn.Module, step: Step, batch: Any, ranks: int) -> ContextCut:
    """Where the sequence of ``module`` can be cut over ``ranks`` context ranks, observed in a dry run and proven: a
    block of each kind, whole and on as many threads as there are ranks, in float64.

    Args:
        module: the whole model, real or on ``meta``; not changed.
        step: ``step(copy of module, batch)`` runs the training step.
        batch: as the loader gives it.
        ranks: context ranks.

    Raises:
        ContextError: it can't be cut, or would not compute the same; with the numbers that show it.
        PlanError: the step can't be observed.
    """
    asked = f"context_parallel_size={ranks}"
    if block_list(module) is None:
        raise ContextError(
            f"{asked} divides the sequence in repeated blocks, and {type(module).__name__} has no list of them; {UNCUT}"
        )
    long, short = observe_twice(module, step, batch, ranks)
    seen = short if short is not None and short.program == long.program else long
    if problem := seen.between or seen.apart:
        raise ContextError(f"{asked}: the sequence can't be divided in the blocks alone: {problem}; {UNCUT}")
    for name, function in seen.program:
        if function in _APART:
            raise ContextError(
                f"{asked}: {name} draws random numbers by {function.__name__}, other ones on each rank, which may be "
                f"for whole rows, of which each rank has a part; use F.dropout, or {UNCUT}"
            )
    cut = _observed(long, short, seen, batch, asked)
    _check_length(cut, long, ranks, asked)
    for kind in dict.fromkeys(seen.kinds):
        _prove(cut, seen, module, kind, ranks)
    return cut


def _observed(long: Observation, short: Observation | None, seen: Observation, batch: Any, asked: str) -> ContextCut:
    hidden = f"[0][{seen.hidden}]" if isinstance(seen.hidden, int) else f"[1][{seen.hidden!r}]"
    lengths = [_length(of, hidden, asked) for of in (long, short) if of is not None]
    rows = {x.shape[0] for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim}
    shape = _tensors(long.calls[long.kinds[0]])[hidden].shape
    if rows and shape[0] not in rows:
        raise ContextError(
            f"{asked}: the hidden state is {tuple(shape)}, of which the first dimension is not the batch; blocks that "
            f"take (batch, time, channels) can be divided; {UNCUT}"
        )
    axes = {}
    for kind in dict.fromkeys(long.kinds):
        shapes = [_tensors(of.calls[kind]) for of in (long, short) if of is not None]
        axes[kind] = {path: _axis([s[path].shape for s in shapes if path in s], lengths) for path in shapes[0]}
        if hidden in axes[kind]:  # also where it is as wide as it is long
            axes[kind][hidden] = SEQUENCE_DIM
    first = next(iter(seen.attention.values()), None)
    heads = (first.heads, first.kv_heads) if first else ()
    return ContextCut(hidden, seen.kinds, axes, heads, seen.random)


def _length(seen: Observation, hidden: str, asked: str) -> int:
    found = _tensors(seen.calls[seen.kinds[0]]).get(hidden)
    if found is None or found.ndim != 3:
        shape = "not a tensor" if found is None else tuple(found.shape)
        raise ContextError(
            f"{asked} divides hidden states (batch, time, channels), and that of {seen.names[0]} is {shape}; {UNCUT}"
        )
    return found.shape[SEQUENCE_DIM]


def _tensors(call: Call) -> dict[str, Tensor]:
    leaves = tree_flatten_with_path((call.args, call.kwargs))[0]
    return {keystr(path): x for path, x in leaves if isinstance(x, Tensor)}


def _axis(shapes: list[torch.Size], lengths: list[int]) -> int:
    """The one axis that is as long as the sequence in both runs; with two of them it is a mask, which stays whole."""
    every = zip(*shapes, strict=True) if len({len(s) for s in shapes}) == 1 else ()
    found = [axis for axis, sizes in enumerate(every) if list(sizes) == lengths[: len(sizes)]]
    return found[0] if len(found) == 1 else WHOLE


def _check_length(cut: ContextCut, long: Observation, ranks: int, asked: str) -> None:
    time = _length(long, cut.hidden, asked)
    if time % ranks or time == ranks:
        raise ContextError(
            f"{asked} does not divide the sequence of {time} of the first batch into parts of two or more; give "
            f"batches a length that is a multiple of {ranks}, from {2 * ranks} up, by padding or cutting them"
        )


def _prove(cut: ContextCut, seen: Observation, module: nn.Module, kind: str, ranks: int) -> None:
    sample, name = Sample(seen, module, kind), seen.names[seen.kinds.index(kind)]
    sample.tolerance = TOLERANCE
    alone = ContextCut(cut.hidden, (kind,), cut.axes, cut.heads)  # without random numbers: threads share a generator

    def make(peers: Peers) -> nn.Module:
        # The same memory: gradients are each thread's own.
        memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in sample.block.parameters()}
        block = copy.deepcopy(sample.block, memo)
        divide_block(block, kind, ContextFlow(peers, alone), Place(name, True, True))
        return block

    verdict = sample.prove_made(ranks, make)
    problem = verdict.problem or (f"the gradient of {verdict.summed[0]} is partial" if verdict.summed else "")
    if problem:
        attention = "" if name in seen.attention else f" {name} calls no F.scaled_dot_product_attention;"
        raise ContextError(
            f"context_parallel_size={ranks}: {name} does not compute the same on parts of the sequence: {problem}."
            f"{attention} Blocks may look along the sequence by F.scaled_dot_product_attention alone (Hugging Face: "
            "attn_implementation='sdpa'), and must be given positions and masks, not make them from the length of what "
            f"they get. Change that, or {UNCUT}"
        )
