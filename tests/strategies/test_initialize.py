"""The same start on every layout: plain Lightning's bits, or leaf by leaf of what exists on ``meta`` alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_bharat import HybridStrategy
from tests.modules import Result, Rows, Trained, assert_equal, fit, zoo
from tests.plan.models import VOCABULARY, Nano
from tests.ranks import RanksFailed, run_ranks

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2": (2, {"tensor_parallel_size": 2}),
    "data 4 in 2 copies": (4, {"replicate_size": 2}),
    "data 2 × tensor 2": (4, {"tensor_parallel_size": 2}),
}


class OnMeta(Trained):
    """Its ``configure_model`` builds ``make()`` on meta."""

    def __init__(self, make: Callable[[], nn.Module], name: str = "nano") -> None:
        super().__init__("stack")
        self.make, self.rows_of = make, name
        del self.model

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            with torch.device("meta"):
                self.model = self.make()


def begun(
    strategy: dict[str, Any] | None, makes: dict[str, Callable[[], nn.Module]], on_meta: bool
) -> dict[str, dict[str, Tensor]]:
    """The parameters and buffers of each model before its first step."""
    found = {}
    for name, make in makes.items():
        made: list[Any] = []

        def module(name: str = name, make: Callable[[], nn.Module] = make, made: list[Any] = made) -> Trained:
            made.append(OnMeta(make, name) if on_meta else Trained("stack"))
            if not on_meta:
                made[0].model, made[0].rows_of = make(), name
            return made[0]

        weights = fit(module, strategy, steps=0).weights
        found[name] = weights | dict(made[0].named_buffers())
    return found


@cache
def on_one(on_meta: bool) -> dict[str, dict[str, Tensor]]:
    return run_ranks(begun, 1, {} if on_meta else None, zoo(), on_meta)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("on_meta", [False, True], ids=["there", "on meta"])
def test_starts_from_the_same_bits(layout: str, on_meta: bool) -> None:
    """A module that is there: plain Lightning's with that seed. One on meta: the same on one rank as on many."""
    ranks, strategy = LAYOUTS[layout]
    for found in run_ranks(begun, ranks, strategy, zoo(), on_meta):
        for model, tensors in on_one(on_meta).items():
            assert found[model].keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert torch.equal(found[model][name], tensor), (model, name)


def test_begins_on_meta_as_where_it_is_there() -> None:
    """Constants, buffers, and how far random numbers are spread; of GPT-2 also the scaled projections."""
    there, on_meta = on_one(False), on_one(True)
    for model, tensors in there.items():
        for name, tensor in tensors.items():
            found = on_meta[model][name]
            assert found.dtype == tensor.dtype
            if tensor.unique().numel() == 1 or "inv_freq" in name:
                assert torch.equal(found, tensor), (model, name)
            elif tensor.numel() > 1000:
                assert found.std().item() == pytest.approx(tensor.std().item(), rel=6 / tensor.numel() ** 0.5), (
                    model,
                    name,
                )
    scaled = on_meta["gpt2"]["model.model.transformer.h.0.attn.c_proj.weight"]
    assert scaled.std().item() == pytest.approx(0.02 / 4**0.5, rel=0.1)  # two layers, each with two projections


class Masked(nn.Linear):
    """Has values in a buffer and none in its weights."""

    def __init__(self) -> None:
        super().__init__(48, 48)
        self.register_buffer("mask", torch.ones(48, device="cpu").cumsum(0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (self.mask > 24)


class Odd(nn.Module):
    """Modules that hold their weights in their own ways: some for their children, some in a list beside."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(VOCABULARY, 48), nn.Linear(48, VOCABULARY)
        self.attention, self.recurrent = (
            nn.MultiheadAttention(48, 4, batch_first=True),
            nn.LSTM(48, 48, batch_first=True),
        )
        self.masked, self.temperature = Masked(), Temperature()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.masked(self.recurrent(x)[0])) * self.temperature.value


class Temperature(nn.Module):
    """A parameter without dimensions, and a count."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.empty(()))
        self.register_buffer("count", torch.empty((), dtype=torch.long))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.value, 0.5)
        self.count.fill_(3)


def odd(strategy: dict[str, Any], on_meta: bool, steps: int) -> tuple[Result, dict[str, Tensor]]:
    made: list[Trained] = []

    def module() -> Trained:
        made.append(OnMeta(Odd) if on_meta else Trained())
        if not on_meta:
            made[0].model = Odd()
        return made[0]

    return fit(module, strategy, steps), dict(made[0].named_buffers())


def test_each_way_to_hold_weights() -> None:
    begun, buffers = run_ranks(odd, 1, {}, True, 0)[0]
    assert torch.equal(buffers["model.masked.mask"], torch.arange(1.0, 49.0).double())
    assert buffers["model.temperature.count"] == 3 and begun.weights["model.temperature.value"] == 0.5
    assert not begun.weights["model.attention.out_proj.bias"].any()  # its parent sets it, after its own reset
    for on_meta in (False, True):
        expected = run_ranks(odd, 1, {}, on_meta, 3)[0][0]
        for ranks, strategy in ((2, {}), (4, {"replicate_size": 2})):
            for found, _ in run_ranks(odd, ranks, strategy, on_meta, 3):
                assert_equal(found, expected)


# ---- ranks that differ


class Said(logging.Handler):
    """Keeps what Lightning says on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        logging.getLogger("lightning.pytorch").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.words.append(record.getMessage())


def unseeded(strategy: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor], str, int]:
    said, mine = Said(), dict[str, Tensor]()

    def module() -> Trained:
        torch.manual_seed(int(os.environ["RANK"]))
        made = Trained()
        made.model.register_buffer("noise", torch.randn(3))
        mine.update({name: tensor.detach().double() for name, tensor in made.state_dict().items()})
        return made

    run = fit(module, strategy, steps=0)
    return mine, run.weights, run.explain, sum("rank 0's are taken" in words for words in said.words)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_that_differ_take_rank_0s_weights(layout: str) -> None:
    ranks, strategy = LAYOUTS[layout]
    results = run_ranks(unseeded, ranks, strategy)
    first = results[0][0]
    assert not torch.equal(results[1][0]["model.head.weight"], first["model.head.weight"])
    for _, weights, explained, _ in results:
        assert all(torch.equal(weight, first[name]) for name, weight in weights.items())
        assert "weights: differed between ranks; rank 0's are taken" in explained
    assert [said for *_, said in results] == [1] + [0] * (ranks - 1)


def other_models() -> None:
    def module() -> Trained:
        made = Trained()
        made.model = Nano(depth=2 + int(os.environ["RANK"]))
        return made

    fit(module, {})


def test_ranks_with_other_models_are_refused() -> None:
    with pytest.raises(RanksFailed, match="build the same model on every rank"):
        run_ranks(other_models, 2)


# ---- what meta asks for


class Silent(nn.Module):
    """Says nothing about how it begins."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(48))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class HalfSaid(nn.Linear):
    """Sets its weight and bias, and not its whole numbers, of which the last is one that a fill could hit."""

    def __init__(self) -> None:
        super().__init__(48, 48)
        self.register_buffer("order", torch.arange(2))

    def reset_parameters(self) -> None:
        super().reset_parameters()


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.arange(48.0)


class Reads(nn.Linear):
    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            nn.init.constant_(self.weight, self.values[0])


class With(Nano):
    """Nano and one more module."""

    def __init__(self, kind: type[nn.Module], *args: Any) -> None:
        super().__init__()
        self.extra = kind(*args)


class TiedAsItCame(Nano):
    """The head's weights (spread 0.08) become the embedding's (spread 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.token.weight = self.head.weight


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "silent": (partial(With, Silent), "model.extra (Silent) was built on meta, and nothing says how scale begin"),
    "half said": (partial(With, HalfSaid), "nothing says how order begin: write HalfSaid.reset_parameters"),
    "plain": (partial(With, Plain), "model.extra.table is a plain tensor on meta"),
    "reads": (partial(With, Reads, 48, 48), "nothing says how weight, bias begin"),
    "tied": (TiedAsItCame, "model.token.weight and model.head.weight are one tensor, built on meta, and begin differe"),
}


def refused() -> dict[str, str]:
    words = {}
    for name, (make, _) in REFUSED.items():
        with pytest.raises(ValueError) as error:
            fit(lambda make=make: OnMeta(make), {}, steps=0)
        words[name] = str(error.value)
    return words


def test_what_does_not_say_how_it_begins_is_refused_by_name() -> None:
    for name, words in run_ranks(refused, 1)[0].items():
        assert REFUSED[name][1] in words
    with pytest.raises(RanksFailed, match="nothing says how scale begin"):
        run_ranks(begun, 4, {"tensor_parallel_size": 2}, {"nano": REFUSED["silent"][0]}, True)


# ---- memory


LEAF, LEAVES = 2**23, 24  # bytes, number


class Wide(Trained):
    """Blocks on meta of which each has one large leaf."""

    rows_of = "stack"

    def __init__(self) -> None:
        super().__init__("stack")
        self.lift = nn.Linear(8, 1024)
        with torch.device("meta"):
            side = int((LEAF / 4) ** 0.5)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(side, side, bias=False)) for _ in range(LEAVES))


def peak() -> tuple[int, int]:
    """Bytes that this rank's memory grew by at most while it made the module ready, and those of its pieces."""
    made = Wide()
    memory: dict[str, int] = {}

    class Watched(HybridStrategy):
        def setup(self, trainer: Any) -> None:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
            memory["before"] = resident("VmHWM")
            super().setup(trainer)
            memory["peak"] = resident("VmHWM")

    def resident(what: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
        return int(line.split()[1]) * 1024

    trainer = L.Trainer(
        strategy=Watched(), devices=4, accelerator="cpu", max_steps=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(made, Rows("stack", 8, 1, 4, int(os.environ["RANK"]), False))
    pieces = sum(p.to_local().numel() * p.element_size() for p in made.blocks.parameters())
    return memory["peak"] - memory["before"], pieces


def test_no_rank_holds_more_than_its_pieces_and_a_leaf() -> None:
    """And what collectives, the mesh and the pages that a fork copies take. The whole module has 192 megabytes."""
    for grown, pieces in run_ranks(peak, 4):
        assert pieces == pytest.approx(LEAF * LEAVES // 4, rel=1e-3)
        assert grown < pieces + 6 * LEAF
