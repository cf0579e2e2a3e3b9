"""The same start on all ranks: weights that were drawn differently become rank 0's."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def agree_on_weights(module: nn.Module, device: torch.device, given: Collection[str] = ()) -> str:
    """Compare the bits of all ranks' parameters and buffers; where they differ, take rank 0's.

    Args:
        module: not cut yet; what is on ``meta`` has no values to compare.
        device: where a collective wants tensors.
        given: names of what gets other values later.

    Returns:
        What was found, in words, the same on all ranks.
    """
    tensors = list(_tensors(module, given))
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, _digest(tensors))
    if len(set(digests)) == 1:
        return "equal on all ranks"
    if len({digest.split(":")[0] for digest in digests}) > 1:
        raise ValueError(
            "the module has other parameters on some ranks than on rank 0; build the same model on every rank"
        )
    for tensor in tensors:
        moved = tensor.detach().to(device).contiguous()
        dist.broadcast(moved, 0)
        with torch.no_grad():
            tensor.copy_(moved)
    rank_zero_info(
        "The module's weights differ between ranks, and rank 0's are taken for all. "
        "Call seed_everything(...) before you build it to choose them."
    )
    return "differed between ranks; rank 0's are taken"


def _tensors(module: nn.Module, given: Collection[str]) -> Iterator[Tensor]:
    every = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    done = {id(tensor) for name, tensor in every if name in given}
    for _, tensor in every:
        if not (tensor.is_meta or isinstance(tensor, DTensor) or id(tensor) in done):
            done.add(id(tensor))
            yield tensor


def _digest(tensors: list[Tensor]) -> str:
    shapes, bits = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        shapes.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        bits.update(memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b"")  # type: ignore[arg-type]
    return f"{shapes.hexdigest()}:{bits.hexdigest()}"
