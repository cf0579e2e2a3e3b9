"""``bharat launch -- bharat fit``: a LightningCLI project that loses a rank goes on, with its config where it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.project import QUIET, Project
from tests.cluster.launching import launched_words

FAULT = """
import os
import lightning as L

class Fault(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if (trainer.global_step, os.environ["TORCHELASTIC_RESTART_COUNT"], trainer.global_rank) == (6, "0", 1):
            os.kill(os.getpid(), 9)
"""


def test_fit_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = Project(tmp_path, monkeypatch)
    (tmp_path / project.package / "fault.py").write_text(FAULT)
    words = ["bharat", "fit", *project.classes, *QUIET, "--trainer.strategy=bharat_hybrid", "--trainer.devices=2"]
    words += ["--trainer.max_steps=12", "--trainer.default_root_dir=run", "--ckpt_path=last"]
    words += [f"--trainer.callbacks+={project.package}.fault.Fault"]
    words += ["--trainer.callbacks+=lightning_bharat.callbacks.FaultTolerantCheckpoint"]
    words += ["--trainer.callbacks.every_n_train_steps=4"]
    done = launched_words(tmp_path, "--nproc-per-node=2", "--", *words)
    assert done.code == 0, done.output(0, 1)
    assert [(event["cause"], event["ranks"]) for event in done.events("failure")] == [("signal", [1])]
    assert [event["step"] for event in done.events("training")] == [0, 4]
    assert done.events("end")[0]["step"] == 12
    assert [path.name for path in (tmp_path / "run").glob("*.yaml")] == ["config.yaml"]
