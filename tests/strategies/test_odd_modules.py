"""Odd modules over data and tensor ranks: equal to one process to 1e-9, or refused on every rank by what is odd."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.modules import Result, assert_equal, fit
from tests.ranks import RanksFailed, run_ranks
from tests.strategies.odd import DATA, REFUSED, RIGHT, RIGHT_OVER_DATA, TENSOR

LAYOUTS: dict[str, dict[str, Any]] = {DATA: {}, TENSOR: {"tensor_parallel_size": 2}}


def train(name: str, strategy: dict[str, Any] | None, **options: Any) -> Result:
    kind, model = {**RIGHT, **RIGHT_OVER_DATA, **{name: refused[0] for name, refused in REFUSED.items()}}[name]
    return fit(lambda: kind(model()), strategy, steps=6, gradient_clip_val=0.5, **options)


def train_with(name: str, strategy: dict[str, Any] | None, options: dict[str, Any]) -> Result:
    return train(name, strategy, **options)


@cache
def one_process(name: str) -> Result:
    return run_ranks(train, 1, name, None)[0]


@pytest.mark.parametrize("name", [*RIGHT, *RIGHT_OVER_DATA])
def test_data_ranks_equal_one_process(name: str) -> None:
    for found in run_ranks(train, 2, name, LAYOUTS[DATA]):
        assert_equal(found, one_process(name))


@pytest.mark.parametrize("name", RIGHT)
def test_tensor_ranks_equal_one_process(name: str) -> None:
    for found in run_ranks(train, 2, name, LAYOUTS[TENSOR]):
        assert_equal(found, one_process(name))


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_what_a_block_does_to_its_buffers_it_does_once_though_it_is_computed_twice(mode: str) -> None:
    name = "batch norm in blocks"
    for found in run_ranks(train, 2, name, {"activation_checkpointing": mode}):
        assert_equal(found, one_process(name))


@pytest.mark.parametrize("name", RIGHT_OVER_DATA)
def test_tensor_ranks_refuse_what_has_no_cut(name: str) -> None:
    with pytest.raises(RanksFailed, match="[Ww]rite tensor_parallel_size=1|use tensor_parallel_size=1") as failed:
        run_ranks(train, 2, name, LAYOUTS[TENSOR])
    assert {outcome.error for outcome in failed.value.outcomes} == {"PlanError"}


@pytest.mark.parametrize(("name", "axis"), [(name, axis) for name, found in REFUSED.items() for axis in found[1]])
def test_what_would_go_wrong_is_refused_by_name(name: str, axis: str) -> None:
    _, _, words, options = REFUSED[name]
    with pytest.raises(RanksFailed, match=words) as failed:
        run_ranks(train_with, 2, name, LAYOUTS[axis], options)
    outcomes = failed.value.outcomes
    assert len({(outcome.error, outcome.message) for outcome in outcomes}) == 1, failed.value
    assert sum(outcome.output.count(outcome.message) for outcome in outcomes) == 1  # printed by one rank


def test_synchronized_batch_norm_is_what_there_is_anyway() -> None:
    name = "batch norm"
    for found in run_ranks(train_with, 2, name, {}, {"sync_batchnorm": True}):
        assert_equal(found, one_process(name))
