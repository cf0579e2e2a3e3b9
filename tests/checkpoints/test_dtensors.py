"""Modules that a person has parallelized with torch's own tools: DTensors of any placements are saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_bharat.checkpoints import Checkpoint, load_weights, optimizers, save, weights
from lightning_bharat.checkpoints.manifest import Manifest
from lightning_bharat.plan.layout import Layout
from tests.ranks import run_ranks

SIZES = {"one": (1, 1), "both": (2, 2), "tensor": (1, 2), "uneven": (3, 1), "columns": (2, 1)}


def build(kind: str, seed: int) -> nn.Module:
    data, tensor = SIZES[kind]
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4), nn.LayerNorm(4))
    if kind == "one":
        return module
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data", "tensor"))
    if tensor > 1:
        parallelize_module(module, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if data > 1:
        # uneven: 4 and 6 and 12 rows on 3 ranks; columns: sharded along the second dimension
        placed = (lambda p: Shard(p.ndim - 1)) if kind == "columns" else None
        fully_shard(module, mesh=mesh["data"], shard_placement_fn=placed)
    return module


def gathered(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {}
    for name, p in module.named_parameters():
        parts = {name: p.detach(), **{f"{name} {key}": v for key, v in optimizer.state[p].items()}}
        found |= {key: v.full_tensor() if isinstance(v, DTensor) else v.clone() for key, v in parts.items()}
    return found


def train_and_save(kind: str, folder: str) -> dict[str, Tensor]:
    module = build(kind, seed=1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.ones(2, 6) * (1 + torch.arange(6))).square().sum().backward()
        optimizer.step()
    names = weights.parameter_names(module)
    state = weights.as_shares(module.state_dict(), module, {}, first_replica=True)
    checkpoint = {"state_dict": state, "optimizer_states": [optimizers.state_by_name(optimizer, names, {})]}
    save(Path(folder), checkpoint, Manifest.of(checkpoint, Layout()))
    return gathered(module, optimizer)


def load(kind: str, folder: str) -> dict[str, Tensor]:
    module = build(kind, seed=2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    checkpoint = Checkpoint(Path(folder)).load()
    load_weights(module, {}, checkpoint["state_dict"])
    optimizers.load_state(optimizer, weights.parameter_names(module), {}, checkpoint["optimizer_states"][0])
    return gathered(module, optimizer)


@pytest.mark.parametrize("kind", SIZES)
def test_any_placement_loads_what_any_saved(tmp_path: Path, kind: str) -> None:
    data, tensor = SIZES[kind]
    expected = run_ranks(train_and_save, data * tensor, kind, str(tmp_path / "a.ckpt"))[0]
    assert len(expected) == 6 * 4
    for other in ("one", "both", "uneven"):
        ranks = SIZES[other][0] * SIZES[other][1]
        for found in run_ranks(load, ranks, other, str(tmp_path / "a.ckpt")):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], value) for key, value in expected.items()), other
