"""Ranks, their devices and their process group: what a strategy is before it knows its model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import gcd
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.distributed.device_mesh import DeviceMesh

from lightning_bharat.plan.layout import Layout, LayoutError
from lightning_bharat.strategies import _lightning
from lightning_bharat.strategies._torch import set_timeout
from lightning_bharat.strategies.collectives import Collectives
from lightning_bharat.strategies.options import Options

if TYPE_CHECKING:
    from lightning_bharat.strategies.global_batch import Batches


@dataclass(frozen=True)
class Chosen:
    """A layout that was found when the ranks were there.

    Attributes:
        options: the strategy's arguments that it sets.
        batch: of training loaders, as :class:`~lightning_bharat.strategies.global_batch.Batches` of a run before.
        why: in words.
    """

    options: dict[str, Any]
    batch: Batches
    why: str


class ConnectedStrategy(Collectives, ParallelStrategy):
    """Started by ``devices=n``, ``torchrun`` or Slurm, its ranks stand in a :class:`~lightning_bharat.Layout`."""

    options: Options
    choose: Callable[[ConnectedStrategy], Chosen] | None = None  # the layout, when ranks are there
    planned_batch: Batches | None = None  # for that layout

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_nodes = 1
        self.choices: dict[str, str] = {}
        self._layout: Layout | None = None
        # Kept: what torch remembers of distributed tensors may refer to them when a layout comes back.
        self._meshes: dict[Layout, tuple[DeviceMesh, DeviceMesh | None]] = {}
        self._mesh: DeviceMesh | None = None
        self._data_group: dist.ProcessGroup | None = None
        self._tensor_group: dist.ProcessGroup | None = None
        self._context_group: dist.ProcessGroup | None = None
        self._expert_mesh: DeviceMesh | None = None

    @property
    def is_distributed(self) -> bool:
        """Lightning asks whether to divide data and to reduce logged values."""
        return True

    @property
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Ranks on this host."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    def layout(self) -> Layout:
        """How many ways each cut is made; known once processes are connected."""
        return _known(self._layout, "layout")

    @property
    def device_mesh(self) -> DeviceMesh:
        """All ranks, with the axes ``"data_parallel"`` and ``"tensor_parallel"``."""
        return _known(self._mesh, "device mesh")

    @property
    def data_group(self) -> dist.ProcessGroup:  # type: ignore[override]
        """The ranks that hold other batches and the same tensor pieces."""
        return _known(self._data_group, "group of data ranks")

    @property
    def tensor_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same batch and other tensor pieces; ``None`` if this is the only one."""
        return self._tensor_group if self.layout.tensor > 1 else None

    @property
    def context_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same batch and other parts of its sequence, in order; ``None`` if this is the only
        one."""
        return self._context_group

    @property
    def expert_mesh(self) -> DeviceMesh:
        """All ranks, with the axes ``"expert_copies"`` and ``"expert_parallel"`` in the place of data and context."""
        return _known(self._expert_mesh, "mesh of expert ranks")

    @property
    def expert_group(self) -> dist.ProcessGroup:
        """The ranks that hold other tokens and other experts."""
        return self.expert_mesh.get_group("expert_parallel")

    @property
    def pipeline_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same batch and other blocks, in order; ``None`` if this is the only one."""
        return self.device_mesh.get_group("pipeline_parallel") if self.layout.pipeline > 1 else None

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Data is divided over data ranks alone: tensor and context peers load the same batches."""
        here = self.layout.coordinates(self.global_rank)
        return {"num_replicas": self.layout.data, "rank": here["data"]}

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally:
            self._launcher = _lightning.SubprocessLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def set_world_ranks(self) -> None:
        """Called by Lightning when it has chosen devices and nodes."""
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        _lightning.set_rank(self.global_rank)

    def setup_environment(self) -> None:
        super().setup_environment()
        self.set_world_ranks()
        assert self.cluster_environment is not None
        backend = self.options.process_group_backend or _lightning.default_backend(self.root_device)
        _lightning.init_process_group(self.cluster_environment, backend, self.options.timeout, self.root_device)

    def arrange_ranks(self, module: Any) -> None:
        """Choose the layout, if there is none yet, and make its mesh. All ranks must call it.

        Raises:
            LayoutError: the sizes do not fit the devices.
        """
        if self._layout is None:
            self._choose()
            layout = self.options.layout(self.world_size, self.num_processes, module, self.root_device, self.choices)
            self._say_across_hosts(layout.tensor)
            if layout not in self._meshes:
                self._meshes[layout] = self._made_meshes(layout)
            self._layout, (self._mesh, self._expert_mesh) = layout, self._meshes[layout]
            # Kept: each step asks for them, once a parameter, and a mesh looks them up by name.
            self._data_group = self._mesh.get_group("data_parallel")
            self._tensor_group = self._mesh.get_group("tensor_parallel")
            self._context_group = self._mesh.get_group("context_parallel") if layout.context > 1 else None

    def _choose(self) -> None:
        """Take what :attr:`choose` finds on rank 0."""
        if self.choose is None:
            return
        choose, self.choose = self.choose, None
        found: Chosen | str = ""
        if self.is_global_zero:
            try:
                found = choose(self)
            except ValueError as error:  # LayoutError, PlanError, ...: in words
                found = str(error)
        found = self.broadcast(found)
        if isinstance(found, str):
            raise LayoutError(found)
        self.options = replace(self.options, **found.options)
        self.planned_batch, self.choices["layout"] = found.batch, found.why

    def _made_meshes(self, layout: Layout) -> tuple[DeviceMesh, DeviceMesh | None]:
        kind = self.root_device.type
        mesh, experts = layout.mesh(kind), layout.expert_mesh(kind) if layout.expert > 1 else None
        for made in filter(None, (mesh, experts)):
            set_timeout(made, self.options.timeout)
        return mesh, experts

    def _say_across_hosts(self, tensor: int) -> None:
        if self.num_nodes > 1 and self.num_processes % tensor:
            fits = gcd(self.num_processes, tensor)
            self.choices["across nodes"] = (
                f"tensor_parallel_size={tensor} does not divide the {self.num_processes} devices of a node, so each "
                "tensor cut sums hidden states over the network; "
                f"write tensor_parallel_size={fits} to keep them on one node"
            )
            rank_zero_warn(self.choices["across nodes"])

    def teardown(self) -> None:
        """Ends nothing that a next run needs: the module stays cut, the process group connected."""
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()


def _known(value: Any, name: str) -> Any:
    if value is None:
        raise RuntimeError(f"the {name} is known when trainer.fit, validate, test or predict has connected the ranks")
    return value
