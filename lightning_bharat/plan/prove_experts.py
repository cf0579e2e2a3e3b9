"""Proof that spread experts compute the same: a small number of them in float64, whole and on threads as ranks.

In float32 where their kernels know no float64 (Hugging Face's grouped product), with room for its rounding.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bharat.plan.blocks import PlanError
from lightning_bharat.plan.exchange import Table
from lightning_bharat.plan.experts import FusedExperts, ThreadRoutes, cut_experts
from lightning_bharat.plan.prove import PATIENCE, TOLERANCE

MOST_RANKS = 4  # threads: more ranks do the same with more of the same
EACH = 2  # experts of a rank
TOLERANCES = {torch.float64: TOLERANCE, torch.float32: 1e-5}  # relative to the largest value
CHOSEN = 2  # experts of a token
# Tokens of the ranks: many and few, and one rank whose tokens all choose one expert.
TOKENS = (9, 1, 5, 6)


def prove_experts(module: nn.Module, found: list[FusedExperts], ranks: int) -> None:
    """Compare outputs and all gradients of each kind of experts in ``module``, whole and spread over ``ranks``.

    Raises:
        PlanError: they differ, by how much; or the module can't be tried.
    """
    tried = set[Any]()
    for each in found:
        part = module.get_submodule(each.name)
        kind = type(part), tuple(tuple(p.shape) for p in part.parameters()), each.counts
        if kind not in tried:
            tried.add(kind)
            problem = _Proof(part, each, min(ranks, MOST_RANKS)).problem()
            if problem:
                raise PlanError(
                    f"expert_parallel_size={ranks}: {each.name} ({type(part).__name__}) does not compute the same when "
                    f"its experts are spread over ranks: {problem}. Its forward must add up, for each token, the "
                    "outputs of its chosen experts times their weights; else leave expert_parallel_size out"
                )


class _Proof:
    """One module with few of its experts, random weights and tokens."""

    def __init__(self, part: nn.Module, found: FusedExperts, ranks: int) -> None:
        self.ranks, self.experts, self.dtype = ranks, EACH * ranks, torch.float64
        self.found = FusedExperts(found.name, self.experts, found.counts)
        self.generator = torch.Generator().manual_seed(0)
        memo: dict[int, Any] = {
            id(p): nn.Parameter(self._draw(self.experts, *p.shape[1:]) * max(p.shape[1:]) ** -0.5)
            for p in part.parameters()
        }
        self.whole = copy.deepcopy(part, memo).train()
        for attribute in found.counts:
            setattr(self.whole, attribute, self.experts)

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def problem(self) -> str:
        """What is wrong, or "". Once an expert has no tokens, and once a rank has none."""
        return self._with_idle(1) or self._with_idle(EACH)

    def _with_idle(self, idle: int) -> str:
        why = "its forward fails"
        sizes = dict.fromkeys(size for p in self.whole.parameters() if p.ndim == 3 for size in p.shape[1:])
        for self.dtype, width in product(TOLERANCES, sizes):
            self.whole.to(self.dtype)
            try:
                inputs = [self._inputs(rank, width, idle) for rank in range(self.ranks)]
                together = [torch.cat(parts) for parts in zip(*inputs, strict=True)]
                expected = _pass(self.whole, *together)
            except Exception as error:  # another width
                why = f"{type(error).__name__}: {error}"
                continue
            if expected[0].shape == together[0].shape:
                return self._compare(inputs, expected)
        return why

    def _inputs(self, rank: int, width: int, idle: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens of a rank, what they chose (never the last experts), weights, and what the loss says of outputs."""
        count = TOKENS[rank]
        scores = self._draw(count, self.experts - idle)
        if rank == 2:
            scores[:, 0] = torch.inf
        chosen = scores.topk(CHOSEN).indices
        return self._draw(count, width), chosen, self._draw(count, CHOSEN), self._draw(count, width)

    def _compare(self, inputs: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], expected: list[Tensor]) -> str:
        table = Table(self.ranks, PATIENCE)
        errors: list[BaseException] = []

        def play(rank: int) -> list[Tensor]:
            try:
                part = copy.deepcopy(self.whole, {id(p): p for p in self.whole.parameters()})  # large: not copied
                cut_experts(part, self.found, ThreadRoutes(table, rank))
                return _pass(part, *inputs[rank])
            except BaseException as error:
                table.barrier.abort()
                errors.append(error)
                return []

        with ThreadPoolExecutor(self.ranks) as pool:
            runs = list(pool.map(play, range(self.ranks)))
        if errors:
            first = next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
            return f"{type(first).__name__}: {first}"
        names = ["output", "gradient of tokens", "gradient of weights of choices"]
        of_weights = [f"gradient of {name}" for name, _ in self.whole.named_parameters()]
        for name, whole, *parts in zip(names + of_weights, expected, *runs, strict=True):
            found = torch.cat(parts) * (self.ranks if name in of_weights else 1)  # means over ranks
            distance = (
                float((found - whole).abs().max() / whole.abs().max()) if found.shape == whole.shape else torch.inf
            )
            if not distance <= TOLERANCES[self.dtype]:
                return f"the {name} differs by {distance:.1e} of its largest value"
        return ""


def _pass(part: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor, seed: Tensor) -> list[Tensor]:
    hidden, weights = hidden.detach().requires_grad_(), weights.detach().requires_grad_()
    out = part(hidden, chosen, weights)
    grads = torch.autograd.grad(out, [hidden, weights, *part.parameters()], seed)
    return [out.detach(), *grads]
