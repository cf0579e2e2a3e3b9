"""muP: one learning rate for all widths, on every layout, and nothing where it is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_bharat.checkpoints import CheckpointError
from lightning_bharat.models import GPTConfig, GPTModule
from lightning_bharat.models.gpt import attend
from lightning_bharat.models.mup import coordinate_check
from tests.experts import TrainedGPT
from tests.modules import Rows
from tests.strategies.together import Run, Together

SIZES = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 32, "num_shared_experts": 1}


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(61, (4, 17), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:].contiguous()}


def module(weights: Path | None = None, **options: Any) -> GPTModule:
    torch.manual_seed(0)
    return GPTModule(GPTConfig(**{**SIZES, **options}), learning_rate=3e-3, weights=weights)


def trained(**options: Any) -> list[Tensor]:
    made = module(**options)
    optimizer = made.configure_optimizers()
    for _ in range(2):
        optimizer.zero_grad()
        made._loss(batch()).backward()
        optimizer.step()
    return [parameter.detach() for parameter in made.parameters()]


def of_width(width: int, mup: bool, grow: str) -> GPTModule:
    heads = {"num_attention_heads": width // 16, "head_dim": 16} if grow == "heads" else {"head_dim": width // 4}
    base = {"mup_base_width": 64, "mup_base_head_dim": 16} if mup else {}
    sizes = {**SIZES, **heads, **base, "hidden_size": width}
    return GPTModule(GPTConfig(**sizes), learning_rate=3e-3)


@pytest.mark.parametrize("grow", ["heads", "head_dim"])
def test_what_training_changes_is_of_one_size_at_all_widths_and_grows_without(grow: str) -> None:
    widths = [64, 256]
    there = coordinate_check(lambda width: of_width(width, True, grow), widths, batch(), steps=3, seeds=1)
    without = coordinate_check(lambda width: of_width(width, False, grow), widths, batch(), steps=3, seeds=1)
    assert there.keys() == {"embeddings", "layers.0", "layers.1", "logits"}
    assert all(abs(growth) < 0.25 for growth in there.values()), there
    assert all(without[name] > 0.6 for name in ("layers.0", "layers.1", "logits")), without


@pytest.mark.parametrize("left_out", ["rates", "logits"])
def test_the_check_finds_what_is_left_out(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def partial(width: int) -> GPTModule:
        made = of_width(width, True, "heads")
        if left_out == "rates":
            monkeypatch.setattr(made, "configure_optimizers", lambda: torch.optim.AdamW(made.parameters(), 3e-3))
        else:
            with torch.no_grad():
                made.model.norm.weight.mul_(width / 64)
        return made

    growth = coordinate_check(partial, [64, 256], batch(), steps=3, seeds=1)
    assert growth["layers.1" if left_out == "rates" else "logits"] > 0.5


def test_experts_and_a_tied_head_are_of_one_size_at_all_widths_too() -> None:
    def wide(width: int) -> GPTModule:
        grown = {"hidden_size": width, "num_attention_heads": width // 16, "moe_intermediate_size": width}
        return module(**{**EXPERTS, **grown, "num_shared_experts": None}, mup_base_width=64, tie_word_embeddings=True)

    growth = coordinate_check(wide, [64, 256], batch(), steps=3, seeds=1)
    assert all(abs(each) < 0.3 for each in growth.values()), growth


@pytest.mark.parametrize("options", [{}, EXPERTS, {"tie_word_embeddings": True}])
def test_at_the_width_it_starts_from_it_is_the_usual_model_bit_by_bit(options: dict[str, Any]) -> None:
    for one, other in zip(trained(**options), trained(**options, mup_base_width=64), strict=True):
        assert torch.equal(one, other)


def test_groups_have_the_rates_of_their_width_and_without_there_are_the_usual_two() -> None:
    usual = module().configure_optimizers().param_groups
    assert [(group["lr"], group["weight_decay"]) for group in usual] == [(3e-3, 0.1), (3e-3, 0.0)]
    made = module(mup_base_width=16, **EXPERTS)
    hidden, head, rest = made.configure_optimizers().param_groups
    assert [(g["lr"], g["weight_decay"]) for g in (hidden, head, rest)] == [(7.5e-4, 0.4), (3e-3, 0.1), (3e-3, 0.0)]
    assert [id(p) for p in head["params"]] == [id(made.model.lm_head.weight)]
    assert id(made.model.embed_tokens.weight) in map(id, rest["params"])
    assert {id(p) for p in made.parameters()} == {id(p) for g in (hidden, head, rest) for p in g["params"]}


def test_first_weights_and_attention_have_the_scales_of_their_width() -> None:
    made = module(hidden_size=256, mup_base_width=64, mup_base_head_dim=4, **EXPERTS)
    layer = made.model.layers[0]
    std = {
        "q": (layer.self_attn.q_proj.weight, 0.02 / 2),
        "o": (layer.self_attn.o_proj.weight, 0.02 / 2 / 2),
        "expert": (layer.mlp.experts.gate_up_proj, 0.02 / 2),
        "router": (layer.mlp.gate.weight, 0.02 / 4),
        "head": (made.model.lm_head.weight, 0.02),
        "embedding": (made.model.embed_tokens.weight, 0.02),
    }
    for name, (weight, expected) in std.items():
        assert float(weight.detach().std()) == pytest.approx(expected, rel=0.1), name
    assert layer.self_attn.scale == 4**0.5 / 16
    q, k, v = torch.randn(3, 1, 2, 5, 16).unbind()
    scores = (q @ k.mT * layer.self_attn.scale).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(attend(q, k, v, layer.self_attn.scale), scores.softmax(-1) @ v)
    torch.testing.assert_close(attend(q[:, :, 4:], k, v, layer.self_attn.scale), (scores.softmax(-1) @ v)[:, :, 4:])


def test_a_loss_in_chunks_is_the_loss() -> None:
    whole = module(mup_base_width=16).double()
    torch.manual_seed(0)
    chunked = GPTModule(whole.config, chunked_loss=True).double()
    torch.testing.assert_close(whole._loss(batch()), chunked._loss(batch()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mup_base_width": 32, "head_dim": None}, "write head_dim if this model has more heads"),
        ({"mup_base_head_dim": 8}, "write mup_base_width as well"),
        ({"mup_base_width": 0}, "mup_base_width=0 must be positive"),
    ],
)
def test_what_says_too_little_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GPTConfig(**{**SIZES, **options})
    with pytest.raises(ValueError, match="growth needs two different ones"):
        coordinate_check(lambda width: module(), [64, 64], batch())


def trainer(steps: int) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", devices=1, max_steps=steps, enable_checkpointing=False, **quiet)


def test_a_start_from_another_width_or_another_parametrization_is_refused(tmp_path: Path) -> None:
    ckpt, batches = tmp_path / "last.ckpt", DataLoader([batch(), batch()], batch_size=None)
    first = trainer(1)
    first.fit(module(mup_base_width=16), batches)
    first.save_checkpoint(ckpt)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight is \[61, 64\] in the checkpoint and \[61, 32\]"):
        module(hidden_size=32, mup_base_width=16, weights=ckpt)
    for other, said in (
        ({"mup_base_width": 32}, "this model has mup_base_width=32"),
        ({}, "trained with mup_base_width=16"),
    ):
        with pytest.raises(CheckpointError, match=said):
            module(**other, weights=ckpt)
        with pytest.raises(CheckpointError, match=said):
            trainer(2).fit(module(**other), batches, ckpt_path=ckpt)
    started = module(mup_base_width=16, weights=ckpt)
    assert torch.equal(started.model.lm_head.weight, first.lightning_module.model.lm_head.weight)


class Mup(TrainedGPT):
    """Four times as wide as the model whose rates it has."""

    def __init__(self, lazy: bool = False) -> None:
        sizes = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}
        dense = {"num_experts": None, "moe_intermediate_size": None}
        super().__init__(lazy, num_hidden_layers=2, mup_base_width=16, **sizes, **dense)
        self.learning_rate = 1e-2

    def configure_optimizers(self) -> Any:
        optimizer = GPTModule.configure_optimizers(self)
        for group in optimizer.param_groups:
            group["eps"] = 1e-4  # far above rounding, as in tests/modules.py
        return optimizer


def test_data_2_and_tensor_2_go_on_as_one_process_does(tmp_path: Path) -> None:
    # In float32, as plain Lightning reads weights before it makes the module one of float64.
    first, ckpt = trainer(2), str(tmp_path / "last.ckpt")
    first.fit(Mup(), Rows("nano", 8, 2, 1, 0, False, 0))
    first.save_checkpoint(ckpt)
    ways = {"data_parallel_size": 2, "tensor_parallel_size": 2}
    whole = {"steps": 4, "batches": 2, "ckpt": ckpt}
    both = Together(4, {"both": Run(Mup, ways, whole)})
    assert len(both.check("both")[0]["seen"]) == 2
