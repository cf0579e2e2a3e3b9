"""The trainer's loops on each layout: the same batches, steps, epochs, losses and logged values as on one process."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_bharat import HybridStrategy
from lightning_bharat.strategies.refusals import ModuleError
from tests.ranks import run_ranks
from tests.strategies.watched import Numbered, Place, Scenario, Watched, check, left


def all_after_one_another(at: Place) -> Any:
    """Also a validation before the fit, and a second fit that goes on."""
    module, trainer = at.module(), at.trainer(num_sanity_val_steps=2)
    first = trainer.validate(module, at.evaluate(), verbose=False)
    trainer.fit(module, at.train(), at.evaluate())
    validated = trainer.validate(module, at.evaluate(), verbose=False)
    tested = trainer.test(module, at.evaluate(), verbose=False)
    trainer.predict(module, at.evaluate())
    between = left(trainer, module)
    module.calls = []
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, at.train(), at.evaluate())
    return {"first": first, "validated": validated, "tested": tested, "between": between, **left(trainer, module)}


def with_a_second_trainer(at: Place) -> Any:
    module, trainer = at.module(), at.trainer()
    trainer.fit(module, at.train(), at.evaluate())
    results = {"first": left(trainer, module)}
    module.calls = []
    at.known(trainer)
    second = at.trainer(max_epochs=1)
    tested = second.test(module, at.evaluate(), verbose=False)
    second.fit(module, at.train(), at.evaluate())
    second.save_checkpoint(f"{at.folder}/{at.layout}/second.ckpt")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0)
    again = second.validate(module, at.evaluate(), ckpt_path=f"{at.folder}/{at.layout}/second.ckpt", verbose=False)
    return {**results, "tested": tested, "again": again, "second": left(second, module)}


def outputs(at: Place, predictions: list[dict[str, Tensor]]) -> dict[int, Any]:
    """What was predicted for each row."""
    return at.together({int(r): out.tolist() for p in predictions for r, out in zip(p["row"], p["out"], strict=True)})


def each_alone(at: Place) -> Any:
    results = {}
    for name in ("validate", "test"):
        module, trainer = at.module(), at.trainer()
        returned = getattr(trainer, name)(module, at.evaluate(), verbose=False)
        results[name] = {"returned": returned, **left(trainer, module)}
    module, trainer = at.module(), at.trainer()
    results["predict"] = {"outs": outputs(at, trainer.predict(module, at.evaluate())), **left(trainer, module)}
    return results


def several_predict_loaders(at: Place) -> Any:
    module, trainer = at.module(), at.trainer()
    outs = [outputs(at, part) for part in trainer.predict(module, [at.evaluate(), at.evaluate(10, first=50)])]
    assert trainer.predict(module, at.evaluate(), return_predictions=False) is None
    assert [len(part) for part in outs] == [14, 10]
    return {"outs": outs, **left(trainer, module)}


def checkpoints(at: Place) -> Any:
    folder = f"{at.folder}/{at.layout}/checkpoints"
    keep = ModelCheckpoint(folder, "{epoch}-{val:.9f}", monitor="val", mode="min", save_top_k=1, save_last=True)
    module, trainer = at.module(), at.trainer(enable_checkpointing=True, callbacks=[keep], max_epochs=3)
    trainer.fit(module, at.train(), at.evaluate())
    results = {"fit": left(trainer, module), "best": Path(keep.best_model_path).name}
    for which in ("best", "last"):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(0)
        results[which + "_test"] = trainer.test(module, at.evaluate(), ckpt_path=which, verbose=False)
        results[which + "_validate"] = trainer.validate(module, at.evaluate(), ckpt_path=which, verbose=False)
        trainer.predict(module, at.evaluate(), ckpt_path=which)
    results["again"] = left(trainer, module)
    return results


def fast_dev_runs(at: Place) -> Any:
    results = {}
    for fast in (True, 3):
        module, trainer = (
            at.module(),
            at.trainer(fast_dev_run=fast, enable_checkpointing=True, callbacks=[ModelCheckpoint(f"{at.folder}/never")]),
        )
        trainer.fit(module, at.train(40), at.evaluate(40))
        trainer.test(module, at.evaluate(40), verbose=False)
        results[f"{fast}"] = left(trainer, module)
    return results


def limits(at: Place) -> Any:
    results = {}
    for name, options in {
        "int": {"limit_train_batches": 2, "limit_val_batches": 1, "limit_test_batches": 1, "limit_predict_batches": 1},
        "float": {"limit_train_batches": 0.5, "limit_val_batches": 0.5, "limit_test_batches": 0.5},
        "zero": {"limit_val_batches": 0, "limit_train_batches": 0.75},
        "interval": {"val_check_interval": 2, "limit_val_batches": 1},
        "fraction": {"val_check_interval": 0.5},
        "over epochs": {"val_check_interval": 3, "check_val_every_n_epoch": None, "max_epochs": 3},
        "epochs": {"check_val_every_n_epoch": 2, "max_epochs": 3},
        "accumulated": {"accumulate_grad_batches": 2, "val_check_interval": 3},
        "log": {"log_every_n_steps": 2},
        "steps": {"max_steps": 7, "max_epochs": -1},
    }.items():
        module, trainer = at.module(), at.trainer(**options)
        trainer.fit(module, at.train(38), at.evaluate(30))
        trainer.test(module, at.evaluate(30), verbose=False)
        results[name] = left(trainer, module)
    return results


def overfit(at: Place) -> Any:
    results = {}
    for part in (2, 0.5):
        module, trainer = at.module(), at.trainer(overfit_batches=part)
        trainer.fit(module, at.train(32, first=0), at.evaluate(32))
        results[f"{part}"] = left(trainer, module)
    return results


def overfit_a_shuffled_loader(at: Place) -> Any:
    module, trainer = at.module(), at.trainer(overfit_batches=2)
    trainer.fit(module, DataLoader(Numbered(32), 8 // at.data, shuffle=True))
    return left(trainer, module)


def several_validation_loaders(at: Place) -> Any:
    results = {}

    def loaders() -> tuple[DataLoader, DataLoader]:
        return at.evaluate(), at.evaluate(24, first=300)

    for name, made in {
        "list": lambda: list(loaders()),
        "dict": lambda: dict(zip("ab", loaders(), strict=True)),
        **{mode: (lambda mode=mode: CombinedLoader(list(loaders()), mode)) for mode in MODES},
    }.items():
        module, trainer = at.module(), at.trainer()
        trainer.fit(module, at.train(), made())
        tested = trainer.test(module, made(), verbose=False)
        results[name] = {"tested": tested, **left(trainer, module)}
    return results


MODES = ("min_size", "max_size", "max_size_cycle", "sequential")


def several_training_loaders(at: Place) -> Any:
    results = {}
    for mode in ("min_size", "max_size", "max_size_cycle"):
        module, trainer = at.module(), at.trainer()
        loaders = {"a": at.train(32), "b": [at.train(16, first=200), at.train(24, first=400)]}
        trainer.fit(module, CombinedLoader(loaders, mode), at.evaluate())
        results[mode] = left(trainer, module)
    module, trainer = at.module(), at.trainer()
    trainer.fit(module, {"a": at.train(32), "b": at.train(16, first=200)})
    results["plain dict"] = left(trainer, module)
    return results


class Reloading(Watched):
    """Makes its loaders, others each time."""

    def __init__(self, at: Place) -> None:
        super().__init__()
        self.at, self.asked = [at], []

    def train_dataloader(self) -> Any:
        self.asked.append(("train", self.current_epoch))
        return self.at[0].train(first=10 * self.current_epoch)

    def val_dataloader(self) -> Any:
        self.asked.append(("val", self.current_epoch))
        return self.at[0].evaluate(first=100 + 10 * self.current_epoch)


def reloaded(at: Place) -> Any:
    module, trainer = at.module(Reloading, at), at.trainer(reload_dataloaders_every_n_epochs=2, max_epochs=5)
    trainer.fit(module)
    return {"asked": module.asked, **left(trainer, module)}


def at_least(at: Place) -> Any:
    results = {}
    for name, options in {
        "steps": {"min_steps": 5, "max_epochs": 4},
        "epochs": {"min_epochs": 2, "max_epochs": 4},
    }.items():
        module, trainer = at.module(Stopping, "all"), at.trainer(**options)
        trainer.fit(module, at.train(), at.evaluate())
        results[name] = left(trainer, module)
    module, trainer = at.module(), at.trainer(max_time={"seconds": 0}, max_epochs=-1)
    trainer.fit(module, at.train())
    results["no time"] = left(trainer, module)
    return results


class Stopping(Watched):
    """Stops at the second batch of the first epoch, in ``hook``, on one rank or all."""

    def __init__(self, who: str, hook: str = "on_train_batch_end") -> None:
        super().__init__()
        self.who, self.hook = who, hook

    def stop(self, hook: str) -> None:
        last = int(os.environ["WORLD_SIZE"]) - 1
        if hook == self.hook and self.global_step >= 2 and (self.who == "all" or int(os.environ["RANK"]) == last):
            self.trainer.should_stop = True

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.stop("training_step")
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *_: Any) -> None:
        self.stop("on_train_batch_end")

    def on_validation_epoch_end(self) -> None:
        self.stop("on_validation_epoch_end")

    def on_train_epoch_end(self) -> None:
        self.stop("on_train_epoch_end")


def stopped(at: Place) -> Any:
    results = {}
    for who in ("all", "one"):
        for hook in ("training_step", "on_train_batch_end", "on_validation_epoch_end", "on_train_epoch_end"):
            module, trainer = at.module(Stopping, who, hook), at.trainer(val_check_interval=2, limit_val_batches=1)
            trainer.fit(module, at.train(38), at.evaluate())
            results[f"{who} {hook}"] = left(trainer, module)
    return results


SCENARIOS: dict[str, Scenario] = {
    f.__name__: f
    for f in (
        all_after_one_another,
        with_a_second_trainer,
        each_alone,
        several_predict_loaders,
        checkpoints,
        fast_dev_runs,
        limits,
        overfit,
        overfit_a_shuffled_loader,
        several_validation_loaders,
        several_training_loaders,
        reloaded,
        at_least,
        stopped,
    )
}
# Data ranks are the cheapest; with tensor ranks what depends on them: dry runs, equal batches, shared decisions.
PLAYED = {
    "data": list(SCENARIOS),
    "tensor": ["each_alone", "several_predict_loaders", "fast_dev_runs", "limits", "overfit", "reloaded"],
    "both": [
        "all_after_one_another",
        "with_a_second_trainer",
        "checkpoints",
        "several_validation_loaders",
        "several_training_loaders",
        "stopped",
    ],
}


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("layout", "scenario"), [(layout, name) for layout, names in PLAYED.items() for name in names])
def test_it_is_what_one_process_does(scenario: str, layout: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    check(__name__, scenario, layout, tmp_path_factory.getbasetemp() / "loops")


def cut_again(layout: str, folder: str) -> list[str]:
    """What is said when other trainers get a module that has been cut."""
    at, said = Place(layout, folder), []
    module = at.module()
    at.trainer(max_epochs=1).fit(module, at.train())
    other = {"tensor_parallel_size": 1 if at.strategy else 2}
    for options in (
        {"strategy": "auto", "devices": 1, "plugins": [LightningEnvironment()]},
        {"strategy": HybridStrategy(**other)},
        {"strategy": HybridStrategy(**at.strategy, activation_checkpointing="full")},
        {"strategy": HybridStrategy(**at.strategy, weights="folder")},
        {"precision": "32-true"},
    ):
        with pytest.raises(ModuleError) as found:
            at.trainer(**options).validate(module, at.evaluate(), verbose=False)
        said.append(str(found.value).removeprefix("an earlier Trainer has cut the module ").split(". ")[0])
    assert "write a checkpoint" in str(found.value)
    if layout == "tensor":  # what FSDP has divided can't be copied
        assert copy.deepcopy(module).cut_by_bharat is None
    return said


@pytest.mark.parametrize("layout", ["data", "tensor"])
def test_another_trainer_is_refused_a_module_that_is_cut(layout: str, tmp_path: Path) -> None:
    sizes = {"data": ("Layout(data=2)", "Layout(tensor=2)"), "tensor": ("Layout(tensor=2)", "Layout(data=2)")}[layout]
    for said in run_ranks(cut_again, 2, layout, str(tmp_path)):
        assert said == [
            f"over ranks ({sizes[0]})",
            f"with layout={sizes[0]}, and now {sizes[1]} is asked for",
            "with activation_checkpointing=None, and now full is asked for",
            "with weights=None, and now a start from these is asked for",
            "with precision=64-true, and now 32-true is asked for",
        ]
