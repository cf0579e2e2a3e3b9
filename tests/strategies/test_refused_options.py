"""Options of the Trainer that the strategy does not do are refused on every rank, before anything is trained."""

from __future__ import annotations

import pytest

from tests.modules import fit
from tests.ranks import RanksFailed, run_ranks


def synchronized() -> None:
    fit("stack", {}, sync_batchnorm=True)


def test_synchronized_batch_norm_is_refused() -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(synchronized, 2)
    for outcome in failed.value.outcomes:
        assert "sync_batchnorm=True is not done" in outcome.message
