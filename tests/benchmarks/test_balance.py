"""benchmarks/balance.py: what it counts, and that a new cut evens the stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import balance
from tests.ranks import run_ranks


def test_the_busiest_of_the_worst_layer() -> None:
    assert balance.over_mean(torch.tensor([[2, 2], [3, 1]])) == 1.5
    assert balance.Result("stages", 1.5, 1.05).missed is False
    assert balance.Result("stages", 1.05, 1.5).missed and not balance.Result("alone", 1.0, 4.0, False).missed
    assert "| missed" in balance.report(200, [balance.Result("stages", 1.0, 1.2)]).replace("  missed", "| missed")


@pytest.mark.timeout(120)
def test_stages_are_cut_anew_while_they_train(tmp_path: Path) -> None:
    for busy, words in run_ranks(balance.train_stages, 2, 20, str(tmp_path), timeout=90):
        ratios = [balance.over_mean(torch.tensor([found])) for found in busy]
        assert len(ratios) == balance.CHANGES + 1 and ratios[-1] < ratios[0]
        assert "blocks 0-11 |" not in words
