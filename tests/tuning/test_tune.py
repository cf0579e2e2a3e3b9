"""`tune` and `bharat tune`: an unchanged project or objective, trials in processes of their own, one study."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lightning_bharat.cli import main
from lightning_bharat.commands.project import BadInput
from lightning_bharat.tuning import Limit, SearchSpace, tune
from lightning_bharat.tuning.proposals import NoFeasiblePoint, Proposals
from lightning_bharat.tuning.same_error import SameError
from lightning_bharat.tuning.storage import open_storage
from tests.ranks import server
from tests.tuning import tuned

SPACE = SearchSpace({"model.lr": FloatDistribution(1e-3, 0.3, log=True)})
pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    server.warm_up()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_config_is_tuned_and_its_best_is_a_config(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tune(tuned.config(here), SPACE, n_trials=3, seed=1, workers=2)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
    best = yaml.safe_load(Path("runs/config/best.yaml").read_text())
    assert best["model"]["init_args"]["lr"] == study.best_params["model.lr"]
    attrs = study.best_trial.user_attrs
    assert attrs["end"] == "complete" and attrs["steps"] == 6 and attrs["seed"] == 1 and attrs["where"]["ranks"] == 1
    # The same again goes on: nothing is left to do. A fit of the best config gives the best value.
    assert len(tune(tuned.config(here), SPACE, n_trials=3, seed=1).trials) == 3
    assert "best: trial" in capsys.readouterr().out


LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "data": {"devices": 2, "data_parallel_size": 2},
    "tensor": {"devices": 2, "tensor_parallel_size": 2},
    "pipeline": {"devices": 2, "pipeline_parallel_size": 2},
}


def test_a_study_is_the_same_under_every_layout(here: Path) -> None:
    """Parameters, states and steps of prunes; values to 1e-9 in 64-true. Prints the closest decision of the pruner."""
    found = {}
    for name, layout in LAYOUTS.items():
        options = dict(layout)
        devices = options.pop("devices", 1)
        strategy = {"class_path": "lightning_bharat.HybridStrategy", "init_args": options} if options else "auto"
        path = tuned.config(here, devices=devices, strategy=strategy)
        args = ["--data.data=2"] if name == "data" else []
        pruner = {"name": "median", "n_startup_trials": 2}
        found[name] = tune(
            path, SPACE, n_trials=5, seed=3, pruner=pruner, study_name=name, args=args, monitor="val_loss"
        )
    one = found.pop("one").trials
    assert {trial.state.name for trial in one} == {"COMPLETE", "PRUNED"}
    for name, study in found.items():
        for a, b in zip(study.trials, one, strict=True):
            assert (a.params, a.state, a.user_attrs["end"]) == (b.params, b.state, b.user_attrs["end"]), name
            assert a.intermediate_values == pytest.approx(b.intermediate_values, rel=1e-9)
    print(f"closest decision: {_closest(one):.1e} relative")


def _closest(trials: list[optuna.trial.FrozenTrial]) -> float:
    """The smallest relative distance of a trial's report from the median that decided on it."""
    from statistics import median

    margins = []
    for trial in trials:
        for step, value in trial.intermediate_values.items():
            before = [t.intermediate_values[step] for t in trials[: trial.number] if step in t.intermediate_values]
            if len(before) >= 2:
                margins.append(abs(value / median(before) - 1))
    return min(margins)


def test_an_objective_on_one_rank_and_on_two() -> None:
    study = tune(tuned.parabola, n_trials=4, seed=0)
    assert all(trial.value == tuned.parabola(optuna.trial.FixedTrial(trial.params)) for trial in study.trials)
    study = tune(tuned.of_all_ranks, n_trials=4, seed=0, ranks=2, pruner={"name": "median", "n_startup_trials": 1})
    assert {trial.state.name for trial in study.trials} == {"COMPLETE", "PRUNED"}
    assert all(trial.user_attrs["where"]["ranks"] == 2 for trial in study.trials)


@pytest.mark.parametrize("objective", [tuned.of_unlike_ranks, tuned.of_a_talkative_rank])
def test_ranks_that_ask_for_different_things_are_told(objective: Any) -> None:
    with pytest.raises(SameError, match="the ranks of a trial must ask the same in the same order"):
        tune(objective, n_trials=9, ranks=2, max_retries=0)


@pytest.mark.parametrize(
    ("trouble", "end"),
    [("error", "error: ValueError: a bug of its own"), ("nan", "the value is nan")],
)
def test_how_a_trial_ended_is_said(here: Path, trouble: str, end: str) -> None:
    study = tune(tuned.config(here), SPACE, n_trials=2, args=[f"--model.trouble={trouble}"])
    assert [trial.user_attrs["end"] for trial in study.trials] == [end] * 2
    assert [trial.state.name for trial in study.trials] == ["FAIL"] * 2


def test_out_of_memory_is_a_failed_trial_and_a_constraint(here: Path) -> None:
    space = SearchSpace({"model.trouble": CategoricalDistribution(["memory", ""])})
    study = tune(tuned.config(here), space, n_trials=2, sampler="grid", limits=[Limit("size", 1)])
    failed, complete = sorted(study.trials, key=lambda trial: trial.state == optuna.trial.TrialState.COMPLETE)
    assert failed.user_attrs["end"].startswith("out of memory: ") and failed.constraints["out_of_memory"] > 0
    assert complete.constraints["size"] > 0


def test_a_killed_rank_is_retried_from_its_own_checkpoint(here: Path) -> None:
    path = tuned.config(here, enable_checkpointing=True, max_epochs=3)
    study = tune(path, SPACE, n_trials=1, seed=0, args=["--model.trouble=kill"])
    killed, retried = study.trials
    assert killed.user_attrs["end"].startswith("killed: rank 0: ended by SIGKILL")
    assert retried.user_attrs["retry_of"] == 0 and retried.params == killed.params
    assert retried.state.name == "COMPLETE" and retried.user_attrs["steps"] < 6  # it went on behind the second step
    whole = tune(path, SPACE, n_trials=1, seed=0, study_name="whole")
    # Lightning's single-device strategy loads a checkpoint before it makes the module's weights double.
    assert retried.intermediate_values == pytest.approx(whole.trials[0].intermediate_values, rel=1e-6)


def test_points_that_break_a_constraint_never_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    width = IntDistribution(8, 16, step=8)
    space = SearchSpace(
        {"model.width": width, "model.depth": IntDistribution(1, 2)}, ["model.width * model.depth <= 16"]
    )
    study = tune(tuned.config(here), space, n_trials=2, sampler="random", seed=3)
    ran = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    assert len(ran) == 2 and all(t.params["model.width"] * t.params["model.depth"] <= 16 for t in ran)
    impossible = SearchSpace({"model.width": width}, ["model.width > 99"])
    with pytest.raises(NoFeasiblePoint, match="narrow the ranges"):
        Proposals(impossible, patience=9).next(optuna.create_study())


def test_several_objectives(here: Path) -> None:
    study = tune(tuned.config(here), SPACE, monitor=["val_loss", "size"], n_trials=2, seed=0)
    assert len(study.directions) == 2 and all(len(trial.values) == 2 for trial in study.trials)
    with pytest.raises(ValueError, match="Optuna can't prune there"):
        tune(tuned.config(here), SPACE, monitor=["val_loss", "size"], n_trials=2, pruner="asha", study_name="other")


def test_bad_input_is_refused_before_anything_runs(here: Path) -> None:
    path = tuned.config(here)
    tune(path, SPACE, n_trials=1, seed=0)
    with pytest.raises(BadInput, match="ran with another config: trainer.max_epochs was 3, and is 9"):
        tune(path, SPACE, n_trials=2, args=["--trainer.max_epochs=9"])
    with pytest.raises(BadInput, match="a trial runs on one host"):
        tune(path, SPACE, n_trials=2, args=["--trainer.num_nodes=2"])
    forking = {"class_path": "DDPStrategy", "init_args": {"start_method": "fork"}}
    for strategy in ("ddp_spawn", json.dumps(forking)):
        with pytest.raises(BadInput, match=r"would start more from each of them; write --trainer\.strategy=ddp"):
            tune(path, SPACE, n_trials=2, args=[f"--trainer.strategy={strategy}"])
    with pytest.raises(BadInput, match="a config needs a space"):
        tune(path, n_trials=1)
    with pytest.raises(BadInput, match="leave space out"):
        tune(tuned.parabola, SPACE, n_trials=1)
    with pytest.raises(BadInput, match="n_trials"):
        tune(path, SPACE)
    with pytest.raises(TypeError, match="top level of a module"):
        tune(lambda trial: 0.0, n_trials=1)


def test_a_monitor_that_is_not_logged(here: Path) -> None:
    with pytest.raises(SameError, match="val_los"):
        tune(tuned.config(here), SPACE, monitor="val_los", n_trials=9)


def test_the_command(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(os.getcwd())
    tuned.config(here)
    Path("space.yaml").write_text("parameters:\n  model.lr: {low: 0.001, high: 0.3, log: true}\n")
    words = ["tune", "--config", "config.yaml", "--space", "space.yaml", "--n_trials", "2", "--data.batches", "1"]
    assert main(words) == 0
    assert "the study has its 2 trials: 2 complete" in capsys.readouterr().out
    assert yaml.safe_load(Path("runs/config/best.yaml").read_text())["data"]["init_args"]["batches"] == 1
    other = ["--study_name", "other", "--sampler", '{"name": "tpe", "n_startup_trials": 1}', "--limits", "[]"]
    Path("points.csv").write_text("model.lr\n0.125\n")
    other += ["--points", "points.csv", "--transfer", "runs/config"]
    assert main([*words, *other]) == 0
    first, second = optuna.load_study(study_name="other", storage=open_storage("runs/other")).trials
    best = yaml.safe_load(Path("runs/config/best.yaml").read_text())["model"]["init_args"]["lr"]
    assert (first.params, second.params) == ({"model.lr": 0.125}, {"model.lr": best})
    assert main([*words, *other]) == 0
    assert len(optuna.load_study(study_name="other", storage=open_storage("runs/other")).trials) == 2
    assert main([*words, "--transfer", "runs/none"]) == 2
    assert "transfer[0]: storage='runs/none': there is no study" in capsys.readouterr().err
    assert main([*words, "--sampler", "tp"]) == 2
    assert "tpe" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["tune", "--config", "config.yaml", "--n_trials", "2"])
    assert "space" in capsys.readouterr().err
