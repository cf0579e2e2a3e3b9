"""Checkpoints of a strategy: what Lightning's hooks of that name do when weights are cut.

:class:`ShardedCheckpoints` is mixed in before Lightning's strategy::

    class HybridStrategy(ShardedCheckpoints, ParallelStrategy): ...

Lightning's own order is kept: a checkpoint is collected by ``lightning_module_state_dict`` and ``optimizer_state``
(every rank its own parts), passes the module's and callbacks' hooks, and is written by ``save_checkpoint``. It is
opened by ``load_checkpoint`` (tensors stay on disk), passes the hooks, and is read by ``load_model_state_dict`` and
``load_optimizer_state_dict``, where each rank reads its parts alone.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.optim import Optimizer

from lightning_bharat.checkpoints import directory, host_memory, optimizers, plain, stored, weights
from lightning_bharat.checkpoints.document import as_plain
from lightning_bharat.checkpoints.errors import CheckpointError, on_rank_zero, together
from lightning_bharat.checkpoints.manifest import FORMAT, Manifest
from lightning_bharat.checkpoints.opened import content_of
from lightning_bharat.checkpoints.positions import take_position, with_positions
from lightning_bharat.checkpoints.stages import Stages
from lightning_bharat.checkpoints.told import gathered
from lightning_bharat.plan.layout import Layout
from lightning_bharat.plan.model_plan import ModelPlan
from lightning_bharat.plan.shards import TensorSlice
from lightning_bharat.strategies import _lightning_resume, metric_states
from lightning_bharat.strategies.background_saves import BackgroundSaves
from lightning_bharat.strategies.randomness import RandomStates

AFTER_SAVE = "Trainer.save_checkpoint"  # Lightning's name of its barrier

if TYPE_CHECKING:
    from lightning.pytorch.strategies import ParallelStrategy as _Base
else:
    _Base = object


class ShardedCheckpoints(_Base):
    """Sharded checkpoint directories and plain ``.ckpt`` files, each saved and loaded under any layout.

    Attributes:
        save_distributed_checkpoint: ``True`` writes a directory to which each rank writes its parts, ``False`` a plain
            Lightning ``.ckpt`` with everything, gathered in rank 0's host memory. Both are read, whatever it says.
        layout, plan, slices, tensor_group: of the strategy.
        stages: of its pipeline; ``None`` without one.
        random_states: what a run that goes on draws from.
        saves: when directories are written.
    """

    save_distributed_checkpoint: bool = True
    layout: Layout
    plan: ModelPlan | None
    slices: dict[str, TensorSlice]
    tensor_group: dist.ProcessGroup | None
    stages: Stages | None = None
    random_states: RandomStates
    saves: BackgroundSaves

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.random_states = RandomStates()
        self.saves = BackgroundSaves(self)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights are loaded when they are cut."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state, as :meth:`in_checkpoint` makes it."""
        weights.parameter_names(self._module())
        with metric_states.of_all_ranks(self._module()):
            return self.in_checkpoint(self._module().state_dict())

    def in_checkpoint(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """``state`` (tensors by the module's names, each of which lies as that weight does: averages, for instance) in
        the form that may stand anywhere in a checkpoint, also in what a callback's ``state_dict`` returns.

        That is this rank's parts, or (plain ``.ckpt``) the whole on rank 0, ``{}`` elsewhere. All ranks must call it.
        """
        if self.save_distributed_checkpoint:
            return weights.LikeWeights(state)
        return weights.whole_state(
            self._module(), self.slices, self.tensor_group, self.is_global_zero, state, self.stages
        )

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state by names, this rank's parts; or (plain ``.ckpt``) torch's own form on rank 0."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        names = weights.parameter_names(self._module())
        if self.save_distributed_checkpoint:
            return optimizers.state_by_name(optimizer, names, self.slices, self.stages)
        return optimizers.whole_state_by_index(
            optimizer, names, self.slices, self.tensor_group, self.is_global_zero, self.stages
        )

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``filepath`` (rank 0's counts). All ranks must call it.

        Raises:
            CheckpointError: on every rank: the disk, or an object that couldn't be read back, by its key.
        """
        if storage_options is not None:
            raise CheckpointError(f"storage_options={storage_options!r}: checkpoints are written to file systems only")
        path, module = directory.local_path(filepath), self._module()
        manifest = Manifest.of(checkpoint, self.layout, self.plan_to_save(), module, self.batches())
        manifest = replace(manifest, **self.facts(path))
        checkpoint = with_positions(self.to_go_on(checkpoint), self.layout)
        if self.save_distributed_checkpoint:
            state = weights.LikeWeights(checkpoint["state_dict"])  # a hook may have made a plain dict of it
            content = {**checkpoint, "state_dict": state}
            content = weights.with_shares(content, module, self.slices, self._is_first_replica(), self.stages)
            self.saves.save(path, content, manifest)
        else:
            whole = gathered(checkpoint)
            on_rank_zero(lambda: self._save_plain(whole, path, manifest))

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks; not after a save that has only begun: what follows it waits for its end."""
        if not (name == AFTER_SAVE and self.saves.puts_off):
            super().barrier(name)  # type: ignore[safe-super]

    def to_go_on(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """``checkpoint`` with what Lightning does not save. All ranks must call it."""
        again = _lightning_resume.in_validation(self._module().trainer)
        return self.random_states.with_states(checkpoint, self.layout, self.root_device, again)

    def facts(self, path: Path) -> dict[str, Any]:
        """What else stands in the manifest of the checkpoint ``path``, by its names."""
        return {"id": uuid.uuid4().hex}

    def plan_to_save(self) -> ModelPlan | None:
        """With what was learnt about the model since. All ranks must call it."""
        return self.plan

    def batches(self) -> list[dict[str, Any]]:
        """Of the training loaders, whatever is to be known of them when the run goes on."""
        return []

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Open a checkpoint directory, of ours or DeepSpeed's, or a plain ``.ckpt``; tensors are read later. All ranks
        must call it.

        Raises:
            CheckpointError: on every rank: missing, damaged, or not safe to read (``weights_only=False`` is refused).
        """
        if weights_only is False:
            raise CheckpointError("weights_only=False runs code from the checkpoint; leave it out")
        self.saves.writer.wait()
        path = host_memory.here(directory.local_path(self.broadcast(checkpoint_path)))
        checkpoint = together(lambda: content_of(path))
        self.saves.saver.frozen.parent = path
        take_position(checkpoint, self.layout, self.global_rank)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Read the module's state, as far as this rank holds it. All ranks must call it.

        Raises:
            CheckpointError: on every rank: the checkpoint is one of another model; names what differs.
        """
        together(lambda: weights.load_weights(self._module(), self.slices, checkpoint["state_dict"], strict))
        if self.layout.coordinates(self.global_rank)["data"]:
            metric_states.leave_to_another_rank(self._module())

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Read the optimizers' state, as far as this rank holds it, without a step. All ranks must call it.

        Raises:
            CheckpointError: on every rank: other optimizers, groups, parameters or shapes; names them.
        """
        saved = checkpoint["optimizer_states"]
        if len(saved) != len(self.optimizers):
            raise CheckpointError(f"the checkpoint has {len(saved)} optimizers, and the module {len(self.optimizers)}")
        names = weights.parameter_names(self._module())

        def load() -> None:
            for optimizer, state in zip(self.optimizers, saved, strict=True):
                optimizers.load_state(optimizer, names, self.slices, state)

        together(load)
        self.random_states.read(checkpoint, self.layout, self.global_rank, self.root_device)

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint; a process killed meanwhile leaves no half one."""
        self.saves.writer.wait()
        if self.is_global_zero:
            directory.remove(directory.local_path(filepath))

    def _is_first_replica(self) -> bool:
        here = self.layout.coordinates(self.global_rank)
        return here["data"] == here["tensor"] == here["context"] == 0

    def _module(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module

    def _save_plain(self, checkpoint: dict[str, Any], path: Path, manifest: Manifest) -> None:
        if path.is_dir() and not stored.is_checkpoint(path):
            raise CheckpointError(f"{path} is a directory, and not one of a checkpoint; choose another path")
        about = {key: value for key, value in asdict(manifest).items() if key != "files"}
        content = as_plain({**checkpoint, FORMAT: about})
        if path.is_dir():
            directory.remove(path)
        plain.write(path, content)  # Lightning's writer passes over a refused rename in silence (its issue 21800)
