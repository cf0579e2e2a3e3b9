"""Parts of parameters: what ranks hold, put together again, is the whole parameter, exactly and once."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_bharat.plan.layout import Layout
from lightning_bharat.plan.shards import TensorSlice, fill, gather, pieces, rows_of_shard, shape_of_whole
from tests.ranks import run_ranks

quick = settings(max_examples=60, deadline=None)


@st.composite
def cut_parameters(draw: st.DrawFn) -> tuple[Tensor, list[TensorSlice]]:
    """A whole parameter of distinct numbers, and the slices of all tensor ranks."""
    ranks = draw(st.integers(1, 4))
    parts = tuple(ranks * draw(st.integers(1, 3)) for _ in range(draw(st.integers(1, 3))))
    shape = [draw(st.integers(1, 4)) for _ in range(draw(st.integers(1, 3)))]
    dim = draw(st.integers(0, len(shape) - 1))
    shape[dim] = sum(parts)
    whole = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    return whole, [TensorSlice(dim, parts, ranks, rank) for rank in range(ranks)]


@quick
@given(cut_parameters())
def test_join_is_the_inverse_of_take(case: tuple[Tensor, list[TensorSlice]]) -> None:
    whole, slices = case
    taken = [cut.take(whole) for cut in slices]
    assert torch.equal(slices[0].join(taken), whole)
    assert all(cut.shape_of_whole(piece.shape) == tuple(whole.shape) for cut, piece in zip(slices, taken, strict=True))
    assert all(piece.data_ptr() != whole.data_ptr() for piece in taken)


@quick
@given(cut_parameters())
def test_pieces_cover_the_whole_once(case: tuple[Tensor, list[TensorSlice]]) -> None:
    whole, slices = case
    rebuilt, times = torch.full_like(whole, -1), torch.zeros_like(whole)
    for cut in slices:
        local = cut.take(whole)
        for piece in pieces(local, cut):
            assert piece.local.untyped_storage().data_ptr() == local.untyped_storage().data_ptr()
            index = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.local.shape, strict=True))
            rebuilt[index] = piece.local
            times[index] += 1
    assert torch.equal(rebuilt, whole)
    assert bool((times == 1).all())


@quick
@given(cut_parameters())
def test_fill_is_take_in_place(case: tuple[Tensor, list[TensorSlice]]) -> None:
    whole, slices = case
    for cut in slices:
        local = torch.zeros_like(cut.take(whole))
        fill(local, cut, whole)
        assert torch.equal(local, cut.take(whole))


def test_uncut_tensors_are_one_piece() -> None:
    scalar, vector = torch.tensor(3.0), torch.arange(3.0)
    assert [(p.offsets, p.local.item()) for p in pieces(scalar, None)] == [((), 3.0)]
    assert [(p.offsets, p.local.tolist()) for p in pieces(vector, None)] == [((0,), [0, 1, 2])]
    target = torch.zeros(())
    fill(target, None, scalar)
    assert target == 3
    assert pieces(torch.empty(0, 4), None) == []


class Uneven(nn.Module):
    """Parameters whose rows the data ranks can't share evenly, cut over tensor ranks or not."""

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__()
        self.wholes = {
            "rows": torch.arange(20.0).reshape(10, 2),
            "columns": torch.arange(30.0).reshape(5, 6),
            "fused": torch.arange(24.0).reshape(12, 2),
            "bias": torch.arange(6.0),
            "uncut": torch.arange(21.0).reshape(7, 3),
            "few": torch.arange(2.0).reshape(1, 2),
        }
        self.slices = {
            "rows": TensorSlice(0, (10,), ranks, rank),
            "columns": TensorSlice(1, (6,), ranks, rank),
            "fused": TensorSlice(0, (4, 6, 2), ranks, rank),
            "bias": TensorSlice(0, (6,), ranks, rank),
        }
        for name, whole in self.wholes.items():
            self.register_parameter(name, nn.Parameter(self.slices[name].take(whole) if name in self.slices else whole))


def two_dimensions(data: int, tensor: int) -> dict[str, list]:
    dist.init_process_group("gloo")
    mesh = Layout(data=data, tensor=tensor).mesh("cpu")
    group = mesh["tensor_parallel"].get_group()
    module = Uneven(dist.get_rank(group), tensor)
    wholes, slices = module.wholes, module.slices
    fully_shard(module, mesh=mesh["data_parallel"])
    found = {}
    for name, parameter in module.named_parameters():
        cut = slices.get(name)
        assert isinstance(parameter, DTensor)
        assert shape_of_whole(parameter, cut) == tuple(wholes[name].shape)
        assert torch.equal(gather(parameter, cut, group), wholes[name]), name
        found[name] = [(piece.offsets, piece.local.clone()) for piece in pieces(parameter, cut)]
        fill(parameter, cut, wholes[name] + 100)
        assert torch.equal(gather(parameter, cut, group), wholes[name] + 100), name
    return found


@pytest.mark.parametrize(("data", "tensor"), [(4, 1), (3, 1), (2, 2)])
def test_pieces_of_uneven_shards_cover_the_whole_once(data: int, tensor: int) -> None:
    ranks = run_ranks(two_dimensions, data * tensor, data, tensor)
    for name, whole in Uneven(0, tensor).wholes.items():
        times = torch.zeros_like(whole)
        for rank, found in enumerate(ranks):
            for offsets, local in found[name]:
                index = tuple(slice(o, o + n) for o, n in zip(offsets, local.shape, strict=True))
                assert torch.equal(whole[index], local), (name, rank)
                times[index] += 1
        copies = tensor if name in ("uncut", "few") else 1  # tensor ranks share what is not cut
        assert bool((times == copies).all()), name


def copies_of_shards() -> list:
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    module = nn.Linear(3, 5, bias=False)
    nn.init.constant_(module.weight, 1)
    fully_shard(module, mesh=mesh)
    first, local = rows_of_shard(module.weight)
    wrong = distribute_tensor(torch.zeros(4, 4), mesh, [Replicate(), Shard(1)])
    try:
        rows_of_shard(wrong)
    except ValueError as error:
        return [first, tuple(local.shape), str(error)]
    return []


def test_replicated_shards_start_where_their_copy_does() -> None:
    found = run_ranks(copies_of_shards, 4)
    assert [first for first, _, _ in found] == [0, 3, 0, 3]
    assert [shape for _, shape, _ in found] == [(3, 3), (2, 3), (3, 3), (2, 3)]
    assert all("are not those of fully_shard along dimension 0" in message for _, _, message in found)
