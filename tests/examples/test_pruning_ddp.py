"""The half of `examples/pruning_ddp.py` that is ours: the trials that were asked for, each with one learning rate."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from examples import pruning_ddp
from tests.ranks import server


def test_ranks_of_a_trial_have_one_learning_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.warm_up()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pruning_ddp, "N_TRIALS", 2)
    pruning_ddp.main(["--callback", "ours"])
    lines = re.findall(r"^trial (\d): (\w+) +lr=(\S+) value=\S+ reports: \d", capsys.readouterr().out, re.MULTILINE)
    assert [line[:2] for line in lines] in ([("0", "COMPLETE"), ("1", state)] for state in ("COMPLETE", "PRUNED"))
    for number, _, rate in lines:
        for rank in range(2):
            log = Path(f"runs/with_ours/trials/000{number}/rank{rank}.log").read_text()
            assert f"rank {rank} trains for trial {number} with lr={rate}\n" in log
