"""A decoder of today, dense: rotary positions, RMS norms, SwiGLU, grouped-query attention. It reads from top to bottom.

It computes what Hugging Face's Llama computes, under the same names, so weights of that family load as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a :class:`GPT`, by Hugging Face's names.

    Attributes:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        intermediate_size: width inside a feed-forward; 8/3 of ``hidden_size``, rounded up to a multiple of 32, if None.
        num_hidden_layers: blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads, each shared by the same number of query heads; as many as query
            heads if None.
        head_dim: width of a head; ``hidden_size / num_attention_heads`` if None.
        rope_theta: base of the rotary wave lengths.
        rms_norm_eps: added to the mean square in norms.
        initializer_range: standard deviation of the first weights; divided by √(2 · blocks) where a block adds to the
            residual stream, which then starts with the same variance at any depth (GPT-2, section 2.3).
        tie_word_embeddings: the head is the embedding, transposed.

    Raises:
        ValueError: a size isn't positive, or does not divide as it must.
    """

    vocab_size: int = 32_000
    hidden_size: int = 512
    intermediate_size: int | None = None
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not isinstance(value, bool) and value <= 0:
                raise ValueError(f"{name}={value} must be positive")
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}; write a divisor of it"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}; "
                "write one that is, or give head_dim"
            )
        if self.head_size % 2:
            raise ValueError(f"head_dim={self.head_size} is odd; rotary positions turn pairs, so write an even number")

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def inner_size(self) -> int:
        """Width inside a feed-forward."""
        return self.intermediate_size or -(-8 * self.hidden_size // (3 * 32)) * 32


class GPT(nn.Module):
    """Token ids (batch, time) to logits (batch, time, vocabulary) of the next token.

    Every leaf has its own ``reset_parameters``, and there is no buffer: the module can be built on ``meta`` and
    started leaf by leaf.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        std = config.initializer_range
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, std)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, std)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """Logits of the token that follows each of ``input_ids``.

        Args:
            input_ids: (batch, time), int64.
            caches: one a block. ``input_ids`` then continue what was seen with them.
        """
        seen = caches[0].seen if caches else 0
        x = self.embed_tokens(input_ids)
        rotary = self._rotary(seen, input_ids.shape[1], x.device)
        for i, layer in enumerate(self.layers):
            x = layer(x, rotary, caches[i] if caches else None)
        return self.lm_head(self.norm(x))

    def _rotary(self, start: int, length: int, device: torch.device) -> Rotary:
        """Cosine and sine of positions times frequencies, each (time, head_dim / 2), in float32 whatever the weights.

        Of the whole sequence, also where a rank holds a part of the hidden state: attention sees all of it. Made anew
        in each forward, which costs nothing beside a block, since a table would have to survive ``meta`` and casts.
        """
        size = self.config.head_size
        exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
        positions = torch.arange(start, start + length, dtype=torch.float32, device=device)
        angles = torch.outer(positions, self.config.rope_theta**-exponents)
        return angles.cos(), angles.sin()

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        eos: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue ``input_ids`` token by token.

        Args:
            input_ids: (batch, time) prompts, time ≥ 1, all of one length.
            max_new_tokens: at most so many are added.
            temperature: logits are divided by it; 0 takes the likeliest token.
            top_k: draw from the ``top_k`` likeliest alone.
            eos: id that ends a sequence: what follows it is ``eos`` too, and when all have ended nothing is added.
            generator: draws; torch's global one if None.

        Returns:
            (batch, time + new), prompts included.
        """
        caches = [KVCache(input_ids.shape[1] + max_new_tokens) for _ in self.layers]
        tokens, new = input_ids, input_ids
        ended = torch.zeros_like(input_ids[:, :1], dtype=torch.bool)
        for _ in range(max_new_tokens):
            new = draw(self(new, caches)[:, -1], temperature, top_k, generator)
            if eos is not None:
                new = new.masked_fill(ended, eos)
                ended = new == eos
            tokens = torch.cat((tokens, new), 1)
            if ended.all():
                break
        return tokens


class Block(nn.Module):
    """Attention and feed-forward, each on the normed stream and added to it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, rotary: Rotary, cache: KVCache | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Causal attention whose query heads share key and value heads in groups.

    How many heads there are is read from what the projections return, so a rank may hold some of them.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_size
        width, std = config.hidden_size, config.initializer_range
        self.q_proj = Linear(width, config.num_attention_heads * self.head_dim, std)
        self.k_proj = Linear(width, config.kv_heads * self.head_dim, std)
        self.v_proj = Linear(width, config.kv_heads * self.head_dim, std)
        self.o_proj = Linear(config.num_attention_heads * self.head_dim, width, residual_std(config))

    def forward(self, x: Tensor, rotary: Rotary, cache: KVCache | None = None) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for project in projections)
        q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width, inner, std = config.hidden_size, config.inner_size, config.initializer_range
        self.gate_proj = Linear(width, inner, std)
        self.up_proj = Linear(width, inner, std)
        self.down_proj = Linear(inner, width, residual_std(config))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Linear(nn.Linear):
    """Without bias; its weight starts normal with standard deviation ``std``."""

    def __init__(self, inputs: int, outputs: int, std: float) -> None:
        self.std = std  # before torch's __init__, which calls reset_parameters
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


class Embedding(nn.Embedding):
    """Its weight starts normal with standard deviation ``std``."""

    def __init__(self, tokens: int, width: int, std: float) -> None:
        self.std = std
        super().__init__(tokens, width)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


class KVCache:
    """Keys and values that one block has seen, in memory for ``length`` positions, taken at the first ``append``."""

    def __init__(self, length: int) -> None:
        self.length, self.seen = length, 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Remember new ones, each (batch, heads, time, head_dim); returns all so far."""
        if not self.seen:
            batch, heads, _, size = k.shape
            self.k, self.v = (x.new_empty(batch, heads, self.length, size) for x in (k, v))
        end = self.seen + k.shape[2]
        self.k[:, :, self.seen : end], self.v[:, :, self.seen : end] = k, v
        self.seen = end
        return self.k[:, :, :end], self.v[:, :, :end]


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn each pair of channels (i, i + head_dim / 2) by its position's angle: then the product of a query and a key
    depends on their distance alone (RoPE, Su et al., 2021, https://arxiv.org/abs/2104.09864)."""
    cos, sin = rotary
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention (batch, heads, time, head_dim) of the last positions ``q`` to all so far."""
    time, seen = q.shape[2], k.shape[2]
    if time == seen:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    past = torch.ones(time, seen, dtype=torch.bool, device=q.device).tril(seen - time)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=past, enable_gqa=True)


def residual_std(config: GPTConfig) -> float:
    """Start of what is added to the residual stream: see :class:`GPTConfig`."""
    return config.initializer_range / (2 * config.num_hidden_layers) ** 0.5


def draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """A token for each row of (batch, vocabulary) logits: (batch, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
