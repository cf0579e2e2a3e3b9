"""Points that a study begins with: each is run once, and what does not fit is refused before any is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from lightning_bharat.commands.project import BadInput
from lightning_bharat.tuning import tune
from lightning_bharat.tuning.after_earlier import earlier_studies, sampler_after
from lightning_bharat.tuning.errors import StorageError
from lightning_bharat.tuning.retry import retry, withdraw
from lightning_bharat.tuning.samplers import make_sampler
from lightning_bharat.tuning.space import SearchSpace, When
from lightning_bharat.tuning.storage import open_storage
from lightning_bharat.tuning.warm_start import warm_start

SPACE = {
    "model.lr": FloatDistribution(1e-5, 1e-1, log=True),
    "model.width": IntDistribution(64, 512, step=64),
    "model.act": CategoricalDistribution(["gelu", "relu", None, True, 2]),
}


def objective(trial: optuna.Trial) -> float:
    for key, distribution in SPACE.items():
        trial._suggest(key, distribution)
    return trial.params["model.lr"]


def run(study: optuna.Study, trials: int) -> list[dict[str, Any]]:
    study.optimize(objective, n_trials=trials)
    return [trial.params for trial in study.trials]


def test_points_are_run_in_their_order_and_the_sampler_fills_in_what_they_leave_out() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = [{"model.lr": 1e-3, "model.width": 128, "model.act": None}, {"model.width": 64}]
    assert warm_start(study, SPACE, points) == 2
    first, second, third = run(study, 3)
    assert first == points[0]
    assert second["model.width"] == 64 and second.keys() == SPACE.keys()
    assert third["model.width"] not in (64, 128)


def test_the_same_command_again_runs_no_point_twice(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    points = [{"model.lr": 1, "model.width": 128}, {"model.width": 64}, {"model.width": 64}]
    space = {**SPACE, "model.lr": FloatDistribution(0, 1)}
    found = []
    for _ in range(3):
        study = optuna.create_study(storage=storage, study_name="s", load_if_exists=True)
        found.append(warm_start(study, space, points))
        study.optimize(lambda trial: trial._suggest("model.width", SPACE["model.width"]), n_trials=1)
    assert found == [2, 0, 0]  # a point that has been run, one that waits, and one that is written twice
    assert [trial.params["model.width"] for trial in study.trials][:2] == [128, 64]
    assert not any("fixed_params" in trial.system_attrs for trial in study.trials[2:])


def test_a_csv_with_values_gives_its_best_rows_first_and_then_those_without(tmp_path: Path) -> None:
    file = tmp_path / "points.csv"
    file.write_text(
        "\ufeffmodel.lr, model.width, model.act, value\n"
        "1e-3,64,null,0.5\n1e-2,128.0,true,0.25\n,192,2,\n1e-4,256,gelu,9\n"
    )
    study = optuna.create_study()
    assert warm_start(study, SPACE, file, best=2) == 3
    first, second, third = run(study, 3)
    assert first == {"model.lr": 1e-2, "model.width": 128, "model.act": True} and first["model.act"] is True
    assert second == {"model.lr": 1e-3, "model.width": 64, "model.act": None}
    assert (third["model.width"], third["model.act"]) == (192, 2) and third["model.act"] is not True
    highest = optuna.create_study(direction="maximize")
    warm_start(highest, SPACE, str(file), best=1)
    assert run(highest, 1)[0]["model.width"] == 256


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model.lr\n0.2\n", "line 2: model.lr='0.2' is outside of [1e-05, 0.1]"),
        ("model.lr\n1e-3\nfast\n", "line 3: model.lr='fast' is no number"),
        ("model.lr\nnan\n", "line 2: model.lr='nan' is no finite number"),
        ("model.width\n64.5\n", "line 2: model.width='64.5' is no whole number"),
        ("model.width\n100\n", "line 2: model.width='100' is not 64 plus a multiple of the step 64"),
        ("model.act\nsilu\n", "line 2: model.act='silu' is none of the choices 'gelu', 'relu', None, True, 2"),
        ("model.lrr\n1e-3\n", "line 2: model.lrr: no parameter of the space; did you mean model.lr?"),
        ("model.lr\n1e-3,7\n", "line 2: it has more cells than the head has columns: ['7'] is left over"),
        ("model.lr,value\n1e-3,low\n", "line 2: value='low' is no number; leave it empty where it is not known"),
        ("model.lr,value\n1e-3,inf\n", "line 2: value='inf' is no finite number"),
        ("model.lr,model.lr\n1e-3,1e-3\n", "the column 'model.lr' is there twice"),
        ("model.lr,model.width\n,\n", "line 2: it has no values"),
        ("model.lr\n", "has no rows"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_with_its_line_and_none_is_run(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "points.csv"
    file.write_text(text)
    study = optuna.create_study()
    with pytest.raises(ValueError) as error:
        warm_start(study, SPACE, file)
    assert said in str(error.value) and str(file) in str(error.value)
    assert not study.trials


def test_all_that_is_wrong_is_said_at_once() -> None:
    study = optuna.create_study()
    points: list[Any] = [{"model.lr": True, "lr": 1}, {"model.width": 64}, {"model.act": 2.0, "model.lr": "1e-3"}]
    with pytest.raises(ValueError) as error:
        warm_start(study, SPACE, points)
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["points[0]", "points[0]", "points[2]", "points[2]"]
    assert lines[3] == "points[2]: model.lr='1e-3' is text, where a number is expected"
    assert not study.trials
    with pytest.raises(ValueError, match=r"points\[1\]=3 is no dict"):
        warm_start(study, SPACE, [{"model.lr": 1e-3}, 3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="points='nowhere.csv' is no file"):
        warm_start(study, SPACE, "nowhere.csv")
    with pytest.raises(ValueError, match="best=0"):
        warm_start(study, SPACE, points, best=0)


def test_text_that_may_be_two_choices_is_refused_and_a_dict_tells_them_apart(tmp_path: Path) -> None:
    file = tmp_path / "points.csv"
    file.write_text("a\nNone\n")
    space = {"a": CategoricalDistribution([None, "None"]), "b": CategoricalDistribution(["1", 1])}
    study = optuna.create_study()
    with pytest.raises(ValueError, match="a='None' may be any of None, 'None'; give points as a list of dicts"):
        warm_start(study, space, file)
    assert warm_start(study, space, [{"a": None, "b": 1}, {"a": "None", "b": "1"}]) == 2
    fixed = [trial.system_attrs["fixed_params"] for trial in study.trials]
    assert fixed == [{"a": None, "b": 1}, {"a": "None", "b": "1"}]


def earlier(direction: str, storage: Any = None) -> optuna.Study:
    study = optuna.create_study(direction=direction, storage=storage, study_name="earlier")
    wide = {"model.lr": FloatDistribution(1e-6, 1.0, log=True), "model.act": CategoricalDistribution(["gelu", "tanh"])}
    for lr, act, value in ((0.5, "gelu", 3.0), (1e-3, "tanh", 1.0), (1e-2, "gelu", 2.0), (0.9, "tanh", 4.0)):
        params = {"model.lr": lr, "model.act": act}
        study.add_trial(optuna.create_trial(params=params, distributions=wide, value=value))
    study.add_trial(optuna.create_trial(state=optuna.trial.TrialState.FAIL, params=params, distributions=wide))
    return study


def test_the_best_trials_of_an_earlier_study_come_first_with_what_the_space_allows() -> None:
    study = optuna.create_study()
    assert warm_start(study, SPACE, earlier("minimize"), best=3) == 3
    fixed = [trial.system_attrs["fixed_params"] for trial in study.trials]
    assert fixed == [{"model.lr": 1e-3}, {"model.lr": 1e-2, "model.act": "gelu"}, {"model.act": "gelu"}]
    study = optuna.create_study()
    assert warm_start(study, SPACE, earlier("maximize"), best=2) == 1  # of 4.0 nothing is in the space
    with pytest.raises(ValueError, match="nothing of its best trials fits"):
        warm_start(study, SPACE, earlier("maximize"), best=1)


def test_an_earlier_study_is_found_by_its_folder_or_storage_and_name(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "earlier"
    folder.mkdir(parents=True)
    earlier("minimize", JournalStorage(JournalFileBackend(str(folder / "study.journal"))))
    url = f"sqlite:///{tmp_path}/old.db"
    earlier("minimize", url)
    for source in (folder, str(folder), (url, "earlier")):
        study = optuna.create_study()
        assert warm_start(study, SPACE, source, best=1) == 1
        assert study.trials[0].system_attrs["fixed_params"] == {"model.lr": 1e-3}
    with pytest.raises(ValueError, match="which study. There are earlier"):
        warm_start(study, SPACE, (url, "another"))
    with pytest.raises(StorageError, match="there is no study"):
        warm_start(study, SPACE, tmp_path)
    with pytest.raises(ValueError, match="has no complete trial"):
        warm_start(study, SPACE, optuna.create_study())
    with pytest.raises(ValueError, match="has 2 objectives"):
        warm_start(study, SPACE, optuna.create_study(directions=["minimize"] * 2))


def test_conditions_and_constraints_of_a_search_space() -> None:
    space = SearchSpace(
        {
            "moe": CategoricalDistribution([True, False]),
            "experts": When("moe", IntDistribution(4, 16, step=4)),
            "width": IntDistribution(1, 64),
        },
        constraints=["experts * width <= 256"],
    )
    study = optuna.create_study()
    with pytest.raises(ValueError, match=r"points\[1\]: it breaks the constraint experts \* width <= 256"):
        warm_start(study, space, [{"moe": True}, {"moe": True, "experts": 16, "width": 17}])
    assert not study.trials
    assert warm_start(study, space, [{"moe": True, "experts": 16, "width": 16}, {"moe": False, "width": 64}]) == 2
    assert [space.suggest(study.ask()) for _ in range(2)][1] == {"moe": False, "width": 64}


def test_two_hosts_that_begin_at_once_run_a_point_once() -> None:
    study = optuna.create_study()
    for _ in range(2):  # neither sees the other's, as both look before either writes
        for point in ({"a": 1}, {"a": True}):
            study.enqueue_trial(point, user_attrs={"point": json.dumps(point)})
    asked = [study.ask() for _ in range(4)]
    assert [withdraw(study, trial) for trial in asked] == [False, False, True, True]
    assert study.trials[2].user_attrs["end"] == "withdrawn: trial 0 has the same point"
    assert retry(study, study.trials[0], "killed")  # whose successor is no third one
    assert not withdraw(study, study.ask())


def test_what_tune_can_not_begin_with_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, direction, key in (("lowest", "minimize", "x"), ("highest", "maximize", "x"), ("other", "minimize", "z")):
        made = optuna.create_study(storage=open_storage(f"runs/{name}"), study_name=name, direction=direction)
        made.optimize(lambda trial, key=key: trial.suggest_float(key, 0, 1), n_trials=3)
    kept, space = open_storage("runs/new"), SearchSpace({"x": FloatDistribution(0, 1)})

    def refused(
        said: str, *sources: Any, name: str = "new", storage: Any = kept, directions: Any = ("minimize",)
    ) -> None:
        with pytest.raises((BadInput, StorageError)) as error:
            earlier_studies(list(sources), name, storage, directions, space)
        assert said in str(error.value), error.value

    refused("transfer[1]: storage='runs/none': there is no study", "runs/lowest", "runs/none")
    refused("transfer[0]: the study 'highest' was to maximize its value, and this one is to minimize", "runs/highest")
    refused("searched z, and this one x: no parameter is in both", "runs/other")
    refused("'lowest' is this study itself", "runs/lowest", name="lowest", storage=open_storage("runs/lowest"))
    refused("transfer ranks trials by one objective, and this study has 2", "runs/lowest", directions=("minimize",) * 2)
    assert [e.name for e in earlier_studies("runs/lowest", "new", kept, ["minimize"], space)] == ["lowest"]
    # Another study of the same name is not this one.
    assert earlier_studies("runs/lowest", "lowest", kept, ["minimize"], space)
    found = earlier_studies("runs/lowest", "new", kept, ["minimize"], None)
    with pytest.raises(BadInput, match="the sampler Grid tries all points"):
        sampler_after(found, make_sampler("grid", space={"x": [0, 1]}), 0)
    with pytest.raises(ValueError, match="write a list of dicts"):
        tune(ask_x, n_trials=1, points="points.csv")
    with pytest.raises(BadInput, match="'lowest' is this study itself"):
        tune(ask_x, n_trials=9, study_name="lowest", transfer="runs/lowest")


def ask_x(trial: optuna.Trial) -> float:
    raise AssertionError("nothing was to run")
