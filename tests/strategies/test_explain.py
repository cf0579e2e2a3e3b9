"""``explain()`` says what is really done, in the same words on all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.modules import Trained, fit
from tests.plan.models import TIME, VOCABULARY
from tests.ranks import run_ranks

Said = dict[str, str]


class Looks(Trained):
    """Sees what its blocks and its loss get in a training step."""

    rows_of = "nano"

    def __init__(self) -> None:
        super().__init__("nano")
        self.found: dict[str, Any] = {"passes": 0}
        block = self.model.layers[1]
        block.norm1.register_forward_hook(self.look)
        block.register_forward_hook(lambda *_: self.found.update(passes=self.found["passes"] + 1))

    def look(self, norm: Any, args: tuple[Tensor], out: Tensor) -> None:
        if self.training and not torch.is_inference_mode_enabled() and not isinstance(norm.weight, DTensor):
            self.found.setdefault("time", args[0].shape[1])

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.model(batch["ids"])
        if self.training:
            weight = self.model.layers[1].up.weight
            self.found |= {"width": getattr(logits, "local", logits).shape[-1]}
            self.found |= {"freed": isinstance(weight, DTensor), "dtype": (logits * 1).dtype}
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def explained(strategy: dict[str, Any], options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    made: list[Looks] = []

    def module() -> Looks:
        made.append(Looks())
        return made[0]

    text = fit(module, strategy, 1, **options).explain
    return text, made[0].found


def run(ranks: int, strategy: dict[str, Any], **options: Any) -> tuple[Said, dict[str, Any]]:
    """What is said, by name, and what was found on rank 0; all ranks say the same."""
    results = run_ranks(explained, ranks, strategy, options)
    assert len({text for text, _ in results}) == 1
    text, found = results[0]
    lines = text.split("\n\n")[0].splitlines()
    assert all(len(line) < 130 for line in text.splitlines())
    return {"layout": lines[0], **dict(line.split(": ", 1) for line in lines[1:])}, found


BOTH = {"tensor_parallel_size": 2}


@pytest.mark.parametrize(("asked", "used"), [("auto", True), (True, True), (False, False)])
def test_sequence_parallelism(asked: Any, used: bool) -> None:
    said, found = run(2, {**BOTH, "sequence_parallel": asked})
    assert said["sequence_parallel"] == ("used, proven" if used else "not used: as asked")
    assert found["time"] == (TIME // 2 if used else TIME)


def test_data_ranks() -> None:
    for reshard, words in ((None, "yes: "), (False, "no, as asked: "), (True, "yes: ")):
        said, found = run(2, {"reshard_after_forward": reshard})
        assert said["layout"] == "Layout(data=2)"
        assert said["data_parallel_size"].startswith("2: FSDP2 gathers 3 blocks one at a time")
        assert said["reshard_after_forward"].startswith(words)
        assert found["freed"] == (reshard is not False)
        assert "sequence_parallel" not in said and "loss_parallel" not in said


def test_pipeline_and_data_ranks() -> None:
    said, _ = run(4, {"pipeline_parallel_size": 2, "activation_checkpointing": "full"})
    assert said["activation_checkpointing"] == "full, for 3 blocks"
    assert said["data_parallel_size"] == "2: FSDP2 gathers a stage's weights for a whole step"
    assert said["layout"] == "Layout(data=2, pipeline=2)"
    assert said["reshard_after_forward"].startswith("no: the weights of all blocks stay whole")
    assert said["pipeline_parallel_size"].startswith("2, schedule 1F1B: blocks 0-1")


def test_all_that_was_asked_for() -> None:
    strategy = {**BOTH, "loss_parallel": False, "activation_checkpointing": "full", "token_weighted": True}
    said, found = run(4, {**strategy, "offload": True}, precision="bf16-mixed")
    assert said["layout"] == "Layout(data=2, tensor=2)"
    assert said["loss_parallel"] == "not used: as asked" and found["width"] == VOCABULARY
    assert said["activation_checkpointing"] == "full, for 3 blocks"
    assert said["token_weighted"].startswith("each label weighs the same")
    assert said["precision"].startswith("bf16-mixed: autocast computes in bfloat16")
    assert found["dtype"] == torch.bfloat16
    assert said["offload"].startswith("weights, gradients and optimizer states in the host")
    assert said["weights"] == "equal on all ranks"


def test_without_ranks() -> None:
    said, _ = run(1, {})
    assert said["layout"] == "Layout()" and said["precision"] == "64-true: everything in float64"
    assert said["data_parallel_size"] == "1: nothing is divided over data ranks"
    assert said["token_weighted"].startswith("not used: ")
