"""Everything private of torch that this package touches; tests/strategies/test_private_names.py fails when it moves.

``Root`` drives the outermost FSDP2 state by hand. FSDP2 gathers a module's weights when its ``forward`` is called, and
a LightningModule is entered by ``training_step`` and its kin instead, which may also run backward and optimizer steps
in the middle (manual optimization) and read weights without calling the module that holds them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from copy import copy
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.distributed import Store, _composable_state
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

LAST_RATES = "_last_lr"  # of a learning-rate scheduler, and in its state


class Root:
    """The outermost FSDP module of a tree: when its own weights are whole, and when they are divided again.

    Args:
        module: the root, after ``fully_shard``; its parameters hold data, so no longer on ``meta``.
    """

    def __init__(self, module: nn.Module) -> None:
        assert isinstance(module, FSDPModule)
        self.module = module
        self._state: FSDPState = module._get_fsdp_state()
        self._state._pre_forward_hook_handle.remove()
        self._state._post_forward_hook_handle.remove()
        self._state._lazy_init()
        self._groups = self._state._fsdp_param_groups
        self._armed: dict[int, Any] = {}
        self._trains: dict[int, bool] = {}
        for owner, parameters in self._owners().items():
            owner.register_forward_pre_hook(partial(self._enter_owner, parameters), prepend=True)

    def _owners(self) -> dict[nn.Module, list[Any]]:
        """Modules with parameters of the root, tied ones too, and FSDP's record of these."""
        found: dict[nn.Module, list[Any]] = {}
        for group in self._groups:
            for parameter in group.fsdp_params:
                info = parameter._module_info
                for owner in (info.module, *info.shared_modules):
                    found.setdefault(owner, []).append(parameter)
        return found

    def _enter_owner(self, parameters: list[Any], *_: Any) -> None:
        self.enter()
        self._agree_on_frozen(parameters)

    def _agree_on_frozen(self, parameters: Iterable[Any]) -> None:
        """What was frozen or thawed since it was gathered is so in both of its forms: optimizers know the divided one
        (``toggle_optimizer``), the module shows the whole one."""
        for parameter in parameters:
            shown, whole = parameter.sharded_param, parameter.unsharded_param
            if whole.requires_grad != shown.requires_grad:
                wanted = not self._trains[id(whole)]
                whole.requires_grad_(wanted)
                shown.requires_grad_(wanted)
            self._trains[id(whole)] = whole.requires_grad
            self._arm(whole)

    @property
    def is_whole(self) -> bool:
        """Whether the root's own weights are gathered."""
        return all(group.is_unsharded for group in self._groups)

    def enter(self) -> None:
        """Gather the root's own weights, if they are not."""
        if self.is_whole and self._groups:
            return
        self._state._pre_forward(self.module, (), {})
        for parameter in self._fsdp_parameters():
            whole = parameter.unsharded_param
            self._trains[id(whole)] = whole.requires_grad
            self._arm(whole)

    def gather_ahead(self) -> None:
        """Begin to gather all weights of the tree, which travel while the first modules compute. For weights that stay
        whole until the backward pass: then no more of them are in memory at once than without."""
        for group in self._groups_of_tree():
            group.unshard(async_op=True)

    def drop_gathered(self) -> None:
        """Forget weights that were gathered ahead, for modules that no forward has called since."""
        for group in self._groups_of_tree():
            if group._all_gather_result is not None:
                group.finalize_backward()

    def _groups_of_tree(self) -> Iterator[Any]:
        for state in self._state._state_ctx.all_states:
            yield from state._fsdp_param_groups

    def leave(self, loss: Any, keep: bool) -> None:
        """End of a step. ``keep``: the weights stay whole for the backward pass of ``loss``, which divides them."""
        if self.is_whole:
            self._agree_on_frozen(self._fsdp_parameters())
        starts = isinstance(loss, Tensor) and loss.requires_grad and loss._base is None
        self._state._post_forward(self.module, (), loss if keep and starts else None)
        if not keep:
            self.module.reshard()

    def divide(self) -> None:
        """Free the gathered weights, if they are."""
        if not self._groups or not self.is_whole:
            return
        self._state._state_ctx.iter_forward_root = None
        for state in (self._state, *self._groups):  # entered outside of a step, by a forward that nothing leaves
            state._training_state = TrainingState.IDLE  # type: ignore[attr-defined]
        self.module.reshard()

    def hold(self) -> None:
        """Gather all weights of the tree, which stay whole, and let gradients add up, until :meth:`finish`.

        (Weights that are divided between micro-batches give schedules with a split backward wrong gradients.)
        """
        self.enter()
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
        self._set(last=False)

    def finish(self, factor: float) -> None:
        """Average the gradients over the data ranks, times ``factor``, and divide the weights."""
        self._set(last=True)
        for group in self._groups_of_tree():
            for parameter in group.fsdp_params:
                whole = parameter.unsharded_param
                if whole.grad is not None:
                    whole.grad.mul_(factor)
            group.post_backward()
        self._state._root_post_backward_final_callback()
        self._state._state_ctx.iter_forward_root = None

    def _set(self, last: bool) -> None:
        self.module.set_is_last_backward(last)
        self.module.set_reshard_after_backward(last)
        self.module.set_requires_gradient_sync(last)

    def release(self) -> None:
        """No step follows. (The garbage collector does not see through hooks on gradients.)"""
        for hook in self._armed.values():
            hook.remove()

    def recover(self) -> None:
        """After an exception in the middle of a step."""
        self.module.reset_iter_state()

    def _fsdp_parameters(self) -> Iterator[Any]:
        for group in self._groups:
            yield from group.fsdp_params

    def _arm(self, parameter: nn.Parameter) -> None:
        if parameter.requires_grad and id(parameter) not in self._armed:
            self._armed[id(parameter)] = parameter.register_post_accumulate_grad_hook(self._finish_backward)

    def _finish_backward(self, _: Tensor) -> None:
        """FSDP2 reduces what has no input with a gradient at the end of a backward pass that one of its own hooks saw;
        a pass that only reaches the root's own weights needs this one."""
        self._state._register_root_post_backward_final_callback()


def replace_groups_of_copies(module: nn.Module, make: Callable[[dist.ProcessGroup], Any]) -> None:
    """Let each unit of ``module`` that FSDP2 divides in several copies (hybrid sharding) average its gradients by what
    ``make`` returns for the group of these copies."""
    for part in module.modules():
        for group in part._get_fsdp_state()._fsdp_param_groups if isinstance(part, FSDPModule) else ():
            ranks: Any = copy(group.mesh_info)
            ranks.replicate_process_group = make(ranks.replicate_process_group)
            group.mesh_info = ranks


def forget_divided(module: nn.Module) -> None:
    """Let ``fully_shard`` take ``module`` for one that it has not seen; what it has put into it is out already."""
    _composable_state._module_state_mapping.pop(module, None)


def materialize(module: nn.Module, device: torch.device) -> None:
    """Give memory on ``device`` to what is on ``meta``, and to nothing else."""
    module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that are in the ``state_dict`` of ``module``, each once."""
    for name, part in module.named_modules():
        for leaf, buffer in part.named_buffers(recurse=False):
            if leaf not in part._non_persistent_buffers_set:
                yield f"{name}.{leaf}".lstrip("."), buffer


def version(tensor: Tensor) -> int:
    """A count of the changes in place of ``tensor``."""
    return tensor._version


def is_view(tensor: Tensor) -> bool:
    """Whether autograd knows ``tensor`` as a view of another one."""
    return tensor._is_view()


def has_gradient_hooks(parameter: Tensor) -> bool:
    """Whether anything was registered to be called with the gradient of ``parameter``."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module`` as a whole was given to ``torch.compile``."""
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"


def no_compiler() -> str:
    """Why there is no C++ compiler that ``torch.compile`` could use; "" if there is one."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        return str(error)
    return ""


def without_hooks(optimizer: Optimizer) -> dict[str, Any]:
    """The attributes of ``optimizer``, with no hooks, and without the ``step`` that schedulers put over its own."""
    kept = {name: value for name, value in vars(optimizer).items() if name != "step"}
    return {**kept, "_optimizer_step_pre_hooks": OrderedDict(), "_optimizer_step_post_hooks": OrderedDict()}


def found_infs(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> list[Tensor]:
    """The flags (one a device, 0-dimensional) that say whether ``scaler`` saw a gradient that is not finite."""
    return list(scaler._found_inf_per_device(optimizer).values())


def agree_after(scaler: torch.amp.GradScaler, agree: Callable[[list[Tensor]], None]) -> None:
    """Call ``agree`` on the flags of ``scaler`` whenever it has looked at gradients."""

    def wrap(look: Callable) -> Callable:
        def wrapped(optimizer: Optimizer) -> Any:
            out = look(optimizer)
            agree(found_infs(scaler, optimizer))
            return out

        return wrapped

    if not hasattr(scaler, "_agrees"):
        scaler.unscale_ = wrap(scaler.unscale_)  # type: ignore[method-assign]
        scaler._check_inf_per_device = wrap(scaler._check_inf_per_device)  # type: ignore[method-assign]
        scaler._agrees = True  # type: ignore[attr-defined]


def set_timeout(mesh: DeviceMesh, timeout: timedelta | None) -> None:
    """Give the groups of ``mesh``, which begin with torch's default, this time-out of collectives."""
    set_of_group: Callable = getattr(dist, "set_timeout", _set_pg_timeout)  # public since torch 2.14
    for axis in range(mesh.ndim if timeout is not None else 0):
        set_of_group(timeout, mesh.get_group(axis))


def default_store() -> Store:
    """The store of the default process group."""
    return _get_default_store()


def flight_record() -> str:
    """What backends remember of their collectives, as JSON; empty where nothing is recorded (``TORCH_FR_BUFFER_SIZE``
    says how many they keep)."""
    dump: Any = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json")  # noqa: B009 - its types do not know it
    return dump().decode(errors="replace")


def forget_workers(loader: DataLoader) -> None:
    """End the workers that ``loader`` keeps for its next iteration, if it keeps some; new ones take no random number
    of this process."""
    if isinstance(loader._iterator, _MultiProcessingDataLoaderIter):
        loader._iterator._shutdown_workers()
        loader.generator = loader.generator or torch.Generator()
    loader._iterator = None


def is_recomputed() -> bool:
    """Whether ``torch.utils.checkpoint`` is going to compute again, in the backward pass, what is computed now."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0].__qualname__.startswith("_checkpoint_hook.")


def in_backward() -> bool:
    """Whether a backward pass is running in this thread."""
    return torch._C._current_graph_task_id() != -1


def note_rates(scheduler: Any) -> None:
    """Let ``scheduler.get_last_lr()`` be what its optimizer's groups have now."""
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def innermost_function_mode() -> TorchFunctionMode | None:
    """The ``TorchFunctionMode`` that sees a function first; ``None`` outside of all."""
    return _get_current_function_mode()


def without_innermost_function_mode() -> AbstractContextManager[TorchFunctionMode]:
    """In here it sees nothing."""
    return _pop_mode_temporarily()


def own_gradients(module: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Gradients that FSDP has not exchanged yet: this rank's, of whole weights."""
    for parameter in _fsdp_parameters_of(module):
        grad = parameter.unsharded_accumulated_grad
        if grad is None and hasattr(parameter, "_unsharded_param"):
            grad = parameter._unsharded_param.grad
        if grad is not None:
            yield parameter.sharded_param, grad


def gradient_records(module: nn.Module) -> dict[int, OwnGradient]:
    """By the ``id`` of a divided parameter where its gradient is added up before it is exchanged."""
    return {id(parameter.sharded_param): OwnGradient(parameter) for parameter in _fsdp_parameters_of(module)}


class OwnGradient:
    """The gradient of a whole weight that FSDP keeps until it is exchanged."""

    def __init__(self, parameter: Any) -> None:
        self._parameter = parameter

    def whole_like(self) -> Tensor:
        """A tensor of its shape, without values."""
        local = self._parameter.sharded_param.to_local()
        return torch.empty(self._parameter._orig_size, dtype=local.dtype, device=local.device)

    def add_to(self, grad: Tensor) -> None:
        """Let the next backward pass add to ``grad``."""
        self._parameter.unsharded_accumulated_grad = grad


def _fsdp_parameters_of(module: nn.Module) -> Iterator[Any]:
    for part in module.modules():
        if isinstance(part, FSDPModule):
            for group in part._get_fsdp_state()._fsdp_param_groups:
                yield from group.fsdp_params
