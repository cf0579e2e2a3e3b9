"""The front and the volume that it dominates, against figures by hand."""

from __future__ import annotations

import optuna
import pytest
from optuna import Study

from lightning_bharat.tuning.pareto import hypervolume_curve, pareto_front, reference_point

# The first is to be small, the second large.
VALUES = [(3.0, 1.0), (1.0, 1.0), (2.0, 3.0), (4.0, 0.0), (1.0, 1.0), (2.5, 2.0)]


def study(values: list[tuple[float, float]], broken: tuple[int, ...] = ()) -> Study:
    made = optuna.create_study(directions=["minimize", "maximize"])
    for number, pair in enumerate(values):
        trial = made.ask()
        trial.set_constraint("latency", 1.0 if number in broken else -1.0)
        made.tell(trial, pair)
    return made


def test_the_front_has_each_point_once_in_order() -> None:
    assert [trial.number for trial in pareto_front(study(VALUES))] == [1, 2]
    assert [trial.number for trial in pareto_front(study(VALUES, broken=(1, 2)))] == [4, 5]


def test_volume_by_hand() -> None:
    numbers, volumes = hypervolume_curve(study(VALUES), [4.0, 0.0])
    assert numbers == list(range(6))
    # 1 × 1; then 3 × 1; then 2 × 2 on top of it; then nothing that is new.
    assert volumes == pytest.approx([1, 3, 7, 7, 7, 7])
    assert hypervolume_curve(study(VALUES, broken=(1,)), [4.0, 0.0])[1] == pytest.approx([1, 1, 6, 6, 7, 7])


def test_the_reference_is_a_tenth_of_the_range_beyond_the_worst() -> None:
    assert reference_point(study(VALUES)) == pytest.approx([4.3, -0.3])
    assert reference_point(study(VALUES, broken=(3,))) == pytest.approx([3.2, 0.8])
    assert reference_point(study([(2.0, 5.0)])) == pytest.approx([2.2, 4.5])
    assert hypervolume_curve(study([(2.0, 5.0)]))[1] == pytest.approx([0.1])
    with pytest.raises(ValueError, match="no complete trial that keeps its limits"):
        reference_point(study(VALUES, broken=tuple(range(6))))


def test_one_objective_has_no_front() -> None:
    made = optuna.create_study()
    made.tell(made.ask(), 1.0)
    with pytest.raises(ValueError, match="multi-objective"):
        hypervolume_curve(made)
