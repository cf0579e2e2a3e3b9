"""How many ways each cut is made: the sizes of all dimensions of parallelism, their ranks and their mesh."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import product
from math import gcd, prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.distributed.device_mesh import DeviceMesh

    from lightning_bharat.plan.cluster import Cluster
    from lightning_bharat.plan.model_plan import ModelPlan
    from lightning_bharat.plan.share import Share

# From the outermost to the innermost: tensor ranks are neighbours on a host, where links are fast.
AXES = ("pipeline", "data", "context", "tensor")


class LayoutError(ValueError):
    """A layout that does not fit the devices or the model; the message says what to write instead."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the dimensions of parallelism.

    Devices = ``data`` × ``tensor`` × ``pipeline`` × ``context``. Experts are spread over ranks that are also data (and
    context) ranks: ``expert`` divides ``data`` × ``context``. ``replicate`` is the number of copies of the sharded
    parameters inside the data dimension (hybrid sharding): it divides ``data``.

    Raises:
        LayoutError: a size is not a positive whole number, or does not divide what it is taken from.
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    replicate: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            size = getattr(self, field.name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise LayoutError(f"Layout({field.name}={size!r}): a size is a whole number from 1 up")
        if self.data % self.replicate:
            raise LayoutError(
                f"Layout(data={self.data}, replicate={self.replicate}): the copies must divide the data ranks; "
                f"write replicate={_nearest_divisor(self.data, self.replicate)}"
            )
        if (self.data * self.context) % self.expert:
            raise LayoutError(
                f"Layout(data={self.data}, context={self.context}, expert={self.expert}): experts are spread over "
                f"data × context = {self.data * self.context} ranks, which {self.expert} does not divide; "
                f"write expert={_nearest_divisor(self.data * self.context, self.expert)}"
            )

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read ``"data=2,tensor=2"``; dimensions that are not named are 1.

        Raises:
            LayoutError: a name is not a dimension, or a size not a whole number from 1 up.

        >>> Layout.parse("data=4, tensor=2").devices
        8
        """
        sizes = {}
        for word in text.split(","):
            name, _, size = (part.strip() for part in word.partition("="))
            if name not in cls.__dataclass_fields__ or not size.isdecimal():
                raise LayoutError(
                    f"layout {text!r}: {word.strip()!r} is not a dimension and its size; write data=2,tensor=2 "
                    f"(dimensions: {', '.join(cls.__dataclass_fields__)})"
                )
            sizes[name] = int(size)
        return cls(**sizes)

    @property
    def devices(self) -> int:
        """Number of ranks."""
        return prod(self._sizes())

    def _sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where ``rank`` stands on each axis.

        >>> Layout(data=2, tensor=2).coordinates(3)
        {'pipeline': 0, 'data': 1, 'context': 0, 'tensor': 1}
        """
        if not 0 <= rank < self.devices:
            raise LayoutError(f"rank {rank} is not one of the {self.devices} ranks of {self}")
        found = {}
        for axis, size in reversed(list(zip(AXES, self._sizes(), strict=True))):
            rank, found[axis] = divmod(rank, size)
        return {axis: found[axis] for axis in AXES}

    def rank(self, **coordinates: int) -> int:
        """The rank at these coordinates; axes that are not named are 0. Inverse of :meth:`coordinates`."""
        number = 0
        for axis, size in zip(AXES, self._sizes(), strict=True):
            number = number * size + coordinates.get(axis, 0)
        return number

    def peers(self, rank: int, axis: str) -> list[int]:
        """Ranks that differ from ``rank`` on ``axis`` only, in order, itself among them."""
        here = self.coordinates(rank)
        return [self.rank(**{**here, axis: i}) for i in range(getattr(self, axis))]

    def name(self, rank: int) -> str:
        """A rank's name in messages.

        >>> Layout(data=4, tensor=2).name(5)
        'rank 5 (data 2, tensor 1)'
        """
        where = [f"{axis} {i}" for axis, i in self.coordinates(rank).items() if getattr(self, axis) > 1]
        return f"rank {rank} ({', '.join(where)})" if where else f"rank {rank}"

    def mesh(self, device_type: str) -> DeviceMesh:
        """The ``DeviceMesh``: axes ``"pipeline_parallel"`` and ``"context_parallel"`` where they are cut, always
        ``"data_parallel"`` and ``"tensor_parallel"`` (Lightning's names). Every rank must call it.

        Raises:
            LayoutError: the process group has another number of ranks.
        """
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        if dist.get_world_size() != self.devices:
            raise LayoutError(f"{self} needs {self.devices} ranks, and {dist.get_world_size()} were started")
        kept = [axis for axis in AXES if axis in ("data", "tensor") or getattr(self, axis) > 1]
        return init_device_mesh(
            device_type,
            tuple(getattr(self, axis) for axis in kept),
            mesh_dim_names=tuple(f"{axis}_parallel" for axis in kept),
        )

    def expert_mesh(self, device_type: str) -> DeviceMesh:
        """All ranks again, with data × context as ``"expert_copies"`` × ``"expert_parallel"``: expert ranks are
        neighbours. Every rank must call it."""
        from torch.distributed.device_mesh import init_device_mesh

        copies = self.data * self.context // self.expert
        sizes = {"outer": self.pipeline, "expert_copies": copies, "expert_parallel": self.expert, "inner": self.tensor}
        return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    def check(self, plan: ModelPlan, devices: int | None = None) -> None:
        """Refuse a layout that does not fit the number of devices or the model.

        Raises:
            LayoutError: names the size, what it must divide and the sizes that would do.
        """
        if devices is not None and devices != self.devices:
            model_parallel = self.devices // self.data
            other = f"data_parallel_size={devices // model_parallel} or " if devices % model_parallel == 0 else ""
            raise LayoutError(
                f"{self} needs data × tensor × pipeline × context = {self.devices} devices, and there are {devices}; "
                f"write {other}devices={self.devices}"
            )
        for cut in plan.all_cuts():
            if cut.units % self.tensor:
                fits = [n for n in range(1, cut.units + 1) if cut.units % n == 0]
                raise LayoutError(
                    f"tensor_parallel_size={self.tensor} does not divide the {cut.units} {cut.unit} of "
                    f"{', '.join(c.module for c in cut.columns)}; sizes that do: {', '.join(map(str, fits[:8]))}"
                )
        if self.pipeline > plan.depth:
            raise LayoutError(
                f"pipeline_parallel_size={self.pipeline} is more than the {plan.depth} blocks of {plan.blocks!r}; "
                f"write at most {plan.depth}"
            )

    @classmethod
    def legal(cls, plan: ModelPlan, devices: int, context: int = 1, experts: int = 1) -> list[Layout]:
        """All layouts of ``devices`` ranks that :meth:`check` accepts, with ``context`` context ranks.

        Args:
            plan: of the model.
            devices: ranks.
            context: context ranks.
            experts: how many there are: each number of expert ranks divides it.
        """
        found = []
        for data, tensor, pipeline in product(_divisors(devices), repeat=3):
            if data * tensor * pipeline * context != devices:
                continue
            layout = cls(data=data, tensor=tensor, pipeline=pipeline, context=context)
            try:
                layout.check(plan)
            except LayoutError:
                continue
            found += [replace(layout, expert=n) for n in _divisors(gcd(data * context, experts))]
        return found

    @classmethod
    def best(cls, shares: Mapping[tuple[int, int], Share], cluster: Cluster, rows: int) -> Layout:
        """The layout whose step is estimated to be the fastest of those that fit ``cluster``; see
        :func:`~lightning_bharat.plan.search.search`, which also gives its setting, bytes and seconds.

        Args:
            shares: by number of tensor and of context ranks, what one of them holds and does.
            rows: of a batch, over all data ranks.

        Raises:
            LayoutError: none is legal, or none fits.
        """
        from lightning_bharat.plan.search import search

        return search(shares, cluster, rows)[0].layout

    def __str__(self) -> str:
        cut = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) > 1]
        return f"Layout({', '.join(cut)})"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _nearest_divisor(number: int, wanted: int) -> int:
    return min(_divisors(number), key=lambda n: abs(n - wanted))
