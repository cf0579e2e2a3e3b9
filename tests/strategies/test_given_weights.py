"""``weights=``: a start from a state dict, a file, a folder or an export is that of one process, on every layout."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_bharat.checkpoints import CheckpointError
from lightning_bharat.commands import checkpoint as commands
from lightning_bharat.strategies.initialize import Initializer
from tests.modules import Result, Trained, assert_equal, fit, zoo
from tests.plan.models import Stack
from tests.ranks import RanksFailed, run_ranks
from tests.strategies.test_initialize import OnMeta

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data 2": (2, {}),
    "tensor 2": (2, {"tensor_parallel_size": 2}),
    "data 2 × tensor 2": (4, {"tensor_parallel_size": 2}),
    "pipeline 2": (2, {"pipeline_parallel_size": 2}),
}
STEPS = 2


def other(model: str) -> nn.Module:
    """A model with values that no run begins with by itself."""
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        made = zoo()[model]().double()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn_like(parameter) / 50)
    return made


def built(model: str, on_meta: bool) -> Trained:
    return OnMeta(zoo()[model], model) if on_meta else Trained(model)


# ---- the ways to give weights: name to (model, what writes them below a folder and returns what to give)


def in_memory(folder: Path) -> dict[str, Tensor]:
    return other("nano").state_dict()


def in_memory_by_full_names(folder: Path) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in other("nano").state_dict().items()}


def one_file(folder: Path) -> Path:
    save_file(other("nano").state_dict(), folder / "nano.safetensors")
    return folder / "nano.safetensors"


def hugging_face(folder: Path, model: str, shard: str = "1GB") -> Path:
    other(model).model.save_pretrained(folder / "saved", max_shard_size=shard)
    return folder / "saved"


def linked(folder: Path) -> Path:
    """As Hugging Face's cache: a folder of links to files elsewhere."""
    saved = hugging_face(folder, "qwen3")
    (folder / "snapshot").mkdir()
    for file in saved.iterdir():
        (folder / "snapshot" / file.name).symlink_to(Path("..") / "saved" / file.name)
    return folder / "snapshot"


def beside_another_file(folder: Path) -> Path:
    """What an index lists counts, and nothing beside it."""
    saved = hugging_face(folder, "llama", "50KB")
    assert len(list(saved.glob("*.safetensors"))) > 2
    save_file({"a": torch.ones(1)}, saved / "consolidated.safetensors")
    return saved


def exported(folder: Path, model: str, shard: str = "5GB") -> Path:
    commands.export(folder.parent / f"{model}.ckpt", folder / "out", max_shard_size=shard)
    return folder / "out"


def save(folder: str) -> None:
    """Checkpoints that tensor ranks write."""
    for model in ("nano", "gpt2"):

        def module(model: str = model) -> Trained:
            made = Trained(model)
            made.model = other(model)
            return made

        class Saves(L.Callback):
            path = f"{folder}/{model}.ckpt"

            def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
                trainer.save_checkpoint(self.path)

        fit(module, {"tensor_parallel_size": 2}, steps=1, callbacks=[Saves()])


def a_checkpoint(folder: Path) -> Path:
    return folder.parent / "nano.ckpt"


def plain_ckpt(folder: Path) -> Path:
    state = {f"model.{name}": tensor for name, tensor in other("nano").state_dict().items()}
    torch.save({"state_dict": state}, folder / "plain.ckpt")
    return folder / "plain.ckpt"


SOURCES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "in memory": ("nano", in_memory),
    "in memory, full names": ("nano", in_memory_by_full_names),
    "file": ("nano", one_file),
    "llama": ("llama", partial(hugging_face, model="llama")),
    "llama in shards": ("llama", beside_another_file),
    "gpt2, tied": ("gpt2", partial(hugging_face, model="gpt2")),
    "gpt2 in shards": ("gpt2", partial(hugging_face, model="gpt2", shard="40KB")),
    "links": ("qwen3", linked),
    "exported": ("nano", partial(exported, model="nano")),
    "exported for Hugging Face": ("gpt2", partial(exported, model="gpt2", shard="40KB")),
    "checkpoint": ("nano", a_checkpoint),
    "plain .ckpt": ("nano", plain_ckpt),
}
Given = dict[str, tuple[str, Any]]  # name to (model, what HybridStrategy gets)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    found = tmp_path_factory.mktemp("given")
    run_ranks(save, 2, str(found))
    for name in SOURCES:
        (found / name).mkdir()
    return {name: (model, write(found / name)) for name, (model, write) in SOURCES.items()}


def by_load_state_dict(models: list[str]) -> dict[str, Result]:
    """On one process, without the strategy."""

    def module(model: str) -> Trained:
        made = Trained(model).double()
        made.model.load_state_dict(other(model).state_dict())
        return made

    return {model: fit(partial(module, model), None, STEPS) for model in models}


@pytest.fixture(scope="module")
def one_process() -> dict[str, Result]:
    return run_ranks(by_load_state_dict, 1, ["nano", "llama", "gpt2", "qwen3"])[0]


def train(strategy: dict[str, Any], given: Given, on_meta: bool) -> dict[str, Result]:
    return {
        name: fit(partial(built, model, on_meta), {**strategy, "weights": source}, STEPS)
        for name, (model, source) in given.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("on_meta", [False, True], ids=["there", "on meta"])
def test_trains_from_them_as_one_process_does(
    layout: str, on_meta: bool, given: Given, one_process: dict[str, Result]
) -> None:
    ranks, strategy = LAYOUTS[layout]
    if layout != "data 2 × tensor 2" or not on_meta:  # all of them once
        given = {name: given[name] for name in ("file", "llama in shards", "gpt2, tied")}
    for found in run_ranks(train, ranks, strategy, given, on_meta, timeout=60):
        for name, (model, source) in given.items():
            assert_equal(found[name], one_process[model])
            shown = "a state dict" if isinstance(source, dict) else repr(str(source))
            assert f"weights: read from {shown}, " in found[name].explain


def partly(strategy: dict[str, Any] | None, weights: dict[str, Tensor]) -> Result:
    """With ``strict_loading = False``: names may be missing, and there may be more."""

    def module() -> Trained:
        made = Trained("nano")
        made.strict_loading = False
        if strategy is None:
            made.double().model.load_state_dict(weights, strict=False)
        return made

    return fit(module, strategy and {**strategy, "weights": weights}, STEPS)


def test_loads_what_fits_where_loading_is_not_strict() -> None:
    weights = other("nano").state_dict()
    del weights["head.weight"]
    weights["extra.weight"] = torch.ones(3)
    expected = run_ranks(partly, 1, None, weights)[0]
    for found in run_ranks(partly, 2, {"tensor_parallel_size": 2}, weights):
        assert_equal(found, expected)


def unequal(weights: dict[str, Tensor]) -> tuple[Tensor, str]:
    """Ranks differ in what the weights do not give, a buffer that no state dict has."""
    made: list[Trained] = []

    def module() -> Trained:
        made.append(Trained("nano"))
        made[0].model.register_buffer("noise", torch.full((3,), float(os.environ["RANK"])), persistent=False)
        return made[0]

    explained = fit(module, {"weights": weights}, 1).explain
    return made[0].model.noise, explained


def test_ranks_agree_on_what_the_weights_do_not_give() -> None:
    for noise, explained in run_ranks(unequal, 2, other("nano").state_dict()):
        assert not noise.any() and "weights: read from a state dict, 41 tensors" in explained


# ---- what is refused


class Runs:
    """Its pickle makes a file when it is read by a reader that runs code."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.file),)


def changed(**changes: Tensor | None) -> dict[str, Tensor]:
    state = {**other("nano").state_dict(), **{name.replace("__", "."): value for name, value in changes.items()}}
    return {name: value for name, value in state.items() if value is not None}


def a_folder(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir()
    for name, written in content.items():
        if isinstance(written, Path):
            (folder / name).symlink_to(written)
        elif isinstance(written, str):
            (folder / name).write_text(written)
        elif name.endswith(".json"):
            (folder / name).write_text(json.dumps(written))
        elif name.endswith(".safetensors"):
            save_file(written, folder / name)
        else:
            torch.save(written, folder / name)
    return folder


def wrong(at: Path) -> dict[str, tuple[Any, str]]:
    """Name to (weights, what is said of them)."""
    tensors, one, index = {"a": torch.ones(2)}, "model-1.safetensors", "model.safetensors.index.json"
    runs = Runs(str(at / "ran"))
    folders = {
        "empty": a_folder(at / "empty", {}),
        "pickles": a_folder(at / "pickles", {"pytorch_model.bin": runs}),
        "files": a_folder(
            at / "files",
            {"a.bin": runs, "a.pt": runs, "a.ckpt": {"state_dict": runs}, "text.safetensors": "no tensors",
             "nothing.safetensors": {}, "dangling.safetensors": Path("gone.safetensors"), "b.ckpt": tensors},
        ),
        "out": a_folder(at / "out", {index: {"weight_map": {"a": "../other/model.safetensors"}}}),
        "torn": a_folder(at / "torn", {index: {"weight_map": {"a": one, "b": "model-2.safetensors"}}, one: tensors}),
        "no map": a_folder(at / "no map", {index: {"weights": 1}, one: tensors}),
        "no json": a_folder(at / "no json", {index: "{", one: tensors}),
        "twice": a_folder(at / "twice", {"x.safetensors": tensors, "y.safetensors": tensors}),
    }  # fmt: skip
    files = folders["files"]
    weight, head = torch.ones(96, 40, dtype=torch.float64), "head.weight"
    return {
        "missing": (changed(head__weight=None), "weights=a state dict: .* it lacks model.head.weight .strict_loading"),
        "unexpected": (changed(tail__weight=weight), "it has model.tail.weight, unknown here"),
        "shape": (changed(head__weight=weight), r"head.weight is \[96, 40\] in the checkpoint and \[96, 48\] here"),
        "integers": (
            changed(head__weight=torch.ones(96, 48, dtype=torch.int8)),
            "model.head.weight is torch.int8 in the checkpoint and torch.float64 here",
        ),
        "whole checkpoint": ({"state_dict": changed(), "epoch": 1}, r'of state_dict, epoch; write .*checkpoint\["'),
        "no tensors": ({"epoch": 1}, "weights=a state dict has no tensors: leave weights out"),
        "nowhere": (f"{at}/{head}", "does not exist; write a .safetensors file, a folder of them, or a checkpoint"),
        "hub": ("openai-community/gpt2", "a name on a hub is not fetched"),
        "empty folder": (folders["empty"], "is a folder without .safetensors files"),
        "folder of pickles": (folders["pickles"], "model.bin' is a pickle, .* was not read. .*save_pretrained"),
        "bin": (files / "a.bin", "a.bin' is a pickle"),
        "pt": (files / "a.pt", "a.pt' is a pickle"),
        "ckpt with code": (files / "a.ckpt", "holds objects that could run code when read, so it was not loaded"),
        "another ckpt": (files / "b.ckpt", "is not a Lightning checkpoint: it has no 'state_dict'"),
        "text": (files / "text.safetensors", "text.safetensors' can't be read"),
        "no tensors in a file": (files / "nothing.safetensors", "has no tensors"),
        "dangling": (files / "dangling.safetensors", "dangling.safetensors' does not exist"),
        "link out": (folders["out"], "names '../other/model.safetensors', which is not in its folder"),
        "incomplete": (folders["torn"], "model-2.safetensors is missing: .* an incomplete copy"),
        "no map": (folders["no map"], "has no weight_map from names to files"),
        "no json": (folders["no json"], "is damaged: it can't be read as JSON"),
        "twice": (folders["twice"], "a is in several files, of which one is y.safetensors"),
    }  # fmt: skip


def refused(cases: dict[str, tuple[Any, str]]) -> dict[str, str]:
    words = {}
    for name, (weights, _) in cases.items():
        with pytest.raises(CheckpointError) as error:
            fit("nano", {"weights": weights}, 1)
        words[name] = str(error.value)
    return words


def test_what_can_not_be_read_or_is_of_another_model_is_refused_in_words(tmp_path: Path) -> None:
    cases = wrong(tmp_path)
    ranks = run_ranks(refused, 2, cases, timeout=100)
    assert ranks[0] == ranks[1]
    for name, (_, words) in cases.items():
        assert re.search(words, ranks[0][name]), (name, ranks[0][name])
        assert "\n" not in ranks[0][name]
    assert not (tmp_path / "ran").exists()


def on_tensor_ranks(weights: Any) -> None:
    fit("nano", {"tensor_parallel_size": 2, "weights": weights}, 1)


def test_a_refusal_is_printed_once() -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(on_tensor_ranks, 2, changed(head__weight=None))
    outcomes = failed.value.outcomes
    assert {(outcome.error, outcome.message) for outcome in outcomes} == {("CheckpointError", outcomes[0].message)}
    assert sum(outcome.output.count(outcome.message) for outcome in outcomes) == 1


# ---- memory


LEAF, BLOCKS = 2**21, 6  # bytes of each of a block's two leaves, number


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(512, 1024, bias=False), nn.Linear(1024, 512, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Wide(Stack):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.blocks = nn.Sequential(*(Pair() for _ in range(BLOCKS)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x.repeat(1, 64))[:, :4]


class Anonymous(TorchDispatchMode):
    """How many bytes of this process's own memory (what is mapped from files apart) there are after each operation."""

    def __init__(self) -> None:
        super().__init__()
        gc.collect()  # what an earlier run left in circles would be freed in the middle
        ctypes.CDLL(None).malloc_trim(0)  # what is free counts as free
        self.before = self.most = self.now()

    def now(self) -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.most = max(self.most, self.now())
        return out


def peaks(sources: list[str]) -> list[int]:
    """Bytes by which a rank grew at most while it read the weights, for each of their sources."""
    grown: list[int] = []

    def watched(start: Initializer, *args: Any) -> None:
        with Anonymous() as seen:
            fill(start, *args)
        grown.append(seen.most - seen.before)

    fill, Initializer.fill = Initializer.fill, watched  # type: ignore[method-assign]
    for weights in sources:
        strategy = {"tensor_parallel_size": 2, "weights": weights}
        run = fit(partial(OnMeta, Wide, "stack"), strategy, 0, precision="32-true")
        assert (run.weights["model.blocks.0.up.weight"] == 0.5).all()
    return grown


def test_no_rank_holds_more_than_its_pieces_and_a_leaf(tmp_path: Path) -> None:
    """Of a file, of a .ckpt and of a checkpoint's directory, which have twelve leaves."""
    state = {name: torch.full(p.shape, 0.5) for name, p in on_meta_device(Wide).named_parameters()}
    save_file(state, tmp_path / "wide.safetensors")
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}}, tmp_path / "wide.ckpt")
    commands.convert(tmp_path / "wide.ckpt", tmp_path / "wide")
    sources = [str(tmp_path / name) for name in ("wide.safetensors", "wide.ckpt", "wide")]
    pieces = 2 * LEAF * BLOCKS // 4
    for rank in run_ranks(peaks, 4, sources, timeout=60):
        for grown in rank:
            assert pieces - LEAF / 16 <= grown < pieces + LEAF  # other threads may free some pages meanwhile


def on_meta_device(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()
