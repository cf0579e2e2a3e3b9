"""Unchanged models of transformers over tensor ranks and stages; `python -m benchmarks.families` tries all of them."""

from __future__ import annotations

import pytest

from benchmarks.families import verdicts
from tests.ranks import server

# Each is here for something that no other test has: a cache that is filled between blocks, experts, a recurrence,
# attention both ways, a layer that nothing reaches.
CUTS = ("tensor=2", "pipeline=2")
EQUAL = {"mistral": CUTS, "mixtral": (*CUTS, "context=2"), "mamba": CUTS, "bert": CUTS, "llava": (*CUTS, "context=2")}


@pytest.mark.parametrize("family", EQUAL)
def test_equal_to_one_rank(family: str) -> None:
    assert verdicts(server, family, EQUAL[family]) == dict.fromkeys(EQUAL[family], "equal")


def test_blocks_that_read_one_another_s_bias_stay_on_one_stage() -> None:
    found = verdicts(server, "t5", CUTS)
    assert found["tensor=2"] == "equal"
    assert "an output beside the hidden state of model.decoder.block.0 is read in model.decoder" in found["pipeline=2"]
