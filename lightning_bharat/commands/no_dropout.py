"""Dropout switched off, as a module or as a function, without switching the module out of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_DROPOUTS = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
    torch.dropout_,
    torch.alpha_dropout,
    torch.alpha_dropout_,
    torch.feature_dropout,
    torch.feature_dropout_,
    torch.feature_alpha_dropout,
    torch.feature_alpha_dropout_,
}
_DROPPING = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_PLACE_IN_ATTENTION = 4  # scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, ...)


class NoDropout(TorchFunctionMode):
    """Inside it, functional dropout returns its input and attention drops nothing.

    Attributes:
        met: whether there was any to switch off.
    """

    met = False

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            self.met |= self._drops(args, kwargs)
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            positional = len(args) > _PLACE_IN_ATTENTION
            self.met |= bool(args[_PLACE_IN_ATTENTION] if positional else kwargs.get("dropout_p"))
            if positional:
                args = (*args[:_PLACE_IN_ATTENTION], 0.0, *args[_PLACE_IN_ATTENTION + 1 :])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)

    def switch_off(self, module: nn.Module) -> None:
        """Set the rates of torch's own modules to 0, for those that hand them to other functions than the above."""
        for part in module.modules():
            rate = "p" if isinstance(part, _DROPPING) else "dropout"
            if isinstance(part, (*_DROPPING, nn.MultiheadAttention, nn.RNNBase)):
                self.met |= bool(getattr(part, rate))
                setattr(part, rate, 0.0)

    @staticmethod
    def _drops(args: tuple, kwargs: dict) -> bool:
        rate = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
        return bool(rate) and bool(training)
