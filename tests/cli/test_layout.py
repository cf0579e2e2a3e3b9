"""`bharat layout`: the plan, every legal layout, and bytes per rank, for a module that is never in memory."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from lightning_bharat.cli import main
from lightning_bharat.commands import table
from tests.cli.project import Project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    return Project(tmp_path, monkeypatch)


def rows(out: str) -> dict[str, list[str]]:
    """Layout -> its numbers, from the printed table."""
    found = re.findall(r"^(data=\d+, tensor=\d+) {2,}(.*)$", out, flags=re.MULTILINE)
    return {layout: re.split(r" {2,}", numbers) for layout, numbers in found}


def test_docstrings_are_true() -> None:
    assert doctest.testmod(table).failed == 0


def test_plan_and_layouts(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layout", *project.classes, "--model.width=9", "--devices=4"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("blocks: 2 blocks\n")
    assert "up ──▶ down   18 channels" in out
    assert list(rows(out)) == ["data=4, tensor=1", "data=2, tensor=2"]
    assert re.findall(r"^(data=\d, tensor=\d, pipeline=\d) ", out, re.MULTILINE) == [
        "data=2, tensor=1, pipeline=2",
        "data=1, tensor=2, pipeline=2",
    ]
    assert "No layout with tensor=4: tensor_parallel_size=4 does not divide the 18 channels" in out
    assert "Activations come on top" in out


def test_bytes_of_one_device(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layout", *project.classes, "--devices=1", "--trainer.precision=bf16-true"]) == 0
    embed, block, head = 5 * 8, 2 * 8 + (8 + 1) * 16 + (16 + 1) * 8, 9
    parameters = embed + 2 * block + head
    of_adamw = 2 * 2 * parameters + 4 * (2 + 2 * 6 + 2)  # two states in bfloat16 and a step in float32 for each tensor
    expected = [table.size(n) for n in (2 * parameters, 2 * parameters, of_adamw, 0, 4 * parameters + of_adamw)]
    assert rows(capsys.readouterr().out) == {"data=1, tensor=1": expected}


def test_a_model_that_no_host_could_hold(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """Half a petabyte in float32: anything that is not on `meta` would end the process."""
    huge = [f"--model={project.package}.model.Huge", *project.classes[2:], "--devices=512"]
    assert main(["layout", *huge]) == 0
    assert rows(capsys.readouterr().out)["data=512, tensor=1"][0] == "910 GiB"


def test_the_given_optimizer_counts(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["layout", *project.classes, "--devices=1", "--optimizer=SGD", "--optimizer.lr=0.1"]
    assert main(words) == 0
    assert rows(capsys.readouterr().out)["data=1, tensor=1"][2] == "0 B"


def test_an_optimizer_that_needs_values_is_taken_for_adamw(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["layout", *project.classes, "--devices=1", "--optimizer=Adafactor", "--optimizer.lr=0.1"]) == 0
    assert (
        "The optimizer is taken for AdamW, since the module's could not be stepped on meta" in capsys.readouterr().out
    )


def test_timeline_of_a_step(project: Project, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["layout", *project.classes, "--data.batch_size=6", f"--folder={tmp_path / 'out'}"]
    assert main([*words, "--timeline=pipeline=2"]) == 0
    out = capsys.readouterr().out
    assert re.match(r"bubble [\d.]+% of a step of \d+ ms; [\d.]+% if ranks waited for nothing but what they need", out)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"timeline.png", "timeline.html", "timeline.json"}


def test_timelines_that_can_not_be(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layout", *project.classes, "--timeline=data=2"]) == 2
    assert "it has no pipeline; write pipeline=2,data=2" in capsys.readouterr().err
    assert main(["layout", *project.classes, "--timeline=pipeline=4"]) == 1
    said = capsys.readouterr()
    assert "pipeline_parallel_size=4 is more than the 2 blocks" in said.err and "Traceback" not in said.err


CLUSTER = """
nodes: 2
devices_per_node: 2
memory: [1 GB, 2 GB, 1 GB, 1 GB]
flops: 1 TFLOP/s
intra_node: {bandwidth: 10 GB/s, latency: 5 us}
inter_node: {bandwidth: 1 GB/s, latency: 50 us}
"""


def test_plan_for_a_cluster(project: Project, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    assert main(["layout", *project.classes, "--cluster=cluster.yaml", "--global_batch_size=16"]) == 0
    head, _, names, *rest = capsys.readouterr().out.splitlines()
    assert head.startswith("2 nodes of 2 devices, 1 GB and 1 TFLOP/s each")
    columns = "parameters gradients optimizer gathered activations buffers together step communication bubble"
    assert names.split()[-10:] == columns.split()
    found = rest[: rest.index("")]
    assert 3 <= len(found) <= 10 and len({re.split(r" {2,}", row)[0] for row in found}) == len(found)
    assert any("data=2, tensor=2" in row for row in found)
    assert "Devices differ in memory, and ranks hold alike: planned for the smallest, 1 GB." in rest


def test_plan_for_this_machine(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layout", *project.classes, "--detect=true", "--global_batch_size=16"]) == 0
    assert "efficiency is 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cluster=nowhere.yaml", "--global_batch_size=8"], "No such file"),
        (["--cluster=cluster.yaml"], "the batch is missing; write --global_batch_size 1024"),
        (["--cluster=cluster.yaml", "--detect=true", "--global_batch_size=8"], "are two clusters; write one"),
        (["--cluster=cluster.yaml", "--devices=8", "--global_batch_size=8"], "the cluster has 4; leave it out"),
        (["--devices=4", "--global_batch_size=8"], "--global_batch_size is of a plan for a cluster"),
        (
            ["--cluster=cluster.yaml", "--global_batch_size=8", "--sequence_length=4"],
            "--sequence_length 4: the batch has no token ids of shape (rows, time); leave it out",
        ),
        (["--cluster=small.yaml", "--global_batch_size=8"], "nothing fits 2 nodes of 2 devices"),
    ],
)
def test_plans_that_can_not_be(
    project: Project, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], said: str
) -> None:
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    (tmp_path / "small.yaml").write_text(CLUSTER.replace("[1 GB, 2 GB, 1 GB, 1 GB]", "100 B"))
    assert main(["layout", *project.classes, *words]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


TOKENS = """
import lightning as L
import torch
from torch.utils.data import DataLoader


class Tokens(L.LightningDataModule):
    def train_dataloader(self):
        ids = torch.arange(16)
        return DataLoader([{"input_ids": ids, "labels": ids}] * 4, batch_size=2)
"""
MIXTURE = """
model:
  class_path: lightning_bharat.models.GPTModule
  init_args:
    config:
      vocab_size: 64
      hidden_size: 32
      num_hidden_layers: 2
      num_attention_heads: 3
      head_dim: 8
      num_experts: 4
      moe_intermediate_size: 16
data: tokens.Tokens
"""


def test_experts_and_context(project: Project, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Three heads: tensor ranks can't divide them, context ranks gather keys and values."""
    (tmp_path / "tokens.py").write_text(TOKENS)
    (tmp_path / "mixture.yaml").write_text(MIXTURE)
    assert main(["layout", "--config=mixture.yaml", "--devices=4"]) == 0
    said = capsys.readouterr().out
    sizes = {re.split(r" {2,}", row)[0]: re.split(r" {2,}", row)[1:] for row in said.splitlines() if "data=" in row}
    pipeline = "data=2, tensor=1, pipeline=2"
    assert {f"{pipeline}, expert=2", "data=4, tensor=1, expert=2", "data=4, tensor=1, expert=4"} < set(sizes)
    assert f"{pipeline}, expert=4" not in sizes  # experts lie on data ranks
    assert sizes["data=4, tensor=1, expert=4"][0] == sizes["data=4, tensor=1"][0] < sizes["data=4, tensor=1"][3]
    (tmp_path / "cluster.yaml").write_text(CLUSTER.replace("nodes: 2", "nodes: 1"))
    words = ["layout", "--config=mixture.yaml", "--cluster=cluster.yaml", "--global_batch_size=2"]
    assert main([*words, "--sequence_length=20"]) == 0
    found = capsys.readouterr().out
    assert "\ndata=2, expert=2 " in found and "\ncontext=2, expert=2 " in found
