"""``bharat fit --layout``: all sizes of a strategy in one word, or the best ones for the ranks that are there.

The best one is looked for when the ranks have met, by rank 0 for all, in a process of its own: there the module is
built on ``meta`` and one batch of the data is read, as by ``bharat layout``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import lightning.pytorch as pl
from torch.utils._pytree import tree_leaves

from lightning_bharat.cluster import inventory
from lightning_bharat.cluster.node import Node
from lightning_bharat.cluster.outcome import RanksFailed
from lightning_bharat.cluster.warm import PRELOAD, WarmServer
from lightning_bharat.commands.inspection import InspectionCLI, quiet
from lightning_bharat.commands.planner import best, duration, layouts_table
from lightning_bharat.commands.project import BadInput
from lightning_bharat.commands.table import size
from lightning_bharat.commands.why import why
from lightning_bharat.plan.cluster import Cluster
from lightning_bharat.plan.layout import Layout, LayoutError
from lightning_bharat.plan.search import Choice
from lightning_bharat.strategies import _lightning_loops, _lightning_resume
from lightning_bharat.strategies.connection import Chosen, ConnectedStrategy
from lightning_bharat.strategies.global_batch import Batches, saved_batches
from lightning_bharat.strategies.options import sizes

HELP = """\
--layout data=2,tensor=2 sets all sizes of HybridStrategy; --layout auto takes the fastest legal ones for the ranks that
are there, by estimate, and says why: for the devices of this machine, or those of --cluster cluster.yaml (docs:
planner.md). A step then takes --global_batch_size rows, whatever the layout: by default the data's batch_size on each
rank, and in a run that goes on from a checkpoint as many as before."""


@dataclass(frozen=True)
class Wish:
    """What ``bharat fit`` was asked for beside the options of the project.

    Attributes:
        words: the project's.
        layout: "auto", or the sizes; ``None``: the strategy's own.
        cluster: a file that describes the machines.
        rows: of a step, over all data ranks.
    """

    words: tuple[str, ...]
    layout: str | None = None
    cluster: str | None = None
    rows: int | None = None

    @classmethod
    def of(cls, words: Sequence[str]) -> Wish:
        """Taken out of ``words``.

        Raises:
            BadInput: a value is missing, or can't be.
            LayoutError: sizes that are none.
        """
        parser = _Parser(add_help=False, allow_abbrev=False)
        parser.add_argument("--layout")
        parser.add_argument("--cluster")
        parser.add_argument("--global_batch_size", type=_count)
        found, rest = parser.parse_known_args(list(words))
        for name in ("cluster", "global_batch_size"):
            if getattr(found, name) is not None and found.layout != "auto":
                raise BadInput(f"--{name} is for a layout that is looked for; write --layout auto beside it")
        if found.layout is not None:
            auto = {"data_parallel_size": "auto"}  # without any the class would be taken for a registered name
            chosen = auto if found.layout == "auto" else sizes(Layout.parse(found.layout))
            own = (i for i, word in enumerate(rest) if word.startswith("--trainer.strategy."))
            at = next(own, len(rest))  # arguments need their class before them
            rest[at:at] = ["--trainer.strategy", "HybridStrategy"]
            rest += [f"--trainer.strategy.{name}={size}" for name, size in chosen.items()]
        return cls(tuple(rest), found.layout, found.cluster, found.global_batch_size)

    def grant(self, trainer: pl.Trainer) -> None:
        """Let the strategy of ``trainer`` look for its layout, if that is the wish."""
        if self.layout == "auto":
            assert isinstance(trainer.strategy, ConnectedStrategy)
            trainer.strategy.choose = self._choose

    def _choose(self, strategy: ConnectedStrategy) -> Chosen:
        assert strategy.lightning_module is not None
        trainer, options = strategy.lightning_module.trainer, strategy.options
        for name in ("context_parallel_size", "expert_parallel_size"):
            if getattr(options, name) > 1:
                raise LayoutError(
                    f"--layout auto looks for data, tensor and pipeline sizes, and {name}={getattr(options, name)} is "
                    "given; leave that out, or write all sizes, as in --layout data=2,context=2"
                )
        before = saved_batches(_lightning_resume.ckpt_path(trainer))
        rows = self.rows or (before[0].rows if before else None)
        machines = (strategy.num_nodes, strategy.num_processes, strategy.root_device.type, inventory.here())
        staged = strategy.lightning_module.automatic_optimization and options.reduce_dtype is None
        try:
            found, told = WarmServer((*PRELOAD, __name__)).run(find, 1, self, machines, rows, staged, timeout=600)[0]
        except RanksFailed as error:
            raise LayoutError(f"--layout auto: {why(error.outcomes)}") from None
        print(f"{found.why}\n{told}", flush=True)
        return found


def find(wish: Wish, machines: tuple[int, int, str, list[Node]], rows: int | None, staged: bool) -> tuple[Chosen, str]:
    """The best layout for the project of ``wish``, and the table of those that it was chosen from.

    Args:
        machines: nodes, ranks on each, the type of their devices, and what a launcher has told of them.
        rows: of a step; ``None``: as many as the data give each rank.
        staged: whether it may have a pipeline.

    Raises:
        LayoutError: none fits, or the rows of a step are not known.
    """
    quiet()
    nodes, ranks, kind, known = machines
    cluster = Cluster.read(wish.cluster) if wish.cluster else Cluster.detect(kind)
    if known and not wish.cluster:
        cluster = inventory.on_nodes(cluster, known)
    else:
        cluster = cluster.of(nodes, ranks, share=not wish.cluster and kind == "cpu")
    made: list[tuple[Chosen, str]] = []

    def look(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        given = _batch_size(_lightning_loops.loaders_of(trainer)[0])
        every = rows or given * nodes * ranks
        found, _ = best(trainer, module, cluster, every, accumulates=False, spread=False)
        legal = [choice for choice in found if staged or choice.layout.pipeline == 1]
        if not legal:
            raise LayoutError("no layout without a pipeline fits; leave out what a pipeline can't do")
        chosen = Chosen(_options(legal[0]), Batches(given, every, 1), _words(legal, every))
        notes = "".join(f"\n{words}" for words in cluster.notes) if nodes > 1 else ""
        made.append((chosen, f"{cluster}\n\n{layouts_table(legal)}\n{notes}"))

    InspectionCLI("bharat fit", "", list(wish.words)).look_on_meta(look)
    return made[0]


def _batch_size(loaders: Any) -> int:
    leaves = tree_leaves(loaders)
    if any(getattr(loader, "unit", "rows") == "tokens" for loader in leaves):
        raise LayoutError(
            "--layout auto must know the rows of a step, and max_tokens= lets each have others; write all sizes, as in "
            "--layout data=2, or batch_size= and sharding=length"
        )
    sizes = [getattr(loader, "batch_size", None) for loader in leaves]
    if not sizes or not isinstance(sizes[0], int):
        raise LayoutError(
            "--layout auto must know the rows of a step, and the training data have no batch_size that could be set "
            "for each layout; give a DataLoader with batch_size=, or TokenDataModule"
        )
    return sizes[0]


def _options(choice: Choice) -> dict[str, Any]:
    """As arguments of a strategy: what is needed, and no more."""
    setting = choice.setting
    wanted: dict[str, Any] = sizes(setting.layout)
    if setting.layout.pipeline > 1:
        wanted |= {"num_microbatches": setting.microbatches, "schedule": setting.schedule.name}
    if setting.recompute:
        wanted["activation_checkpointing"] = setting.recompute
    return wanted | ({"offload": True} if setting.offload else {})


def _words(found: list[Choice], rows: int) -> str:
    layout, takes, holds = found[0].layout, duration(found[0].seconds.total), size(found[0].bytes.total)
    share = f"{rows // layout.data} on each of {layout.data} data ranks" if layout.data > 1 else "on one data rank"
    return (
        f"--layout auto: {layout}, by estimate the fastest of {len(found)} that fit: {takes} a step, {holds} "
        f"on the fullest rank; {rows} rows a step, {share}"
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(message)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: write a whole number from 1 up")
    return int(text)
