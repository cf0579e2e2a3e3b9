"""``bharat layout``: where a model can be cut, and what every layout on n devices would cost in bytes."""

from __future__ import annotations

from dataclasses import replace

import lightning.pytorch as pl
from jsonargparse.typing import PositiveInt
from lightning.pytorch.cli import LightningArgumentParser
from torch.optim import AdamW, Optimizer
from torch.utils._pytree import tree_leaves

from lightning_bharat.cluster.outcome import RanksFailed
from lightning_bharat.cluster.warm import PRELOAD, WarmServer
from lightning_bharat.commands.inspection import InspectionCLI, quiet
from lightning_bharat.commands.project import BAD_PROJECT, BadInput
from lightning_bharat.commands.signature import say_error
from lightning_bharat.commands.table import size, table
from lightning_bharat.commands.timeline_ranks import run_step
from lightning_bharat.commands.why import why
from lightning_bharat.plan.blocks import find_units
from lightning_bharat.plan.copies import copy_module
from lightning_bharat.plan.find import find_plan, structural_plan
from lightning_bharat.plan.layout import Layout, LayoutError
from lightning_bharat.plan.memory import FirstOf, Memory, State, memory_per_rank, optimizer_state
from lightning_bharat.plan.model_plan import ModelPlan
from lightning_bharat.plan.partition import by_cost, placed
from lightning_bharat.strategies.dry_step import dry_step, first_batch
from lightning_bharat.strategies.tensor import cut_module

DESCRIPTION = """\
Show where a model can be cut, and all its layouts on a number of devices with bytes per rank.

The module is built on meta: a model of any size takes no memory. One batch of its data is read.

Example:
    bharat layout --devices 8 --model my.module.MyModel --data my.data.MyData
    bharat layout --devices 64 --config config.yaml
    bharat layout --timeline pipeline=2,data=2 --config config.yaml
"""


class LayoutCLI(InspectionCLI):
    """The parser of ``bharat layout``."""

    def add_options(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--devices", type=PositiveInt | None, default=None, help="Number of devices.")
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
        if cli.config.devices is None:
            raise BadInput("the number of devices is missing; write --devices 8, or --timeline pipeline=2")
        cli.look_on_meta(lambda trainer, module: print(describe(trainer, module, cli.config.devices)))
    except BAD_PROJECT as error:
        say_error("bharat layout", error)
        return 2
    return 0


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
    plans, refused = _plans(trainer, module, devices)
    rows, notes = [], dict.fromkeys(refused)
    for tensor, plan in plans.items():
        share = copy_module(module)
        share.trainer = trainer
        if tensor > 1:
            cut_module(share, plan, FirstOf(tensor))
        state, note = _state(share)
        notes |= dict.fromkeys([note] if note else [])
        legal = [layout for layout in Layout.legal(plan, devices) if layout.tensor == tensor]
        if plan.apart and any(layout.pipeline > 1 for layout in legal):
            notes |= {f"No layout with pipeline stages: {plan.apart}.": None}
        for layout in (layout for layout in legal if layout.pipeline == 1 or not plan.apart):
            rows.append(_row(layout, fullest(share, plan, layout, state)))
    head = ["layout", "parameters", "gradients", "optimizer", "gathered block", "together"]
    shown = plans[min(plans, key=lambda tensor: (tensor == 1, tensor))]
    notes |= {"Bytes are those of the fullest rank. Activations come on top: they are not estimated yet.": None}
    return "\n".join([str(shown), "", table(head, rows), "", *notes])


def fullest(share: pl.LightningModule, plan: ModelPlan, layout: Layout, state: State) -> Memory:
    """Bytes on the fullest rank; of a pipeline with one stage on each."""
    if layout.pipeline == 1:
        return memory_per_rank(share, find_units(share), layout.data, state)
    on = placed(share, plan, by_cost(plan, layout.pipeline))
    stages = [{name for name, where in on.items() if i in where} for i in range(layout.pipeline)]
    found = [memory_per_rank(share, find_units(share), layout.data, state, held) for held in stages]
    return max(found, key=lambda memory: memory.total)


def _plans(trainer: pl.Trainer, module: pl.LightningModule, devices: int) -> tuple[dict[int, ModelPlan], list[str]]:
    """By number of tensor ranks, the plan proven for it; and in words, which numbers are refused and why."""
    step, batch = dry_step(trainer), first_batch(trainer)
    refused: list[str] = []
    try:
        plans = {1: find_plan(module, step, batch, 1)}
    except ValueError as error:
        plans = {1: replace(structural_plan(module), apart=str(error))}
    for tensor in (n for n in range(2, devices + 1) if devices % n == 0):
        try:
            plan = find_plan(module, step, batch, tensor)
            Layout(tensor=tensor).check(plan)
            plans[tensor] = plan
        except ValueError as error:  # LayoutError, PlanError: all others of that size would be refused alike
            refused.append(f"No layout with tensor={tensor}: {error}.")
    return plans, refused


def _state(module: pl.LightningModule) -> tuple[State, str]:
    """What the module's optimizers keep; AdamW's states, with a note that says so, where that can't be known."""
    try:
        made = tree_leaves(module.configure_optimizers())
        return optimizer_state(o for o in made if isinstance(o, Optimizer)), ""
    except Exception as error:  # whatever a person's configure_optimizers or an optimizer raises on meta
        trained = [p for p in module.parameters() if p.requires_grad]
        note = f"The optimizer is taken for AdamW, since the module's could not be stepped on meta: {error}."
        return optimizer_state([AdamW(trained)] if trained else []), note


def _row(layout: Layout, memory: Memory) -> list[str]:
    sizes = (memory.parameters, memory.gradients, memory.optimizer, memory.gathered, memory.total)
    stages = f", pipeline={layout.pipeline}" if layout.pipeline > 1 else ""
    return [f"data={layout.data}, tensor={layout.tensor}{stages}", *map(size, sizes)]
