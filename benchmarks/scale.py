"""Decoders of 10¹² parameters on 4096 devices of 80 GB: planned on ``meta``, and really cut for some of the ranks.

    python -m benchmarks.scale
    python -m benchmarks.scale --model mixture

One is dense, one a mixture of experts. The planner's tables for two sizes of a batch come first. Then the strategy's
own cuts (tensor ranks, sequence, experts, stages, FSDP2) are applied to the module on ``meta`` under torch's fake
process group, as each of a few ranks of the fastest layout of each table; bytes of local parameters, gradients and
AdamW's states are compared with the planner's. These ranks are the first data ranks, which are the fullest: FSDP2
divides rows of weights, and the last data ranks get fewer, or none.

A cut is proven on one block with real numbers, and a block of these decoders has eight or sixteen billion weights. So
their cuts are proven on a narrow decoder with as many heads, and widened.

The goals, of each: planned in less than a minute; parameters, gradients and optimizer states of every rank within 5 %
of the planner's, in less than five minutes and 8 GB of host memory. Exit code 1: a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_bharat import Layout
from lightning_bharat.commands.counted import Cuts, counted
from lightning_bharat.commands.planner import layouts_table
from lightning_bharat.commands.table import size, table
from lightning_bharat.models import GPTConfig, GPTModule
from lightning_bharat.plan.blocks import find_units
from lightning_bharat.plan.cluster import Cluster, Link
from lightning_bharat.plan.cut_context import ContextCut, cut_context
from lightning_bharat.plan.elsewhere import is_elsewhere
from lightning_bharat.plan.estimate import Estimate
from lightning_bharat.plan.exchange import ProcessPeers
from lightning_bharat.plan.experts import ProcessRoutes, cut_experts, find_experts
from lightning_bharat.plan.find import find_plan
from lightning_bharat.plan.find_context import find_context_cut
from lightning_bharat.plan.memory import State, optimizer_state
from lightning_bharat.plan.model_plan import Column, Cut, ModelPlan
from lightning_bharat.plan.partition import by_cost
from lightning_bharat.plan.prove_experts import prove_experts
from lightning_bharat.plan.search import Choice, search
from lightning_bharat.plan.share import Setting, Share
from lightning_bharat.strategies.data import DataShards, local
from lightning_bharat.strategies.stage import keep_own
from lightning_bharat.strategies.tensor import cut_module

WORDS, TIME = 51_200, 2048
ROWS = (4096, 512)


@dataclass(frozen=True)
class Model:
    """A decoder, and one with as many heads on which its cuts are proven.

    Attributes:
        contexts: numbers of context ranks to plan with.
    """

    wide: GPTConfig
    narrow: GPTConfig
    contexts: tuple[int, ...] = (1,)


_CHOICE: dict[str, Any] = {"scoring_func": "sigmoid", "num_shared_experts": 1, "bias_update_speed": 0.001}
MODELS = {
    "dense": Model(
        GPTConfig(WORDS, 160 * 160, num_hidden_layers=128, num_attention_heads=160),
        GPTConfig(WORDS, 2 * 160, num_hidden_layers=2, num_attention_heads=160),
    ),
    "mixture": Model(
        GPTConfig(
            *(WORDS, 7168, None, 64, 64),
            **(_CHOICE | {"num_experts": 512, "num_experts_per_tok": 8, "moe_intermediate_size": 1440}),
        ),
        GPTConfig(
            *(WORDS, 2 * 64, None, 2, 64),
            **(_CHOICE | {"num_experts": 16, "num_experts_per_tok": 8, "moe_intermediate_size": 64}),
        ),
        contexts=(1, 2, 4, 8),
    ),
}
CLUSTER = Cluster(
    nodes=512,
    devices_per_node=8,
    memory=80 * 10**9,
    flops=312e12,
    intra_node=Link(300e9, 5e-6),
    inter_node=Link(200e9, 10e-6),
)
MINUTE, MINUTES, HOST, NEAR = 60, 300, 8 * 10**9, 0.05
QUANTITIES = ("parameters", "gradients", "optimizer")


@dataclass(frozen=True)
class Rank:
    """One rank that was really cut: bytes by the planner and of its local tensors."""

    layout: str
    rank: int
    planned: dict[str, float]
    cut: dict[str, int]
    seconds: float

    @property
    def apart(self) -> float:
        """The largest relative difference."""
        return max(abs(self.planned[name] / self.cut[name] - 1) for name in QUANTITIES)


def loss(module: Any, batch: dict[str, Tensor]) -> Tensor:
    """Of a step."""
    return module._loss(batch)


def on_meta(config: GPTConfig) -> tuple[GPTModule, dict[str, Tensor]]:
    """The decoder, and a batch for it."""
    ids = torch.zeros(2, TIME, dtype=torch.long)
    with torch.device("meta"):
        return GPTModule(config), {"input_ids": ids, "labels": ids}


def widened(proven: ModelPlan, narrow: GPTModule, wide: GPTModule, observed: ModelPlan) -> ModelPlan:
    """The cuts of ``narrow``, for a module of the same structure with other widths."""

    def of(cut: Cut, prefix: tuple[str, str]) -> Cut:
        columns = []
        for column in cut.columns:
            sizes = [
                module.get_submodule(f"{at}{column.module}").weight.shape[0]  # type: ignore[union-attr, operator]
                for module, at in zip((narrow, wide), prefix, strict=True)
            ]
            columns.append(Column(column.module, tuple(part * sizes[1] // sizes[0] for part in column.parts)))
        same = cut.units == sum(cut.columns[0].parts)  # channels, which are as many as the module is wide
        return replace(cut, columns=tuple(columns), units=sum(columns[0].parts) if same else cut.units)

    inside = tuple(f"{plan.block_names(module)[0]}." for plan, module in ((proven, narrow), (observed, wide)))
    return replace(
        observed,
        cuts={kind: tuple(of(cut, (inside[0], inside[1])) for cut in cuts) for kind, cuts in proven.cuts.items()},
        outside=tuple(of(cut, ("", "")) for cut in proven.outside),
        sequence=proven.sequence,
        loss=proven.loss,
        summed=proven.summed,
        proven=proven.proven,
    )


def shares(of: Model, tensors: Sequence[int] = (1, 2, 4, 8)) -> dict[tuple[int, int], Share]:
    """What tensor and context ranks of a node hold and do, for each number of them; cuts are proven on a narrow
    decoder."""
    wide, batch = on_meta(of.wide)
    narrow, small = on_meta(of.narrow)
    plans = {1: find_plan(wide, in_bfloat16, batch, 1)}
    for tensor in {*tensors} - {1}:
        plans[tensor] = widened(find_plan(narrow, loss, small, tensor), narrow, wide, plans[1])
    sequences = {
        n: replace(find_context_cut(narrow, loss, small, n), kinds=plans[1].kinds) for n in of.contexts if n > 1
    }
    if experts := find_experts(narrow):
        prove_experts(narrow, experts, experts[0].experts)
    found = {}
    for tensor, context in product(tensors, of.contexts):
        if CLUSTER.devices_per_node % (tensor * context) == 0:
            cuts = Cuts(plans[tensor], tensor, context, sequences.get(context), bool(experts))
            found[tensor, context] = counted(wide, cuts, in_bfloat16, batch, TIME, _state, found.get((tensor, 1)))
    return found


def _state(module: Any) -> State:
    return optimizer_state([module.configure_optimizers()])


def in_bfloat16(module: Any, batch: dict[str, Tensor]) -> Tensor:
    """A step under ``precision="bf16-mixed"``."""
    with torch.autocast("cpu", torch.bfloat16):
        return loss(module, batch)


def cut(setting: Setting, plan: ModelPlan, rank: int, config: GPTConfig) -> dict[str, int]:
    """Cut the decoder as ``rank`` of the setting's layout does; bytes of its local tensors."""
    layout, schedule = setting.layout, setting.schedule
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.devices)
    try:
        mesh, (module, _) = layout.mesh("cpu"), on_meta(config)
        stages = by_cost(plan, layout.pipeline * schedule.each)
        if layout.tensor > 1:
            peers = ProcessPeers(mesh["tensor_parallel"].get_group())
            sequence = layout.context == layout.expert == 1
            cut_module(module, plan, peers, sequence=sequence, loss=True, stages=stages)
        if layout.context > 1:  # divides no weights
            cut_context(module, _sequence(plan), ProcessPeers(mesh["context_parallel"].get_group()), stages)
        experts, copies = [], None
        if layout.expert > 1:
            of_experts = layout.expert_mesh("cpu")
            routes, copies = ProcessRoutes(of_experts["expert_parallel"].get_group()), of_experts["expert_copies"]
            for found in find_experts(module):
                cut_experts(module.get_submodule(found.name), found, routes)
                experts.append(found.name)
        units = find_units(module)
        if layout.pipeline > 1:
            mine = schedule.stages_of(layout.coordinates(rank)["pipeline"], layout.pipeline)
            keep_own(module, plan, stages, mine, torch.device("meta"))
            units = [name for name in units if not any(map(is_elsewhere, module.get_submodule(name).parameters()))]
        if layout.data > 1 or layout.expert > 1:
            alone: list[torch.nn.Parameter] = []
            if copies is not None and copies.size() == 1 and layout.pipeline == 1:  # as the strategy leaves them
                alone, experts = [p for name in experts for p in module.get_submodule(name).parameters()], []
            DataShards(module, _of_data(layout, mesh), units, None, False, experts, copies, None, alone)
        held = [p for p in module.parameters() if not is_elsewhere(p)]
        state = optimizer_state([module.configure_optimizers()])
        return {
            "parameters": _bytes(held),
            "gradients": _bytes(p.grad for p in held if p.grad is not None),
            "optimizer": _bytes(t for p in held for t in state.get(p, ())),
        }
    finally:
        dist.destroy_process_group()


def _sequence(plan: ModelPlan) -> ContextCut:
    return ContextCut("[0][0]", plan.kinds, {kind: {} for kind in plan.kinds})


def _of_data(layout: Layout, mesh: DeviceMesh) -> DeviceMesh:
    if layout.replicate == 1:
        return mesh["data_parallel"]
    same = layout.context * layout.tensor
    shape = (layout.pipeline, layout.replicate, layout.data // layout.replicate, same)
    return init_device_mesh("cpu", shape, mesh_dim_names=("stages", "replicate", "shard", "same"))["replicate", "shard"]


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.itemsize for t in map(local, tensors))


def compared(choice: Choice, share: Share, config: GPTConfig) -> list[Rank]:
    """Ranks of the first, the middle and the last stage, really cut."""
    estimate, layout, found = Estimate(share, CLUSTER), choice.layout, []
    for stage in sorted({0, layout.pipeline // 2, layout.pipeline - 1}):
        rank, start = layout.rank(pipeline=stage, tensor=stage % layout.tensor), time.perf_counter()
        bytes, said = cut(choice.setting, share.plan, rank, config), estimate.static(choice.setting, stage)
        planned = {name: getattr(said, name) for name in QUANTITIES}
        found.append(Rank(str(layout), rank, planned, bytes, time.perf_counter() - start))
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Plan and cut; returns the exit code."""
    form: Any = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.scale", description=__doc__, formatter_class=form)
    parser.add_argument("--model", action="append", choices=list(MODELS), help="may be given again (default: all)")
    options = parser.parse_args(words)
    return max(measured(name) for name in options.model or MODELS)


def measured(name: str) -> int:
    """Plan and cut one of :data:`MODELS`; 1 where a goal is missed."""
    start, imported, model = time.perf_counter(), time.process_time(), MODELS[name]
    known = shares(model)
    plans = {rows: search(known, CLUSTER, rows) for rows in ROWS}
    seconds, cpu = time.perf_counter() - start, time.process_time() - imported
    parameters = sum(p.numel() for p in known[1, 1].module.parameters())
    print(f"{name}: {parameters / 1e12:.3f} × 10¹² parameters, bf16-mixed\n{CLUSTER}")
    for rows, found in plans.items():
        print(f"\n{rows} rows of {TIME} tokens\n{layouts_table(found)}")
    print(f"\nplanned in {seconds:.0f} s, {cpu:.0f} s of them on the CPU\n", flush=True)
    best = {str(found[0].layout): found[0] for found in plans.values()}
    of = {layout: (choice.layout.tensor, choice.layout.context) for layout, choice in best.items()}
    cuts = [rank for layout, choice in best.items() for rank in compared(choice, known[of[layout]], model.wide)]
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    total = time.perf_counter() - start
    head = ["layout", "rank", *(f"{name}{of}" for name in QUANTITIES for of in ("", " planned")), "apart", "took"]
    print(table(head, [_row(rank) for rank in cuts]))
    print(f"\n{total:.0f} s and {size(host)} of host memory in all")
    met = seconds < MINUTE and total < MINUTES and host < HOST and all(rank.apart <= NEAR for rank in cuts)
    line: dict[str, Any] = {
        "benchmark": "scale",
        "model": name,
        "torch": torch.__version__,
        "planned_s": seconds,
        "planned_cpu_s": cpu,
    }
    line |= {"all_s": total, "host": host, "ranks": [asdict(rank) for rank in cuts]}
    print(json.dumps({**line, "verdict": "met" if met else "missed"}))
    return int(not met)


def _row(rank: Rank) -> list[str]:
    pairs = [size(bytes) for name in QUANTITIES for bytes in (rank.cut[name], rank.planned[name])]
    return [rank.layout, str(rank.rank), *pairs, f"{rank.apart:.1%}", f"{rank.seconds:.1f} s"]


if __name__ == "__main__":
    sys.exit(main())
