"""Sizes of the decoder, and what they must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SCORES: dict[str, Callable[[Tensor], Tensor]] = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid}


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
        num_experts_per_tok: how many a token goes through; on average, where experts choose.
        num_shared_experts: more experts, which all tokens go through.
        moe_intermediate_size: width inside an expert; as inside a feed-forward if None.
        router_choice: "token": each token chooses experts; "expert": each expert chooses tokens, all the same number,
            of each sequence, among them later ones, so that nothing can be generated.
        scoring_func: "softmax" over all experts' scores (Mixtral), or "sigmoid" of each (DeepSeek-V3).
        norm_topk_prob: the weights of a token's experts add up to 1, where tokens choose.
        routed_scaling_factor: the weights are multiplied by it.
        n_group: experts stand in so many groups...
        topk_group: ...and a token's are all in so many of them.
        router_aux_loss_coef: times :func:`~lightning_bharat.models.moe.balance_loss` is added to the loss; nothing if
            None.
        bias_update_speed: step of the biases that balance experts without a loss, 0.001 in DeepSeek-V3; no biases if
            None.
        mup_base_width: ``hidden_size`` of the model whose hyperparameters this one is to be trained with: it is
            parametrized so that its best ones are about the same (muP, see :mod:`lightning_bharat.models.mup`). Not if
            None.
        mup_base_head_dim: width of a head of that model; ``head_dim`` if None, which must be given then.

    Raises:
        ValueError: a size isn't positive, or does not divide as it must, a name is unknown, or fields contradict.
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
    router_choice: str = "token"
    scoring_func: str = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    router_aux_loss_coef: float | None = None
    bias_update_speed: float | None = None
    mup_base_width: int | None = None
    mup_base_head_dim: int | None = None

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
        if self.mup_base_width is not None and self.mup_base_head_dim is None and self.head_dim is None:
            raise ValueError(
                f"mup_base_width={self.mup_base_width} does not say how wide a head of that model is; write "
                "head_dim if this model has more heads of that width, else mup_base_head_dim"
            )
        if self.mup_base_width is None and self.mup_base_head_dim is not None:
            raise ValueError(f"mup_base_head_dim={self.mup_base_head_dim} is about muP; write mup_base_width as well")

    def _check_experts(self) -> None:
        if self.scoring_func not in SCORES:
            raise ValueError(f"scoring_func={self.scoring_func!r} is unknown; write {' or '.join(map(repr, SCORES))}")
        if self.router_choice not in ("token", "expert"):
            raise ValueError(f"router_choice={self.router_choice!r} is unknown; write 'token' or 'expert'")
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
        if self.router_choice == "expert":
            self._check_expert_choice()
        allowed = self.num_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > allowed:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than the {allowed} experts that a token may "
                "choose from; write fewer"
            )

    def _check_expert_choice(self) -> None:
        for name, nothing in {"n_group": 1, "router_aux_loss_coef": None, "bias_update_speed": None}.items():
            if getattr(self, name) != nothing:
                raise ValueError(
                    f"{name}={getattr(self, name)} is about tokens that choose, and router_choice='expert' is balanced "
                    f"by itself; leave {name} out, or write router_choice='token'"
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
    def width_ratio(self) -> float:
        """How many times wider this model is than the one whose hyperparameters it has; 1 without muP."""
        return self.hidden_size / (self.mup_base_width or self.hidden_size)

    @property
    def hidden_std(self) -> float:
        """Standard deviation of the first weights that multiply what is as wide as the model."""
        return self.initializer_range / self.width_ratio**0.5

    @property
    def residual_std(self) -> float:
        """Standard deviation of the first weights of what is added to the residual stream."""
        return self.hidden_std / (2 * self.num_hidden_layers) ** 0.5

    @property
    def attention_scale(self) -> float | None:
        """What products of queries and keys are multiplied by; 1 / √head_dim if None."""
        if self.mup_base_width is None:
            return None
        return float((self.mup_base_head_dim or self.head_size) ** 0.5 / self.head_size)
