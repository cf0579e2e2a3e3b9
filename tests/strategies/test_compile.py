"""Compiled blocks are one process that compiles nothing, and so are modules that a person has compiled."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_bharat.checkpoints.opened import open_any
from lightning_bharat.strategies._torch import no_compiler
from tests.modules import Result, Trained, assert_equal, fit
from tests.plan.models import FusedBlock, Nano
from tests.ranks import RanksFailed, run_ranks

# torch.compile's work in parts: the program of a forward pass; and that of a backward pass; none makes C++ of them.
EAGER, AOT = {"backend": "eager"}, {"backend": "aot_eager"}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data 2": (2, {"compile": AOT}),
    "tensor 2": (2, {"compile": EAGER, "tensor_parallel_size": 2}),
    "data 2 × tensor 2": (4, {"compile": EAGER, "tensor_parallel_size": 2, "activation_checkpointing": "full"}),
    "pipeline 2": (2, {"compile": AOT, "pipeline_parallel_size": 2}),
}
OPTIONS = {"steps": 3, "gradient_clip_val": 0.5}


class Deep(Trained):
    """Blocks that are alike, more than torch compiles anew (eight) before it gives up."""

    rows_of = "nano"

    def __init__(self, depth: int = 10) -> None:
        super().__init__("nano")
        self.model = Nano(depth=depth)


def trained(strategy: dict[str, Any] | None, depth: int = 10) -> tuple[Result, int, list[str]]:
    """And how many programs there are, and why they are in parts."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = fit(partial(Deep, depth), strategy, **OPTIONS)
    counters = torch._dynamo.utils.counters
    return run, counters["stats"]["unique_graphs"], list(counters["graph_break"])


@cache
def one_process(depth: int = 10) -> Result:
    run, programs, _ = run_ranks(trained, 1, None, depth)[0]
    assert programs == 0
    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_blocks_equal_one_process(layout: str) -> None:
    """One program for all blocks that are alike: those at the ends of a tensor cut do more than the others."""
    ranks, strategy = LAYOUTS[layout]
    for run, programs, breaks in run_ranks(trained, ranks, strategy, timeout=100):
        assert_equal(run, one_process())
        assert 1 <= programs <= 3 and breaks == []
        assert f"compile: {strategy['compile']}, for" in run.explain


def test_by_the_default_compiler() -> None:
    """Where this machine has none, that is said before anything is trained."""
    strategy = {"compile": True, "activation_checkpointing": "full"}
    if no_compiler():
        with pytest.raises(RanksFailed, match="Install g..,"):
            run_ranks(trained, 2, strategy, 2)
        return
    for run, programs, _ in run_ranks(trained, 2, strategy, 2, timeout=100):
        assert_equal(run, one_process(2))
        assert programs >= 1 and "compile: True, for 2 blocks" in run.explain


def refused(strategy: dict[str, Any]) -> None:
    fit("nano", strategy, 1)


REFUSED = {
    "no compiler": (
        {"compile": True},
        r"compile=True: on the CPU torch.compile makes C\+\+ of a block, and there is no compiler .*Install g\+\+",
    ),
    "selective": (
        {"compile": AOT, "activation_checkpointing": "selective"},
        r"compile=.* chooses itself .*; leave that out, or write activation_checkpointing=\"full\"",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_compiled_is_refused_before_anything_is_trained(name: str) -> None:
    strategy, words = REFUSED[name]
    with pytest.raises(RanksFailed, match=words) as failed:
        run_ranks(refused, 2, strategy, env={"PATH": "/nowhere", "CXX": ""})
    assert len({(outcome.error, outcome.message) for outcome in failed.value.outcomes}) == 1


# ---- checkpoints


def saved(strategy: dict[str, Any], path: str) -> None:
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(path)

    fit(partial(Deep, 2), strategy, **{**OPTIONS, "steps": 2}, batches=1, callbacks=[Saves()])


def resumed(strategy: dict[str, Any] | None, path: str | None) -> Result:
    return fit(partial(Deep, 2), strategy, **OPTIONS, batches=1, ckpt=path)


def test_checkpoints_have_the_module_s_names(tmp_path: Path) -> None:
    """Saved by compiled blocks, resumed by others that are not, and the other way round."""
    compiled, plain = {"compile": EAGER, "activation_checkpointing": "full"}, {"tensor_parallel_size": 2}
    expected = run_ranks(resumed, 1, None, None)[0]
    for first, then in ((compiled, plain), (plain, compiled)):
        path = tmp_path / f"{len(first)}.ckpt"
        run_ranks(saved, 2, first, str(path))
        assert open_any(path).weights().keys() == Deep(2).state_dict().keys()
        for run in run_ranks(resumed, 2, then, str(path)):
            assert run.seen == [pytest.approx(expected.seen[-1], rel=1e-9)]


# ---- what a person has compiled


def by_person(how: str) -> Trained:
    made = Deep(3)
    if how == "a copy of the model":
        made.model = torch.compile(made.model, **EAGER)
    elif how == "the model":
        made.model.compile(**EAGER)
    elif how == "copies of blocks":
        made.model.layers = nn.ModuleList(torch.compile(layer, **EAGER) for layer in made.model.layers)
    elif how == "blocks":
        for layer in made.model.layers:
            layer.compile(**EAGER)
    elif how == "the step":
        made.compile(**EAGER)
    return made


HOW = ("a copy of the model", "the model", "copies of blocks", "blocks", "the step")


def compiled_by_person(strategy: dict[str, Any] | None, how: tuple[str, ...]) -> list[Result]:
    return [fit(partial(by_person, name), strategy, **OPTIONS) for name in how]


@pytest.mark.parametrize(
    "strategy", [{}, {"tensor_parallel_size": 2, "activation_checkpointing": "full"}], ids=["data", "tensor"]
)
def test_what_a_person_has_compiled(strategy: dict[str, Any]) -> None:
    expected = one_process(3)
    for found in run_ranks(compiled_by_person, 2, strategy, HOW, timeout=100):
        for run in found:
            named = {name.replace("_orig_mod.", ""): weight for name, weight in run.weights.items()}
            gradients = {name.replace("_orig_mod.", ""): weight for name, weight in run.gradients.items()}
            assert_equal(Result({**run, "weights": named, "gradients": gradients}), expected)


@pytest.mark.parametrize("how", HOW[:2])
def test_stages_of_a_compiled_model_are_refused(how: str) -> None:
    with pytest.raises(RanksFailed, match="is compiled as a whole, .* write HybridStrategy.compile=True"):
        run_ranks(compiled_by_person, 2, {"pipeline_parallel_size": 2}, (how,))


def compiled_module() -> None:
    fit(lambda: torch.compile(Deep(2), **EAGER), {})


def test_a_compiled_lightning_module_is_refused_by_lightning() -> None:
    with pytest.raises(RanksFailed, match="compiled model is incompatible with the current strategy: .HybridStrategy."):
        run_ranks(compiled_module, 2)


# ---- recomputed under the types of the first pass


class NewTensors(FusedBlock):
    """Makes a tensor of the default type, which is float64 in a step only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.full((x.shape[-1],), 1.1)


class Scaled(Trained):
    def __init__(self) -> None:
        super().__init__("nano")
        self.model, self.rows_of = Nano(NewTensors), "nano"


def scaled(strategy: dict[str, Any] | None) -> Result:
    return fit(Scaled, strategy, **OPTIONS)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_with_the_types_of_the_first_pass(mode: str) -> None:
    for run in run_ranks(scaled, 2, {"activation_checkpointing": mode}):
        assert_equal(run, run_ranks(scaled, 1, None)[0])
