"""Modules with a ``configure_model`` for Lightning's own strategies work as they are, or are refused."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F

from lightning_bharat import HybridStrategy
from tests.modules import Batch, Result, Rows, Trained, assert_equal, fit
from tests.plan.models import VOCABULARY, Stack
from tests.ranks import RanksFailed, run_ranks

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data 2": (2, {}),
    "tensor 2": (2, {"tensor_parallel_size": 2}),
    "data 2 × tensor 2": (4, {"tensor_parallel_size": 2}),
}
OPTIONS = {"steps": 4, "gradient_clip_val": 0.2, "accumulate_grad_batches": 2}


class FeedForward(nn.Module):
    """That of Lightning's documentation of tensor parallelism, with a norm before it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.w1, self.w3 = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)
        self.w2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


class Deep(Stack):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.layers = nn.ModuleList(FeedForward() for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Cuts(Trained):
    """Cuts itself over both axes, as the documentation does it."""

    rows_of = "stack"
    axes: tuple[str, ...] = ("tensor_parallel", "data_parallel")

    def __init__(self) -> None:
        super().__init__("stack")
        self.model = Deep()

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is None:  # one process, to compare with
            return
        if "tensor_parallel" in self.axes and mesh["tensor_parallel"].size() > 1:
            for layer in self.model.layers:
                plan = {"w1": ColwiseParallel(), "w2": RowwiseParallel(), "w3": ColwiseParallel()}
                parallelize_module(layer, mesh["tensor_parallel"], plan)
        if "data_parallel" in self.axes and mesh["data_parallel"].size() > 1:
            for layer in self.model.layers:
                fully_shard(layer, mesh=mesh["data_parallel"])
            fully_shard(self.model, mesh=mesh["data_parallel"])


class CutsOverTensor(Cuts):
    axes = ("tensor_parallel",)


class CutsOverData(Cuts):
    axes = ("data_parallel",)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings, self.norm = nn.Embedding(VOCABULARY, 16), nn.LayerNorm(16)
        self.layers = nn.ModuleDict({str(i): FeedForward(16) for i in range(2)})
        self.output = nn.Linear(16, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok_embeddings(ids)
        for layer in self.layers.values():
            x = layer(x)
        return self.output(self.norm(x))


class LossParallel(Trained):
    """As Lightning's example of a Llama: sequence parallel norms, logits in pieces, and a loss over them."""

    rows_of = "nano"

    def __init__(self) -> None:
        super().__init__("stack")
        self.model = Transformer()

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is None:
            return
        if (tensor := mesh["tensor_parallel"]).size() > 1:
            plan = {
                "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
                "norm": SequenceParallel(),
                "output": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
            }
            parallelize_module(self.model, tensor, plan)
            for layer in self.model.layers.values():
                plan = {
                    "norm": SequenceParallel(),
                    "w1": ColwiseParallel(input_layouts=Shard(1)),
                    "w3": ColwiseParallel(input_layouts=Shard(1)),
                    "w2": RowwiseParallel(output_layouts=Shard(1)),
                }
                parallelize_module(layer, tensor, plan)
        if (data := mesh["data_parallel"]).size() > 1:
            for layer in self.model.layers.values():
                fully_shard(layer, mesh=data)
            fully_shard(self.model, mesh=data)

    def loss(self, batch: Batch) -> Tensor:
        logits = self.model(batch["ids"])
        with loss_parallel():
            return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    def backward(self, *args: Any, **kwargs: Any) -> None:
        with loss_parallel():
            super().backward(*args, **kwargs)


class NotBuilt(Trained):
    """Without a model, which ``configure_model`` makes."""

    rows_of = "stack"

    def __init__(self) -> None:
        super().__init__("stack")
        self.model = None


class ForFSDP(NotBuilt):
    """As the documentation of FSDPStrategy writes it; it may be called many times."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.built = 0, 0

    def configure_model(self) -> None:
        self.calls += 1
        if self.model is not None:
            return
        self.built += 1
        self.model = Deep()


class OnMeta(NotBuilt):
    """Cuts what is on meta: its values are those that the layers set, here the same on every layout."""

    def configure_model(self) -> None:
        if self.model is None:
            with torch.device("meta" if self.device_mesh else "cpu"):
                self.model = Steady()
            Cuts.configure_model(self)  # type: ignore[arg-type]

    axes = Cuts.axes


class SteadyLinear(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.125)
        nn.init.constant_(self.bias, 0.25)


class Steady(Deep):
    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.w1, layer.w3, layer.w2 = SteadyLinear(8, 32), SteadyLinear(8, 32), SteadyLinear(32, 8)
        self.head = SteadyLinear(8, 4)


CASES: dict[str, type[Trained]] = {"both axes": Cuts, "loss parallel": LossParallel, "on meta": OnMeta}


def trained(strategy: dict[str, Any] | None, kind: type[Trained], options: dict[str, Any]) -> Result:
    return fit(kind, strategy, **{**OPTIONS, **options})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_written_for_model_parallel_strategy(layout: str) -> None:
    for found in run_ranks(all_trained, *LAYOUTS[layout]):
        for name, expected in one_process().items():
            assert_equal(found[name], expected)
            assert "the module was cut by its own configure_model" in found[name].explain


def all_trained(strategy: dict[str, Any] | None) -> dict[str, Result]:
    return {name: trained(strategy, kind, {}) for name, kind in CASES.items()}


@cache
def one_process() -> dict[str, Result]:
    return run_ranks(all_trained, 1, None)[0]


@pytest.mark.parametrize(
    ("kind", "layout", "taken"),
    [
        (CutsOverTensor, "tensor 2", True),
        (CutsOverTensor, "data 2", False),
        (CutsOverData, "data 2", True),
        (CutsOverData, "tensor 2", False),
        (CutsOverData, "data 2 × tensor 2", True),
    ],
)
def test_cuts_over_one_axis(kind: type[Cuts], layout: str, taken: bool) -> None:
    """What it leaves whole is cut by the strategy, if it has cut nothing; tensor ranks may compute the same."""
    ranks, strategy = LAYOUTS[layout]
    for found in run_ranks(trained, ranks, strategy, kind, {}):
        assert_equal(found, one_process()["both axes"])
        assert ("by its own configure_model" in found.explain) == taken


REFUSED: dict[str, tuple[type[Trained], str, dict[str, Any], str]] = {
    "over tensor ranks alone": (
        CutsOverTensor,
        "data 2 × tensor 2",
        {},
        r"has not divided model.layers.0.norm.weight and \d+ more over the data ranks: .*fully_shard.*data_parallel",
    ),
    **{
        name: (Cuts, "data 2", {name: value}, f"{name}=.*configure_model.* cut the module itself")
        for name, value in {
            "activation_checkpointing": "full",
            "compile": True,
            "offload": True,
            "weights": {"model.head.bias": torch.ones(4)},
            "plan": {"model.head": "colwise"},
            "reshard_after_forward": False,
        }.items()
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_its_own_cut_leaves_undone_is_refused(name: str) -> None:
    kind, layout, options, words = REFUSED[name]
    ranks, strategy = LAYOUTS[layout]
    with pytest.raises(RanksFailed, match=words) as failed:
        run_ranks(trained, ranks, {**strategy, **options}, kind, {})
    assert len({(outcome.error, outcome.message) for outcome in failed.value.outcomes}) == 1


# ---- saved, resumed, loaded


EACH = {"batches": 2, "accumulate_grad_batches": 1}


def saved(strategy: dict[str, Any], kind: type[Trained], path: str) -> None:
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(path)

    trained(strategy, kind, {**EACH, "steps": 2, "callbacks": [Saves()]})


@pytest.mark.parametrize("kind", [Cuts, ForFSDP])
def test_resumed_on_other_layouts(kind: type[Trained], tmp_path: Path) -> None:
    expected = run_ranks(trained, 1, None, kind, EACH)[0]
    for layout, then in (("data 2 × tensor 2", "tensor 2"), ("tensor 2", "data 2 × tensor 2")):
        ranks, strategy = LAYOUTS[layout]
        path = str(tmp_path / f"{layout}.ckpt")
        run_ranks(saved, ranks, strategy, kind, path)
        ranks, strategy = LAYOUTS[then]
        for found in run_ranks(trained, ranks, strategy, kind, {**EACH, "ckpt": path}):
            assert found.seen == [pytest.approx(seen, rel=1e-9) for seen in expected.seen[2:]]
            for name, weight in expected.weights.items():
                torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=1e-9)


def plain_file(strategy: dict[str, Any], kind: type[Trained], path: str) -> Result:
    return fit(kind, {**strategy, "save_distributed_checkpoint": False}, steps=2, callbacks=[AtTheEnd(path)])


class AtTheEnd(L.Callback):
    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("kind", [Cuts, ForFSDP])
def test_load_from_checkpoint(kind: type[Trained], tmp_path: Path) -> None:
    """With a ``configure_model`` that builds the model, and with one that cuts what is there."""
    path = str(tmp_path / "a.ckpt")
    run = run_ranks(plain_file, 4, {"tensor_parallel_size": 2}, kind, path)[0]
    loaded = kind.load_from_checkpoint(path)
    assert loaded.state_dict().keys() == run.weights.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, run.weights[name].to(tensor.dtype))


# ---- built by a trainer


def many_runs(strategy: dict[str, Any]) -> tuple[int, int, Result]:
    made: list[ForFSDP] = []

    def module() -> ForFSDP:
        made.append(ForFSDP())
        return made[0]

    run = fit(module, strategy, **OPTIONS)
    for _ in range(2):
        made[0].trainer.validate(made[0], Rows("stack", 8, 1, 1, 0, False), verbose=False)
    return made[0].calls, made[0].built, run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_written_for_fsdp_strategy(layout: str) -> None:
    expected = run_ranks(trained, 1, None, ForFSDP, {})[0]
    ranks, strategy = LAYOUTS[layout]
    for calls, built, found in run_ranks(many_runs, ranks, strategy):
        assert_equal(found, expected)
        assert calls >= 3 and built == 1


class InInit(Trained):
    rows_of = "stack"

    def __init__(self) -> None:
        super().__init__("stack")
        self.model = Steady()


def under_init_module(strategy: dict[str, Any], empty: bool) -> tuple[set[str], Result]:
    """Built as Lightning's documentation says, in ``trainer.init_module()``."""
    trainer = L.Trainer(
        strategy=HybridStrategy(**strategy), devices=int(os.environ["WORLD_SIZE"]), accelerator="cpu",
        precision="64-true", **QUIET,
    )  # fmt: skip
    L.seed_everything(7, verbose=False)
    with trainer.init_module(empty_init=empty):
        made = InInit()
    found = {f"{p.device.type} {p.dtype}" for p in made.parameters()}
    return found, fit(lambda: made, strategy, **OPTIONS)


QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_init_module(layout: str) -> None:
    """On meta where it is to be empty; its values are then those that its leaves set, here constants."""
    expected = run_ranks(trained, 1, None, InInit, {})[0]
    for empty, device in ((False, "cpu"), (True, "meta")):
        for devices, found in run_ranks(under_init_module, *LAYOUTS[layout], empty):
            assert devices == {f"{device} torch.float64"}
            assert_equal(found, expected)
