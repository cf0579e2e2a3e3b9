"""The decoder: what it computes, against Hugging Face's Llama and against what must hold of any decoder."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lightning_bharat.models.config import GPTConfig
from lightning_bharat.models.gpt import GPT, KVCache, attend, draw, rotate

SMALL = GPTConfig(
    vocab_size=61, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, rope_theta=500.0
)


def gpt(config: GPTConfig = SMALL, dtype: torch.dtype = torch.float64) -> GPT:
    torch.manual_seed(0)
    model = GPT(config).to(dtype)
    with torch.no_grad():  # sharper than at the start, so that a wrong position or head shows
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def ids(batch: int = 2, time: int = 12) -> torch.Tensor:
    return torch.randint(SMALL.vocab_size, (batch, time), generator=torch.Generator().manual_seed(1))


def their_sizes(config: GPTConfig) -> dict[str, Any]:
    """``config`` as Hugging Face's configurations take it."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


@pytest.mark.parametrize("tied", [False, True])
def test_equals_hugging_faces_llama_with_the_same_weights(tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = GPTConfig(**{**vars(SMALL), "tie_word_embeddings": tied})
    inner = {"intermediate_size": config.inner_size, "tie_word_embeddings": tied}
    theirs = LlamaForCausalLM(LlamaConfig(**their_sizes(config), **inner))
    ours = gpt(config, torch.float32)
    names = {name.removeprefix("model."): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(names)
    torch.testing.assert_close(ours(ids()), theirs(ids()).logits, rtol=1e-5, atol=1e-6)


def test_cached_generation_equals_recomputing_everything() -> None:
    model, tokens = gpt(), ids(3, 5)
    for _ in range(10):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(ids(3, 5), 10, temperature=0), tokens)


def test_cached_logits_equal_whole_ones_however_the_sequence_is_divided() -> None:
    model, tokens = gpt(), ids()
    caches = [KVCache(12) for _ in model.layers]
    parts = [model(part, caches) for part in tokens.split((5, 1, 4, 2), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-9, atol=1e-9)


def test_grouped_heads_equal_repeated_ones() -> None:
    q, k, v = (torch.randn(2, heads, 7, 6, dtype=torch.float64) for heads in (4, 2, 2))
    k2, v2 = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = (q @ k2.mT / math.sqrt(6)).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(attend(q, k, v), scores.softmax(-1) @ v2)


def test_rotary_products_depend_on_the_distance_alone_and_keep_lengths() -> None:
    model = gpt()
    q, k = (torch.randn(1, 1, 1, 12, dtype=torch.float64) for _ in range(2))

    def at(x: torch.Tensor, position: int) -> torch.Tensor:
        return rotate(x, model._rotary(position, 1, torch.device("cpu")))

    products = [(at(q, start + 5) * at(k, start)).sum() for start in (0, 1, 17, 200)]
    torch.testing.assert_close(torch.stack(products), products[0].expand(4), rtol=1e-4, atol=1e-4)
    assert (at(q, 6) * at(k, 0)).sum() != pytest.approx(products[0].item(), rel=1e-3)
    torch.testing.assert_close(at(q, 99).norm(), q.norm(), rtol=1e-6, atol=0)


def test_the_future_does_not_change_the_past() -> None:
    model, tokens = gpt(), ids()
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % SMALL.vocab_size
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amin() > 1e-6


def test_tied_weights_are_one_parameter() -> None:
    model = gpt(GPTConfig(**{**vars(SMALL), "tie_word_embeddings": True}))
    assert model.lm_head.weight is model.embed_tokens.weight
    untied = sum(p.numel() for p in gpt().parameters())
    assert sum(p.numel() for p in model.parameters()) == untied - SMALL.vocab_size * SMALL.hidden_size


def test_built_on_meta_and_started_leaf_by_leaf_it_is_the_same_model() -> None:
    with torch.device("meta"):
        model = GPT(SMALL)
    real = GPT(SMALL)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert not list(model.buffers())
    model.to_empty(device="cpu")
    for leaf in (m for m in model.modules() if next(m.parameters(recurse=False), None) is not None):
        leaf.reset_parameters()  # type: ignore[operator]
    for (name, mine), theirs in zip(model.named_parameters(), real.parameters(), strict=True):
        assert mine.std().item() == pytest.approx(theirs.std().item(), rel=0.15), name
    start = F.cross_entropy(model(ids()).flatten(0, 1), ids().flatten())
    assert start.item() == pytest.approx(math.log(SMALL.vocab_size), abs=0.1)


def test_a_rank_with_fewer_heads_needs_no_other_setting() -> None:
    """Two halves of the heads, each alone, add up to the whole attention."""
    whole = gpt().layers[0].self_attn
    x, rotary = torch.randn(2, 9, 48, dtype=torch.float64), gpt()._rotary(0, 9, torch.device("cpu"))
    total = torch.zeros_like(x)
    for rank in range(2):
        part = gpt().layers[0].self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(part, name).weight = torch.nn.Parameter(getattr(whole, name).weight.chunk(2, 0)[rank])
        part.o_proj.weight = torch.nn.Parameter(whole.o_proj.weight.chunk(2, 1)[rank])
        total += part(x, rotary)
    torch.testing.assert_close(total, whole(x, rotary))


def test_an_ended_sequence_stays_ended_and_generation_stops_when_all_have() -> None:
    model = gpt()
    free = model.generate(ids(4, 3), 20, temperature=0)
    eos = free[0, 5].item()
    tokens = model.generate(ids(4, 3), 20, temperature=0, eos=eos)
    for row, unhindered in zip(tokens[:, 3:], free[:, 3:], strict=True):
        first = next((i for i, token in enumerate(unhindered) if token == eos), 20)
        assert torch.equal(row[: first + 1], unhindered[: min(first + 1, len(row))])
        assert (row[first + 1 :] == eos).all()
    alone = model.generate(ids(4, 3)[:1], 20, temperature=0, eos=eos)
    assert alone.shape == (1, 3 + free[0, 3:].tolist().index(eos) + 1)


def test_draws_follow_the_probabilities_and_top_k_leaves_the_rest_out() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(20_000, 4)
    shares = torch.bincount(draw(logits, 1.0, None, generator)[:, 0], minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.015, rtol=0)
    shares = torch.bincount(draw(logits, 0.5, 2, generator)[:, 0], minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.0, 9 / 25, 16 / 25]), atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, "num_key_value_heads=3 does not divide"),
        ({"hidden_size": 50, "num_attention_heads": 4}, "hidden_size=50 is not a multiple of num_attention_heads=4"),
        ({"hidden_size": 12, "num_attention_heads": 4}, "head_dim=3 is odd"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be positive"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**sizes)
