"""Parameters without dimensions or elements, which FSDP2 can't divide: whole on every data rank, gradients averaged.

Between steps such a parameter is a replicated ``DTensor``, so that optimizers that handle many tensors at once see
one kind of them; in a step it is the plain tensor that the person's code expects. Both share their memory.
"""

from __future__ import annotations

from functools import partial

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate


class Scalars:
    """Such parameters of ``module``; ``sync`` says whether a backward pass averages gradients."""

    def __init__(self, module: nn.Module, mesh: DeviceMesh) -> None:
        self.mesh, self.sync = mesh, True
        self._places = [
            (owner, name)
            for owner in module.modules()
            for name, p in owner.named_parameters(recurse=False)
            if p.ndim == 0 or p.numel() == 0
        ]
        self._armed = set[int]()
        self._trains: dict[int, bool] = {}
        self._pairs: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        self.parameters = {owner.get_parameter(name) for owner, name in self._places}
        for owner in {owner for owner, _ in self._places}:
            owner.register_forward_pre_hook(lambda *_: self.gather(), prepend=True)

    def divide(self) -> None:
        """Show them as ``DTensor``."""
        for owner, name in self._places:
            parameter = owner.get_parameter(name)
            if not isinstance(parameter, DTensor):
                plain, shown = self._pair(parameter)
                self._agree_on_frozen(plain, shown)
                owner.register_parameter(name, shown)

    def gather(self) -> None:
        """Show them as plain tensors."""
        for owner, name in self._places:
            plain, shown = self._pair(owner.get_parameter(name))
            self._agree_on_frozen(plain, shown)
            if plain.requires_grad and id(plain) not in self._armed:
                plain.register_post_accumulate_grad_hook(partial(self._reduce, shown))
                self._armed.add(id(plain))
            owner.register_parameter(name, plain)

    def _agree_on_frozen(self, plain: nn.Parameter, shown: nn.Parameter) -> None:
        """Either of both may be frozen or thawed, in the middle of a step too."""
        if plain.requires_grad != shown.requires_grad:
            wanted = not self._trains[id(plain)]
            plain.requires_grad_(wanted)
            shown.requires_grad_(wanted)
        self._trains[id(plain)] = plain.requires_grad

    def finish(self, factor: float) -> None:
        """Average the gradients of micro-batches, which no hook may have seen, times ``factor``."""
        for plain, shown in {id(pair[0]): pair for pair in self._pairs.values()}.values():
            grad = plain.grad if plain.grad is not None else shown.grad
            if grad is None:
                continue
            plain.grad, shown.grad = (grad.to_local() if isinstance(grad, DTensor) else grad) * factor, None
            self._reduce(shown, plain)
        self.divide()

    def _pair(self, parameter: nn.Parameter) -> tuple[nn.Parameter, nn.Parameter]:
        if id(parameter) not in self._pairs:
            everywhere = DTensor.from_local(
                parameter.detach(), self.mesh, [Replicate()] * self.mesh.ndim, run_check=False
            )
            pair = parameter, nn.Parameter(everywhere, requires_grad=parameter.requires_grad)
            self._pairs[id(pair[0])] = self._pairs[id(pair[1])] = pair
            self._trains[id(pair[0])] = parameter.requires_grad
        return self._pairs[id(parameter)]

    def _reduce(self, shown: nn.Parameter, plain: Tensor) -> None:
        """Average the gradients so far (those of earlier passes are equal on all ranks, or not yet averaged)."""
        grad = plain.grad
        assert grad is not None
        plain.grad = None
        if shown.grad is not None:
            grad += shown.grad.to_local()  # type: ignore[attr-defined]
        if self.sync:
            for axis in range(self.mesh.ndim):
                dist.all_reduce(grad, group=self.mesh.get_group(axis))
            grad /= self.mesh.size()
        shown.grad = DTensor.from_local(grad, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
