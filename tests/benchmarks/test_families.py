"""Unchanged models of transformers over tensor ranks and stages; `python -m benchmarks.families` tries all of them."""

from __future__ import annotations

import pytest

from benchmarks.families import verdicts
from tests.ranks import server

# Each is here for something that no other test has: a cache that is filled between blocks, experts, a recurrence,
# attention both ways, a layer that nothing reaches.
EQUAL = ("mistral", "mixtral", "mamba", "bert", "llava")


@pytest.mark.parametrize("family", EQUAL)
def test_equal_to_one_rank(family: str) -> None:
    found = verdicts(server, family, ["tensor=2", "pipeline=2"])
    assert found == {"tensor=2": "equal", "pipeline=2": "equal"}


@pytest.mark.parametrize("family", ["mixtral", "llava"])
def test_equal_over_context_ranks(family: str) -> None:
    assert verdicts(server, family, ["context=2"]) == {"context=2": "equal"}


def test_blocks_that_read_one_another_s_bias_stay_on_one_stage() -> None:
    found = verdicts(server, "t5", ["tensor=2", "pipeline=2"])
    assert found["tensor=2"] == "equal"
    assert "an output beside the hidden state of model.decoder.block.0 is read in model.decoder" in found["pipeline=2"]
