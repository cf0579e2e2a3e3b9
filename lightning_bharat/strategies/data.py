"""The data cut: parameters, gradients and optimizer states divided over data ranks by FSDP2 (``fully_shard``).

Blocks are gathered one by one around their ``forward``; what is outside of blocks is gathered for the length of a step.
Between steps every parameter is a ``DTensor`` of which a rank holds its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.optim import Optimizer

from lightning_bharat.plan.elsewhere import is_elsewhere
from lightning_bharat.strategies._torch import Root
from lightning_bharat.strategies.reduce_scatter import ExchangeAndAdd
from lightning_bharat.strategies.scalars import Scalars


class DataShards:
    """A module whose parameters are divided over data ranks, and when they are whole.

    Args:
        module: the LightningModule; real or on ``meta``.
        mesh: the data ranks: one axis, or (replicate, shard).
        units: names of the modules that are gathered one at a time.
        reshard: free a unit's weights between its forward and its backward (``None``: yes), or an ``int``: divide them
            over that many ranks only, as in ``fully_shard``.
        offload: keep parameters, gradients and optimizer states in the host's memory.
        experts: names of the modules that hold a rank's experts, which are divided over the ranks with the same ones.
        copies: these ranks.
        reduce_dtype: name of the type in which gradients are averaged; ``None``: their own.
        whole: what no other rank has, and is not divided.

    Attributes:
        parameters: divided, as optimizers know them; those of the module may be whole.
    """

    parameters: list[nn.Parameter]

    def __init__(
        self,
        module: nn.Module,
        mesh: DeviceMesh,
        units: list[str],
        reshard: bool | int | None,
        offload: bool,
        experts: Iterable[str] = (),
        copies: DeviceMesh | None = None,
        reduce_dtype: str | None = None,
        whole: Iterable[nn.Parameter] = (),
    ) -> None:
        self.module, self.units = module, units
        for parameter in module.parameters():
            if not parameter.is_contiguous():  # transposed, or channels last: FSDP divides rows
                parameter.data = parameter.detach().contiguous()
        self._scalars = Scalars(module, mesh)
        others = {parameter for parameter in module.parameters() if is_elsewhere(parameter)} | set(whole)
        keep: dict[str, Any] = {"mesh": mesh, "ignored_params": self._scalars.parameters | others}
        if offload:
            keep["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
        else:
            keep["offload_policy"] = OffloadPolicy()
        if reduce_dtype is not None:
            keep["mp_policy"] = MixedPrecisionPolicy(reduce_dtype=getattr(torch, reduce_dtype))
        for name in experts:
            part: Any = module.get_submodule(name)
            if not all(map(is_elsewhere, part.parameters())):
                fully_shard(part, reshard_after_forward=reshard is not False, **{**keep, "mesh": copies})
        for name in units:
            unit = module.get_submodule(name)
            if not isinstance(unit, FSDPModule):  # one module may stand in a list twice
                fully_shard(unit, reshard_after_forward=True if reshard is None else reshard, **keep)
        fully_shard(module, reshard_after_forward=False, **keep)
        if mesh.device_type == "cpu":
            for divided in self._divided():
                divided.set_custom_reduce_scatter(ExchangeAndAdd())  # type: ignore[arg-type]
        self._keeps = reshard is False and not offload
        self._root: Root | None = None

    def ready(self) -> None:
        """The weights have values: FSDP may look at them."""
        self._scalars.divide()
        self._root = Root(self.module)
        self.parameters = list(self.module.parameters())

    def step(self, run: Callable[[], Any], backward: bool) -> Any:
        """Call ``run`` with whole weights. ``backward``: its loss is going to be differentiated afterwards."""
        assert self._root is not None
        if backward and self._keeps:
            self._root.gather_ahead()
        self._root.enter()
        self._scalars.gather()
        try:
            out = run()
        except BaseException:
            self._root.recover()
            self._scalars.divide()
            raise
        loss = out.get("loss") if isinstance(out, dict) else out
        self._root.leave(loss, keep=backward)
        if not backward:
            self._scalars.divide()
        return out

    def before_backward(self) -> None:
        """A backward pass needs whole weights: one before it, of another loss of the same step, has divided them."""
        if self._root is not None:
            self._root.enter()

    def after_backward(self) -> None:
        """FSDP has divided what it handles."""
        self._scalars.divide()

    def release(self) -> None:
        """No step follows: let go of the weights."""
        self.rest()
        if self._root is not None:
            self._root.release()

    def watch(self, optimizer: Optimizer) -> None:
        """Never leave weights gathered from before a step of ``optimizer``."""
        optimizer.register_step_post_hook(lambda *_: self.rest())

    def rest(self) -> None:
        """Divide what is still whole."""
        if self._root is not None:
            self._root.divide()
            self._root.drop_gathered()
            self._scalars.divide()

    def scheduled(self, run: Callable[[], float]) -> None:
        """Call ``run``, forward and backward passes of many micro-batches, with weights that stay whole; then average
        the gradients over the data ranks, times the number that it returned."""
        assert self._root is not None
        self._scalars.gather()
        self._root.hold()
        self._scalars.sync = False
        try:
            factor = run()
        except BaseException:
            self._root.recover()
            self._scalars.divide()
            raise
        finally:
            self._scalars.sync = True
        self._root.finish(factor)
        self._scalars.finish(factor)

    def divide(self) -> None:
        """Divide what is whole, also what an evaluation has left so: parameters are then those of the optimizers."""
        for module in self._divided():
            module.reshard()
        self.rest()

    def _divided(self) -> Iterator[FSDPModule]:
        return (module for module in self.module.modules() if isinstance(module, FSDPModule))

    @contextmanager
    def without_sync(self) -> Iterator[None]:
        """Backward passes in here add to this rank's gradients, without an exchange."""
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(False)
        self._scalars.sync = False
        try:
            yield
        finally:
            self.module.set_requires_gradient_sync(True)
            self._scalars.sync = True


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a parameter or gradient, sharing its memory."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
