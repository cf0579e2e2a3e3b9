"""``bharat layout``: where a model can be cut, and what every layout on n devices would cost in bytes."""

from __future__ import annotations

from collections.abc import Collection

import lightning.pytorch as pl
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch.cli import LightningArgumentParser

from lightning_bharat.cluster.outcome import RanksFailed
from lightning_bharat.cluster.warm import PRELOAD, WarmServer
from lightning_bharat.commands.inspection import InspectionCLI, quiet
from lightning_bharat.commands.planner import planned
from lightning_bharat.commands.project import BAD_PROJECT, BadInput
from lightning_bharat.commands.shares import proven_plans, spreads, state_of
from lightning_bharat.commands.signature import say_error
from lightning_bharat.commands.table import size, table
from lightning_bharat.commands.timeline_ranks import run_step
from lightning_bharat.commands.why import why
from lightning_bharat.plan.blocks import find_units
from lightning_bharat.plan.cluster import Cluster
from lightning_bharat.plan.copies import copy_module
from lightning_bharat.plan.experts import find_experts
from lightning_bharat.plan.layout import Layout, LayoutError
from lightning_bharat.plan.memory import FirstOf, Memory, Spread, State, memory_per_rank
from lightning_bharat.plan.model_plan import ModelPlan
from lightning_bharat.plan.partition import by_cost, placed
from lightning_bharat.plan.share import number_of, parameters_of
from lightning_bharat.strategies.tensor import cut_module

DESCRIPTION = """\
Show where a model can be cut, and all its layouts on a number of devices with bytes per rank; or, for a cluster, the
ten fastest layouts that fit it.

The module is built on meta: a model of any size takes no memory. One batch of its data is read.

Example:
    bharat layout --devices 8 --model my.module.MyModel --data my.data.MyData
    bharat layout --devices 64 --config config.yaml
    bharat layout --cluster cluster.yaml --global_batch_size 1024 --sequence_length 4096 --config config.yaml
    bharat layout --timeline pipeline=2,data=2 --config config.yaml
"""


class LayoutCLI(InspectionCLI):
    """The parser of ``bharat layout``."""

    def add_options(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--devices", type=PositiveInt | None, default=None, help="Number of devices.")
        parser.add_argument(
            "--cluster",
            type=str,
            default=None,
            help="A YAML file with nodes, devices_per_node, memory, flops, intra_node and inter_node: plan for it.",
        )
        parser.add_argument("--detect", type=bool, default=False, help="Plan for this machine, as one node.")
        parser.add_argument(
            "--global_batch_size",
            type=PositiveInt | None,
            default=None,
            help="With a cluster: rows of an optimizer step, over all data ranks.",
        )
        parser.add_argument(
            "--sequence_length",
            type=PositiveInt | None,
            default=None,
            help="With a cluster: tokens of a row; those of the project's data if it is left out.",
        )
        parser.add_argument(
            "--timeline",
            type=str,
            default=None,
            help="A layout with a pipeline, such as pipeline=2,data=2: run a few of its steps on this machine's CPU, "
            "and write the timeline of one of them instead of the table.",
        )
        parser.add_argument("--folder", type=str, default="timeline", help="Where the timeline is written to.")


def main(words: list[str]) -> int:
    """Run ``bharat layout``."""
    quiet()
    try:
        cli = LayoutCLI("bharat layout", DESCRIPTION, words)
        if cli.config.timeline is not None:
            return follow(words, cli.config.timeline, cli.config.folder)
        if (cluster := _cluster(cli.config)) is not None:
            sizes = cli.config.global_batch_size, cli.config.sequence_length
            cli.look_on_meta(lambda trainer, module: print(planned(trainer, module, cluster, *sizes)))
            return 0
        if cli.config.devices is None:
            raise BadInput(
                "the number of devices is missing; write --devices 8, --cluster cluster.yaml or --timeline pipeline=2"
            )
        cli.look_on_meta(lambda trainer, module: print(describe(trainer, module, cli.config.devices)))
    except BAD_PROJECT as error:
        say_error("bharat layout", error)
        return 2
    return 0


def _cluster(config: Namespace) -> Cluster | None:
    """The cluster to plan for, if any."""
    if not (config.cluster or config.detect):
        for name in ("global_batch_size", "sequence_length"):
            if config[name] is not None:
                raise BadInput(f"--{name} is of a plan for a cluster; write --cluster cluster.yaml or --detect true")
        return None
    if config.cluster and config.detect:
        raise BadInput("--cluster and --detect are two clusters; write one of them")
    if config.global_batch_size is None:
        raise BadInput("the batch is missing; write --global_batch_size 1024, the rows of an optimizer step")
    cluster = Cluster.read(config.cluster) if config.cluster else Cluster.detect()
    if config.devices not in (None, cluster.devices):
        raise BadInput(f"--devices {config.devices}: the cluster has {cluster.devices}; leave it out")
    return cluster


def step_of(words: list[str], layout: Layout, folder: str) -> str:
    """On each rank of ``layout``."""
    return run_step(LayoutCLI("bharat layout", DESCRIPTION, words), layout, folder)


def follow(words: list[str], text: str, folder: str) -> int:
    """Run a few steps on ranks here and print what one of them was like; the exit code."""
    layout = Layout.parse(text)
    if layout.pipeline == 1:
        raise LayoutError(f"--timeline {text}: it has no pipeline; write pipeline=2,{text}")
    server = WarmServer((*PRELOAD, "lightning_bharat.commands.layout"))
    try:
        said = server.run(step_of, layout.devices, words, layout, folder, timeout=600)[0]
    except RanksFailed as error:
        say_error("bharat layout", f"{layout}: {why(error.outcomes)}")
        return 1
    print(f"{said}\nwritten: {folder}/timeline.png, {folder}/timeline.html, {folder}/timeline.json")
    return 0


def describe(trainer: pl.Trainer, module: pl.LightningModule, devices: int) -> str:
    """The plan, the table of layouts on ``devices`` devices, and what they do not show."""
    sizes = [n for n in range(1, devices + 1) if devices % n == 0]
    plans, refused = proven_plans(trainer, module, sizes)
    spread, said = spreads(module, sizes)
    rows, notes = [], dict.fromkeys([*refused, *said])
    for tensor, plan in plans.items():
        share = copy_module(module)
        share.trainer = trainer
        if tensor > 1:
            cut_module(share, plan, FirstOf(tensor))
        state, note = state_of(share)
        notes |= dict.fromkeys([note] if note else [])
        experts = find_experts(share) if spread else []
        legal = [layout for layout in Layout.legal(plan, devices, 1, number_of(experts)) if layout.tensor == tensor]
        if plan.apart and any(layout.pipeline > 1 for layout in legal):
            notes |= {f"No layout with pipeline stages: {plan.apart}.": None}
        for layout in (layout for layout in legal if layout.pipeline == 1 or not plan.apart):
            rows.append(_row(layout, fullest(share, plan, layout, state, parameters_of(share, experts))))
    head = ["layout", "parameters", "gradients", "optimizer", "gathered block", "together"]
    shown = plans[min(plans, key=lambda tensor: (tensor == 1, tensor))]
    notes |= {"Bytes are those of the fullest rank. Activations come on top; with --cluster they are counted.": None}
    return "\n".join([str(shown), "", table(head, rows), "", *notes])


def fullest(
    share: pl.LightningModule, plan: ModelPlan, layout: Layout, state: State, experts: Collection[str] = ()
) -> Memory:
    """Bytes on the fullest rank; of a pipeline with one stage on each. ``experts``: their parameters, by name."""
    spread = Spread(experts, layout.expert, layout.data // layout.expert) if layout.expert > 1 else None
    if layout.pipeline == 1:
        return memory_per_rank(share, find_units(share), layout.data, state, spread=spread)
    on = placed(share, plan, by_cost(plan, layout.pipeline))
    stages = [{name for name, where in on.items() if i in where} for i in range(layout.pipeline)]
    found = [memory_per_rank(share, find_units(share), layout.data, state, held, spread) for held in stages]
    return max(found, key=lambda memory: memory.total)


def _row(layout: Layout, memory: Memory) -> list[str]:
    sizes = (memory.parameters, memory.gradients, memory.optimizer, memory.gathered, memory.total)
    more = "".join(f", {n}={getattr(layout, n)}" for n in ("pipeline", "expert") if getattr(layout, n) > 1)
    return [f"data={layout.data}, tensor={layout.tensor}{more}", *map(size, sizes)]
