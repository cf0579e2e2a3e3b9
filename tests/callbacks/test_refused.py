"""Callbacks that would go wrong on a cut module end every rank at once, with what to write instead."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EMAWeightAveraging,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tests.modules import fit
from tests.ranks import run_ranks


class Mine(WeightAveraging):
    pass


REFUSED: dict[str, tuple[Callable[[], Callback], str]] = {
    "WeightAveraging": (
        WeightAveraging,
        "use lightning_bharat.callbacks.WeightAveraging, which has the same arguments",
    ),
    "EMAWeightAveraging": (EMAWeightAveraging, "use lightning_bharat.callbacks.EMAWeightAveraging"),
    "Mine": (Mine, "derive Mine from lightning_bharat.callbacks.WeightAveraging"),
    "StochasticWeightAveraging": (
        lambda: StochasticWeightAveraging(1e-2),
        "use lightning_bharat.callbacks.WeightAveraging, whose should_update says when to average",
    ),
    "ModelPruning": (lambda: ModelPruning("l1_unstructured"), "export the checkpoint, and prune it on one device"),
    "BatchSizeFinder": (BatchSizeFinder, 'find the size with Trainer(devices=1, strategy="auto")'),
}


def messages() -> dict[str, str]:
    """What this rank says to each of them."""
    said = {}
    for name, (make, _) in REFUSED.items():
        with pytest.raises(MisconfigurationException) as refused:
            fit("stack", {"tensor_parallel_size": 1}, callbacks=[make()])
        said[name] = str(refused.value)
    return said


def test_all_ranks_say_what_to_write_instead() -> None:
    first, second = run_ranks(messages, 2)
    assert first == second
    for name, (_, words) in REFUSED.items():
        assert first[name].startswith(f"{name} under bharat_hybrid")
        assert words in first[name]
