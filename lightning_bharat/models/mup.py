"""One learning rate for models of all widths: the maximal update parametrization (muP; Yang et al., 2022, Tensor
Programs V, https://arxiv.org/abs/2203.03466).

Of a model m times as wide as the one that was tuned, with AdamW (their table 8):

- weights that multiply something as wide as the model start with a standard deviation √m times smaller, and have a
  learning rate m times smaller, and a weight decay m times larger, as AdamW multiplies it by the rate;
- a router's, whose output does not grow, start m times smaller;
- logits are divided by m; the head's own weights start and learn as those of the narrow one;
- queries and keys that have learned of each other agree in all channels, so products are divided by ``head_dim``, not
  by its root, if that is what grows;
- embeddings and norms stay as they are.

The ratio is that of ``hidden_size``: what is inside feed-forwards, experts and heads together is to grow with it. How
many blocks, steps and sequences there are is not part of it. :func:`coordinate_check` shows whether it holds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_bharat.checkpoints import CheckpointError
from lightning_bharat.models.config import GPTConfig

if TYPE_CHECKING:
    from lightning_bharat.models.lightning_module import GPTModule

HEAD = "lm_head.weight"


def decayed_groups(
    parameters: Mapping[str, nn.Parameter], config: GPTConfig, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The optimizer's groups of matrices: one, and under muP one of those that grow in both directions and the head."""
    if config.mup_base_width is None:
        return [{"params": list(parameters.values()), "weight_decay": weight_decay}]
    hidden = [p for name, p in parameters.items() if not name.endswith(HEAD)]
    head = [p for name, p in parameters.items() if name.endswith(HEAD)]
    ratio = config.width_ratio
    return [
        {"params": hidden, "lr": learning_rate / ratio, "weight_decay": weight_decay * ratio},
        {"params": head, "weight_decay": weight_decay},
    ]


def refuse_other_scales(config: GPTConfig, hyper_parameters: Any) -> None:
    """Weights of another parametrization have the same shapes and would load, but compute something else.

    Args:
        config: of the model that is to have them.
        hyper_parameters: of the checkpoint that they are in; nothing is known of another module's.

    Raises:
        CheckpointError: logits or attention were scaled otherwise.
    """
    found = hyper_parameters.get("config") if isinstance(hyper_parameters, Mapping) else None
    if not isinstance(found, Mapping) or found.get("hidden_size") != config.hidden_size:
        return  # shapes differ too, and are named
    before = GPTConfig(**found)
    if _scales(before) != _scales(config):
        names = ("mup_base_width", "mup_base_head_dim")
        was, now = (", ".join(f"{name}={getattr(c, name)}" for name in names) for c in (before, config))
        raise CheckpointError(f"The checkpoint was trained with {was}, and this model has {now}; write the same")


def _scales(config: GPTConfig) -> tuple[float, float]:
    return config.width_ratio, config.attention_scale or config.head_size**-0.5


def coordinate_check(
    module_of: Callable[[int], GPTModule],
    widths: Sequence[int],
    batch: Mapping[str, Tensor],
    steps: int = 4,
    seeds: int = 3,
) -> dict[str, float]:
    """How what training changes in a model grows with its width (section D.1 of the paper).

    Each model takes ``steps`` optimizer steps on one batch. Then the root mean square of the change of each block's
    output and of the logits is compared over widths.

    Args:
        module_of: a module of a width.
        widths: at least two, the widest several times the narrowest.
        batch: ``input_ids`` and ``labels``.
        steps: of the module's optimizer, without its schedule.
        seeds: models of each width, of which the mean is taken.

    Returns:
        By name, the exponent of the width that the change grows with: about 0 under muP, where it is of one size at
        all widths. Without, one is well above 0 and the learning rate that suits one width is too high for the next.

    Raises:
        ValueError: there are fewer than two widths.
    """
    if len(set(widths)) < 2:
        raise ValueError(f"widths={list(widths)!r}: growth needs two different ones at least, such as [64, 128, 256]")
    changes = [_mean([_changes(module_of, width, seed, batch, steps) for seed in range(seeds)]) for width in widths]
    logs = [math.log2(width) for width in widths]
    return {name: _slope(logs, [math.log2(change[name]) for change in changes]) for name in changes[0]}


def _changes(
    module_of: Callable[[int], GPTModule], width: int, seed: int, batch: Mapping[str, Tensor], steps: int
) -> dict[str, float]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = module_of(width)
    before = copy.deepcopy(module)
    made = module.configure_optimizers()
    optimizer = made["optimizer"] if isinstance(made, dict) else made
    for group in optimizer.param_groups:
        group["lr"] = group.get("initial_lr", group["lr"])  # a schedule has begun with a warm-up
    for _ in range(steps):
        optimizer.zero_grad()
        module._loss(dict(batch)).backward()
        optimizer.step()
    new, old = _outputs(module, batch), _outputs(before, batch)
    return {name: float((new[name] - old[name]).square().mean().sqrt()) for name in new}


@torch.no_grad()
def _outputs(module: GPTModule, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, __, output: found.update({name: output})

    named = {"embeddings": module.model.embed_tokens, "logits": module.model.lm_head}
    named |= {f"layers.{i}": layer for i, layer in enumerate(module.model.layers)}
    hooks = [part.register_forward_hook(keep(name)) for name, part in named.items()]
    module(batch["input_ids"])
    for hook in hooks:
        hook.remove()
    return found


def _mean(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(one[name] for one in each) / len(each) for name in each[0]}


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the line of least squares."""
    middle = sum(x) / len(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)
