"""Plain models for the plan's tests: what people write, and unchanged Hugging Face ones."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY, TIME = 96, 32


class FusedBlock(nn.Module):
    """As a person writes it: fused query-key-value, an integer of its own for the heads."""

    def __init__(self, width: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Nano(nn.Module):
    """A decoder with learned positions, that sizes them from the ids."""

    def __init__(self, block: type[nn.Module] = FusedBlock, width: int = 48, depth: int = 3) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, width), nn.Embedding(TIME, width)
        self.layers = nn.ModuleList(block(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids):
        _, t = ids.size()
        x = self.token(ids) + self.position(torch.arange(t, device=ids.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Stack(nn.Module):
    """A plain multi-layer perceptron."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (8, 32, 64, 32, 4)
        layers: list[nn.Module] = []
        for i, o in pairwise(sizes):
            layers += [nn.Linear(i, o), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, x):
        return self.net(x)


class Wrapped(nn.Module):
    """A Hugging Face model as an attribute, as in a LightningModule."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


# Of Hugging Face's decoders here.
DECODER = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return Wrapped(LlamaForCausalLM(LlamaConfig(hidden_size=48, intermediate_size=112, **DECODER)))


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 48, "intermediate_size": 112, "head_dim": 16}
    return Wrapped(Qwen3ForCausalLM(Qwen3Config(**sizes, **DECODER, tie_word_embeddings=True)))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return Wrapped(
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=48,
                n_layer=2,
                n_head=4,
                n_positions=64,
                bos_token_id=1,
                eos_token_id=1,
                **no_dropout,
            )
        )
    )


MODELS = {"nano": Nano, "llama": llama, "qwen3": qwen3, "gpt2": gpt2, "stack": Stack}


def batch_of(module: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Four samples; with some labels ignored."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(module, Stack):
        draw = [torch.randn(4, n, generator=generator, dtype=torch.float64) for n in (8, 4)]
        return {"x": draw[0], "y": draw[1]}
    tokens = torch.randint(0, VOCABULARY, (4, TIME + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[1, 20:] = -100
    return {"ids": tokens[:, :-1].clone(), "labels": labels}


def step(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    if isinstance(module, Wrapped):
        return module.model(input_ids=batch["ids"], labels=batch["labels"]).loss
    if isinstance(module, Stack):
        return F.mse_loss(module(batch["x"]), batch["y"])
    return F.cross_entropy(module(batch["ids"]).flatten(0, 1), batch["labels"].flatten())
