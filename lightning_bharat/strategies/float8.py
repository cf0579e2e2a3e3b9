"""Products of blocks in float8, by torchao: an ordinary Lightning precision plugin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_bharat.plan.blocks import find_units
from lightning_bharat.plan.layout import Layout, LayoutError

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
_SMALLEST = (8, 9)  # compute capability: Ada and Hopper


class Float8Precision(MixedPrecision):
    """``Trainer(plugins=[Float8Precision()])``: as ``precision="bf16-mixed"``, but ``nn.Linear`` in repeated blocks
    multiplies in float8 with dynamic scales (torchao, https://arxiv.org/abs/2507.16099). Weights, gradients,
    optimizer states and checkpoints are those of bf16-mixed.

    It changes linears whose sizes are multiples of 16, as the kernels ask. Embeddings, norms and the head stay.

    Args:
        recipe: "tensorwise" (fastest), "rowwise", or "rowwise_with_gw_hp" (most accurate), of torchao.
        emulate: round as float8 does and compute in a wider type, on any device, slower: to try out what it does.

    Raises:
        ValueError: another recipe.
        ModuleNotFoundError: torchao is missing.
        MisconfigurationException: the device has no float8 products; a module has no linear to change.
    """

    def __init__(self, recipe: str = "tensorwise", emulate: bool = False) -> None:
        if recipe not in RECIPES:
            raise ValueError(f"recipe={recipe!r}: write one of {', '.join(RECIPES)}")
        if not emulate:
            _refuse_device()
        super().__init__("bf16-mixed", "cuda" if torch.cuda.is_available() else "cpu")
        self.config = _config(recipe, emulate)

    def convert_module(self, module: nn.Module) -> nn.Module:
        from torchao.float8 import convert_to_float8_training
        from torchao.float8.float8_linear import Float8Linear

        if any(isinstance(part, Float8Linear) for part in module.modules()):  # by an earlier run
            return module

        def fits(part: nn.Module, _: str) -> bool:
            return isinstance(part, nn.Linear) and part.in_features % 16 == 0 and part.out_features % 16 == 0

        blocks = [module.get_submodule(name) for name in find_units(module)]
        if not any(fits(part, "") for block in blocks for part in block.modules()):
            raise MisconfigurationException(
                f"Float8Precision: {type(module).__name__} has no nn.Linear in repeated blocks whose sizes are "
                'multiples of 16; write Trainer(precision="bf16-mixed") instead'
            )
        for block in blocks:
            convert_to_float8_training(block, config=self.config, module_filter_fn=fits)
        return module


def refuse_float8_cuts(plugin: Precision, layout: Layout) -> None:
    """Raise where a cut is proven in float64, which a product in float8 never equals.

    Raises:
        LayoutError: names the size and what to write.
    """
    sizes = {"tensor_parallel_size": layout.tensor, "context_parallel_size": layout.context}
    for name, size in sizes.items():
        if size > 1 and isinstance(plugin, Float8Precision):
            raise LayoutError(
                f"Float8Precision with {name}={size}: scales of divided products are others than of whole ones, so the "
                f'cut can\'t be proven; write {name}=1 or Trainer(precision="bf16-mixed")'
            )


def _refuse_device() -> None:
    found = "no CUDA device is here"
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability >= _SMALLEST:
            return
        found = f"{torch.cuda.get_device_name()} has compute capability {'.'.join(map(str, capability))}"
    raise MisconfigurationException(
        f"Float8Precision: {found}, and products in float8 need 8.9 or more (Ada, Hopper, Blackwell); write "
        'Trainer(precision="bf16-mixed") instead, or Float8Precision(emulate=True) to try out what it does to training'
    )


def _config(recipe: str, emulate: bool) -> Any:
    try:
        from torchao.float8 import Float8LinearConfig
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Float8Precision needs torchao: pip install 'lightning-bharat[fp8]'", name=error.name
        ) from error
    return replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
