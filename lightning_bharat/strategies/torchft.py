"""``strategy="bharat_torchft"``: replicated data parallelism in which a process may die, and the others go on."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_bharat import events
from lightning_bharat.strategies import _lightning_loops, _torchft
from lightning_bharat.strategies.replica_groups import ReplicaError, ReplicaGroups
from lightning_bharat.strategies.replica_refusals import check_arguments, refuse, refuse_loaders, refuse_optimizers
from lightning_bharat.strategies.replica_state import ReplicaState

LIGHTHOUSE, REPLICA, REPLICAS = "TORCHFT_LIGHTHOUSE", "REPLICA_GROUP_ID", "NUM_REPLICA_GROUPS"


class TorchFTStrategy(ParallelStrategy):
    """Trains copies of a whole module in processes of their own, of which any may die at any time.

    Each process is a replica group of torchft, started by itself. In each step the groups that are alive average their
    gradients, before clipping. A step in which one dies is left out by the others, which go on without it and without
    a restart; a process that is started in its place takes weights, optimizers, schedulers and the trainer's counters
    from a live one, and goes on with it in the same epoch, behind the same number of batches of its own share.

    Method: torchft's per-step fault tolerance (https://github.com/pytorch/torchft), on the CPU over gloo.

    Args:
        replica: the number of this group, from 0 up. ``None``: what the environment says in ``REPLICA_GROUP_ID``.
        replicas: how many groups share the samples. ``None``: ``NUM_REPLICA_GROUPS``.
        lighthouse: the address of ``torchft_lighthouse``, one for each run. ``None``: ``TORCHFT_LIGHTHOUSE``.
        timeout: of whatever waits for other groups; longer than a step. For the lighthouse, which waits for late groups
            itself (``--join_timeout_ms``), twice as long.

    Raises:
        ModuleNotFoundError: torchft is not installed.
        ReplicaError: an argument that is missing or wrong; in training, what this strategy can't do, and a lighthouse
            that does not answer.
    """

    strategy_name = "bharat_torchft"
    is_distributed = True  # Lightning asks: samples are to be shared by distributed_sampler_kwargs

    def __init__(
        self,
        replica: int | None = None,
        replicas: int | None = None,
        lighthouse: str | None = None,
        timeout: timedelta = timedelta(seconds=60),
    ) -> None:
        _torchft.torchft()
        super().__init__()
        self.replica = _number(replica, "replica", REPLICA)
        self.replicas = _number(replicas, "replicas", REPLICAS)
        self.lighthouse = os.environ.get(LIGHTHOUSE, "") if lighthouse is None else lighthouse
        self.timeout = timeout
        check_arguments(self.replica, self.replicas, self.lighthouse, timeout)
        self.groups: ReplicaGroups | None = None
        self._open = self._averaged = self._lost = False
        self._size = self._opened_at = 0

    # ---- setting up

    @property
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[0]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.replicas, "rank": self.replica}

    def setup(self, trainer: pl.Trainer) -> None:
        refuse(trainer, self._module(), self.root_device, self.world_size, len(self.parallel_devices or ()))
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            refuse_optimizers(self.optimizers, self.lr_scheduler_configs)
            self._state = ReplicaState(trainer, self.optimizers, self.lr_scheduler_configs)
            self._open = self._lost = False
            self._size = 0
            _lightning_loops.before_each_batch(trainer, self._begin)

    def model_to_device(self) -> None:
        self._module().to(self.root_device)

    # ---- steps

    def _begin(self) -> None:
        """Meet the others before the first batch of a step."""
        trainer = self._module().trainer
        if self.groups is None:
            refuse_loaders(_lightning_loops.training_loaders(trainer))
            self.groups = ReplicaGroups(self.replica, self.lighthouse, self.timeout, self._state.give, self._heal)
        now = self._state.batches
        # A loop that goes on from a checkpoint comes here twice.
        if self._open and (now % trainer.accumulate_grad_batches != 0 or now == self._opened_at):
            return
        if self._open:
            raise ReplicaError(
                "a step was left out here alone (on_train_batch_start returned -1), and the other groups wait for its "
                "gradients; train on all batches, or leave them out of the dataset"
            )
        self._open, self._averaged = True, False
        size = self.groups.begin()
        self._opened_at = self._state.batches
        if size != self._size:
            rank_zero_info(f"Step {trainer.global_step}: {size} replica groups are alive")
            self._tell("groups", alive=size)
        self._size = size

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """As Lightning's; the last one of a step averages the gradients, before ``on_after_backward``."""
        module = self._module()
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, module)
        self.precision_plugin.backward(closure_loss, module, optimizer, *args, **kwargs)
        if not _lightning_loops.accumulates(module.trainer):
            assert self.groups is not None
            self.groups.average([p for p in module.parameters() if p.requires_grad])
            self._averaged = True
        closure_loss = self.precision_plugin.post_backward(closure_loss, module)
        self.post_backward(closure_loss)
        return closure_loss

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        def whole() -> Any:
            out = closure()
            self._commit()
            return out

        return super().optimizer_step(optimizer, whole, model, **kwargs)

    def _commit(self) -> None:
        if not self._averaged:
            raise ReplicaError(
                "training_step returned no loss for the last batch of a step, and the other groups wait for its "
                "gradients; return a loss for each batch (0.0 * loss for one that is to be left out)"
            )
        assert self.groups is not None
        self._lost = not self.groups.commits()
        self._open = False
        if self._lost:
            module = self._module()
            for parameter in module.parameters():
                parameter.grad = None  # so the optimizer leaves it as it is
            rank_zero_warn(f"Step {module.trainer.global_step} is left out: a replica group was lost in it")
            self._tell("lost_step")

    def _heal(self, state: dict[str, Any]) -> None:
        try:
            self._state.take(state)
        except Exception as error:
            raise ReplicaError(
                f"the state of a live group does not fit this one: {error}. Start all groups with the same module, "
                "optimizer, data and Trainer arguments"
            ) from error
        self._tell("healed")

    # ---- ending

    def teardown(self) -> None:
        groups, self.groups = self.groups, None
        if groups is not None:
            trainer = self._module().trainer
            groups.leave(together=not (self._open or trainer.should_stop or trainer.interrupted))
            if self._lost:
                rank_zero_warn(
                    "The last step was lost here: another group may have taken it. Compare the weights, or keep those "
                    "of a group without this warning"
                )
        super().teardown()

    def _tell(self, kind: str, **facts: Any) -> None:
        trainer = self._module().trainer
        events.append(Path(trainer.default_root_dir), kind, replica=self.replica, step=trainer.global_step, **facts)

    def _module(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    # ---- of one process: nothing is exchanged but gradients

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """``tensor``: what a group logs is its own."""
        return tensor

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return tensor

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj

    def barrier(self, name: str | None = None) -> None:
        """Nothing: groups wait for each other at the beginning of a step."""

    def __repr__(self) -> str:
        return f"TorchFTStrategy(replica={self.replica}, replicas={self.replicas})"


def _number(given: int | None, name: str, variable: str) -> int:
    if given is not None:
        return given
    text = os.environ.get(variable, "")
    if not text.isdecimal():
        found = f"{variable}={text!r} in the environment" if text else f"no {variable} in the environment"
        raise ReplicaError(f"{name} is not given, and there is {found}; write {name}=<number>, or set {variable}")
    return int(text)
