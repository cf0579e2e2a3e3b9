"""``bharat fit --layout``: sizes in one word, and the best ones for the ranks that are there."""

from __future__ import annotations

import os
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.demos import boring_classes
from torch.utils.data import DataLoader

from lightning_bharat import HybridStrategy
from lightning_bharat.cli import main
from lightning_bharat.cluster.inventory import VARIABLE
from lightning_bharat.cluster.node import Node, to_text
from lightning_bharat.commands.best_layout import Wish
from lightning_bharat.commands.project import BadInput
from lightning_bharat.plan.cluster import Cluster, ClusterError, Link
from lightning_bharat.plan.layout import LayoutError
from lightning_bharat.strategies.connection import Chosen
from lightning_bharat.strategies.global_batch import Batches
from tests.cli.project import QUIET, Project
from tests.ranks import run_ranks


def test_sizes_are_those_of_the_strategy() -> None:
    wish = Wish.of(["--config", "a.yaml", "--layout=data=2,tensor=2", "--trainer.devices", "4"])
    assert wish.words[:4] == ("--config", "a.yaml", "--trainer.devices", "4")
    assert wish.words[4:8] == (
        *("--trainer.strategy", "HybridStrategy"),
        *("--trainer.strategy.data_parallel_size=2", "--trainer.strategy.tensor_parallel_size=2"),
    )
    assert "--trainer.strategy.pipeline_parallel_size=1" in wish.words
    assert Wish.of(["--trainer.max_epochs", "1"]) == Wish(("--trainer.max_epochs", "1")), "nothing else is taken out"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layout"], "expected one argument"),
        (["--layout", "data=2", "--cluster", "a.yaml"], "--cluster is for a layout that is looked for"),
        (["--global_batch_size", "8"], "write --layout auto beside it"),
        (["--layout", "auto", "--global_batch_size", "0"], "write a whole number from 1 up"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_what_can_not_be_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        Wish.of(words)
    with pytest.raises(LayoutError, match="'rows=2' is not a dimension"):
        Wish.of(["--layout", "rows=2"])


def test_a_cluster_of_the_ranks_that_are_there() -> None:
    cluster = Cluster(1, 2, 8 * 10**9, 1e12, Link(1e9, 1e-6))
    assert cluster.of(1, 4).memory == cluster.memory
    assert cluster.of(1, 4, share=True).memory * 4 == cluster.memory * 2
    with pytest.raises(ClusterError, match=r"2 nodes, and no link between nodes is known; write --cluster"):
        cluster.of(2, 4)


def _chosen_by_rank_zero() -> tuple[str, int, str]:
    """The layout and the batch size of a fit, and what another one is refused with."""
    strategy = HybridStrategy(token_weighted=False)
    here = int(os.environ["RANK"])
    found = Chosen({"tensor_parallel_size": 1, "data_parallel_size": 2}, Batches(8, 8, 1), "as rank 0 says")
    strategy.choose = lambda _: found if here == 0 else pytest.fail("only rank 0 is asked")
    trainer = _trainer(strategy)
    trainer.fit(BoringModel())
    assert strategy.choices["layout"] == "as rank 0 says"
    size = trainer.train_dataloader.batch_size
    refusing = HybridStrategy()
    refusing.choose = _refuse
    with pytest.raises(LayoutError) as error:
        _trainer(refusing).fit(BoringModel())
    return str(strategy.layout), size, str(error.value)


def _refuse(strategy: Any) -> Any:
    raise LayoutError("nothing fits")


class BoringModel(boring_classes.BoringModel):
    def train_dataloader(self) -> Any:
        return DataLoader(boring_classes.RandomDataset(32, 64), batch_size=8)


def _trainer(strategy: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(strategy=strategy, accelerator="cpu", devices=2, max_steps=2, limit_val_batches=0, **quiet)  # type: ignore[arg-type]


def test_rank_zero_chooses_for_all() -> None:
    for layout, size, words in run_ranks(_chosen_by_rank_zero, 2):
        assert (layout, size) == ("Layout(data=2)", 4)
        assert "nothing fits" in words


def test_the_best_with_as_many_rows_and_again_with_those_of_the_run_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = Project(tmp_path, monkeypatch)
    words = ["fit", *project.classes, *QUIET, "--layout", "auto", "--trainer.devices=1"]
    first = ["--global_batch_size", "8", "--trainer.max_epochs=1", "--trainer.default_root_dir=first"]
    assert main([*words, *first]) == 0
    said = capsys.readouterr().out
    assert "--layout auto: Layout(), by estimate the fastest of 1 that fit" in said and "parameters  gradients" in said
    assert "8 rows a step, on one data rank" in said
    (path,) = Path("first").rglob("*step=4.ckpt")  # of 32 rows, with batch_size=4 in the data
    more = [f"--ckpt_path={path}", "--trainer.max_epochs=2", "--trainer.default_root_dir=more"]
    assert main([*words, *more]) == 0
    assert "8 rows a step, on one data rank" in capsys.readouterr().out
    assert list(Path("more").rglob("*step=8.ckpt"))
    assert main([*words, "--trainer.strategy.context_parallel_size=2"]) == 2
    assert "context_parallel_size=2 is given; leave that out, or write all sizes" in capsys.readouterr().err


def _on_two_hosts(words: list[str], mine: Node) -> str:
    """Each rank is on a host of its own, as a launcher would tell."""
    os.environ |= {"LOCAL_RANK": "0", "GROUP_RANK": os.environ["RANK"], "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"GROUP_WORLD_SIZE": "2", VARIABLE: to_text([mine, replace(mine, name="small", memory=10**10)])}
    said = StringIO()
    with redirect_stdout(said):
        assert main(words) == 0
    return said.getvalue()


def test_hosts_as_their_launchers_have_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = Project(tmp_path, monkeypatch)
    words = ["fit", *project.classes, *QUIET, "--layout", "auto", "--trainer.devices=1", "--trainer.num_nodes=2"]
    words += ["--trainer.max_steps=1", "--global_batch_size=8", "--trainer.default_root_dir=run"]
    mine = replace(Node.read(1, tmp_path), link=Link(1e6, 1e-2))
    said = run_ranks(_on_two_hosts, 2, words, mine)[0]
    assert "2 nodes of 1 devices, 10 GB" in said and "the memory is that of small, the smallest" in said
    assert "Link between hosts as measured when they met: 0.001 GB/s, 1e+04 µs" in said
