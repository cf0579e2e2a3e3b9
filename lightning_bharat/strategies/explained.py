"""The choices that are an argument's own value, in words: what a run does by it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_bharat.plan.layout import Layout
    from lightning_bharat.strategies.options import Options

_PRECISION = {
    "32-true": "everything in float32",
    "64-true": "everything in float64",
    "bf16-true": "everything in bfloat16, optimizer states too",
    "16-true": "everything in float16, optimizer states too",
    "bf16-mixed": "autocast computes in bfloat16; weights and gradients stay float32",
    "16-mixed": "autocast computes in float16; weights and gradients stay float32; losses are scaled",
}


def explained(options: Options, layout: Layout, precision: str) -> Iterator[tuple[str, str]]:
    """Names of choices and what they mean here, for a module that the strategy has cut."""
    yield "precision", f"{precision}: {_PRECISION.get(precision, 'by its plugin')}"
    if layout.data > 1:
        yield "reshard_after_forward", _reshard(options.reshard_after_forward, layout)
    if options.reduce_dtype is not None:
        averaged = f"data ranks average gradients in {options.reduce_dtype}, and keep them in their own type"
        yield "reduce_dtype", averaged if layout.data > 1 else "not used: there is one data rank"
    if options.gradient_compression is not None:
        yield (
            "gradient_compression",
            f"{layout.replicate} copies average gradients in int8, and make up for rounding",
        )
    weighted = "each label weighs the same, over data ranks and accumulated batches"
    yield "token_weighted", weighted if options.token_weighted else "not used: the mean of each batch's own mean"
    if options.activation_checkpointing is None:
        yield "activation_checkpointing", "not used: activations are kept for the backward pass"
    if options.offload:
        yield "offload", "weights, gradients and optimizer states in the host's memory"


def _reshard(asked: bool | int | None, layout: Layout) -> str:
    if layout.pipeline > 1:
        return "no: the weights of all blocks stay whole between the micro-batches of a pipeline"
    if asked is False:
        return "no, as asked: all weights are gathered from when a step begins, and stay for the backward pass"
    if asked is None or asked is True:
        return "yes: a block's weights are gathered for its forward, freed, and gathered again for its backward"
    return f"over {asked} ranks: between its forward and its backward a block is divided over these alone"
