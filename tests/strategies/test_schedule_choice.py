"""``schedule="auto"``: orders are those that run, what they take is the textbook's, and training is one process."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from lightning_bharat.plan.model_plan import ModelPlan
from lightning_bharat.plan.times import BlockTimes
from lightning_bharat.strategies.choose import Predicted, best, legal, predict
from lightning_bharat.strategies.orders import order_of
from lightning_bharat.strategies.schedule import KINDS
from lightning_bharat.strategies.simulation import BACKWARD, FORWARD, INPUT, WEIGHT, bubble, length, play
from tests.callbacks.test_pipeline_timeline import _followed
from tests.modules import Result, Trained, fit
from tests.plan.models import FusedBlock, Nano
from tests.ranks import run_ranks
from tests.strategies.together import Run, Together

EQUAL = {"a": BlockTimes(1.0, 1.0, 1.0, 10, 4)}
STAGES: dict[str, Any] = {"pipeline_parallel_size": 2, "schedule": "auto"}


def plan(depth: int, costs: tuple[int, ...] = ()) -> ModelPlan:
    return ModelPlan("blocks", ("a",) * depth, costs=costs)


def _orders(folder: str) -> dict[str, list[tuple[int, int, int, str]]]:
    """Rank, stage, micro-batch and kind of all work of a real step, by schedule."""
    found = {}
    for name in KINDS:
        spans = sorted(_followed({"schedule": name, "num_microbatches": 4}, folder).spans, key=lambda s: s.start)
        found[name] = [(s.rank, s.stage, s.microbatch, s.kind) for s in spans]
    return found


def test_orders_are_those_that_run(tmp_path: Any) -> None:
    for name, works in run_ranks(_orders, 2, str(tmp_path), timeout=60)[0].items():
        order = order_of(KINDS[name], 2, 4)
        assert order is not None
        for rank in range(2):
            expected = [(rank, w.stage, w.microbatch, w.kind) for group in order[rank] for w in group]
            assert [work for work in works if work[0] == rank] == expected, name


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (3, 6)])
def test_what_orders_take_is_the_textbook_s(ranks: int, microbatches: int) -> None:
    for name, each in {"GPipe": 1, "1F1B": 1, "LoopedBFS": 2, "Interleaved1F1B": 2}.items():
        found = predict(name, ranks, microbatches, plan(2 * ranks), EQUAL, 0.0)
        assert found is not None
        assert found.bubble == pytest.approx((ranks - 1) / (microbatches * each + ranks - 1))
        assert found.seconds == pytest.approx(2 * 3 * (microbatches + (ranks - 1) / each))


def test_a_pair_is_sent_when_both_are_done() -> None:
    """DualPipeV on four ranks, as benchmarks/bubble.py expects it: (p - 1) (F&B + B - 3 W) is idle."""
    found = predict("DualPipeV", 4, 8, plan(8), EQUAL, 0.0)
    assert found is not None and found.bubble == pytest.approx(6 / (8 * 6 + 6))


def test_activations() -> None:
    """GPipe keeps all micro-batches, 1F1B on the first rank as many as there are ranks."""
    kept = {name: predict(name, 4, 8, plan(4), EQUAL, 0.0) for name in ("GPipe", "1F1B")}
    assert [found and found.activations for found in kept.values()] == [80, 40]


def test_where_messages_are_slow_another_one_is_best() -> None:
    for transfer, first in ((0.0, "Interleaved1F1B"), (2.0, "GPipe")):
        found = [predict(name, 4, 8, plan(8), EQUAL, transfer) for name in ("GPipe", "1F1B", "Interleaved1F1B")]
        assert best([f for f in found if f], 1000).name == first


def test_a_block_that_is_recomputed_is_so_twice_where_the_backward_pass_is_apart() -> None:
    for name, longer in (("1F1B", False), ("ZBVZeroBubble", True)):
        once, twice = (predict(name, 2, 4, plan(4), EQUAL, 0.0, recomputed) for recomputed in (False, True))
        assert once and twice and (twice.seconds > once.seconds) == longer


def test_what_is_before_and_after_the_blocks_counts() -> None:
    """A head that costs as much as two blocks leaves its stage two blocks less."""
    even = predict("GPipe", 2, 4, plan(6, (0, 5, 5, 5, 5, 5, 5, 10)), EQUAL, 0.0)
    assert even is not None and even.bubble == pytest.approx(1 / 5)


def test_numbers_that_a_schedule_does_not_take() -> None:
    assert predict("1F1B", 4, 3, plan(8), EQUAL, 0.0) is None
    assert predict("Interleaved1F1B", 4, 9, plan(8), EQUAL, 0.0) is None
    assert predict("GPipe", 4, 1, plan(8), EQUAL, 0.0) is not None
    assert [*legal(4, 7)] == ["GPipe", "1F1B"] and [*legal(4, 8)] == [*KINDS]


def test_the_best_fits() -> None:
    fast, equal, small = (
        Predicted("a", 8, 1.0, 0.1, 100),
        Predicted("b", 8, 1.005, 0.1, 80),
        Predicted("c", 8, 2.0, 0.5, 30),
    )
    assert best([fast, equal, small], 1000) is equal
    assert best([fast, equal, small], 50) is small
    assert best([fast, equal, small], 10) is small


def test_work_without_its_input() -> None:
    order = order_of(KINDS["GPipe"], 2, 2)
    assert order is not None
    seconds = {(stage, kind): 1.0 for stage in range(2) for kind in (FORWARD, BACKWARD, INPUT, WEIGHT)}
    spans = play(order, seconds, 1.0)
    assert length(spans) == 8 and 0 < bubble(spans) < 1  # 2 × 3 passes deep, and a message there and back
    with pytest.raises(ValueError, match="made by no other"):
        play({0: order[1]}, seconds | {(0, FORWARD): 1.0})


def test_it_trains_as_one_process() -> None:
    options = {"gradient_clip_val": 0.3, "accumulate_grad_batches": 3, "last": 2}
    for found in Together(2, {"deep": Run("deep", STAGES, options)}).check("deep"):
        (line,) = [line for line in found.explain.splitlines() if line.startswith("schedule: ")]
        assert "predicted by measured blocks; the others " in line
        assert "; measured in step 3: " in line and line.count("(bubble ") == 1 + len(KINDS)
        chosen = line.removeprefix("schedule: ").split()[0]
        assert chosen in KINDS and f"2, schedule {chosen}: blocks" in found.explain


TOLD: list[float] = []


class _Told(FusedBlock):
    """Reads what the model says while it runs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * TOLD[-1]


class _Telling(Nano):
    def forward(self, ids: Tensor) -> Tensor:
        TOLD.append(0.5)
        try:
            return super().forward(ids)
        finally:
            TOLD.pop()


class Telling(Trained):
    rows_of = "deep"

    def __init__(self) -> None:
        super().__init__("deep")
        self.model = _Telling(_Told, depth=4)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "not measured": (Telling, {}),
    "recomputed, tensor 2": ("deep", {"tensor_parallel_size": 2, "activation_checkpointing": "full"}),
    "two blocks": ("qwen3", {}),
    "another split": ("deep", {"num_microbatches": 3}),
}


def _others() -> dict[str, Result]:
    return {name: fit(module, {**STAGES, **options}, 3) for name, (module, options) in CASES.items()}


def test_other_layouts_and_blocks() -> None:
    for found in run_ranks(_others, 4, timeout=60):
        assert " ms (bubble " in found["recomputed, tensor 2"].explain
        (line,) = [line for line in found["two blocks"].explain.splitlines() if line.startswith("schedule: ")]
        assert line.startswith(("schedule: 1F1B", "schedule: GPipe")) and "V" not in line
        words = "schedule: 1F1B: a block could not be measured alone: IndexError: list index out of range"
        assert words in found["not measured"].explain
