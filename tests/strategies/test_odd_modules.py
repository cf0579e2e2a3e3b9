"""Odd modules over data and tensor ranks: equal to one process to 1e-9, or refused on every rank by what is odd."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.modules import fit
from tests.ranks import RanksFailed, run_ranks
from tests.strategies.odd import DATA, REFUSED, RIGHT, RIGHT_OVER_DATA, TENSOR, Odd
from tests.strategies.together import Run, Together

LAYOUTS: dict[str, dict[str, Any]] = {DATA: {}, TENSOR: {"tensor_parallel_size": 2}}


TRAINER: dict[str, Any] = {"steps": 6, "gradient_clip_val": 0.5}


def odd(name: str) -> Odd:
    kind, model = {**RIGHT, **RIGHT_OVER_DATA, **{name: refused[0] for name, refused in REFUSED.items()}}[name]
    return kind(model())


def run(name: str, strategy: dict[str, Any], **options: Any) -> Run:
    return Run(partial(odd, name), strategy, {**TRAINER, **options}, whole=TRAINER)


RECOMPUTED = ("full", "selective")
# With all blocks gathered when a step begins, these call some of them later, twice, or not at all.
KEPT = {f"{name}, kept": name for name in ("branches", "leaves out", "looped", "shared block", "partly evaluated")}
OVER_DATA = Together(
    2,
    {name: run(name, LAYOUTS[DATA]) for name in (*RIGHT, *RIGHT_OVER_DATA)}
    | {mode: run("batch norm in blocks", {"activation_checkpointing": mode}) for mode in RECOMPUTED}
    | {kept: run(name, {"reshard_after_forward": False}) for kept, name in KEPT.items()}
    | {"synchronized": run("batch norm", {}, sync_batchnorm=True)},
)
OVER_TENSOR = Together(2, {name: run(name, LAYOUTS[TENSOR]) for name in RIGHT})


@pytest.mark.parametrize("name", [*RIGHT, *RIGHT_OVER_DATA])
def test_data_ranks_equal_one_process(name: str) -> None:
    OVER_DATA.check(name)


@pytest.mark.parametrize("name", RIGHT)
def test_tensor_ranks_equal_one_process(name: str) -> None:
    OVER_TENSOR.check(name)


@pytest.mark.parametrize("name", KEPT)
def test_weights_that_are_gathered_when_a_step_begins(name: str) -> None:
    OVER_DATA.check(name)


@pytest.mark.parametrize("mode", RECOMPUTED)
def test_what_a_block_does_to_its_buffers_it_does_once_though_it_is_computed_twice(mode: str) -> None:
    OVER_DATA.check(mode)


def train(name: str, strategy: dict[str, Any], options: dict[str, Any]) -> None:
    fit(partial(odd, name), strategy, **TRAINER, **options)


@pytest.mark.parametrize("name", RIGHT_OVER_DATA)
def test_tensor_ranks_refuse_what_has_no_cut(name: str) -> None:
    with pytest.raises(RanksFailed, match="[Ww]rite tensor_parallel_size=1|use tensor_parallel_size=1") as failed:
        run_ranks(train, 2, name, LAYOUTS[TENSOR], {})
    assert {outcome.error for outcome in failed.value.outcomes} == {"PlanError"}


@pytest.mark.parametrize(("name", "axis"), [(name, axis) for name, found in REFUSED.items() for axis in found[1]])
def test_what_would_go_wrong_is_refused_by_name(name: str, axis: str) -> None:
    _, _, words, options = REFUSED[name]
    with pytest.raises(RanksFailed, match=words) as failed:
        run_ranks(train, 2, name, LAYOUTS[axis], options)
    outcomes = failed.value.outcomes
    assert len({(outcome.error, outcome.message) for outcome in outcomes}) == 1, failed.value
    assert sum(outcome.output.count(outcome.message) for outcome in outcomes) == 1  # printed by one rank


def test_synchronized_batch_norm_is_what_there_is_anyway() -> None:
    OVER_DATA.check("synchronized")
