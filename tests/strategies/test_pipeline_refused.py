"""What can't lie on stages is refused in words on all ranks; what can, though it looks odd, is one process."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest

from lightning_bharat import HybridStrategy
from tests.modules import Result, Rows, Trained, assert_equal, fit
from tests.ranks import RanksFailed, run_ranks
from tests.strategies.uncuttable import ALL

STAGES: dict[str, Any] = {"pipeline_parallel_size": 2}
RIGHT = ["Penalty"]
WORDS = {
    "Auxiliary": "an output beside the hidden state of model.layers.0 is read in the loss",
    "Backwards": "model.layers.3 does not read what model.layers.2 returned",
    "BatchNormed": "the buffer model.layers.0.norm.num_batches_tracked changes in the training step",
    "ByHand": "automatic_optimization=False: under a pipeline the strategy runs the backward passes",
    "Compiled": "model (Nano) is compiled as a whole, with the blocks of all pipeline stages",
    "Contrastive": "the loss of a batch is",
    "DropsLayers": "does not run in the training step, so it can't be known what it does. Call it, or write",
    "GraphBetween": "torch.Tensor.detach reads the output of model.layers.1",
    "LeavesOut": "block 'model.layers.3' of 'model.layers' does not run in the training step",
    "ManyLosses": "under a pipeline the training step must return one loss",
    "NoList": "pipeline_parallel_size=2 is more than the 1 blocks of 'model'; write at most 1",
    "NoLoss": "under a pipeline the training step must return one loss",
    "OneBlock": "the model can't be cut: it has no list of two or more blocks of one class",
    "OverHidden": "torch.Tensor.square reads the output of model.layers.1",
    "Pyramid": "model.layers.3 changes the shape of the hidden state",
    "Remembers": "torch.Tensor.square reads the output of model.layers.0",
    "Skips": "torch.Tensor.add reads the output of model.layers.0",
    "SkipsBatches": "it returned NoneType; use pipeline_parallel_size=1 for a step that skips batches",
    "Sum": "a pipeline would train with another loss. Write num_microbatches=1, or a step whose loss is a mean",
    "Twice": "model.layers.0 runs more than once in a step",
    "TwiceInARow": "model.layers.0 runs more than once in a step",
    "Unsplittable": "so a pipeline can't split it into micro-batches; write microbatch_fn=function(batch, number)",
}


def _run(name: str, strategy: dict[str, Any] | None) -> Result:
    return fit(ALL[name], strategy, 4)


@pytest.mark.parametrize("name", WORDS)
def test_refused(name: str) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(_run, 2, name, STAGES)
    for outcome in failed.value.outcomes:
        assert WORDS[name] in outcome.message
        assert outcome.seconds < 10


@pytest.mark.parametrize("name", RIGHT)
def test_right(name: str) -> None:
    expected = run_ranks(_run, 1, name, None)[0]
    for found in run_ranks(_run, 2, name, STAGES):
        assert_equal(found, expected)


def test_each_is_asked_for() -> None:
    assert sorted([*WORDS, *RIGHT]) == sorted(ALL)


def _deep(options: dict[str, Any]) -> Result:
    return fit("deep", options, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "1f1b"}, "schedule='1f1b'"),
        ({"num_microbatches": 0}, "num_microbatches=0"),
        ({"schedule": "Interleaved1F1B", "pipeline_parallel_size": 4}, "pipeline_parallel_size=4"),
    ],
    ids=str,
)
def test_wrong_numbers(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(_deep, options.get("pipeline_parallel_size", 2), {**STAGES, **options})
    assert all(words in outcome.message for outcome in failed.value.outcomes), str(failed.value)


def _of_another_precision() -> None:
    strategy = HybridStrategy(pipeline_parallel_size=2)
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_steps": 1}
    rows = Rows("nano", 8, 1, 1, 0, False)
    L.Trainer(strategy=strategy, devices=2, precision="32-true", **options).fit(Trained("nano"), rows)
    again = HybridStrategy(pipeline_parallel_size=2, plan=strategy.plan)
    L.Trainer(strategy=again, devices=2, precision="64-true", **options).fit(Trained("nano"), rows)


def test_a_plan_of_another_precision() -> None:
    words = r"block 1 returns float64, and plan= says float32: .* leave plan= out"
    with pytest.raises(RanksFailed, match=words) as failed:
        run_ranks(_of_another_precision, 2)
    assert {outcome.error for outcome in failed.value.outcomes} == {"PlanError", "PeerError"}
