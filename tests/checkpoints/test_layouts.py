"""What any layout saved, any layout loads: bit by bit, weights and optimizer state."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from lightning_bharat.checkpoints import Checkpoint, dcp, load_weights, optimizers, save, weights
from lightning_bharat.checkpoints.errors import together
from lightning_bharat.checkpoints.index import INDEX
from lightning_bharat.checkpoints.manifest import Manifest
from lightning_bharat.checkpoints.saving import Compression
from lightning_bharat.plan.layout import Layout
from tests.checkpoints.cases import Case
from tests.ranks import run_ranks

LAYOUTS = {
    "one": Layout(),
    "data": Layout(data=2),
    "tensor": Layout(tensor=2),
    "both": Layout(data=2, tensor=2),
    "hybrid": Layout(data=4, replicate=2),
    "four": Layout(tensor=4),
}


def save_case(layout: Layout, folder: str, seed: int = 1, compression: Compression | None = None) -> None:
    case = Case(layout, seed)
    case.give_values()
    if case.rank > 0:
        case.module.seen.zero_()  # the first rank's buffers count
    names = weights.parameter_names(case.module)
    state = weights.as_shares(case.module.state_dict(), case.module, case.slices, case.rank == 0)
    checkpoint = {
        "state_dict": state,
        "optimizer_states": [optimizers.state_by_name(case.optimizer, names, case.slices)],
        "global_step": 7,
        "hyper_parameters": {"width": 8, "betas": (0.9, 0.99)},
    }
    save(Path(folder), checkpoint, Manifest.of(checkpoint, layout), compression)


def load_case(layout: Layout, folder: str) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    case = Case(layout, seed=2)
    case.module.seen.zero_()
    checkpoint = Checkpoint(Path(folder)).load()
    together(lambda: load_weights(case.module, case.slices, checkpoint["state_dict"]))
    names = weights.parameter_names(case.module)
    state = checkpoint["optimizer_states"][0]
    together(lambda: optimizers.load_state(case.optimizer, names, case.slices, state))
    assert case.module.head.weight is case.module.embedding.weight
    groups = [{k: v for k, v in group.items() if k != "params"} for group in case.optimizer.param_groups]
    return case.gathered(), checkpoint["hyper_parameters"], groups


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folders = {name: str(tmp_path_factory.mktemp("saved") / f"{name}.ckpt") for name in LAYOUTS}
    for name, layout in LAYOUTS.items():
        run_ranks(save_case, layout.devices, layout, folders[name])
    return folders


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_loads_what_any_saved(saved: dict[str, str], name: str) -> None:
    layout = LAYOUTS[name]
    torch.manual_seed(0)
    expected = Case(Layout(), seed=1).expected()
    for folder in saved.values() if name == "one" else [saved[key] for key in ("one", "both", "hybrid")]:
        for found, hyper_parameters, groups in run_ranks(load_case, layout.devices, layout, folder):
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert torch.equal(found[key], value), f"{folder} on {name}: {key}"
            assert hyper_parameters == {"width": 8, "betas": (0.9, 0.99)}
            assert [g["lr"] for g in groups] == [0.1, 0.025]
            assert [g["weight_decay"] for g in groups] == [0.01, 0.0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_several_ranks_hold_is_written_once_and_shared_out(saved: dict[str, str], name: str) -> None:
    folder = Path(saved[name])
    index = json.loads((folder / INDEX).read_text())["tensors"]
    assert "head.weight" not in index  # tied to the embedding
    written: dict[str, int] = dict.fromkeys((path.name for path in folder.glob("rank_*.safetensors")), 0)
    for entry in index.values():
        assert len({tuple(chunk["offsets"]) for chunk in entry["chunks"]}) == len(entry["chunks"])
        assert sum(prod(chunk["sizes"]) for chunk in entry["chunks"]) == prod(entry["shape"])
        for chunk in entry["chunks"]:
            written[chunk["file"]] += prod(chunk["sizes"]) * 4
    assert len(written) == LAYOUTS[name].devices
    assert max(written.values()) < 1.5 * sum(written.values()) / len(written), written


def test_nothing_but_checkpoints_is_left(saved: dict[str, str]) -> None:
    for folder in map(Path, saved.values()):
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def read_sizes(layout: Layout, folder: str) -> tuple[dict[str, int], dict[str, int]]:
    """Load, and return by tensor how many values this rank read and how many it holds."""
    read: dict[str, int] = {}
    read_file = dcp._Reader._read_file

    def counted(self: Any, path: Path, items: Any, planner: Any) -> None:
        for item in items:
            name = item.storage_index.fqn
            read[name] = read.get(name, 0) + prod(item.lengths)
        read_file(self, path, items, planner)

    dcp._Reader._read_file = counted  # type: ignore[method-assign]
    case = Case(layout, seed=2)
    load_weights(case.module, case.slices, Checkpoint(Path(folder)).load()["state_dict"])
    held = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in case.module.named_parameters()}
    return read, {name: p.numel() for name, p in held.items() if p.numel()}


def test_a_rank_reads_what_it_holds_and_no_more(saved: dict[str, str]) -> None:
    for layout in (Layout(tensor=4), Layout(data=2, tensor=2)):
        for folder in (saved["one"], saved["data"]):
            for read, held in run_ranks(read_sizes, 4, layout, folder):
                assert read.pop("seen") == 2  # the buffer
                assert read == held
                assert held["embedding.weight"] == 12 * 8 // 4
