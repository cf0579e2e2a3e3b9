"""What the process server has ready for trials: a parser of `bharat fit`, and nothing that a fork would break."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch
import yaml

from lightning_bharat.tuning import fit_parser
from tests.ranks import run_ranks
from tests.tuning import tuned


def preloaded(path: Path) -> dict[str, object]:
    """In a fork, as the preload of this process's server is another."""
    import lightning_bharat.tuning.preload  # noqa: F401

    ready, after = fit_parser._ready[0], (threading.active_count(), len(os.listdir("/proc/self/task")))
    first, second = fit_parser.take(), fit_parser.take()
    words = [f"--config={path}", "--model.lr=0.5", "--ckpt_path=some.ckpt"]
    return {
        "threads": after,
        "cuda": torch.cuda.is_initialized(),
        "taken": first is ready and second is not ready,
        "config": yaml.safe_load(first.dump(first.parse_args(words))),
    }


def test_the_server_has_a_parser_and_no_thread_or_device(tmp_path: Path) -> None:
    found = run_ranks(preloaded, 1, tuned.config(tmp_path))[0]
    assert found["threads"] == run_ranks(threads, 1)[0] and not found["cuda"] and found["taken"]
    config = found["config"]
    assert config["model"]["init_args"]["lr"] == 0.5 and config["ckpt_path"] == "some.ckpt"
    assert config["trainer"]["precision"] == "64-true"


def threads() -> tuple[int, int]:
    """Of a rank that has imported nothing more."""
    return threading.active_count(), len(os.listdir("/proc/self/task"))
