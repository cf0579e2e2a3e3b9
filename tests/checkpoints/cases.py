"""A module that is cut by hand, as the strategy cuts it, so that checkpoints are tested alone."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_bharat.plan.layout import Layout
from lightning_bharat.plan.shards import TensorSlice, gather

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(3))  # fewer rows than ranks: some hold none of it


class Net(nn.Module):
    """Tied embedding and head, fused qkv, weights that are cut along both dimensions, some that are not, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 12, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.tensor([3, 4]))


def cut_of(name: str, ranks: int, rank: int) -> TensorSlice | None:
    if ranks == 1:
        return None
    if ".qkv." in name:
        return TensorSlice(0, (WIDTH, WIDTH, WIDTH), ranks, rank)
    if name.endswith("out.weight"):
        return TensorSlice(1, (WIDTH,), ranks, rank)
    if name == "embedding.weight":
        return TensorSlice(0, (12,), ranks, rank)
    return None


class Case:
    """One rank of ``Net`` under ``layout``, with AdamW of two groups whose state is given, not trained."""

    def __init__(self, layout: Layout, seed: int) -> None:
        if layout.devices > 1:
            dist.init_process_group("gloo")
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.rank, self.layout, self.here = rank, layout, layout.coordinates(rank)
        torch.manual_seed(seed)
        self.module = Net()
        self.whole = {name: torch.randn(p.shape) for name, p in self.module.named_parameters()}
        keys = ("exp_avg", "exp_avg_sq")
        self.moments = {key: {n: torch.randn(p.shape) for n, p in self.whole.items()} for key in keys}
        self.slices = {
            name: cut for name in self.whole if (cut := cut_of(name, layout.tensor, self.here["tensor"])) is not None
        }
        self.tensor_group = None
        if layout.devices > 1:
            self._spread()
        parameters = dict(self.module.named_parameters())
        decay = [p for name, p in parameters.items() if name.endswith("weight")]
        rest = [p for name, p in parameters.items() if not name.endswith("weight")]
        self.optimizer = torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=0.1)

    def _spread(self) -> None:
        for name, cut in self.slices.items():
            owner, _, last = name.rpartition(".")
            module = self.module.get_submodule(owner)
            setattr(module, last, nn.Parameter(cut.take(getattr(module, last).detach())))
        self.module.head.weight = self.module.embedding.weight
        mesh = self.layout.mesh("cpu")
        self.tensor_group = mesh["tensor_parallel"].get_group()
        if self.layout.replicate > 1:
            shards = self.layout.data // self.layout.replicate
            mesh = dist.device_mesh.init_device_mesh("cpu", (self.layout.replicate, shards), mesh_dim_names=("r", "s"))
        elif self.layout.data > 1:
            mesh = mesh["data_parallel"]
        else:
            return
        for block in self.module.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.module, mesh=mesh)

    def give_values(self) -> None:
        """Weights and optimizer state from ``whole`` and ``moments``; the last parameter has no state yet."""
        from lightning_bharat.plan.shards import fill

        parameters = dict(self.module.named_parameters())
        for name, p in parameters.items():
            fill(p, self.slices.get(name), self.whole[name])
            if name == "blocks.1.scale":
                continue
            state = {"step": torch.tensor(7.0)}
            for key, values in self.moments.items():
                state[key] = torch.zeros_like(p.detach())
                fill(state[key], self.slices.get(name), values[name])
            self.optimizer.state[p] = state
        self.optimizer.param_groups[1]["lr"] = 0.025

    def gathered(self) -> dict[str, Tensor]:
        """Weights and optimizer state, whole, by readable names."""
        found = {"seen": self.module.seen.clone()}
        for name, p in self.module.named_parameters():
            cut = self.slices.get(name)
            found[name] = gather(p, cut, self.tensor_group).clone()
            for key, value in self.optimizer.state.get(p, {}).items():
                found[f"{name} {key}"] = value if key == "step" else gather(value, cut, self.tensor_group).clone()
        return found

    def expected(self) -> dict[str, Tensor]:
        """What :meth:`gathered` finds after :meth:`give_values`."""
        found = {"seen": torch.tensor([3, 4]), **self.whole}
        for key, values in self.moments.items():
            found |= {f"{name} {key}": v for name, v in values.items() if name != "blocks.1.scale"}
        found |= {f"{name} step": torch.tensor(7.0) for name in self.whole if name != "blocks.1.scale"}
        return found
