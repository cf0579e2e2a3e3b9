"""Random augmentation in loader workers that depends on the sample, and not on what a worker has read before it.

A worker's generators stand where its earlier samples have left them: begun again in the middle of an epoch, or with
another number of workers, it would draw other numbers. Here each sample is read with generators that are seeded for it
(as torchdata and the JAX loaders do it): the same on any number of workers and data ranks.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import xxhash


class SeededSamples(list):
    """Numbers of samples, as a sampler makes a batch of them; each seeds torch's, NumPy's and Python's generators when
    it is taken out to be read."""

    def __init__(self, samples: Iterable[Any], seed: int, epoch: int) -> None:
        super().__init__(samples)
        self._seed, self._epoch = seed, epoch

    def __iter__(self) -> Iterator[Any]:
        for sample in super().__iter__():
            _seed_all(f"{self._seed} {self._epoch} {sample}")
            yield sample

    def __reduce__(self) -> tuple:
        return SeededSamples, (list(super().__iter__()), self._seed, self._epoch)  # the default would take samples out


def _seed_all(words: str) -> None:
    seed = xxhash.xxh3_64_intdigest(words.encode())
    torch.default_generator.manual_seed(seed >> 1)
    np.random.seed(seed % 2**32)
    random.seed(seed)
