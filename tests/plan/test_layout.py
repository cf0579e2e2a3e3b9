"""Layouts: sizes, names of ranks, and what is refused in which words."""

from __future__ import annotations

import doctest
from itertools import product

import pytest
import torch.distributed as dist

from lightning_bharat.plan import layout as layout_module
from lightning_bharat.plan.layout import Layout, LayoutError
from lightning_bharat.plan.model_plan import Column, Cut, ModelPlan
from tests.ranks import run_ranks

PLAN = ModelPlan(
    blocks="model.layers",
    kinds=("a",) * 4,
    cuts={
        "a": (
            Cut("heads", 6, (Column("attn.q", (48,)), Column("attn.k", (48,))), ("attn.o",)),
            Cut("channels", 96, (Column("mlp.up", (96,)),), ("mlp.down",)),
        )
    },
)


def test_docstrings_are_true() -> None:
    assert doctest.testmod(layout_module).failed == 0


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "2", None])
def test_size_must_be_a_positive_whole_number(size: object) -> None:
    with pytest.raises(LayoutError, match="tensor=.*a size is a whole number from 1 up"):
        Layout(tensor=size)  # type: ignore[arg-type]


def test_replicate_must_divide_data() -> None:
    with pytest.raises(LayoutError, match=r"data=6, replicate=4\): the copies must divide.*write replicate=3"):
        Layout(data=6, replicate=4)


def test_expert_must_divide_data_times_context() -> None:
    assert Layout(data=2, expert=2).devices == 2
    with pytest.raises(LayoutError, match="data × context = 4 ranks, which 3 does not divide; write expert=2"):
        Layout(data=2, context=2, expert=3)


def test_tensor_is_innermost_and_pipeline_outermost() -> None:
    layout = Layout(pipeline=2, data=2, tensor=2)
    assert [layout.coordinates(rank)["tensor"] for rank in range(4)] == [0, 1, 0, 1]
    assert layout.peers(5, "tensor") == [4, 5]
    assert layout.peers(5, "data") == [5, 7]
    assert layout.peers(5, "pipeline") == [1, 5]


def test_rank_is_the_inverse_of_coordinates() -> None:
    for data, tensor, pipeline, context in product((1, 2, 3), repeat=4):
        layout = Layout(data=data, tensor=tensor, pipeline=pipeline, context=context)
        places = [layout.coordinates(rank) for rank in range(layout.devices)]
        assert [layout.rank(**place) for place in places] == list(range(layout.devices))
        assert len({tuple(place.values()) for place in places}) == layout.devices


def test_peers_partition_the_ranks() -> None:
    layout = Layout(data=2, tensor=3, context=2)
    for axis in ("data", "tensor", "context"):
        groups = {tuple(layout.peers(rank, axis)) for rank in range(layout.devices)}
        assert sorted(rank for group in groups for rank in group) == list(range(layout.devices))


def test_names_of_ranks() -> None:
    assert Layout(data=4, tensor=2).name(5) == "rank 5 (data 2, tensor 1)"
    assert Layout(tensor=2).name(1) == "rank 1 (tensor 1)"
    assert Layout().name(0) == "rank 0"
    with pytest.raises(LayoutError, match=r"rank 4 is not one of the 4 ranks of Layout\(data=2, tensor=2\)"):
        Layout(data=2, tensor=2).name(4)


def test_parse() -> None:
    assert Layout.parse("data=2,tensor=4") == Layout(data=2, tensor=4)
    assert Layout.parse(" tensor = 2 ") == Layout(tensor=2)
    for wrong in ("tensor", "heads=2", "tensor=two", "tensor=-1", "", "data=2;tensor=2"):
        with pytest.raises(LayoutError, match="is not a dimension and its size; write data=2,tensor=2"):
            Layout.parse(wrong)


def test_devices_must_be_the_product() -> None:
    layout = Layout(data=2, tensor=2)
    layout.check(PLAN, devices=4)
    with pytest.raises(LayoutError, match="= 4 devices, and there are 6; write data_parallel_size=3 or devices=4"):
        layout.check(PLAN, devices=6)
    with pytest.raises(LayoutError, match="and there are 3; write devices=4$"):
        layout.check(PLAN, devices=3)


def test_tensor_must_divide_the_units_of_every_cut() -> None:
    Layout(tensor=6).check(PLAN)
    with pytest.raises(LayoutError) as refused:
        Layout(tensor=4).check(PLAN)
    assert str(refused.value) == (
        "tensor_parallel_size=4 does not divide the 6 heads of attn.q, attn.k; sizes that do: 1, 2, 3, 6"
    )


def test_no_more_stages_than_blocks() -> None:
    Layout(pipeline=4).check(PLAN)
    with pytest.raises(LayoutError, match="pipeline_parallel_size=5 is more than the 4 blocks of 'model.layers'"):
        Layout(pipeline=5).check(PLAN)


def test_legal_layouts_are_all_that_check_accepts() -> None:
    found = Layout.legal(PLAN, 12)
    assert Layout(data=12) in found and Layout(data=2, tensor=6) in found and Layout(tensor=3, pipeline=4) in found
    assert all(layout.devices == 12 for layout in found)
    assert not any(layout.tensor in (4, 12) or layout.pipeline > 4 for layout in found)
    assert len(found) == len(set(found)) == 12


def meshes() -> list:
    dist.init_process_group("gloo")
    mesh = Layout(data=2, tensor=2).mesh("cpu")
    try:
        Layout(data=8).mesh("cpu")
    except LayoutError as error:
        message = str(error)
    return [mesh.mesh_dim_names, mesh.mesh.tolist(), mesh.get_coordinate(), message]


def test_mesh_has_lightnings_names_and_the_order_of_ranks() -> None:
    for rank, (names, ranks, coordinate, message) in enumerate(run_ranks(meshes, 4)):
        assert names == ("data_parallel", "tensor_parallel")
        assert ranks == [[0, 1], [2, 3]]
        assert list(coordinate) == [rank // 2, rank % 2]
        assert message == "Layout(data=8) needs 8 ranks, and 4 were started"
