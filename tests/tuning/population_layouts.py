"""Populations whose members are cut over tensor ranks and stages: the copies of both, against one process.

python -m pytest tests/tuning/population_layouts.py        # as `make chaos`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_bharat.tuning import tune
from tests.tuning import tuned
from tests.tuning.test_population import MODEL, SPACE, here, written

HOW = {"size": 3, "interval": 1, "mode": "sync", "resample": 0}
OPTIONS = {"max_epochs": 3, "precision": "64-true"}
ARGS = [MODEL, "--model.schedule=steps"]

__all__ = ["here"]


@pytest.mark.parametrize("sizes", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=str)
def test_copies_of_pieces(here: Path, sizes: dict[str, int]) -> None:
    """Each rank begins a generation with what that rank of the donor has ended with; lineage and values are those of
    one process."""

    def study(name: str, **trainer: Any) -> Any:
        path = tuned.config(here, **OPTIONS, **trainer)
        return tune(path, SPACE, population=HOW, seed=1, study_name=name, args=ARGS, say=lambda line: None)

    one = study("one")
    strategy = {"class_path": "lightning_bharat.HybridStrategy", "init_args": sizes}
    two = study("two", devices=2, strategy=strategy)
    assert len(two.trials) == 9
    copies = 0
    for a, b in zip(one.trials, two.trials, strict=True):
        assert (a.params, a.user_attrs.get("parent")) == (b.params, b.user_attrs.get("parent"))
        # Lightning's single-device strategy reads a checkpoint before it makes the weights double.
        assert a.value == pytest.approx(b.value, rel=1e-6)
        if (parent := b.user_attrs.get("parent")) is not None:
            copies += two.trials[parent].user_attrs["member"] != b.user_attrs["member"]
            for rank in range(2):
                assert written(b.number, "two", rank)["start"] == written(parent, "two", rank)["end"]
    assert copies
