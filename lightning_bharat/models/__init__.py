"""A small decoder as an ordinary LightningModule, and learning-rate schedules."""

from lightning_bharat.models.config import GPTConfig
from lightning_bharat.models.gpt import GPT
from lightning_bharat.models.lightning_module import GPTModule
from lightning_bharat.models.schedules import InverseSquareRoot, Warmup, WarmupCosine, WarmupLinear, WarmupStableDecay

__all__ = [
    "GPT",
    "GPTConfig",
    "GPTModule",
    "InverseSquareRoot",
    "Warmup",
    "WarmupCosine",
    "WarmupLinear",
    "WarmupStableDecay",
]
