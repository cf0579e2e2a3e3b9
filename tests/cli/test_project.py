"""fit, validate, test and predict on a person's LightningCLI project, which knows nothing of this package."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_bharat.cli import main
from lightning_bharat.cluster.outcome import RankOutcome
from lightning_bharat.cluster.warm_job import free_port
from tests.cli.project import QUIET, Project
from tests.ranks import fresh_ranks

FAST = [*QUIET, "--trainer.max_epochs=1", "--trainer.enable_checkpointing=false"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    return Project(tmp_path, monkeypatch)


def test_print_config_is_a_config(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["fit", *project.classes, "--model.width=6", *FAST, "--print_config"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    config = yaml.safe_load(printed)
    assert config["model"] == {
        "class_path": f"{project.package}.model.Model",
        "init_args": {"width": 6, "depth": 2, "dropout": 0.0, "broken": False},
    }
    Path("printed.yaml").write_text(printed)
    assert main(["fit", "--config", "printed.yaml"]) == 0


def test_all_four_with_a_checkpoint(project: Project) -> None:
    words = [*QUIET, "--trainer.max_epochs=1", "--trainer.default_root_dir=run"]
    assert main(["fit", *project.classes, *words]) == 0
    (checkpoint,) = Path("run").rglob("*.ckpt")
    for command in ("validate", "test", "predict"):
        Path("run/config.yaml").unlink()  # it is never written over
        assert main([command, *project.classes, *words, "--ckpt_path", str(checkpoint)]) == 0


def test_a_config_is_never_written_over(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.yaml").write_text("trainer:\n  max_epochs: 1\n")
    words = ["fit", *project.classes, "--config", "config.yaml", *QUIET]
    assert main(words) == 2
    assert "written over" in capsys.readouterr().err
    assert main([*words, "--trainer.default_root_dir=runs/2"]) == 0
    assert Path("config.yaml").read_text() == "trainer:\n  max_epochs: 1\n" and Path("runs/2/config.yaml").is_file()


def test_config_of_a_cli_with_fixed_classes(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `LightningCLI(Model, Data)` in a person's main.py saves it: without class paths."""
    model = import_module(f"{project.package}.model").Model
    data = import_module(f"{project.package}.data").Data
    monkeypatch.setattr("sys.argv", ["main.py", "fit", "--model.width=6", *FAST])
    LightningCLI(model, data)
    saved = yaml.safe_load(Path("config.yaml").read_text())
    assert saved["model"]["width"] == 6 and "class_path" not in saved["model"]
    Path("config.yaml").rename("theirs.yaml")
    assert main(["fit", *project.classes, "--config", "theirs.yaml"]) == 0
    assert yaml.safe_load(Path("config.yaml").read_text())["model"]["init_args"]["width"] == 6


def test_optimizer_is_built_when_it_is_asked_for(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI builds it before the trainer: of parameters that a strategy then replaces."""
    built = []

    class Watched(torch.optim.SGD):
        def __init__(self, params, lr: float = 0.1) -> None:
            params = list(params)
            built.append(all(p.dtype == torch.float64 for p in params))
            super().__init__(params, lr)

    Watched.__module__, Watched.__qualname__ = f"{project.package}.model", "Watched"
    import_module(f"{project.package}.model").Watched = Watched
    words = [f"--optimizer={project.package}.model.Watched", "--optimizer.lr=0.5", "--trainer.precision=64-true"]
    words += ["--lr_scheduler=StepLR", "--lr_scheduler.step_size=1"]
    assert main(["fit", *project.classes, *FAST, *words]) == 0
    assert built == [True]


def test_a_bug_in_the_module_keeps_its_traceback(project: Project) -> None:
    with pytest.raises(ValueError, match="a bug of its own"):
        main(["fit", "--model", f"{project.package}.model.Buggy", *project.classes[2:], *FAST])


# Two ranks through the real command in fresh processes

_REPORT = """
import json, os, pathlib
import lightning as L


class Report(L.Callback):
    def on_train_end(self, trainer, module):
        rank = trainer.global_rank
        found = {"world": trainer.world_size, "strategy": type(trainer.strategy).__name__, "steps": trainer.global_step}
        pathlib.Path(f"rank{rank}.json").write_text(json.dumps(found))
"""


def reports(project: Project) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(project.folder.glob("rank*.json"))]


def hybrid(project: Project) -> list[str]:
    (project.folder / project.package / "report.py").write_text(_REPORT)
    words = ["fit", *project.classes, *FAST, f"--trainer.callbacks+={project.package}.report.Report"]
    return [*words, "--trainer.strategy=bharat_hybrid", "--trainer.devices=2"]


def test_two_devices_by_the_installed_script(project: Project) -> None:
    script = project.folder / "bin" / "bharat"  # as pip writes it
    script.parent.mkdir()
    script.write_text("import sys\nfrom lightning_bharat.cli import main\nsys.exit(main())\n")
    (outcome,) = fresh_ranks([str(script), *hybrid(project)])
    assert outcome.exit_code == 0, outcome.output
    assert reports(project) == [{"world": 2, "strategy": "HybridStrategy", "steps": 4}] * 2


def test_two_ranks_inside_slurm(project: Project) -> None:
    variables = {"SLURM_JOB_ID": "4321", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
    variables |= {"SLURM_NTASKS_PER_NODE": "2", "SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": "0"}
    variables |= {"MASTER_PORT": str(free_port())}
    words = ["-m", "lightning_bharat.cli", *hybrid(project)]

    def task(rank: int) -> RankOutcome:
        own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        return fresh_ranks(words, env={**variables, **own})[0]

    with ThreadPoolExecutor(2) as both:
        outcomes = list(both.map(task, range(2)))
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes[0].output + outcomes[1].output
    assert reports(project) == [{"world": 2, "strategy": "HybridStrategy", "steps": 4}] * 2
