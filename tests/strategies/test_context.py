"""An unchanged module over context ranks is one process in float64 to 1e-9, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bharat.plan.whole_attention import ContextError
from tests.modules import Batch, Result, Trained, assert_equal, fit
from tests.plan.models import VOCABULARY, FusedBlock, Nano, Wrapped, llama
from tests.ranks import run_ranks
from tests.strategies.together import Run, Together

CONTEXT: dict[str, Any] = {"context_parallel_size": 2}
OPTIONS: dict[str, Any] = {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2, "last": 2, "steps": 5}


# ---- the same


CONTEXT_2 = Together(2, {name: Run(name, CONTEXT, OPTIONS) for name in ("gpt", "nano", "llama", "qwen3")})


@pytest.mark.parametrize("module", CONTEXT_2.runs)
def test_two_context_ranks_equal_one_process(module: str) -> None:
    results = CONTEXT_2.check(module)
    assert "attention exchanges parts of the time for heads (4; Ulysses)" in results[0].explain


BESIDE: dict[str, dict[str, Any]] = {
    "data": {},
    "tensor": {"tensor_parallel_size": 2, "activation_checkpointing": "full"},
    "1F1B": {"pipeline_parallel_size": 2},
    "ZBVZeroBubble": {"pipeline_parallel_size": 2, "schedule": "ZBVZeroBubble"},
}
PAIRS = [
    *[("nano", "data"), ("llama", "data"), ("gpt", "tensor"), ("llama", "tensor")],
    *[("gpt2", "1F1B"), ("deep", "ZBVZeroBubble")],
]
BESIDE_OTHERS = Together(
    4, {f"{module}, {other}": Run(module, {**CONTEXT, **BESIDE[other]}, OPTIONS) for module, other in PAIRS}
)


@pytest.mark.parametrize("name", BESIDE_OTHERS.runs)
def test_beside_other_ranks(name: str) -> None:
    BESIDE_OTHERS.check(name)


def test_beside_tensor_ranks_and_stages() -> None:
    sizes = {**CONTEXT, "tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    Together(8, {"llama": Run("llama", sizes, {"steps": 4, "gradient_clip_val": 0.3})}).check("llama")


class OfThreeHeads(Trained):
    """Two ranks can't divide them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Nano(partial(FusedBlock, heads=3))


class Grouped(FusedBlock):
    """Four query heads that share one key-value head, under a mask that is made before the blocks."""

    def __init__(self, width: int = 48) -> None:
        super().__init__(width)
        self.qkv = nn.Linear(width, width + 24)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        sizes = (48, 12, 12)
        q, k, v = (t.unflatten(-1, (-1, 12)).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(sizes, -1))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Documents(Trained):
    """Three packed documents in each row, which attention keeps apart; a learned bias for each distance."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.model = Nano(Grouped)
        self.near = nn.Parameter(torch.zeros(32))

    def loss(self, batch: Batch) -> Tensor:
        ids, model = batch["ids"], self.model
        place = torch.arange(ids.shape[1], device=ids.device)
        document = (place >= 5).int() + (place >= 19)
        apart = (document[:, None] != document) | (place[:, None] < place)
        bias = self.near[(place[:, None] - place).clamp(min=0)].masked_fill(apart, -torch.inf)
        x = model.token(ids) + model.position(place)
        for layer in model.layers:
            x = layer(x, bias)
        return F.cross_entropy(model.head(model.norm(x)).flatten(0, 1), batch["labels"].flatten())


class Hinted(FusedBlock):
    """A number for each position scales the hidden state; or (``mixes``) a sum of them up to there."""

    def __init__(self, width: int = 48, mixes: bool = False) -> None:
        super().__init__(width)
        self.mixes = mixes

    def forward(self, x: Tensor, hint: Tensor | None = None) -> Tensor:
        if hint is not None:
            x = x * (hint.cumsum(1) if self.mixes else hint)
        return super().forward(x)


class HintedLater(Trained):
    """Blocks are called otherwise than in the proof, from the second batch on."""

    def __init__(self, mixes: bool = False) -> None:
        super().__init__()
        self.model, self.later = Nano(partial(Hinted, mixes=mixes)), False

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.later = batch_idx > 0
        return super().training_step(batch, batch_idx)

    def loss(self, batch: Batch) -> Tensor:
        ids, model = batch["ids"], self.model
        place = torch.arange(ids.shape[1], device=ids.device)
        hint = (1 + place[None, :, None] / 40).to(self.dtype) if self.later else None
        x = model.token(ids) + model.position(place)
        for layer in model.layers:
            x = layer(x, hint=hint)
        return F.cross_entropy(model.head(model.norm(x)).flatten(0, 1), batch["labels"].flatten())


class Uneven(FusedBlock):
    """Weights that only the later positions use, and weights that none does."""

    def __init__(self, width: int = 48) -> None:
        super().__init__(width)
        self.late, self.never = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        late = place >= 16
        x = x + late * self.late(x) if late.any() else x
        return super().forward(x)


class UsedByOneRank(Trained):
    def __init__(self) -> None:
        super().__init__()
        self.model = Nano(Uneven)

    def loss(self, batch: Batch) -> Tensor:
        ids, model = batch["ids"], self.model
        place = torch.arange(ids.shape[1], device=ids.device)
        x = model.token(ids) + model.position(place)
        for layer in model.layers:
            x = layer(x, place[None, :, None])
        return F.cross_entropy(model.head(model.norm(x)).flatten(0, 1), batch["labels"].flatten())


class Padded(Trained):
    """Hugging Face's own masks, of padding from the second batch on; positions begin anew in the middle in others."""

    def __init__(self, packed: bool = False) -> None:
        super().__init__("llama")
        self.packed = packed
        self.model = llama()

    def loss(self, batch: Batch) -> Tensor:
        ids, rows = batch["ids"], batch["rows"]
        place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        keep = place < 32 - rows[:, None].where(rows[:, None] > 7, 0) % 9
        given = {"attention_mask": keep.long()}
        if self.packed:
            given = {"position_ids": place % 20, "use_cache": False}
        logits = self.model.model(input_ids=ids, **given).logits
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].masked_fill(~keep, -100).flatten())


class HuggingFace(Trained):
    """Of other kinds than the zoo's: windows and norms that add up in float32, or no order in time."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        sizes = {"vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4}
        if kind == "gemma3":
            config = transformers.Gemma3TextConfig(
                **sizes, **heads, num_key_value_heads=2, head_dim=12, sliding_window=8
            )
            self.model = Wrapped(transformers.Gemma3ForCausalLM(config))
        else:
            dry = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            self.model = Wrapped(transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **heads, **dry)))


FEW: dict[str, Any] = {"gradient_clip_val": 0.3, "steps": 4}
OTHERS = Together(2, {kind: Run(partial(HuggingFace, kind), CONTEXT, FEW) for kind in ("gemma3", "bert")})


@pytest.mark.parametrize("kind", OTHERS.runs)
def test_other_hugging_face_models(kind: str) -> None:
    OTHERS.check(kind, 1e-6 if kind == "gemma3" else 1e-9)


MASKS: dict[str, tuple[Callable[[], Trained], str]] = {
    "three heads": (OfThreeHeads, "attention gathers keys and values, since its 3 heads do not divide"),
    "documents": (Documents, "key-value heads (1) repeated"),
    "other arguments later": (HintedLater, "Ulysses"),
    "used by one rank": (UsedByOneRank, "Ulysses"),
    "padded": (Padded, "Ulysses"),
    "packed": (partial(Padded, packed=True), "Ulysses"),
}
MASKED = Together(2, {name: Run(module, CONTEXT, FEW) for name, (module, _) in MASKS.items()})


@pytest.mark.parametrize("name", MASKS)
def test_masks_and_heads(name: str) -> None:
    for found in MASKED.check(name):
        assert MASKS[name][1] in found.explain


def test_checkpoints_of_other_layouts(tmp_path: Path) -> None:
    """Data ranks continue what context ranks saved, and these what one process saved."""
    expected = run_ranks(_saving, 1, None, str(tmp_path / "one"), None)[0]
    for found in run_ranks(_saving, 2, CONTEXT, str(tmp_path / "context"), None):
        assert_equal(found, expected)
    for first, ranks, then in (("context", 2, {}), ("one", 2, CONTEXT)):
        path = str(tmp_path / first / "step=4.ckpt")
        for found in run_ranks(_saving, ranks, then, str(tmp_path / "again"), path):
            for name, weight in expected.weights.items():
                torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=1e-9, msg=name)


def _saving(strategy: dict[str, Any] | None, folder: str, ckpt: str | None) -> Result:
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
    return fit("nano", strategy, 8, enable_checkpointing=True, callbacks=[keep], ckpt=ckpt)


# ---- random numbers


class Dropping(FusedBlock):
    def __init__(self, width: int = 48) -> None:
        super().__init__(width)
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        dropped = F.dropout(torch.ones_like(x), 0.5, self.training)
        if torch.is_grad_enabled() and type(dropped) is Tensor and dropped.dtype == torch.float64:
            self.kept.append(dropped.detach() != 0)
        return x * dropped


class Drops(Trained):
    def __init__(self) -> None:
        super().__init__()
        self.model = Nano(Dropping)


def _dropped(strategy: dict[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    made = Drops()
    weights = fit(lambda: made, strategy, steps=2, limit_val_batches=0).weights
    return [mask for block in made.model.layers for mask in block.kept], weights


@pytest.mark.parametrize("recomputed", [None, "full"])
def test_parts_drop_apart(recomputed: str | None) -> None:
    """Where context ranks hold other positions they drop apart; where tensor ranks hold the same, alike."""
    sizes = {**CONTEXT, "tensor_parallel_size": 2, "activation_checkpointing": recomputed}
    (first, weights), (alike, _), (apart, others), _ = run_ranks(_dropped, 4, sizes)
    assert len(first) == len(apart) > 0
    for mine, same, other in zip(first, alike, apart, strict=True):
        assert mine.shape == (8, 16, 48)
        assert torch.equal(mine, same)
        assert abs((mine == other).double().mean().item() - 0.5) < 0.05
    for name, weight in weights.items():
        assert torch.equal(weight, others[name])


# ---- refused


class MaskInside(FusedBlock):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        return x + self.out(F.scaled_dot_product_attention(q, k, v, past).transpose(1, 2).flatten(2))


class ByHand(FusedBlock):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        return x + self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Convolved(FusedBlock):
    """Mixes neighbours."""

    def __init__(self, width: int = 48) -> None:
        super().__init__(width)
        self.mix = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.mix(x.mT).mT)


class Summed(FusedBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + x.cumsum(1) / 10)


class Far(FusedBlock):
    """Mixes positions that are further apart than the proof's sequence is long."""

    def __init__(self, width: int = 48) -> None:
        super().__init__(width)
        self.mix = nn.Conv1d(width, width, 3, padding=14, dilation=14)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.mix(x.mT).mT)


class DropsRows(FusedBlock):
    """Leaves out what it adds for some rows (stochastic depth)."""

    def forward(self, x: Tensor) -> Tensor:
        kept = x.new_empty(len(x), 1, 1).bernoulli_(0.99) if self.training else 1
        return x + (super().forward(x) - x) * kept


class Own(Trained):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.model = Nano(block)


class Shrinking(Trained):
    """An odd length in the second batch."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return super().training_step({k: v[:, : 32 - batch_idx] if v.ndim > 1 else v for k, v in batch.items()}, 0)


class Skipping(Trained):
    """Leaves out one block in the second batch; its loss does not need all positions."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.left_out = block

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x = self.model.token(batch["ids"])
        for i, layer in enumerate(self.model.layers):
            x = x if (batch_idx, i) == (1, self.left_out) else layer(x)
        loss = F.cross_entropy(self.model.head(self.model.norm(x)).mean(1), batch["labels"][:, 0])
        self.log("loss", loss)
        return loss


REFUSED: dict[str, tuple[Callable[[], Any], int, str]] = {
    "a mask made inside": (partial(Own, MaskInside), 2, "made in the block for the part of the sequence"),
    "attention by hand": (partial(Own, ByHand), 2, "calls no F.scaled_dot_product_attention"),
    "a convolution": (
        partial(Own, Convolved),
        2,
        "layers.0 does not compute the same on parts of the sequence: output",
    ),
    "a running sum": (partial(Own, Summed), 2, "layers.0 does not compute the same on parts of the sequence: output"),
    "a far convolution": (partial(Own, Far), 2, "does not compute the same on parts of the sequence of 32: its output"),
    "rows that are dropped": (partial(Own, DropsRows), 2, "layers.0 draws random numbers by bernoulli_, other ones"),
    "no blocks": (partial(Trained, "stack"), 2, "has no list of them"),
    "a length that does not divide": (Trained, 3, "context_parallel_size=3 does not divide the sequence of 32"),
    "other arguments later": (partial(HintedLater, mixes=True), 2, "It is given argument ['hint'], unlike in the step"),
    "no first block later": (partial(Skipping, 0), 2, "model.layers.1 gets a hidden state (8, 32, 48), and not the 16"),
    "no last block later": (partial(Skipping, 2), 2, "the step left the blocks after model.layers.1"),
    "an odd length later": (Shrinking, 2, "the sequence of 31 can't be divided over context_parallel_size=2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    module, ranks, words = REFUSED[name]
    said = run_ranks(_refusal, ranks, module, ranks)
    assert len(set(said)) == 1
    assert words in said[0]


def _refusal(module: Callable[[], Any], ranks: int) -> str:
    rows = "stack" if isinstance(module, partial) and module.args == ("stack",) else "nano"
    made = module()
    made.rows_of = rows
    with pytest.raises(ContextError) as raised:
        fit(lambda: made, {"context_parallel_size": ranks}, steps=3)
    return str(raised.value)
