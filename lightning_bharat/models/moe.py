"""Mixture of experts: each token goes through a few of many feed-forwards (Shazeer et al., 2017,
https://arxiv.org/abs/1701.06538), which a router chooses for it.

Where tokens choose, none is ever dropped: experts take as many as come. Names are Hugging Face's, so weights of a
Mixtral load as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bharat.models.config import SCORES, GPTConfig


class MixtureOfExperts(nn.Module):
    """A feed-forward of many, (..., hidden) to the same shape.

    Args:
        config: sizes.
        shared: what every token goes through as well (DeepSeekMoE, https://arxiv.org/abs/2401.06066).
    """

    def __init__(self, config: GPTConfig, shared: nn.Module | None) -> None:
        super().__init__()
        self.gate: Gate = ExpertChoice(config) if config.router_choice == "expert" else Router(config)
        self.experts = Experts(config)
        self.shared_experts = shared

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        if not isinstance(self.gate, ExpertChoice):
            return self.experts(tokens, *self.gate(tokens), self._shared(x)).view_as(x)
        taken, by, weights = self.gate(x)
        each = self.experts(tokens[taken], by[:, None], weights[:, None])
        out = torch.zeros_like(tokens).index_add(0, taken, each)
        shared = self._shared(x)
        return (out if shared is None else out + shared()).view_as(x)

    def _shared(self, x: Tensor) -> Callable[[], Tensor] | None:
        shared = self.shared_experts
        return None if shared is None else lambda: shared(x).flatten(0, -2)


@dataclass
class Routed:
    """What a router did in one forward.

    Attributes:
        load: (experts,), choices of each expert, whole numbers.
        share: (experts,), the mean over tokens of each expert's share in a token's scores; has a gradient.
    """

    load: Tensor
    share: Tensor


class Gate(nn.Module):
    """Scores all experts for each token, in float32 at least, as Switch Transformers do
    (https://arxiv.org/abs/2101.03961, section 2.4).

    A bias of each expert may have a say in what is chosen, though not in its weight: see :meth:`balance`.

    Attributes:
        bias_steps: (experts,) int64. The bias is ``bias_update_speed`` times it, exact in any precision.
        routed: of the last forward in training, where a loss may need it.
        seen: (experts + 3,) float64, since the last call of :meth:`take`: choices of each expert, the sum of the
            entropies of all tokens' scores in nats, the number of tokens, and that of tokens without an expert.
            ``None`` if there were none.
    """

    bias_steps: Tensor
    routed: Routed | None = None
    seen: Tensor | None = None

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.num_experts is not None
        self.num_experts, self.top_k = config.num_experts, config.num_experts_per_tok
        self.std, self.scoring = config.initializer_range / config.width_ratio, config.scoring_func
        self.scale, self.keeps = config.routed_scaling_factor, config.router_aux_loss_coef is not None
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        self.speed = config.bias_update_speed
        if self.speed is not None:
            self.register_buffer("bias_steps", torch.zeros(self.num_experts, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.speed is not None:
            self.bias_steps.zero_()

    def scores(self, x: Tensor) -> Tensor:
        """Of all experts for tokens (..., hidden): (..., experts)."""
        exact = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return SCORES[self.scoring](F.linear(x.to(exact), self.weight.to(exact)))

    def write_down(self, scores: Tensor, chosen: Tensor, missed: Tensor) -> None:
        """What :attr:`routed` and :attr:`seen` say of one forward: the ``scores`` of its tokens (n, experts), all
        experts that were ``chosen``, and how many tokens were ``missed``."""
        shares = scores / scores.sum(-1, keepdim=True)
        load = count(chosen, self.num_experts)
        if self.keeps:
            self.routed = Routed(load, shares.mean(0))
        with torch.no_grad():
            entropy = torch.special.entr(shares).sum().double()
            numbers = torch.stack((entropy, torch.full_like(entropy, len(scores)), missed.double()))
            seen = torch.cat((load.double(), numbers))
            self.seen = seen if self.seen is None else self.seen + seen

    def take(self) -> Tensor | None:
        """:attr:`seen`, which then begins anew."""
        seen, self.seen = self.seen, None
        return seen

    def balance(self, load: Tensor) -> None:
        """Make experts with less than the mean ``load`` a little likelier, those with more less likely: by one step
        each, of ``bias_update_speed`` (Wang et al., 2024, https://arxiv.org/abs/2408.15664)."""
        if self.speed is not None:
            self.bias_steps += (load.mean() - load).sign().to(self.bias_steps)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has seen nothing; what has a gradient can't be copied."""
        return {name: value for name, value in vars(self).items() if name not in ("routed", "seen")}


class Router(Gate):
    """Chooses ``num_experts_per_tok`` experts for each token, by its scores of them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.groups, self.kept_groups = config.n_group, config.topk_group
        self.normalized = config.norm_topk_prob

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts of tokens (n, hidden), and their weights, each (n, chosen)."""
        scores = self.scores(x)
        chosen = self.choose(scores)
        weights = scores.gather(-1, chosen)
        if self.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.training:
            self.write_down(scores, chosen, missed=chosen.new_zeros(()))
        return chosen, (weights * self.scale).to(x.dtype)

    @torch.no_grad()
    def choose(self, scores: Tensor) -> Tensor:
        """The experts of tokens with these ``scores`` (n, experts), the best first: (n, chosen) int64.

        With groups an expert can only be chosen in the token's ``topk_group`` best groups, which are those with the
        largest sum of their two best scores (DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 2.1.2).
        """
        if self.speed is not None:
            scores = scores + self.speed * self.bias_steps
        if self.groups > 1:
            grouped = scores.unflatten(-1, (self.groups, -1))
            best = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1).topk(self.kept_groups, -1).indices
            out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
            scores = grouped.masked_fill(out[..., None], -torch.inf).flatten(-2)
        return scores.topk(self.top_k, -1).indices


class ExpertChoice(Gate):
    """Each expert chooses tokens, as many as all others, by their scores (Zhou et al., 2022,
    https://arxiv.org/abs/2202.09368).

    It chooses among the tokens of one sequence, so a sequence's result does not depend on what else is in the batch. It
    does depend on later tokens: nothing can be generated token by token.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From sequences (batch, time, hidden) the tokens that experts take, each (taken,): their places in batch ·
        time, who takes them, and by what weight."""
        scores = self.scores(x)
        time = x.shape[1]
        number = min(time, max(1, time * self.top_k // self.num_experts))
        weights, places = scores.topk(number, 1)  # (batch, number, experts)
        places = places + time * torch.arange(len(x), device=x.device)[:, None, None]
        by = torch.arange(self.num_experts, device=x.device).expand_as(places)
        if self.training:
            missed = (count(places, scores[..., 0].numel()) == 0).sum()
            self.write_down(scores.flatten(0, 1), by, missed)
        return places.flatten(), by.flatten(), (weights.flatten() * self.scale).to(x.dtype)


class Experts(nn.Module):
    """SwiGLU feed-forwards, their weights side by side: (experts, 2 · inner, hidden) and (experts, hidden, inner)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.num_experts is not None
        self.num_experts = config.num_experts
        self.std, self.down_std = config.hidden_std, config.residual_std
        width, inner = config.hidden_size, config.expert_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, width, inner))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gate_up_proj, std=self.std)
        nn.init.normal_(self.down_proj, std=self.down_std)

    def forward(
        self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, plus: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """The sum over a token's experts of their outputs times their weights.

        Args:
            hidden: tokens, (n, hidden).
            top_k_index: the experts of each, (n, chosen).
            top_k_weights: (n, chosen).
            plus: makes what is added, (n, hidden): where experts are spread over ranks, while tokens travel.
        """
        order = top_k_index.flatten().argsort(stable=True)
        load = count(top_k_index, self.num_experts)
        out = self._sorted(hidden[order // top_k_index.shape[1]], load)
        of_tokens = out[order.argsort()].unflatten(0, top_k_index.shape)
        out = (of_tokens * top_k_weights[..., None]).sum(1).type_as(hidden)
        return out if plus is None else out + plus()

    def _sorted(self, x: Tensor, load: Tensor) -> Tensor:
        """Rows in the order of their experts, the first ``load[0]`` of which are the first one's, and so on."""
        up: Tensor = self.gate_up_proj
        down: Tensor = self.down_proj
        if torch.is_autocast_enabled(x.device.type):
            x, up, down = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, up, down))
        if not has_kernel(x, up, down):
            rows = Tensor.tolist(load)  # in a dry run, a fake tensor's own would ask for each number
            bounds = pairwise((0, *accumulate(rows)))
            each = zip(bounds, up.unbind(), down.unbind(), strict=True)
            return torch.cat([F.linear(_swiglu(F.linear(x[a:b], u)), d) for (a, b), u, d in each])
        ends = load.cumsum(0).int()
        inner = _swiglu(F.grouped_mm(x, up.mT, offs=ends))
        return F.grouped_mm(inner, down.mT, offs=ends)


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def has_kernel(*tensors: Tensor) -> bool:
    """Whether one call multiplies all experts' rows: in half precision, with rows of a multiple of 16 bytes, on the CPU
    or an Ampere GPU and later. Else each expert has a product of its own."""
    device = tensors[0].device
    there = device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0))
    return there and all(t.dtype in (torch.bfloat16, torch.float16) and t.shape[-1] % 8 == 0 for t in tensors)


def count(chosen: Tensor, number: int) -> Tensor:
    """How often each of ``number`` is in ``chosen``: (number,) int64. (``bincount`` has no shape on fake tensors.)"""
    flat = chosen.flatten()
    return flat.new_zeros(number).index_add(0, flat, torch.ones_like(flat))


def balance_loss(routed: Iterable[Routed], mean_over_ranks: Callable[[Tensor], Tensor]) -> Tensor:
    """How unevenly tokens are spread: experts · Σ load · share, the mean over layers; 1 if all experts are alike, and
    as many as experts if one has everything (Switch Transformers, https://arxiv.org/abs/2101.03961, section 2.2).

    Args:
        routed: of each layer.
        mean_over_ranks: loads are those of all data ranks together: then the mean of this loss over ranks is the loss
            of their batches as one, and an expert may be busy on one rank and idle on another (Qiu et al., 2025,
            https://arxiv.org/abs/2501.11873).
    """
    every = list(routed)
    load = mean_over_ranks(torch.stack([r.load for r in every]).double())
    share = torch.stack([r.share for r in every])
    load = (load / load.sum(-1, keepdim=True)).to(share)
    return share.shape[-1] * (load * share).sum(-1).mean()


@dataclass(frozen=True)
class Spread:
    """How tokens were spread over the experts of all layers, from what their routers saw.

    Attributes:
        imbalance: the busiest expert's load over the mean, in the worst layer; 1 is even.
        dropped: the share of tokens without an expert.
        entropy: of a token's scores over experts, in nats, the mean over tokens and layers; ln(experts) is no
            preference.
    """

    imbalance: Tensor
    dropped: Tensor
    entropy: Tensor

    @classmethod
    def of(cls, seen: Tensor) -> Spread:
        """From :attr:`Router.seen` of each layer, (layers, experts + 3)."""
        load, (entropy, tokens, missed) = seen[:, :-3], seen[:, -3:].sum(0)
        return cls(imbalance=(load.amax(-1) / load.mean(-1)).amax(), dropped=missed / tokens, entropy=entropy / tokens)
