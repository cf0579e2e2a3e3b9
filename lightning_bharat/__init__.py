"""An ordinary LightningModule, unchanged, on any number of devices.

Importing it registers ``strategy="bharat_hybrid"``, ``"bharat_deepspeed"`` and ``"bharat_torchft"``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_bharat.plan.layout import Layout
    from lightning_bharat.plan.model_plan import Cut, ModelPlan
    from lightning_bharat.strategies.deepspeed import DeepSpeedStrategy
    from lightning_bharat.strategies.float8 import Float8Precision
    from lightning_bharat.strategies.hybrid import HybridStrategy
    from lightning_bharat.strategies.torchft import TorchFTStrategy

__version__ = "0.1.0"
__all__ = ["Cut", "DeepSpeedStrategy", "Float8Precision", "HybridStrategy", "Layout", "ModelPlan", "TorchFTStrategy"]

_HOMES = {
    "Cut": "plan.model_plan",
    "DeepSpeedStrategy": "strategies.deepspeed",
    "Float8Precision": "strategies.float8",
    "HybridStrategy": "strategies.hybrid",
    "Layout": "plan.layout",
    "ModelPlan": "plan.model_plan",
    "TorchFTStrategy": "strategies.torchft",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def register() -> None:
    """Make the names of our strategies known to Lightning, if they are not yet."""
    from lightning.pytorch.strategies import StrategyRegistry

    from lightning_bharat.strategies.deepspeed import DeepSpeedStrategy
    from lightning_bharat.strategies.hybrid import HybridStrategy
    from lightning_bharat.strategies.torchft import TorchFTStrategy

    if "bharat_hybrid" not in StrategyRegistry:
        description = "An unchanged module, cut over data and tensor ranks"
        StrategyRegistry.register("bharat_hybrid", HybridStrategy, description=description)
        description = "DeepSpeed's ZeRO on every accelerator"
        StrategyRegistry.register("bharat_deepspeed", DeepSpeedStrategy, description=description)
        description = "Copies of a module, of which any may die at any step"
        StrategyRegistry.register("bharat_torchft", TorchFTStrategy, description=description)


# The command shows its help at once, without importing torch: it registers when it runs something.
if not {Path(word).name for word in sys.argv[:1]} & {"bharat", "bharat.exe"}:
    register()
