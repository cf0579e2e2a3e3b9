"""benchmarks/samplers.py: its functions have the minima that it subtracts, and it says what it found."""

from __future__ import annotations

import json

import optuna
import pytest

from benchmarks.paired import Interval
from benchmarks.sampler_tasks import FITS, FUNCTIONS
from benchmarks.samplers import Result, main, report

MINIMA = {
    "hartmann6": [{"x0": 0.20169, "x1": 0.150011, "x2": 0.476874, "x3": 0.275332, "x4": 0.311652, "x5": 0.6573}],
    "branin": [{"x": (5 + x) / 15, "y": y / 15} for x, y in ((-3.14159265, 12.275), (9.42477796, 2.475))],
    "conditional": [{"lr": 1e-3, "kind": "experts", "experts": 20, "capacity": 1.25}],
}


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_minima(name: str) -> None:
    for point in MINIMA[name]:
        assert FUNCTIONS[name].objective(optuna.trial.FixedTrial(point)) == pytest.approx(
            FUNCTIONS[name].minimum, abs=1e-6
        )


def test_a_fit_learns_and_depends_on_what_is_suggested_alone() -> None:
    point = {"lr": 0.1, "width": 64, "dropout": 0.0}
    good, again = (FITS["mlp"].objective(optuna.trial.FixedTrial(point)) for _ in range(2))
    poor = FITS["mlp"].objective(optuna.trial.FixedTrial({**point, "lr": 1e-4}))
    assert good == again < poor - 0.3


def test_command_prints_a_table_and_a_line_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--seeds", "6", "--trials", "4", "--tasks", "branin", "--samplers", "random", "tpe"])
    *shown, line = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert len(shown) == 3 and shown[1].split()[:4] == ["branin", "random", "6", "4"]
    assert [each["sampler"] for each in found["results"]] == ["random", "tpe"]
    assert code == any(each["missed"] for each in found["results"])


def test_worse_for_certain_is_missed() -> None:
    null = Interval(0.0, -0.1, 0.1)
    fine, worse = (Result("t", "tpe", 6, 4, 0.2, 0.1, Interval(0.1, low, 0.2), null) for low in (-0.1, 0.05))
    assert (fine.missed, worse.missed) == (False, True)
    assert report([fine, worse]).count("missed") == 1
