"""An ordinary LightningModule, unchanged, on any number of devices.

Importing it registers ``strategy="bharat_hybrid"``.
"""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_bharat.plan.layout import Layout
from lightning_bharat.plan.model_plan import Cut, ModelPlan
from lightning_bharat.strategies.hybrid import HybridStrategy

__version__ = "0.1.0"
__all__ = ["Cut", "HybridStrategy", "Layout", "ModelPlan"]

if "bharat_hybrid" not in StrategyRegistry:
    StrategyRegistry.register(
        "bharat_hybrid", HybridStrategy, description="An unchanged module, cut over data and tensor ranks"
    )
