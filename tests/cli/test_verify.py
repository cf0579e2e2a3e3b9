"""`bharat verify`: what is equal is called equal, what is not is found and named."""

from __future__ import annotations

from math import nan
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_bharat.cli import main
from lightning_bharat.commands.no_dropout import NoDropout
from lightning_bharat.commands.verify import Comparison
from lightning_bharat.commands.verify_ranks import Record
from tests.cli.project import Project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    return Project(tmp_path, monkeypatch)


def test_equal_on_all_layouts(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    layouts = ["data=2", "tensor=2", "data=2,tensor=2", "data=2,pipeline=2"]
    assert main(["verify", *project.classes, "--data.batch_size=6", "--layout", *layouts]) == 0
    out = capsys.readouterr().out
    assert out.count("\nequal (losses within 1e-09") == 4
    assert "1 rank against Layout(data=2, tensor=2), 4 ranks, float64" in out
    assert "Dropout" not in out and "random" not in out


def test_equal_with_dropout_accumulation_and_clipping(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--model.dropout=0.3", "--trainer.accumulate_grad_batches=2", "--trainer.gradient_clip_val=0.1"]
    assert main(["verify", *project.classes, *settings, "--steps=2"]) == 0
    out = capsys.readouterr().out
    assert "Dropout was switched off" in out
    assert "random numbers" not in out


def test_a_step_that_depends_on_its_rank_is_found(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *project.classes, "--model.broken=true", "--layout", "data=2"]) == 1
    out = capsys.readouterr().out
    assert "NOT EQUAL (losses within 1e-09" in out


def test_a_layout_that_is_refused_is_not_equal(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *project.classes, "--model.width=9", "--layout", "tensor=4"]) == 1
    said = capsys.readouterr()
    assert "NOT EQUAL: tensor_parallel_size=4 does not divide the 18 channels" in said.out
    assert "Traceback" not in said.out + said.err


def test_a_module_that_does_not_run_whole(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--model", f"{project.package}.model.Buggy", *project.classes[2:]]) == 1
    assert "does not run whole: rank 0: ValueError: a bug of its own" in capsys.readouterr().err


def test_a_layout_that_is_none(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *project.classes, "--layout", "heads=2"]) == 2
    assert "'heads=2' is not a dimension and its size" in capsys.readouterr().err


def record(loss: float = 1.0, gradient: float = 1.0, weight: float = 1.0, steps: int = 2) -> Record:
    gradients = [{"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([gradient])} for _ in range(steps)]
    return Record(losses=[loss] * steps, gradients=gradients, end={"a": torch.tensor([weight])})


@pytest.mark.parametrize(
    ("other", "equal"),
    [
        (record(), True),
        (record(loss=1 + 1e-12, gradient=1 + 1e-12), True),
        (record(loss=1 + 1e-6), False),
        (record(gradient=1 + 1e-6), False),
        (record(weight=1 + 1e-6), False),
        (record(loss=nan), False),
        (record(gradient=nan), False),
        (record(steps=1), False),
        (Record(), False),
    ],
)
def test_comparison(other: Record, equal: bool) -> None:
    comparison = Comparison(record(), other, 1e-9, 1e-9)
    assert comparison.equal is equal
    assert ("NOT EQUAL" in str(comparison)) is not equal


def test_comparison_names_the_largest_difference() -> None:
    comparison = Comparison(record(), record(gradient=1.5), 1e-9, 1e-9)
    assert comparison.worst == [(0.25, "b")] * 2
    missing = record()
    del missing.gradients[1]["b"]
    assert Comparison(record(), missing, 1e-9, 1e-9).worst == [(0.0, "none"), (1.0, "b")]


class Dropping(nn.Module):
    """Drops in all the ways that people do."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.attention = nn.Dropout(0.5), nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        self.recurrent = nn.LSTM(8, 8, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.drop(x), 0.5, self.training)
        q = x.unflatten(-1, (2, 4)).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(q, q, q, dropout_p=0.5).transpose(1, 2).flatten(2)
        x = x + F.scaled_dot_product_attention(q, q, q, None, 0.5).transpose(1, 2).flatten(2)
        x = x + self.attention(x, x, x)[0]
        return torch.dropout(self.recurrent(x)[0], 0.5, True)


def test_no_dropout_of_any_kind() -> None:
    torch.manual_seed(0)
    module, x = Dropping(), torch.randn(2, 5, 8)
    assert not torch.equal(module(x), module(x))
    with NoDropout() as mode:
        mode.switch_off(module)
        state = torch.get_rng_state()
        assert torch.equal(module(x), module(x))
        assert torch.equal(state, torch.get_rng_state())
    assert mode.met
    with NoDropout() as idle:
        idle.switch_off(nn.Linear(2, 2))
        F.dropout(x, 0.0), F.dropout(x, 0.5, training=False)
    assert not idle.met
