"""The decoder with experts: against one token at a time, against Hugging Face's Mixtral; how it keeps its balance."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.nn import functional as F

from lightning_bharat.models import GPT, GPTConfig, GPTModule
from lightning_bharat.models.moe import Experts, MixtureOfExperts, Routed, Router, Spread, balance_loss
from tests.models.test_gpt import gpt, ids, their_sizes
from tests.models.test_lightning_module import loader, trainer

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "moe_intermediate_size": 24,
}
FORMS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {"scoring_func": "sigmoid", "routed_scaling_factor": 2.5},
    "raw weights": {"norm_topk_prob": False, "num_experts_per_tok": 1},
    "shared": {"num_shared_experts": 2},
    "groups": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "biases": {"bias_update_speed": 0.05},
}


def layer(**options: Any) -> MixtureOfExperts:
    """With weights that make experts and scores unlike each other, in float64."""
    found: Any = gpt(GPTConfig(**{**SMALL, **options})).layers[0].mlp
    if found.gate.speed is not None:
        found.gate.bias_steps.copy_(torch.randint(-9, 9, (found.gate.num_experts,)))
    return found


def tokens(count: int = 7, seed: int = 3) -> torch.Tensor:
    return torch.randn(count, 48, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_by_one(moe: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """What the layer says of each token, written down without a batch."""
    gate, experts, out = moe.gate, moe.experts, []
    for token in x:
        logits = gate.weight @ token
        scores = logits.softmax(0) if gate.scoring == "softmax" else logits.sigmoid()
        wanted = (scores if gate.speed is None else scores + gate.speed * gate.bias_steps).tolist()
        size = len(wanted) // gate.groups
        groups = [range(g * size, (g + 1) * size) for g in range(gate.groups)]
        groups.sort(key=lambda g: -sum(sorted(wanted[i] for i in g)[-2:]))
        allowed = [i for group in groups[: gate.kept_groups] for i in group]
        chosen = sorted(allowed, key=lambda i: -wanted[i])[: gate.top_k]
        weights = torch.stack([scores[i] for i in chosen])
        weights = gate.scale * (weights / weights.sum() if gate.normalized else weights)
        total = torch.zeros_like(token)
        for weight, i in zip(weights, chosen, strict=True):
            a, b = (experts.gate_up_proj[i] @ token).chunk(2)
            total = total + weight * (experts.down_proj[i] @ (F.silu(a) * b))
        out.append(total if moe.shared_experts is None else total + moe.shared_experts(token))
    return torch.stack(out)


@pytest.mark.parametrize("form", FORMS)
def test_equals_one_token_at_a_time_with_gradients(form: str) -> None:
    moe, x = layer(**FORMS[form]), tokens()
    expected, found = one_by_one(moe, x), moe(x[None])[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for name, parameter in moe.named_parameters():
        of_each = [torch.autograd.grad(y.square().sum(), parameter, retain_graph=True)[0] for y in (found, expected)]
        torch.testing.assert_close(*of_each, rtol=1e-11, atol=1e-11, msg=name)
        assert of_each[0].abs().max() > 0, name


def test_experts_that_choose_take_the_tokens_that_fit_them_best_in_each_sequence() -> None:
    moe = layer(router_choice="expert", num_shared_experts=1, num_experts_per_tok=2)
    x = tokens(24).view(2, 12, 48)
    expected = [moe.shared_experts(sequence) for sequence in x]  # type: ignore[misc]
    missed = 0
    for out, sequence in zip(expected, x, strict=True):
        scores, taken = (sequence @ moe.gate.weight.T).softmax(-1), set()
        for i in range(8):
            for t in sorted(range(12), key=lambda t, i=i: -scores[t, i])[: 12 * 2 // 8]:  # type: ignore[misc]
                a, b = (moe.experts.gate_up_proj[i] @ sequence[t]).chunk(2)
                out[t] = out[t] + scores[t, i] * (moe.experts.down_proj[i] @ (F.silu(a) * b))
                taken.add(t)
        missed += 12 - len(taken)
    found = moe.train()(x)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)
    for name, parameter in moe.named_parameters():
        ends = (found, torch.stack(expected))
        of_each = [torch.autograd.grad(y.square().sum(), parameter, retain_graph=True)[0] for y in ends]
        torch.testing.assert_close(*of_each, rtol=1e-11, atol=1e-11, msg=name)
    seen = moe.gate.take()
    assert seen is not None and seen[:8].tolist() == [6] * 8 and seen[-2:].tolist() == [24, missed] and missed
    with pytest.raises(ValueError, match="train with router_choice='token'"):
        GPT(GPTConfig(**SMALL, router_choice="expert")).generate(ids(), 1)


@pytest.mark.parametrize("count", [1, 3])
def test_more_experts_than_tokens(count: int) -> None:
    moe, x = layer(), tokens(count)
    torch.testing.assert_close(moe(x), one_by_one(moe, x), rtol=1e-12, atol=1e-12)
    moe(x).sum().backward()
    idle = moe.experts.down_proj.grad.abs().amax((1, 2)) == 0  # type: ignore[union-attr]
    assert 8 - 2 * count <= int(idle.sum()) < 8


def test_all_tokens_on_the_same_expert() -> None:
    moe, x = layer(num_experts_per_tok=1), tokens()
    with torch.no_grad():
        moe.gate.weight.zero_()[5] = x.mean(0)
        x += 5 * x.mean(0)
    torch.testing.assert_close(moe(x), one_by_one(moe, x), rtol=1e-12, atol=1e-12)
    moe.train()(x).sum().backward()
    assert [i for i in range(8) if moe.experts.down_proj.grad[i].any()] == [5]  # type: ignore[index]
    seen = moe.gate.take()
    assert seen is not None and seen[5] == seen[-2] == 14  # two forwards in training


def test_no_tokens_at_all() -> None:
    moe = layer(num_shared_experts=1)
    assert moe(tokens(0)).shape == (0, 48)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_grouped_product_is_the_product_of_each(dtype: torch.dtype) -> None:
    experts: Experts = copy.deepcopy(layer().experts).to(dtype)
    x = tokens(9).to(dtype)
    chosen = torch.tensor([[0, 7], [7, 3], [3, 0], [0, 3], [7, 0], [3, 7], [0, 7], [3, 0], [7, 3]])  # others idle
    weights = torch.rand(9, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    fused = experts(x, chosen, weights)
    grads = torch.autograd.grad(fused.square().sum(), list(experts.parameters()))
    exact = copy.deepcopy(experts).double()
    expected = exact(x.double(), chosen, weights.double())
    torch.testing.assert_close(fused.double(), expected, rtol=0.05, atol=0.02 * expected.abs().max().item())
    for found, wanted in zip(
        grads, torch.autograd.grad(expected.square().sum(), list(exact.parameters())), strict=True
    ):
        torch.testing.assert_close(found.double(), wanted, rtol=0.1, atol=0.03 * wanted.abs().max().item())
        assert not found[1].any() and not found[2].any()


def test_autocast_computes_experts_in_its_type_and_scores_exactly() -> None:
    moe, x = layer().float(), tokens(20).float()
    exact = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = moe(x)
        chosen, _ = moe.gate(x)
    assert torch.equal(chosen, moe.gate(x)[0])
    assert 0 < (low - exact).abs().max() < 0.05 * exact.abs().max()


def test_equals_hugging_faces_mixtral_with_the_same_weights() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = GPTConfig(**SMALL, num_experts_per_tok=2)
    experts = {"intermediate_size": config.expert_size, "num_local_experts": 8}
    theirs = MixtralForCausalLM(MixtralConfig(**their_sizes(config), **experts))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = GPT(config)
    ours.load_state_dict({name.removeprefix("model."): tensor for name, tensor in theirs.state_dict().items()})
    torch.testing.assert_close(ours(ids()), theirs(ids()).logits, rtol=1e-4, atol=1e-5)


def test_cached_generation_equals_recomputing_everything() -> None:
    model, text = gpt(GPTConfig(**SMALL, num_shared_experts=1, bias_update_speed=0.01)), ids(3, 5)
    for _ in range(6):
        text = torch.cat((text, model(text)[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(ids(3, 5), 6, temperature=0), text)


def test_the_balance_loss_is_one_if_even_and_the_number_of_experts_if_not() -> None:
    even = Routed(torch.full((8,), 4), torch.full((8,), 1 / 8))
    lopsided = Routed(torch.tensor([32, *[0] * 7]), torch.tensor([1.0, *[0.0] * 7]))
    assert balance_loss([even], lambda x: x).item() == pytest.approx(1)
    assert balance_loss([lopsided], lambda x: x).item() == pytest.approx(8)
    assert balance_loss([even, lopsided], lambda x: x).item() == pytest.approx(4.5)


def test_its_gradient_takes_scores_from_the_busiest_expert() -> None:
    gate = Router(GPTConfig(**SMALL, router_aux_loss_coef=1.0)).double()
    with torch.no_grad():
        gate.weight[2] += tokens().mean(0)
    gate(tokens())
    assert gate.routed is not None
    busiest = int(gate.routed.load.argmax())
    before = gate.routed.share[busiest].item()
    balance_loss([gate.routed], lambda x: x).backward()
    with torch.no_grad():
        gate.weight -= 0.01 * gate.weight.grad
    gate(tokens())
    assert gate.routed.share[busiest] < before


def test_what_was_seen_becomes_numbers_to_log() -> None:
    seen = torch.tensor([[4.0, 2.0, 0.0, 2.0, 4 * math.log(4), 4.0, 0.0], [2.0, 2.0, 2.0, 2.0, 0.0, 4.0, 1.0]])
    spread = Spread.of(seen)
    assert spread.imbalance.item() == pytest.approx(2)
    assert spread.dropped.item() == pytest.approx(1 / 8)
    assert spread.entropy.item() == pytest.approx(math.log(4) / 2)


def test_a_copy_after_a_step_has_seen_nothing() -> None:
    gate = Router(GPTConfig(**SMALL, router_aux_loss_coef=0.1)).double()
    gate(tokens())
    twin = copy.deepcopy(gate)
    assert gate.routed is not None and twin.routed is None and twin.seen is None


@pytest.mark.parametrize("by", [{"router_aux_loss_coef": 0.05}, {"bias_update_speed": 0.02}], ids=str)
def test_training_balances_experts_that_begin_lopsided(by: dict[str, float], tmp_path: Path) -> None:
    """The same start, with and without; both learn the batch."""
    worst = []
    for options in ({}, by):
        L.seed_everything(0, verbose=False)
        module = GPTModule(GPTConfig(**SMALL, **options), learning_rate=3e-3)
        with torch.no_grad():
            for block in module.model.layers:
                block.mlp.gate.weight[:2] += 0.5  # type: ignore[index,union-attr]
        first = module.model(ids())
        assert first.isfinite().all()
        loop = trainer(tmp_path, 40)
        loop.fit(module, loader(40))
        metrics = loop.callback_metrics
        assert metrics["train_loss"] < 3.5 and metrics["dropped_tokens"] == 0
        assert 0 < metrics["router_entropy"] <= math.log(8) + 1e-9
        worst.append(metrics["expert_imbalance"].item())
        assert ("balance_loss" in metrics) == ("router_aux_loss_coef" in options)
    assert worst[1] < worst[0]


def test_biases_move_once_an_optimizer_step(tmp_path: Path) -> None:
    module = GPTModule(GPTConfig(**SMALL, bias_update_speed=0.01))
    loop = trainer(tmp_path, 3)
    loop.accumulate_grad_batches = 2
    loop.fit(module, loader(6))
    steps = torch.stack([block.mlp.gate.bias_steps for block in module.model.layers])  # type: ignore[union-attr]
    assert steps.any() and steps.abs().max() <= 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scoring_func": "tanh"}, "'softmax' or 'sigmoid'"),
        ({"num_experts_per_tok": 9}, "write fewer"),
        ({"router_choice": "both"}, "router_choice='both' is unknown; write 'token' or 'expert'"),
        ({"router_choice": "expert", "bias_update_speed": 0.1}, "leave bias_update_speed out"),
        ({"n_group": 3}, "n_group=3 must divide num_experts=8"),
        ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "the 2 experts that a token may choose from"),
        ({"num_experts": None}, "write num_experts as well"),
        ({"num_shared_experts": 0}, "num_shared_experts=0 must be positive"),
    ],
    ids=str,
)
def test_sizes_that_can_not_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GPTConfig(**{**SMALL, **options})
