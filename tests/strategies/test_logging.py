"""What is logged, counted, gathered and printed on each layout is what one process logs, counts, gathers and prints."""

from __future__ import annotations

import contextlib
import csv
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torchmetrics import CatMetric, MaxMetric, MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_bharat import HybridStrategy
from tests.ranks import run_ranks
from tests.strategies.watched import (
    LAYOUTS,
    ONE,
    Place,
    Scenario,
    Watched,
    check,
    compare,
    left,
)

BOTH = {"on_step": True, "on_epoch": True}


class Logs(Watched):
    """Logs with every option, from steps and hooks, and keeps what there is after each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, dict[str, float]]] = []
        self.reductions: dict[str, Any] = {
            "mean": "mean",
            "sum": "sum",
            "max": "max",
            "min": "min",
            "torch.sum": torch.sum,
            "torch.mean": torch.mean,
            "builtin max": max,
            "torch.min": torch.min,
        }

    def values(self, rows: Tensor) -> dict[str, Any]:
        """Of a batch: what its reduction over ranks and steps makes of it is that of all rows."""
        kind = {"mean": rows.mean(), "sum": rows.sum(), "max": rows.max(), "min": rows.min()}
        return {name: kind[name.split(".")[-1].split()[-1]] for name in self.reductions}

    def log_all(self, kind: str, batch: Any, **options: Any) -> None:
        rows = batch["row"].double()
        for name, value in self.values(rows).items():
            self.log(f"{kind} {name}", value, reduce_fx=self.reductions[name], sync_dist=True, **options)
        self.log(f"{kind} given", rows.mean(), batch_size=len(rows), sync_dist=True, **options)
        self.log(f"{kind} float", 0.5, sync_dist=True, **options)
        self.log(f"{kind} int", 3, sync_dist=True, **options)
        self.log(f"{kind} long", torch.tensor(4), sync_dist=True, **options)
        self.log(f"{kind} long sum", batch["row"].sum(), sync_dist=True, reduce_fx="sum", **options)
        self.log(f"{kind} one element", rows.mean().reshape(1), sync_dist=True, **options)
        self.log_dict({f"{kind} a": rows.mean(), f"{kind} b": 1.5}, sync_dist=True, **options)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(self.note("train", batch))
        self.log("loss", loss, sync_dist=True, prog_bar=True, enable_graph=True)
        self.log("no logger", loss.detach(), sync_dist=True, logger=False, prog_bar=True, **BOTH)
        self.log_all("step", batch, on_step=True)
        self.log_all("epoch", batch, on_step=False, on_epoch=True)
        self.log_all("both", batch, prog_bar=True, **BOTH)
        return loss

    def evaluate(self, kind: str, batch: Any, loader: int) -> None:
        super().evaluate(kind, batch, loader)
        self.log_all(f"{kind} all", batch)
        self.log(f"{kind} number {loader}", batch["row"].double().mean(), add_dataloader_idx=False, sync_dist=True)
        self.log_all(f"{kind} both", batch, **BOTH)

    def on_train_batch_end(self, *_: Any) -> None:
        self.log("batch end", float(self.global_step), sync_dist=True)
        kinds = ("logged_metrics", "callback_metrics", "progress_bar_metrics")
        self.seen.append({kind: {k: float(v) for k, v in getattr(self.trainer, kind).items()} for kind in kinds})

    def on_train_epoch_start(self) -> None:
        self.log("epoch start", float(self.current_epoch), sync_dist=True)

    def on_train_epoch_end(self) -> None:
        self.log("epoch end", self.trainer.callback_metrics["epoch sum"] / 2, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self.log("val end", self.trainer.callback_metrics.get("epoch max", 1.0), sync_dist=True)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log("rate", optimizer.param_groups[0]["lr"])


def logged(at: Place) -> Any:
    module, trainer = at.module(Logs), at.trainer(accumulate_grad_batches=2)
    trainer.fit(module, at.train(), [at.evaluate(), at.evaluate(24, first=300)])
    tested = trainer.test(module, [at.evaluate(), at.evaluate(20, first=500)], verbose=False)
    return {"seen": module.seen, "tested": tested, **left(trainer, module)}


def written(at: Place) -> Any:
    folder = f"{at.folder}/{at.layout}"
    logger = CSVLogger(folder, "logs", version=0)
    module, trainer = at.module(Logs), at.trainer(logger=logger, log_every_n_steps=2, max_epochs=3)
    module.save_hyperparameters({"width": 8})
    trainer.fit(module, at.train(), at.evaluate())
    trainer.test(module, at.evaluate(), verbose=False)
    trainer.strategy.barrier()
    with open(f"{folder}/logs/version_0/metrics.csv") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    assert len({(row["step"], *row) for row in rows}) == len(rows)
    return {"rows": rows, "hparams": Path(f"{folder}/logs/version_0/hparams.yaml").read_text()}


class Local(Watched):
    """Logs what is this rank's alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts, strategy = self.note("train", batch), self.trainer.strategy
        rows = batch["row"].double()
        self.log("local", rows.mean(), on_step=False, on_epoch=True)
        self.log("synced", rows.mean(), on_step=False, on_epoch=True, sync_dist=True)
        for name in ("data_group", "tensor_group"):
            group = getattr(strategy, name)
            if group is not None:
                options = {"on_step": False, "on_epoch": True, "sync_dist": True, "sync_dist_group": group}
                self.log(name, rows.mean(), **options)
        if self.trainer.is_global_zero:
            self.log("zero", 2.0, rank_zero_only=True, on_step=False, on_epoch=True, sync_dist=True)
        return self.loss(parts)


def local_values(layout: str, folder: str) -> tuple[dict[str, float], float]:
    at = Place(layout, folder)
    module, trainer = at.module(Local), at.trainer(max_epochs=1)
    trainer.fit(module, at.train(), at.evaluate())
    rows = [row for kind, *_, rows in module.calls if kind == "train" for row in rows]
    return {k: float(v) for k, v in trainer.callback_metrics.items()}, sum(rows) / len(rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_synchronized_is_each_rank_s_own(layout: str, tmp_path: Path) -> None:
    for rank, (metrics, mean) in enumerate(run_ranks(local_values, LAYOUTS[layout][0], layout, str(tmp_path))):
        assert metrics["local"] == metrics.get("tensor_group", mean) == pytest.approx(mean)
        assert metrics["synced"] == metrics["data_group"] == pytest.approx(10.5)
        assert metrics.get("zero") == (2.0 if rank == 0 else None)


class Measured(Watched):
    """torchmetrics in every place that a module may have them."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()
        self.accuracy = MulticlassAccuracy(4, average="micro")
        self.collection = MetricCollection([MulticlassAccuracy(4), MulticlassF1Score(4)], prefix="c/")
        self.listed = nn.ModuleList([SumMetric(), MeanMetric()])
        self.by_hand = SumMetric()
        self.ever = SumMetric()
        self.ever.persistent(True)
        self.computed: list[float] = []

    def measure(self, batch: Any, kind: str) -> Tensor:
        x, y = batch["x"].to(self.dtype), batch["y"].to(self.dtype)
        out = self.model(x)
        classes = y.argmax(-1)
        self.mean(batch["row"].double())
        self.log(f"{kind} mean", self.mean, on_step=False, on_epoch=True)
        self.accuracy(out, classes)
        self.log(f"{kind} accuracy", self.accuracy, on_step=True, on_epoch=True, metric_attribute="accuracy")
        self.collection.update(out, classes)
        self.log_dict(self.collection, on_step=False, on_epoch=True)
        for i, metric in enumerate(self.listed):
            metric.update(batch["row"].double())
            self.log(f"{kind} listed {i}", metric, on_step=False, on_epoch=True)
        self.by_hand.update(batch["row"].double())
        self.ever.update(batch["row"].double())
        return nn.functional.mse_loss(out, y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.note("train", batch)
        return self.measure(batch, "train")

    def on_train_epoch_end(self) -> None:
        self.end()

    def on_validation_epoch_end(self) -> None:
        self.end()

    def end(self) -> None:
        value = self.by_hand.compute()
        self.computed += [float(value), float(self.ever.compute())]
        self.log("by hand", value)
        self.by_hand.reset()


class MeasuredInValidation(Measured):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.note("train", batch))

    def on_train_epoch_end(self) -> None: ...

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.note("val", batch)
        self.measure(batch, "val")


def metrics(at: Place) -> Any:
    results = {}
    for kind in (Measured, MeasuredInValidation):
        module, trainer = at.module(kind), at.trainer()
        trainer.fit(module, at.train(), at.evaluate())
        what = left(trainer, module)
        # A value of one step is the rank's own, as torchmetrics has it; of an epoch it is that of all.
        for values in (what["metrics"], what["logged"]):
            values.pop(f"{'val' if kind is MeasuredInValidation else 'train'} accuracy_step", None)
        assert all(metric._update_count == 0 for metric in (module.mean, module.by_hand, *module.listed))
        results[kind.__name__] = {"computed": module.computed, **what}
    return results


class Counts(Watched):
    """Has metrics that a checkpoint keeps, of states that are summed, put together or the greatest."""

    def __init__(self) -> None:
        super().__init__()
        self.ever = MetricCollection({"sum": SumMetric(), "mean": MeanMetric(), "all": CatMetric(), "max": MaxMetric()})
        self.ever.persistent(True)
        self.computed: list[dict[str, Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.ever.update(batch["row"].double())
        return self.loss(self.note("train", batch))

    def on_train_epoch_end(self) -> None:
        values = self.ever.compute()
        self.computed.append({k: sorted(v.tolist()) if k == "all" else v.item() for k, v in values.items()})


def counted(layout: str, path: str, saves: bool, whole: bool) -> list[dict[str, Any]]:
    at = Place(layout, "")
    strategy = "auto" if at.is_one else HybridStrategy(**at.strategy, save_distributed_checkpoint=not whole)
    module, trainer = at.module(Counts), at.trainer(strategy=strategy, max_epochs=1 if saves else 2)
    trainer.fit(module, at.train(), ckpt_path=None if saves else path)
    if saves:
        trainer.save_checkpoint(path)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, at.train())  # saving has changed nothing
    return module.computed


@pytest.mark.parametrize(("saved", "read"), [(ONE, "data"), ("data", ONE), ("data", "both"), ("both", "tensor")])
def test_metrics_count_on_from_a_checkpoint_of_any_layout(saved: str, read: str, tmp_path: Path) -> None:
    ranks = {ONE: 1, **{layout: n for layout, (n, _) in LAYOUTS.items()}}
    path = str(tmp_path / "counted.ckpt")
    (one,) = run_ranks(counted, 1, ONE, str(tmp_path / "one.ckpt"), True, True)
    assert [epoch["sum"] for epoch in one] == [231.0, 462.0] and one[0]["all"] == [float(row) for row in range(22)]
    assert run_ranks(counted, ranks[saved], saved, path, True, read == ONE) == [one] * ranks[saved]
    assert run_ranks(counted, ranks[read], read, path, False, True) == [one[1:]] * ranks[read]


class Talks(Watched):
    """Gathers, reduces, broadcasts and prints in its steps and hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(self.note("train", batch))
        strategy, rows = self.trainer.strategy, batch["row"].double()
        gathered = self.all_gather({"rows": batch["row"], "pair": [loss, 2.0]})
        with_gradient = self.all_gather(loss * 1, sync_grads=True)
        self.heard += [
            sorted(gathered["rows"].flatten().tolist()),
            torch.as_tensor(gathered["pair"][0]).double().mean().item(),
            with_gradient.requires_grad,
            strategy.reduce(rows.mean(), reduce_op="mean").item(),
            strategy.reduce(rows.sum(), reduce_op="sum").item(),
            strategy.reduce(torch.tensor(7.0)).item(),
            strategy.reduce(3.5),
            strategy.broadcast({"from": "rank", "is": self.global_rank}),
            strategy.reduce_boolean_decision(self.global_rank == 0, all=False),
        ]
        strategy.barrier("here")
        self.print("said once", batch_idx)
        only_one(self.heard)
        return with_gradient.mean()


@rank_zero_only
def only_one(heard: list[Any]) -> None:
    print("done once")


def talk(layout: str, folder: str) -> Any:
    at = Place(layout, folder)
    module, trainer = at.module(Talks), at.trainer()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        trainer.fit(module, at.train())
    numbers = (trainer.world_size, trainer.num_devices, trainer.num_nodes, module.global_rank, trainer.is_global_zero)
    said = [line for line in out.getvalue().splitlines() if "once" in line]
    return {"heard": module.heard, **left(trainer, module)}, numbers, said


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gathered_reduced_and_printed(layout: str, tmp_path: Path) -> None:
    ((one, _, printed),) = run_ranks(talk, 1, ONE, str(tmp_path))
    ranks = LAYOUTS[layout][0]
    found = run_ranks(talk, ranks, layout, str(tmp_path))
    compare([result for result, _, _ in found], one, layout)
    assert len(printed) == 2 * 6
    for rank, (_, numbers, said) in enumerate(found):
        assert numbers == (ranks, ranks, 1, rank, rank == 0)
        before = said[: -len(printed)]  # of the dry runs, on the rank that makes the plan
        assert said[len(before) :] == (printed if rank == 0 else [])
        assert set(before) == ({"done once"} if rank == 0 and layout != "data" else set())


SCENARIOS: dict[str, Scenario] = {f.__name__: f for f in (logged, written, metrics)}
PLAYED = {"data": list(SCENARIOS), "tensor": list(SCENARIOS), "both": list(SCENARIOS)}


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("layout", "scenario"), [(layout, name) for layout, names in PLAYED.items() for name in names])
def test_it_is_what_one_process_logs(scenario: str, layout: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    check(__name__, scenario, layout, tmp_path_factory.getbasetemp() / "logging")
