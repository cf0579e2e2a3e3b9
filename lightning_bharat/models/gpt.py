"""A decoder of today, dense or with experts: rotary positions, RMS norms, SwiGLU, grouped-query attention.

It reads from top to bottom.

It computes what Hugging Face's Llama computes (with experts: Mixtral), under the same names, so weights of these
families load as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bharat.models.moe import SCORES, MixtureOfExperts

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
        num_experts: feed-forwards of a block, of which each token goes through some; one that all go through if None.
            What follows is about them.
        num_experts_per_tok: how many a token goes through.
        num_shared_experts: more experts, which all tokens go through.
        moe_intermediate_size: width inside an expert; as inside a feed-forward if None.
        scoring_func: "softmax" over all experts' scores (Mixtral), or "sigmoid" of each (DeepSeek-V3).
        norm_topk_prob: the weights of a token's experts add up to 1.
        routed_scaling_factor: the weights are multiplied by it.
        n_group: experts stand in so many groups...
        topk_group: ...and a token's are all in so many of them.
        router_aux_loss_coef: times :func:`~lightning_bharat.models.moe.balance_loss` is added to the loss; nothing if
            None.
        bias_update_speed: step of the biases that balance experts without a loss, 0.001 in DeepSeek-V3; no biases if
            None.

    Raises:
        ValueError: a size isn't positive, or does not divide as it must, or ``scoring_func`` is unknown.
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
    num_experts: int | None = None
    num_experts_per_tok: int = 2
    num_shared_experts: int | None = None
    moe_intermediate_size: int | None = None
    scoring_func: str = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    router_aux_loss_coef: float | None = None
    bias_update_speed: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
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
        self._check_experts()

    def _check_experts(self) -> None:
        if self.scoring_func not in SCORES:
            raise ValueError(f"scoring_func={self.scoring_func!r} is unknown; write {' or '.join(map(repr, SCORES))}")
        if self.num_experts is None:
            for name in ("num_shared_experts", "moe_intermediate_size", "router_aux_loss_coef", "bias_update_speed"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}={getattr(self, name)} is about experts; write num_experts as well")
            return
        if self.num_experts % self.n_group or self.topk_group > self.n_group:
            raise ValueError(
                f"n_group={self.n_group} must divide num_experts={self.num_experts}, and be at least "
                f"topk_group={self.topk_group}"
            )
        allowed = self.num_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > allowed:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than the {allowed} experts that a token may "
                "choose from; write fewer"
            )

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

    @property
    def expert_size(self) -> int:
        """Width inside an expert."""
        return self.moe_intermediate_size or self.inner_size

    @property
    def residual_std(self) -> float:
        """Standard deviation of the first weights of what is added to the residual stream."""
        return self.initializer_range / (2 * self.num_hidden_layers) ** 0.5


class GPT(nn.Module):
    """Token ids (batch, time) to logits (batch, time, vocabulary) of the next token.

    Every leaf has its own ``reset_parameters``, which sets its buffers too: the module can be built on ``meta`` and
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
        self.mlp = MixtureOfExperts(config, _shared(config)) if config.num_experts else FeedForward(config)

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
        self.o_proj = Linear(config.num_attention_heads * self.head_dim, width, config.residual_std)

    def forward(self, x: Tensor, rotary: Rotary, cache: KVCache | None = None) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for project in projections)
        q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020, https://arxiv.org/abs/2002.05202), ``inner`` wide: as the config says if None."""

    def __init__(self, config: GPTConfig, inner: int | None = None) -> None:
        super().__init__()
        width, inner, std = config.hidden_size, inner or config.inner_size, config.initializer_range
        self.gate_proj = Linear(width, inner, std)
        self.up_proj = Linear(width, inner, std)
        self.down_proj = Linear(inner, width, config.residual_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def _shared(config: GPTConfig) -> FeedForward | None:
    """All shared experts, as one feed-forward."""
    shared = config.num_shared_experts
    return FeedForward(config, shared * config.expert_size) if shared else None


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


def draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """A token for each row of (batch, vocabulary) logits: (batch, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
