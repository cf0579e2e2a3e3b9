"""The best layout of a model on a cluster: all legal ones in all settings, kept where they fit, ranked by time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from lightning_bharat.plan.cluster import Cluster
from lightning_bharat.plan.estimate import Estimate
from lightning_bharat.plan.layout import Layout, LayoutError
from lightning_bharat.plan.schedules import NONE, SCHEDULES, Schedule
from lightning_bharat.plan.share import Bytes, Seconds, Setting, Share
from lightning_bharat.plan.work import MODES

REMEDIES = tuple((recompute, offload) for offload in (False, True) for recompute in MODES)


@dataclass(frozen=True)
class Choice:
    """A setting, and what it takes."""

    setting: Setting
    bytes: Bytes
    seconds: Seconds

    @property
    def layout(self) -> Layout:
        """Its layout."""
        return self.setting.layout


def search(
    shares: Mapping[tuple[int, int], Share], cluster: Cluster, rows: int, accumulates: bool = True
) -> list[Choice]:
    """The best setting of each legal layout that fits, the fastest first.

    Tensor ranks stay inside a node wherever anything fits so; among equally fast ones the leanest is first.

    Args:
        shares: by number of tensor and of context ranks.
        cluster: to be filled.
        rows: of a batch, over all data ranks.
        accumulates: whether a batch may be taken in several parts, one after another, without a pipeline as well.

    Raises:
        LayoutError: no layout is legal, or none fits; says what the leanest one would need.
    """
    best: dict[Layout, Choice] = {}
    leanest: tuple[Setting, Bytes] | None = None
    for (tensor, context), share in sorted(shares.items()):
        estimate = Estimate(share, cluster)
        for setting in settings(share, cluster, tensor, context, rows, accumulates):
            tried = list(_tried(estimate, setting))
            found = [Choice(made, b, estimate.seconds(made)) for made, b in tried if fits(b, cluster)]
            if found:
                best[setting.layout] = min([*found, *filter(None, [best.get(setting.layout)])], key=_rank)
            elif tried:
                leanest = min([*tried, *filter(None, [leanest])], key=lambda made: made[1].total)
    if not best:
        raise LayoutError(_nothing(cluster, rows, leanest))
    return sorted(best.values(), key=lambda choice: (not _inside(choice.layout, cluster), _rank(choice)))


def settings(
    share: Share, cluster: Cluster, tensor: int, context: int, rows: int, accumulates: bool = True
) -> Iterator[Setting]:
    """Every legal layout, number of micro-batches and schedule, of a number of tensor and of context ranks."""
    for layout in layouts(share, cluster, tensor, context):
        if rows % layout.data:
            continue
        of_rank = rows // layout.data
        for microbatches in _divisors(of_rank) if accumulates or layout.pipeline > 1 else [1]:
            for schedule in SCHEDULES if layout.pipeline > 1 else (NONE,):
                if _schedules(schedule, layout, microbatches, share.plan.depth):
                    yield Setting(layout, microbatches, of_rank // microbatches, schedule)


def layouts(share: Share, cluster: Cluster, tensor: int, context: int) -> Iterator[Layout]:
    """Every legal layout of a number of tensor and of context ranks; each number of copies of what is divided over data
    ranks, but one with spread experts, which are divided over all of them."""
    for layout in Layout.legal(share.plan, cluster.devices, context, share.experts):
        if layout.tensor == tensor and not (layout.pipeline > 1 and share.plan.apart):
            for copies in _divisors(layout.data) if layout.expert == 1 else (1,):
                yield replace(layout, replicate=copies)


def fits(bytes: Bytes, cluster: Cluster) -> bool:
    """Whether a device, and the host's memory, hold them."""
    of_host = cluster.host.memory * cluster.usable / cluster.devices_per_node if cluster.host else 0
    return bytes.total <= cluster.room and bytes.host <= of_host


def _tried(estimate: Estimate, setting: Setting) -> Iterator[tuple[Setting, Bytes]]:
    """The setting as it is, alone where it fits, since whatever saves memory costs time; else with all that may make it
    fit."""
    for recompute, offload in REMEDIES:
        if not _may(setting, recompute) or (offload and estimate.cluster.host is None):
            continue
        made = replace(setting, recompute=recompute, offload=offload)
        yield made, (bytes := estimate.bytes(made))
        if made == setting and fits(bytes, estimate.cluster):
            return


def _may(setting: Setting, recompute: str | None) -> bool:
    if recompute == "selective" and setting.layout.expert > 1:
        return False  # torch can't choose what to keep of a block in which experts are gathered apart
    return recompute is None or setting.schedule.recomputes


def _schedules(schedule: Schedule, layout: Layout, microbatches: int, depth: int) -> bool:
    return layout.pipeline * schedule.each <= depth and schedule.takes(layout.pipeline, microbatches)


def _inside(layout: Layout, cluster: Cluster) -> bool:
    return cluster.devices_per_node % layout.tensor == 0


def _rank(choice: Choice) -> tuple[float, float]:
    return choice.seconds.total, choice.bytes.total


def _nothing(cluster: Cluster, rows: int, leanest: tuple[Setting, Bytes] | None) -> str:
    if leanest is None:
        return (
            f"no layout of the model has {cluster.devices} devices and divides a global batch of {rows} rows; write "
            "another --global_batch_size, or another number of devices"
        )
    setting, bytes = leanest
    need, host = bytes.total, bytes.host
    beside = f", and {host / 1e9:.3g} GB of its host" if host else ""
    return (
        f"nothing fits {cluster}: the leanest, {setting.layout}, needs {need / 1e9:.3g} GB of each device{beside}. "
        "Add devices or memory, or take a smaller batch, sequence or model"
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
