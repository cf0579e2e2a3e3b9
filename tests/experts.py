"""Models with experts: the package's own decoder, and unchanged Hugging Face ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bharat.models import GPT, GPTConfig, GPTModule
from tests.modules import Batch, Trained
from tests.plan.models import DECODER, VOCABULARY, Wrapped

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "moe_intermediate_size": 16,
}


def sharpened(model: nn.Module, spread: float = 0.1) -> nn.Module:
    """With larger weights, so that experts and scores differ and their gradients are no rounding."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return model


def own(**options: Any) -> nn.Module:
    return sharpened(GPT(GPTConfig(**{**SIZES, "num_shared_experts": 1, **options})))


def own_sigmoid() -> nn.Module:
    return own(scoring_func="sigmoid", n_group=4, topk_group=2, num_shared_experts=None)


def one_expert() -> nn.Module:
    """All tokens go through expert 5 alone; the ranks of the others have nothing to do."""
    model: Any = own(num_experts_per_tok=1, bias_update_speed=1.0)
    for layer in model.layers:
        layer.mlp.gate.bias_steps[5] = 100
    return model


def qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "head_dim": 16}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
    return sharpened(Wrapped(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, **DECODER))))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return sharpened(
        Wrapped(MixtralForCausalLM(MixtralConfig(hidden_size=32, intermediate_size=16, **experts, **DECODER)))
    )


MIXTURES: dict[str, Callable[[], nn.Module]] = {
    "own": own,
    "sigmoid, groups": own_sigmoid,
    "one expert": one_expert,
    "two experts": partial(own, num_experts=2, num_experts_per_tok=1),
    "deep": partial(own, num_hidden_layers=4),
    "expert choice": partial(own, router_choice="expert"),
    "qwen3 moe": lambda: _loops(qwen3_moe),
    "mixtral": lambda: _loops(mixtral),
    "deepseek v3": lambda: _loops(deepseek_v3),
}


def deepseek_v3() -> nn.Module:
    """Sigmoid scores in groups, a shared expert, latent attention; its first block is dense."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2}
    of_all = {**DECODER, "num_key_value_heads": 4}
    return sharpened(Wrapped(DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **latent, **experts, **of_all))))


def _loops(make: Callable[[], nn.Module]) -> nn.Module:
    """Hugging Face's own grouped product knows no float64."""
    model: Any = make()
    model.model.set_experts_implementation("eager")
    return model


class TrainedMixture(Trained):
    """One of :data:`MIXTURES`."""

    def __init__(self, name: str) -> None:
        super().__init__("stack")
        self.model = MIXTURES[name]()


class TrainedGPT(GPTModule):
    """The package's own module, that keeps what a run can be compared by."""

    def __init__(self, lazy: bool = False, **options: Any) -> None:
        super().__init__(GPTConfig(**{**SIZES, **options}), lazy=lazy)
        sharpened(self)  # nothing yet, if it is lazy
        self.optimizer: dict[str, Any] = {}
        self.seen: list[tuple[float, float]] = []
        self.norm, self.gradients = 0.0, dict[str, Tensor]()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step({"input_ids": batch["ids"], "labels": batch["labels"]}, batch_idx)
        self.log("loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        super().validation_step({"input_ids": batch["ids"], "labels": batch["labels"]}, batch_idx)

    on_before_optimizer_step = Trained.on_before_optimizer_step
    configure_optimizers = Trained.configure_optimizers

    def on_train_batch_end(self, *_: Any) -> None:
        super().on_train_batch_end(*_)
        self.seen.append((float(self.trainer.callback_metrics["loss"]), self.norm))

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        """The losses of each rank's own tokens too are compared as means over ranks."""
        super().log(name, *args, **{**kwargs, "sync_dist": True})


def held(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of what this rank holds of experts' weights."""
    named = ((name, p) for name, p in module.named_parameters() if ".experts." in name)
    return {name: tuple(getattr(p, "to_local", lambda p=p: p)().shape) for name, p in named}
