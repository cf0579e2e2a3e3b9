"""Attention of a block whose context rank holds a part of the sequence: it still sees all of it.

Where the heads divide, ranks exchange parts of the sequence for heads, attend over the whole sequence with their heads,
and exchange back (DeepSpeed-Ulysses, Jacobs et al., 2023, https://arxiv.org/abs/2309.14509). Elsewhere each gathers all
keys and values for its own queries, as in Llama 3 (https://arxiv.org/abs/2407.21783, section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_bharat.plan.blocks import PlanError
from lightning_bharat.plan.exchange import Peers, exchange, gather

HEADS, TIME = -3, -2  # queries, keys and values are (batch, heads, time, channels)


class ContextError(PlanError):
    """A sequence that can't be divided over context ranks as asked; the message says what to write."""


class WholeAttention(TorchFunctionMode):
    """In here ``scaled_dot_product_attention`` of parts of a sequence is that of the whole.

    Args:
        peers: the context ranks.
        time: positions of the whole sequence.
    """

    def __init__(self, peers: Peers, time: int) -> None:
        super().__init__()
        self.peers, self.time = peers, time

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """``query`` (batch, heads, part of the time, channels); ``key`` and ``value`` alike, with fewer heads perhaps;
        ``attn_mask`` broadcasts to (batch, heads, time, time) of the whole sequence, or is a part of it."""
        part = self.time // self.peers.size
        attend: Callable = partial(F.scaled_dot_product_attention, dropout_p=dropout_p, scale=scale)
        if query.shape[TIME] != part or key.shape[TIME] != part:  # not along the sequence
            return attend(query, key, value, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)
        mask = None if attn_mask is None else self._whole(attn_mask, part)
        if by_heads(query, self.peers.size):
            query, key, value = self._to_heads(query, key, value)
            mask = self._of_heads(mask, query)
            out = attend(query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=enable_gqa)
            return exchange([out], self.peers, TIME, HEADS)[0]
        key, value = gather(key, self.peers, TIME), gather(value, self.peers, TIME)
        mask = self._causal(query, part) if is_causal else self._of_queries(mask, part)
        return attend(query, key, value, attn_mask=mask, enable_gqa=enable_gqa)

    def _to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """All of the sequence, for this rank's heads; key-value heads that do not divide are repeated first."""
        if key.shape[HEADS] % self.peers.size:
            times = query.shape[HEADS] // key.shape[HEADS]
            key, value = (x.repeat_interleave(times, HEADS) for x in (key, value))
        return exchange([query, key, value], self.peers, HEADS, TIME)

    def _whole(self, mask: Tensor, part: int) -> Tensor:
        """A mask of which this rank may hold the columns or the rows of its part."""
        rows, columns = mask.shape[-2:] if mask.ndim > 1 else (1, mask.shape[-1])
        if rows == columns == part:
            raise ContextError(
                f"attention gets a mask of {rows} × {columns} positions, made in the block for the part of the "
                f"sequence of {self.time} that a context rank holds. Make it before the blocks and pass it to each, "
                "or write is_causal=True"
            )
        if columns == part:
            mask = self._joined(mask, -1)
        return self._joined(mask, -2) if rows == part else mask

    def _joined(self, mask: Tensor, dim: int) -> Tensor:
        if mask.dtype == torch.bool:
            return self.peers.all_gather(mask.to(torch.uint8), dim).bool()
        return gather(mask, self.peers, dim)

    def _of_heads(self, mask: Tensor | None, query: Tensor) -> Tensor | None:
        heads = query.shape[HEADS]
        if mask is None or mask.ndim < 3 or mask.shape[HEADS] != heads * self.peers.size:
            return mask
        return mask.narrow(HEADS, self.peers.rank * heads, heads)

    def _of_queries(self, mask: Tensor | None, part: int) -> Tensor | None:
        if mask is None or mask.ndim < 2 or mask.shape[-2] != self.time:
            return mask
        return mask.narrow(-2, self.peers.rank * part, part)

    def _causal(self, query: Tensor, part: int) -> Tensor:
        every = torch.ones(part, self.time, dtype=torch.bool, device=query.device)
        return every.tril(self.peers.rank * part)


def by_heads(query: Tensor, ranks: int) -> bool:
    """Whether ranks exchange heads; else they gather keys and values."""
    return query.ndim > 3 and query.shape[HEADS] % ranks == 0
