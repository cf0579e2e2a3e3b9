"""All hooks of a LightningModule are called on every rank as often and in the same order as on one process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from torch import Tensor
from torch.utils.data import DataLoader

from tests.ranks import run_ranks
from tests.strategies.watched import LAYOUTS, ONE, Place, Watched

OF_THE_MODULE = {
    "training_step",
    "validation_step",
    "test_step",
    "predict_step",
    "configure_callbacks",
    "configure_optimizers",
    "configure_gradient_clipping",
    "optimizer_step",
    "optimizer_zero_grad",
    "lr_scheduler_step",
    "backward",
}
NOT_CALLED = {"configure_sharded_model"}  # nor may it be there
HOOKS = {name for kind in (ModelHooks, DataHooks, CheckpointHooks) for name in vars(kind) if name[0] != "_"}
HOOKS = {name for name in HOOKS | OF_THE_MODULE if name not in NOT_CALLED}


class Loads(Watched):
    """Makes its loaders, and optimizes itself or by hand."""

    def __init__(self, at: Place, by_hand: bool) -> None:
        super().__init__()
        self.automatic_optimization, self.at, self.hooks = not by_hand, [at], list[str]()

    def prepare_data(self) -> None: ...

    def configure_model(self) -> None: ...

    def on_validation_model_train(self) -> None:
        self.train()

    on_test_model_train = on_validation_model_train

    def train_dataloader(self) -> DataLoader:
        return self.at[0].train()

    def val_dataloader(self) -> DataLoader:
        return self.at[0].evaluate()

    test_dataloader = predict_dataloader = val_dataloader

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()
        return loss


def noted(name: str) -> Callable:
    method = getattr(Loads, name)

    @wraps(method)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.hooks.append(name)
        return method(self, *args, **kwargs)

    return hook


Hooked = type("Hooked", (Loads,), {name: noted(name) for name in HOOKS if hasattr(Loads, name)})


def called(layout: str, folder: str) -> dict[str, dict[str, list[str]]]:
    """For each way to optimize and each run, the hooks."""
    at = Place(layout, folder)
    return {"automatic": runs(at, False), "by hand": runs(at, True)}


def runs(at: Place, by_hand: bool) -> dict[str, list[str]]:
    module = at.module(Hooked, at, by_hand)
    options = {} if by_hand else {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
    keep = ModelCheckpoint(f"{at.folder}/{at.layout}{by_hand}", "last")
    trainer = at.trainer(num_sanity_val_steps=1, enable_checkpointing=True, callbacks=[keep], **options)

    def go_on() -> None:
        trainer.fit_loop.max_epochs = 3
        trainer.fit(module, ckpt_path=keep.best_model_path)

    found: dict[str, list[str]] = {}
    for name, run in {
        "fit": lambda: trainer.fit(module),
        "validate": lambda: trainer.validate(module, verbose=False),
        "test": lambda: trainer.test(module, ckpt_path="best", verbose=False),
        "predict": lambda: trainer.predict(module),
        "go on": go_on,
    }.items():
        module.hooks = []
        run()
        found[name] = module.hooks
    return found


@cache
def of_one_process(folder: str) -> dict[str, dict[str, list[str]]]:
    return run_ranks(called, 1, ONE, folder)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hooks_are_called_in_the_order_of_one_process(layout: str, tmp_path: Path) -> None:
    one = of_one_process(str(tmp_path.parent))
    for rank, found in enumerate(run_ranks(called, LAYOUTS[layout][0], layout, str(tmp_path), timeout=60)):
        for way, runs in one.items():
            for run, hooks in runs.items():
                mine, theirs = found[way][run], hooks
                if rank:  # as Lightning has it: once on a host
                    theirs = [name for name in theirs if name != "prepare_data"]
                earlier = later = ""
                if layout != "data" and run == "fit":  # a batch shows where the module can be cut
                    earlier = "train_dataloader"
                if run == "go on":  # as with each of Lightning's strategies that divide weights
                    later = "on_load_checkpoint"
                assert Counter(mine) == Counter(theirs), (way, run)
                assert not earlier or mine.index(earlier) < theirs.index(earlier)
                assert not later or mine.index(later) > theirs.index(later)
                mine, theirs = ([n for n in names if n not in (earlier, later)] for names in (mine, theirs))
                assert mine == theirs, (way, run)


def test_all_hooks_are_among_them(tmp_path: Path) -> None:
    seen = {name for runs in of_one_process(str(tmp_path.parent)).values() for hooks in runs.values() for name in hooks}
    assert HOOKS - seen == set()
