"""Whether an optimizer's step on a rank's pieces is what its step on whole parameters is; refused in words where not.

Most optimizers treat each element by itself, and take a piece for what it is. Some look at more: at the norm of a
weight (LAMB, LARS), at rows and columns (Adafactor), at a matrix (Muon), at all parameters as one vector (LBFGS). Data
ranks hold ``DTensor`` pieces, whose norms are those of the whole, or an error; tensor ranks hold plain pieces, whose
norms are of the piece alone, without a word. Stages of a pipeline see gradients of their own parameters and of no
others. So a twin of the optimizer takes three steps on small stand-ins as a rank has them, another one on the same
stand-ins whole, and both must agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lightning_bharat.plan.elsewhere import is_elsewhere
from lightning_bharat.plan.shards import TensorSlice
from lightning_bharat.strategies._torch import without_hooks

STEPS, RATE = 3, 0.01
# Of the largest change of a weight. Matrix products in bfloat16 (Muon) differ by less, what only sees a piece by more.
TOLERANCE = 0.03


class OptimizerError(ValueError):
    """An optimizer that would not step in pieces as it does on one rank; the message says what to write instead."""


def prove_optimizer(
    optimizer: Optimizer, names: Mapping[int, str], slices: Mapping[str, TensorSlice], staged: bool
) -> None:
    """Refuse ``optimizer`` if ranks that step with their pieces would not step as one rank. All ranks must call it.

    Args:
        optimizer: of the divided and cut parameters; it is not changed.
        names: of parameters, by id.
        slices: by name, which part of a parameter this tensor rank holds.
        staged: whether there are pipeline stages, some of which may hold everything.

    Raises:
        OptimizerError: on all ranks.
    """
    stand_ins = _stand_ins(optimizer, names, slices)
    if not staged and not any(s.cut or isinstance(s.parameter, DTensor) for s in stand_ins):
        return
    expected, problem = _step_whole(optimizer, stand_ins)
    # Steps in pieces exchange with other ranks: none may be missing.
    if _all_are_able(expected is not None, problem):
        _all_are_able(True, _compare(optimizer, stand_ins, expected or []))


def _all_are_able(able: bool, problem: str) -> bool:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (able, problem))
    for _, found in everyone:
        if found:
            raise OptimizerError(found)
    return all(able for able, _ in everyone)


class _StandIn:
    """A small parameter in the place of all that are cut and divided alike in one group."""

    def __init__(self, name: str, parameter: Tensor, cut: TensorSlice | None, seed: int) -> None:
        self.name, self.parameter, self.cut, self.seed = name, parameter, cut, seed
        self.elsewhere = is_elsewhere(parameter)
        divided = parameter.device_mesh.size() if isinstance(parameter, DTensor) else 1
        shape = [3] * parameter.ndim
        if shape:
            shape[0] = 2 * divided
        if cut:
            shape[cut.dim] = 2 * cut.ranks * (divided if cut.dim == 0 else 1)
            self.cut = TensorSlice(cut.dim, (shape[cut.dim],), cut.ranks, cut.rank)
        self.shape = shape
        self.dtype = torch.promote_types(parameter.dtype, torch.float32)

    def draw(self, number: int) -> Tensor:
        """A whole tensor whose elements grow along each dimension, so that pieces are unlike each other."""
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        drawn = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        for dim, size in enumerate(self.shape):
            drawn *= torch.linspace(0.2, 2, size).view([-1 if d == dim else 1 for d in range(len(self.shape))])
        return drawn.to(self.parameter.device, self.dtype)

    def piece(self, whole: Tensor) -> Tensor:
        """What this rank holds of it."""
        local = self.cut.take(whole) if self.cut else whole
        if isinstance(self.parameter, DTensor):
            return distribute_tensor(local, self.parameter.device_mesh, self.parameter.placements, src_data_rank=None)
        return local


def _stand_ins(optimizer: Optimizer, names: Mapping[int, str], slices: Mapping[str, TensorSlice]) -> list[_StandIn]:
    found: dict[tuple, _StandIn] = {}
    for number, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if p.numel() == 0 or p.is_meta:
                continue
            name = names.get(id(p), "a parameter")
            cut = slices.get(name)
            kind = number, p.ndim, cut and cut.dim, type(p), p.dtype, p.device, is_elsewhere(p)
            found.setdefault(kind, _StandIn(name, p, cut, len(found)))
    return list(found.values())


def _step_whole(optimizer: Optimizer, stand_ins: Sequence[_StandIn]) -> tuple[list[Tensor] | None, str]:
    """The stand-ins after steps with all of them whole; ``None`` if it can't be tried, and why if that is wrong."""
    kind, cut = type(optimizer).__name__, next((s for s in stand_ins if s.cut), None)
    try:
        return _stepped(optimizer, stand_ins, in_pieces=False), ""
    except Exception as error:  # a kernel for another device, a step that wants more than gradients
        if cut is None or getattr(optimizer, "elementwise", False):
            return None, ""
        return None, (
            f"{kind} could not be tried on small parameters ({_in_short(error)}), so it can't be known "
            f"whether its step on a piece of {cut.name} is right. If what it does to an element depends on that "
            "element alone, set optimizer.elementwise = True in configure_optimizers; else use torch.optim.AdamW, or "
            "tensor_parallel_size=1"
        )


def _compare(optimizer: Optimizer, stand_ins: Sequence[_StandIn], expected: Sequence[Tensor]) -> str:
    """What is wrong with steps in pieces, in words; "" if nothing is.

    Raises:
        OptimizerError: a step that fails, maybe on this rank alone, in the middle of what others wait for.
    """
    kind, cut = type(optimizer).__name__, next((s for s in stand_ins if s.cut), None)
    try:
        stepped = _stepped(optimizer, stand_ins, in_pieces=True)
    except Exception as error:
        fused = any(group.get("fused") for group in optimizer.param_groups)
        instead = "leave fused=True out" if fused else "use torch.optim.AdamW or SGD, or data_parallel_size=1"
        raise OptimizerError(f"{kind} can't step on pieces of parameters ({_in_short(error)}); {instead}") from None
    for s, whole, piece in zip(stand_ins, expected, stepped, strict=True):
        if s.elsewhere:
            continue
        right = s.cut.take(whole) if s.cut else whole
        here = piece.full_tensor() if isinstance(piece, DTensor) else piece
        if not (here - right).abs().max() <= TOLERANCE * (whole - s.draw(0)).abs().max():
            stages = any(s.elsewhere for s in stand_ins)
            axis = f"{'tensor' if cut else 'pipeline' if stages else 'data'}_parallel_size=1"
            return (
                f"{kind} looks at whole tensors or at all of them together (a norm, a product of matrices): its step "
                f"on a rank's piece of {(cut or s).name} is not that piece of its step on the whole. Give parameters "
                f"that are cut to an optimizer that treats each element by itself (torch.optim.AdamW, SGD), or write "
                f"{axis}"
            )
    return ""


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _stepped(optimizer: Optimizer, stand_ins: Sequence[_StandIn], in_pieces: bool) -> list[Tensor]:
    """The stand-ins after steps of a twin of ``optimizer``."""
    place = _StandIn.piece if in_pieces else lambda _, whole: whole
    made = {id(s.parameter): nn.Parameter(place(s, s.draw(0))) for s in stand_ins}
    device = stand_ins[0].parameter.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        twin = _Copy(made).of(optimizer)
        for group in twin.param_groups:
            if isinstance(rate := group.get("lr"), (float, int, Tensor)):  # a warm-up begins with zero
                group["lr"] = torch.full_like(rate, RATE) if isinstance(rate, Tensor) else RATE
        for step in range(STEPS):
            for s in stand_ins:
                hidden = in_pieces and s.elsewhere
                made[id(s.parameter)].grad = None if hidden else place(s, s.draw(step + 1))
            twin.step(lambda: torch.ones((), device=device))
    return [made[id(s.parameter)].detach() for s in stand_ins]


class _Copy:
    """Copies an optimizer with all that hangs on it; parameters become their stand-ins, or fall out.

    What is neither a container, a tensor nor an optimizer is shared.
    """

    def __init__(self, stand_ins: Mapping[int, nn.Parameter]) -> None:
        self.stand_ins, self.made = stand_ins, dict[int, Any]()

    def of(self, x: Any) -> Any:
        if id(x) in self.stand_ins:
            return self.stand_ins[id(x)]
        if id(x) not in self.made:
            self.made[id(x)] = self._new(x)
        return self.made[id(x)]

    def _new(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.detach().clone()
        if isinstance(x, MethodType) and isinstance(x.__self__, Optimizer):
            return MethodType(x.__func__, self.of(x.__self__))
        if isinstance(x, nn.Module):
            raise TypeError("the optimizer holds a module")
        if isinstance(x, Optimizer):
            self.made[id(x)] = twin = object.__new__(type(x))
            twin.__dict__.update({k: self._value(v) for k, v in without_hooks(x).items() if k != "state"})
            twin.__dict__["state"] = self._state(x.state)
            return twin
        if isinstance(x, dict):
            self.made[id(x)] = new = x.copy()
            new.clear()
            new.update({self.of(k): self._value(v) for k, v in x.items() if not self._is_left_out(k)})
            return new
        if type(x) in (list, tuple, set):
            return type(x)(self._value(v) for v in x if not self._is_left_out(v))
        return x

    def _value(self, x: Any) -> Any:
        return None if self._is_left_out(x) else self.of(x)

    def _is_left_out(self, x: Any) -> bool:
        return isinstance(x, nn.Parameter) and id(x) not in self.stand_ins

    def _state(self, state: Any) -> Any:
        """State of a parameter's shape gets that of its stand-in, with its first value."""
        new = state.copy()
        new.clear()
        for p, values in state.items():
            if not self._is_left_out(p):
                new[self.of(p)] = {key: self._in_place_of(p, value) for key, value in values.items()}
        return new

    def _in_place_of(self, p: Any, value: Any) -> Any:
        like = isinstance(value, Tensor) and isinstance(value, DTensor) == isinstance(p, DTensor)
        if like and value.shape == p.shape:
            local = value.to_local() if isinstance(value, DTensor) else value
            first = local.flatten()[0].item() if local.numel() else 0.0
            return torch.full_like(self.of(p).detach(), first, dtype=value.dtype)
        return self.of(value)
