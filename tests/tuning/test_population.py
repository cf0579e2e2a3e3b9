"""Population-based training: members go on from real checkpoints, explored, and the study alone says what is next."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import lightning as L
import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from lightning_bharat.cli import main
from lightning_bharat.commands.project import BadInput
from lightning_bharat.tuning import SearchSpace, When, tune
from lightning_bharat.tuning.explore import explore
from lightning_bharat.tuning.generation import Generation, GenerationEnd, NotCopied, Unit
from lightning_bharat.tuning.lineage import lineage
from lightning_bharat.tuning.members import Members
from lightning_bharat.tuning.population import Population
from lightning_bharat.tuning.storage import open_storage
from lightning_bharat.tuning.study_config import StudyCLI, StudyConfig
from tests.modules import Rows
from tests.ranks import server
from tests.tuning import tuned
from tests.tuning.populated import Written, schedule_of

MODEL = "--model.class_path=tests.tuning.populated.Written"
LR = FloatDistribution(1e-4, 0.3, log=True)
SPACE = SearchSpace({"model.lr": LR, "model.decay": FloatDistribution(0.01, 0.1)})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    server.warm_up()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_trains_a_population(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights and optimizer are the donor's, bit for bit, also of a member that was killed; what is explored is set
    behind them. The same on two ranks, which keep pieces: the same lineage, and values but for the rounding below.
    """
    options = {"max_epochs": 2, "precision": "64-true"}
    tuned.config(here, **options)
    Path("space.yaml").write_text(
        "model.lr: {low: 1.0e-4, high: 0.3, log: true}\nmodel.decay: {low: 0.01, high: 0.1}\n"
    )
    how = {"size": 2, "interval": 1, "mode": "sync", "resample": 0}
    words = ["tune", "--config=config.yaml", "--space=space.yaml", f"--population={json.dumps(how)}", "--seed=1", MODEL]
    assert main([*words, "--model.schedule=steps", "--model.trouble=kill"]) == 0
    one = optuna.load_study(study_name="config", storage=open_storage(Path("runs/config")))
    places = [(t.user_attrs["generation"], t.user_attrs["member"], t.user_attrs.get("parent")) for t in one.trials]
    assert places == [(0, 0, None), (0, 1, None), (1, 0, 1), (1, 0, 1), (1, 1, 1)]  # member 0 goes on from member 1's
    assert one.trials[2].user_attrs["end"].startswith("killed") and one.trials[3].user_attrs["retry_of"] == 2
    child, donor = one.trials[3].params, one.trials[1].params
    assert {round(child[key] / donor[key], 6) for key in donor} <= {0.8, 1.2}
    for trial in one.trials[3:]:
        assert written(trial.number)["start"] == written(1)["end"]
        for step, lr, decay in written(trial.number)["steps"]:  # the trial's own, at the schedule's place
            assert step >= 2 and decay == trial.params["model.decay"]
            assert lr == pytest.approx(trial.params["model.lr"] * 0.9 ** (step // 2))
    assert [stage.trial for stage in lineage(one)] == [1, one.best_trial.number]
    assert f"/population/{one.best_trial.number:04d}.ckpt, by trial 1 (model.lr=" in capsys.readouterr().out
    assert {int(path.stem) for path in Path("runs/config/population").iterdir()} == {3, 4}

    strategy = {"class_path": "lightning_bharat.HybridStrategy", "init_args": {"data_parallel_size": 2}}
    path = tuned.config(here, devices=2, strategy=strategy, **options)
    args = [MODEL, "--data.data=2", "--model.schedule=steps"]
    two = tune(path, SPACE, population=how, n_trials=3, seed=1, study_name="two", args=args, say=lambda line: None)
    for a, b in zip([one.trials[number] for number in (0, 1, 3)], two.trials, strict=True):
        assert (a.params, a.user_attrs.get("parent")) == (b.params, b.user_attrs.get("parent"))
        # Lightning's single-device strategy reads a checkpoint before it makes the weights double.
        assert a.value == pytest.approx(b.value, rel=1e-6) and b.user_attrs["steps"] == 2
    for rank in range(2):
        assert written(2, "two", rank)["start"] == written(1, "two", rank)["end"]


def written(trial: int, name: str = "config", rank: int = 0) -> dict[str, Any]:
    return json.loads(Path(f"runs/{name}/trials/{trial:04d}/rank{rank}.json").read_text())


# ---- fits without a study


class Placed(Rows):
    """Goes on with the batch behind those that were taken, also in the middle of an epoch."""

    at = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in list(super().__iter__())[self.at :]:
            self.at = (self.at + 1) % len(self)
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def fit(
    folder: Path, end: int, unit: Unit, begins: Path | None = None, lr: float = 0.01, **more: Any
) -> tuple[dict[str, Any], Path]:
    """One generation of at most six steps, three in an epoch."""
    to = folder / f"{unit}-{end}-{lr}.ckpt"
    explored = {"model.lr": (None, lr)} if begins else {}
    callback = GenerationEnd(Generation(end, unit, to, begins, 7, explored))
    limit = {"max_epochs": 2} if unit == "epochs" else {"max_epochs": -1, "max_steps": 6}
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[callback],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **limit,  # type: ignore[arg-type]
    )
    L.seed_everything(0)
    rows = [Placed("stack", 8, 3, 1, 0, False) for _ in range(2)]
    with callback.copying():
        trainer.fit(Written(lr, **more), *rows, ckpt_path=begins)
    return json.loads((folder / "rank0.json").read_text()), to


@pytest.mark.parametrize(
    ("unit", "ends", "schedule"),
    [("epochs", [1, 2], "steps"), ("steps", [2, 3, 6], "milestones"), ("steps", [1, 6], "one cycle")],
)
def test_generations_are_one_training(tmp_path: Path, unit: Unit, ends: list[int], schedule: str) -> None:
    """The same steps, epochs, weights and optimizer as one fit, also where epochs are cut; a new rate at its place."""
    whole, _ = fit(tmp_path, ends[-1], unit, schedule=schedule)
    steps, at = [], None
    for end in ends:
        part, at = fit(tmp_path, end, unit, at, schedule=schedule)
        steps += part["steps"]
    assert steps == whole["steps"] and len(steps) == 6
    assert all(part[key] == whole[key] for key in ("end", "epochs", "steps_in_all"))
    _, at = fit(tmp_path, ends[0], unit, schedule=schedule)
    other, _ = fit(tmp_path, ends[-1], unit, at, lr=0.03, schedule=schedule)
    rest = rates(schedule, 0.03)[-len(other["steps"]) :]
    assert [step[1] for step in other["steps"]] == pytest.approx(rest) and len(rest) < 6


def rates(schedule: str, lr: float) -> list[float]:
    """Of the six steps."""
    optimizer, found = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr), []
    scheduler = schedule_of(schedule, optimizer, lr)
    for _ in range(6):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return found


def test_what_changes_the_shape_is_named(tmp_path: Path) -> None:
    _, at = fit(tmp_path, 1, "epochs")
    with pytest.raises(NotCopied, match=r"trial 7 does not fit: .*size mismatch.*model.lr \(None there, 0.02 here\)"):
        fit(tmp_path, 2, "epochs", at, lr=0.02, width=16)


def test_a_generation_that_was_killed_behind_its_end_makes_no_more_steps(tmp_path: Path) -> None:
    _, at = fit(tmp_path, 1, "epochs")
    again, _ = fit(tmp_path, 1, "epochs", at)
    assert again["steps"] == [] and again["epochs"] == 1


# ---- without fits


def members(mode: str, size: int = 4, **more: Any) -> Members:
    how = Population(size, 1, mode, **more)  # type: ignore[arg-type]
    return Members(how, SearchSpace({"x": FloatDistribution(1, 2)}), Path("nowhere"), 3, 0)


def test_members_wait_or_go_on_at_once() -> None:
    study = optuna.create_study()
    sync = members("sync")
    first = [sync.next(study) for _ in range(4)]
    assert all(first) and sync.next(study) is None
    for trial, value in zip(first[:3], (3.0, 1.0, 2.0), strict=True):
        study.tell(trial, value)
    assert sync.next(study) is None
    # Asynchronously member 0 goes on with its own: of three, a quarter is none.
    gone_on = members("async").next(study)
    assert gone_on is not None and gone_on.user_attrs == {"member": 0, "generation": 1, "parent": 0}
    study.tell(first[3], state=TrialState.FAIL)  # it is replaced, by the best
    replaced = [sync.next(study) for _ in range(3)][-1]
    assert replaced is not None and (replaced.user_attrs["member"], replaced.user_attrs["parent"]) == (3, 1)


def test_two_controllers_that_add_the_same_generation() -> None:
    study = optuna.create_study()
    study.enqueue_trial({}, user_attrs={"member": 0, "generation": 0})
    study.enqueue_trial({}, user_attrs={"member": 0, "generation": 0})
    study.enqueue_trial({"x": 1.5})  # a person's point is the next member
    trials = [members("sync").next(study) for _ in range(2)]
    assert [trial.user_attrs["member"] for trial in trials if trial] == [0, 1]
    assert study.trials[1].user_attrs["end"].startswith("withdrawn: trial 0 is") and trials[1].params == {"x": 1.5}


def test_what_is_explored_stays_in_the_space() -> None:
    space = SearchSpace(
        {
            "lr": FloatDistribution(1e-3, 1e-1, log=True),
            "zero": FloatDistribution(-1, 1),
            "half": FloatDistribution(0, 2, step=0.5),
            "depth": IntDistribution(2, 10, step=4),
            "kind": CategoricalDistribution(["a", "b", "c"]),
            "only": When("kind == 'b'", IntDistribution(1, 8, log=True)),
        },
        ["lr * depth <= 0.9"],
    )
    values = {"lr": 0.09, "zero": 0.0, "half": 1.0, "depth": 6, "kind": "a"}
    near = [explore(space, values, Random(seed), (0.8, 1.2), 0.0) for seed in range(50)]
    assert {round(one["lr"], 3) for one in near} == {0.072, 0.1}
    assert all(one["lr"] * one["depth"] <= 0.9 for one in near)
    assert {one["zero"] for one in near} == {-0.2, 0.2} and {one["half"] for one in near} == {0.5, 1.5}
    assert {one["depth"] for one in near} <= {2, 10} and {one["kind"] for one in near} == {"b"}
    assert all(1 <= one["only"] <= 8 for one in near)
    anew = [explore(space, values, Random(seed), (0.8, 1.2), 1.0, ["kind"]) for seed in range(50)]
    assert {one["kind"] for one in anew} == {"a", "b", "c"}
    assert all({**one, **values, "kind": one["kind"]} == one for one in anew)


@pytest.mark.parametrize(
    ("population", "says"),
    [
        ({"size": 1, "interval": 1}, "size=1: expected a whole number of at least 2; one member has nobody to copy"),
        ({"size": 4}, "needs interval"),
        ({"size": 4, "interval": 1, "mod": "sync"}, 'Did you mean "mode"'),
        ({"size": 4, "interval": 1, "mode": "both"}, "mode='both'"),
        ({"size": 4, "interval": 1, "quantile": 0.7}, "quantile=0.7"),
        ({"size": 4, "interval": 1, "factors": "0.8"}, "factors='0.8'"),
        ({"size": 4, "interval": 1, "resample": None}, "resample=None"),
        ({"size": 4, "interval": 1, "explorer": "bandit"}, 'explorer=\'bandit\': expected "pbt" or "pb2"'),
    ],
)
def test_a_population_that_can_not_be_is_refused(population: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Population.read(population)


def test_what_does_not_go_with_a_population_is_refused(here: Path) -> None:
    config = StudyConfig(StudyCLI([f"--config={tuned.config(here)}", MODEL]), 0)
    for more, says in (
        ({"explore": ["model.l"]}, "explore names 'model.l'"),
        ({"unit": "steps"}, "trainer.max_steps=-1"),
        ({"pruner": "asha"}, "leave pruner out"),
        ({"sampler": {"name": "grid"}}, "the sampler draws the first generation"),
        ({"monitor": ["a", "b"]}, "one metric"),
        ({"n_trials": 13}, "are 12 trials"),
    ):
        options = {name: more.pop(name) for name in ("pruner", "sampler", "monitor", "n_trials") if name in more}
        with pytest.raises(BadInput, match=says):
            tune(config, SPACE, population={"size": 4, "interval": 1, **more}, **options)
    assert not Path("runs").exists()
