"""The planner: its arithmetic by hand, its search against brute force, and what no cluster can hold."""

from __future__ import annotations

import doctest
from dataclasses import replace
from functools import cache
from itertools import product

import pytest

from lightning_bharat.plan import estimate as room
from lightning_bharat.plan.cluster import Cluster, Host, Link
from lightning_bharat.plan.estimate import Estimate, ring
from lightning_bharat.plan.layout import Layout, LayoutError
from lightning_bharat.plan.schedules import NONE, SCHEDULES
from lightning_bharat.plan.search import REMEDIES, fits, search
from lightning_bharat.plan.share import Setting, Share
from tests.plan.planned import mixture, shares

DEVICE = Cluster(1, 1, 10**9, 1e12, Link(1e10, 1e-6), Link(1e10, 1e-6), efficiency=0.5, usable=1.0)
NO_TIME = Link(1e30, 0.0)  # a link that takes no time
ONE_F_ONE_B, INTERLEAVED, ZBV = SCHEDULES


@cache
def known() -> dict[tuple[int, int], Share]:
    return shares(1, 2)


@cache
def mixtures() -> dict[tuple[int, int], Share]:
    """Of a decoder with eight experts."""
    return shares(1, contexts=(1, 2), depth=2, make=mixture)


def test_docstrings_are_true() -> None:
    assert doctest.testmod(room).failed == 0


# ---- seconds


def test_compute_is_three_forward_passes_and_four_with_recomputation() -> None:
    share = known()[1, 1]
    flops = sum(part.flops for part in share.growth.at(2).parts)
    plain = Setting(Layout(), 3, 2)
    found = Estimate(share, DEVICE).seconds(plain)
    assert found.total == found.compute == pytest.approx(3 * 3 * flops / 0.5e12)
    again = Estimate(share, DEVICE).seconds(replace(plain, recompute="full"))
    assert again.total == pytest.approx(found.total * 4 / 3)
    assert (found.communication, found.bubble) == (0, 0)


def test_a_ring_by_hand() -> None:
    assert ring(Link(100.0, 1.0), 1, 400) == 0
    assert ring(Link(100.0, 1.0), 2, 400, messages=3) == 3 * 1 + 200 / 100
    assert 2 * ring(Link(100.0, 1.0), 4, 400) == 12  # an all-reduce


def test_data_ranks_by_hand() -> None:
    cluster = replace(DEVICE, devices_per_node=4, intra_node=Link(1e3, 0.0))  # so slow that nothing is hidden
    share, setting = known()[1, 1], Setting(Layout(data=4), 2, 1)
    blocks = sum(p.numel() * 4 for name, p in share.module.named_parameters() if name.startswith("layers."))
    outside = sum(p.numel() * 4 for name, p in share.module.named_parameters() if not name.startswith("layers."))
    found = Estimate(share, cluster).seconds(setting)
    gathered = 2 * (2 * blocks + outside) + (blocks + outside)  # in two micro-batches; reduced once
    assert found.data + found.compute == pytest.approx(gathered * 3 / 4 / 1e3)
    fast = Estimate(share, replace(cluster, intra_node=Link(1e12, 0.0))).seconds(setting)
    assert 0 < fast.data < 0.1 * fast.compute  # hidden, but for one block's
    waiting = Estimate(share, replace(cluster, overlap=False)).seconds(setting)
    assert waiting.data == pytest.approx(gathered * 3 / 4 / 1e3)


def test_copies_are_summed_over_the_far_link() -> None:
    share = known()[1, 1]
    cluster = Cluster(2, 2, 10**9, 1e12, NO_TIME, Link(1e3, 0.0), usable=1.0)
    weights = sum(p.numel() * 4 for p in share.module.parameters())
    found = Estimate(share, cluster).seconds(Setting(Layout(data=4, replicate=2), 1, 1))
    # Two pairs share a node's link; each sums a half of the gradients.
    assert found.data + found.compute == pytest.approx(2 * (weights / 2) / 2 / (1e3 / 2))


def test_tensor_ranks_by_hand() -> None:
    share = known()[2, 1]
    cluster = replace(DEVICE, devices_per_node=2, intra_node=Link(1e6, 1e-3))
    found = Estimate(share, cluster).seconds(Setting(Layout(tensor=2), 1, 3))
    parts = share.growth.at(3).parts
    moved = sum(part.tensor.gathered + 2 * part.tensor.summed for part in parts)
    assert found.tensor == pytest.approx(2 * (sum(p.tensor.times for p in parts) * 1e-3 + moved / 2 / 1e6))


def test_context_ranks_by_hand() -> None:
    share = mixtures()[1, 2]
    cluster = replace(DEVICE, devices_per_node=2, intra_node=Link(1e6, 1e-3))
    found = Estimate(share, cluster).seconds(Setting(Layout(context=2), 3, 1))
    hidden, blocks = 16 * 64 * 4, 2
    swaps = 2 * blocks  # queries, keys and values are given for heads, and what attention returns for time
    swapped = blocks * (3 + 1) * hidden / 2
    forward = swaps * 1e-3 + swapped / 2 / 1e6 + (1e-3 + hidden / 2 / 1e6)  # and a gather after the last block
    trained = sum(p.numel() * 4 for name, p in share.module.layers.named_parameters())  # type: ignore[union-attr]
    sums = 2 * (blocks * 1e-3 + trained / 2 / 1e6)
    assert found.context == pytest.approx(3 * (2 * forward + sums))
    assert found.communication == pytest.approx(found.context / found.total)


def test_expert_ranks_by_hand() -> None:
    share = mixtures()[1, 1]
    cluster = Cluster(2, 2, 10**9, 1e12, Link(1e6, 1e-3), Link(1e5, 1e-2))
    found = Estimate(share, cluster).seconds(Setting(Layout(data=4, expert=4), 1, 2))
    rows, blocks = 2 * 16 * 2, 2  # two rows of tokens with two experts each
    there = rows * 64 * 4  # and back; of four ranks one is a neighbour, and two are behind the link of two devices
    forward = 2 * there * 2 / 4 / (1e5 / 2) + 8 * 8 * 2 / 4 / (1e5 / 2) + 3 * 1e-2  # how many come is exchanged first
    assert found.expert == pytest.approx(2 * blocks * forward)
    alone = Estimate(share, cluster).seconds(Setting(Layout(data=4), 1, 2))
    assert alone.expert == 0 and alone.compute == found.compute
    assert alone.data > found.data  # each rank has its experts whole, and gathers them from nobody


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8)])
def test_a_pipeline_of_equal_stages_has_the_published_bubble(ranks: int, microbatches: int) -> None:
    cluster = replace(DEVICE, devices_per_node=ranks, intra_node=NO_TIME)
    share = known()[1, 1]
    estimate = Estimate(share, cluster)
    found = estimate.seconds(Setting(Layout(pipeline=ranks), microbatches, 1, ONE_F_ONE_B))
    assert found.bubble == pytest.approx((ranks - 1) / (microbatches + ranks - 1))
    interleaved = estimate.seconds(Setting(Layout(pipeline=2), microbatches, 1, INTERLEAVED))
    assert interleaved.bubble == pytest.approx(1 / (2 * microbatches + 1))
    zero = estimate.seconds(Setting(Layout(pipeline=2), microbatches, 1, ZBV))
    assert zero.bubble < interleaved.bubble


def test_messages_between_stages() -> None:
    cluster = replace(DEVICE, devices_per_node=2, intra_node=Link(1e6, 1e-3))
    found = Estimate(known()[1, 1], cluster).seconds(Setting(Layout(pipeline=2), 4, 1, ONE_F_ONE_B))
    assert found.pipeline == pytest.approx(4 * 2 * (1e-3 + 16 * 64 * 4 / 1e6))


# ---- bytes


def test_activations_are_those_of_the_micro_batches_under_way() -> None:
    share = known()[1, 1]
    estimate = Estimate(share, replace(DEVICE, devices_per_node=2))
    first, last = estimate.stages(2)
    work = share.growth.at(1)
    on_first = work.kept_bytes(range(first.stop + 1), None)
    on_last = work.kept_bytes(range(last.start + 1, 10), None)
    found = estimate.bytes(Setting(Layout(pipeline=2), 8, 1, ONE_F_ONE_B))
    assert found.activations in (2 * on_first, on_last)
    assert estimate.bytes(Setting(Layout(pipeline=2), 1, 8, ONE_F_ONE_B)).activations > found.activations


def test_what_is_whole_for_a_while() -> None:
    share = known()[1, 1]
    estimate = Estimate(share, replace(DEVICE, devices_per_node=2))
    weights = sum(p.numel() * 4 for p in share.module.parameters())
    block = sum(p.numel() * 4 for p in share.module.layers[0].parameters())  # type: ignore[index, union-attr]
    outside = weights - 8 * block
    assert estimate.bytes(Setting(Layout(), 1, 1)).gathered == 0
    assert estimate.bytes(Setting(Layout(data=2), 1, 1)).gathered == outside + 2 * block + outside + block
    assert estimate.bytes(Setting(Layout(data=2), 2, 1)).gathered == outside + 2 * block + weights


def test_offload_moves_what_is_divided_to_the_host() -> None:
    cluster = replace(DEVICE, devices_per_node=2, host=Host(10**9, 1e9))
    estimate = Estimate(known()[1, 1], cluster)
    here, there = (estimate.bytes(Setting(Layout(data=2), 1, 1, offload=offload)) for offload in (False, True))
    assert (there.parameters, there.gradients, there.optimizer) == (0, 0, 0)
    assert there.host == here.parameters + here.gradients + here.optimizer
    assert estimate.seconds(Setting(Layout(data=2), 1, 1, offload=True)).host > 0


def test_experts_lie_on_expert_ranks_and_their_copies() -> None:
    share = mixtures()[1, 1]
    estimate = Estimate(share, replace(DEVICE, devices_per_node=8))
    experts = sum(p.numel() * 4 for name, p in share.module.named_parameters() if name in share.of_experts)
    rest = sum(p.numel() * 4 for p in share.module.parameters()) - experts
    assert rest > 0 and experts == 2 * 8 * 3 * 64 * 32 * 4
    for expert in (2, 4, 8):
        bytes = estimate.bytes(Setting(Layout(data=8, expert=expert), 1, 1))
        assert bytes.parameters == bytes.gradients == (rest + experts) / 8
        fewer = estimate.bytes(Setting(Layout(data=8), 1, 1))
        # No two of eight ranks have the same experts: they are not gathered.
        assert bytes.gathered == fewer.gathered - 3 * experts / 2 * (1 - 1 / expert if expert < 8 else 1)
    # Two ranks that have one expert can't divide it, as nine can't divide the router's eight rows.
    router = 2 * 8 * 64 * 4
    lonely = estimate.bytes(Setting(Layout(data=16, expert=8), 1, 1))
    assert lonely.parameters == (rest - router) / 16 + router / 8 + experts / 8
    whole, half = (Estimate(mixtures()[1, n], DEVICE).bytes(Setting(Layout(context=n), 1, 1)) for n in (1, 2))
    assert half.activations < 0.6 * whole.activations and half.parameters == whole.parameters
    assert half.buffers > 2 * experts / 2  # in which gradients of a block are summed


# ---- search


def brute_force(shares: dict[tuple[int, int], Share], cluster: Cluster, rows: int) -> float:
    """Seconds of the best of everything that there is."""
    found = []
    for (tensor, context), share in shares.items():
        estimate, depth = Estimate(share, cluster), share.plan.depth
        sizes = [n for n in range(1, cluster.devices + 1) if cluster.devices % n == 0]
        for data, pipeline, expert in product(sizes, sizes, (1, 2, 4, 8)):
            if data * tensor * pipeline * context != cluster.devices or rows % data or pipeline > depth:
                continue
            if expert > 1 and (share.spread is None or data * context % expert):
                continue
            for copies, many in product(range(1, data + 1), range(1, rows // data + 1)):
                if data % copies or rows // data % many or (expert > 1 and copies > 1):
                    continue
                layout = Layout(data, tensor, pipeline, context, expert, copies)
                for schedule in SCHEDULES if pipeline > 1 else (NONE,):
                    if pipeline * schedule.each > depth or not schedule.takes(pipeline, many):
                        continue
                    for recompute, offload in REMEDIES:
                        if (offload and not cluster.host) or (recompute and not schedule.recomputes):
                            continue
                        if recompute == "selective" and expert > 1:
                            continue
                        setting = Setting(layout, many, rows // data // many, schedule, recompute, offload)
                        if fits(estimate.bytes(setting), cluster):
                            found.append(estimate.seconds(setting).total)
    return min(found)


CLUSTER = Cluster(2, 4, 3 * 10**6, 1e9, Link(1e9, 1e-5), Link(1e8, 1e-4), host=Host(10**8, 1e7), usable=1.0)


@pytest.mark.parametrize("memory", [800_000, 10**6, 2 * 10**6, 10**8])
@pytest.mark.parametrize("rows", [8, 24])
def test_nothing_is_better_than_the_first(memory: int, rows: int) -> None:
    cluster = replace(CLUSTER, memory=memory)
    found = search(known(), cluster, rows)
    assert found[0].seconds.total == brute_force(known(), cluster, rows)
    assert all(fits(choice.bytes, cluster) for choice in found)
    assert [choice.seconds.total for choice in found] == sorted(choice.seconds.total for choice in found)
    assert len({choice.layout for choice in found}) == len(found)
    assert Layout.best(known(), cluster, rows) == found[0].layout


@pytest.mark.parametrize(("memory", "flops"), [(10**6, 1e9), (10**6, 1e10), (10**9, 1e10)])
def test_nothing_is_better_with_context_and_expert_ranks(memory: int, flops: float) -> None:
    cluster = replace(CLUSTER, memory=memory, flops=flops, host=None)
    found = search(mixtures(), cluster, 8)
    assert found[0].seconds.total == brute_force(mixtures(), cluster, 8)
    assert found[0].layout.expert > 1
    assert any(choice.layout.context > 1 < choice.layout.expert for choice in found)
    assert not any(c.layout.expert > 1 and c.setting.recompute == "selective" for c in found)


def test_context_ranks_where_rows_are_few_and_long() -> None:
    """One row can't be divided over data ranks."""
    cluster = Cluster(1, 2, 10**9, 1e9, Link(1e9, 1e-6))
    found = search(mixtures(), cluster, 1)
    assert [choice.layout for choice in found] == [Layout(context=2, expert=2), Layout(context=2), Layout(pipeline=2)]
    assert found[0].seconds.context < found[1].seconds.context  # which sums the gradients of all experts


def test_more_memory_is_never_slower() -> None:
    times = []
    for memory in (600_000, 700_000, 800_000, 10**6, 1_200_000, 2 * 10**6, 10**7):
        try:
            times.append(search(known(), replace(CLUSTER, memory=memory), 16)[0].seconds.total)
        except LayoutError:
            times.append(float("inf"))
    assert times == sorted(times, reverse=True)
    assert len(set(times)) > 2  # memory matters here


def test_faster_links_and_devices_are_never_slower() -> None:
    plain = search(known(), CLUSTER, 16)[0].seconds.total
    assert search(known(), replace(CLUSTER, inter_node=Link(1e9, 1e-4)), 16)[0].seconds.total <= plain
    assert search(known(), replace(CLUSTER, flops=1e10), 16)[0].seconds.total < plain


def test_tensor_ranks_stay_inside_a_node() -> None:
    alone = replace(CLUSTER, nodes=8, devices_per_node=1, memory=10**8)
    found = search(known(), alone, 16)
    inside = [choice.layout.tensor == 1 for choice in found]
    assert inside == sorted(inside, reverse=True) and inside[0] and not inside[-1]


def test_what_does_not_fit_says_what_the_leanest_needs() -> None:
    with pytest.raises(LayoutError, match=r"nothing fits 2 nodes of 4 devices.*the leanest, Layout\(.*needs .* GB"):
        search(known(), replace(CLUSTER, memory=1000), 16)


def test_a_batch_that_no_layout_divides() -> None:
    eleven = replace(CLUSTER, nodes=1, devices_per_node=11)  # more than there are blocks
    with pytest.raises(LayoutError, match="no layout of the model has 11 devices and divides a global batch of 5 rows"):
        search(known(), eleven, 5)
