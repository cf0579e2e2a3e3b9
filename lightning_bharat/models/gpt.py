"""A decoder of today, dense or with experts: rotary positions, RMS norms, SwiGLU, grouped-query attention.

It reads from top to bottom.

It computes what Hugging Face's Llama computes (with experts: Mixtral), under the same names, so weights of these
families load as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bharat.models.config import GPTConfig
from lightning_bharat.models.moe import MixtureOfExperts

Rotary = tuple[Tensor, Tensor]


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
        return self.lm_head(self.hidden(input_ids, caches))

    def hidden(self, input_ids: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """What ``lm_head`` is given: (batch, time, width). Under muP it is scaled in place of the logits."""
        seen = caches[0].seen if caches else 0
        x = self.embed_tokens(input_ids)
        rotary = self._rotary(seen, input_ids.shape[1], x.device)
        for i, layer in enumerate(self.layers):
            x = layer(x, rotary, caches[i] if caches else None)
        x = self.norm(x)
        return x if self.config.width_ratio == 1 else x / self.config.width_ratio

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

        Raises:
            ValueError: experts choose their tokens among later ones too.
        """
        if self.config.num_experts and self.config.router_choice == "expert":
            raise ValueError(
                "router_choice='expert': experts choose among later tokens too, so none is generated one by one; "
                "train with router_choice='token' to generate"
            )
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
        self.head_dim, self.scale = config.head_size, config.attention_scale
        width, std = config.hidden_size, config.hidden_std
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
        return self.o_proj(attend(q, k, v, self.scale).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020, https://arxiv.org/abs/2002.05202), ``inner`` wide: as the config says if None."""

    def __init__(self, config: GPTConfig, inner: int | None = None) -> None:
        super().__init__()
        width, inner, std = config.hidden_size, inner or config.inner_size, config.hidden_std
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


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention (batch, heads, time, head_dim) of the last positions ``q`` to all so far. Products are
    multiplied by ``scale``, 1 / √head_dim if None."""
    time, seen = q.shape[2], k.shape[2]
    if time == seen:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    past = torch.ones(time, seen, dtype=torch.bool, device=q.device).tril(seen - time)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=past, scale=scale, enable_gqa=True)


def draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """A token for each row of (batch, vocabulary) logits: (batch, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
