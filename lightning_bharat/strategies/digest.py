"""A 64-bit digest of a tensor's bits, computed where the tensor is: no copy to the host, no wait for the device."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

CHUNK = 2**20  # words that are looked at together
_STEP = 0x9E3779B97F4A7C15 - 2**64  # 2⁶⁴ divided by the golden ratio: multiples of it look unlike each other
_BASE = 0x2545F4914F6CDD1D
_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def digest(tensor: Tensor) -> Tensor:
    """An int64 without dimensions, equal for equal bits. All devices give the same.

    Each word's bits times an odd number of its place, summed modulo 2⁶⁴, parts of the tensor by Horner's rule
    (multilinear hashing: Carter and Wegman, 1979; Lemire and Kaser, arXiv:1202.4961). A change of one element always
    changes it, since odd numbers have an inverse modulo 2⁶⁴; changes of several cancel by chance alone.

    Args:
        tensor: of any type and shape; of a tensor that is spread over ranks what this rank holds.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for words in _words(flat).split(CHUNK):
        total = total * _BASE + (words.to(torch.int64) * _odd_numbers(flat.device)[: len(words)]).sum()
    return total


def _words(flat: Tensor) -> Tensor:
    """The bits of ``flat`` as whole numbers: of eight bytes where its length allows it, else of an element's."""
    if flat.nbytes % 8:
        return flat.view(_WORD[flat.itemsize])
    aligned = flat.storage_offset() * flat.itemsize % 8 == 0
    return (flat if aligned else flat.clone()).view(torch.int64)


@cache
def _odd_numbers(device: torch.device) -> Tensor:
    return torch.arange(1, CHUNK + 1, device=device) * _STEP | 1
