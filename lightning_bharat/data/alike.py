"""Whether a loader gives the same batches with any number of workers: tried out in a worker, beside the run."""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Callable
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, Dataset, IterableDataset

RANDOM = "reading it draws random numbers, which would be others with another number of workers"


def why_workers_matter(loader: DataLoader) -> str:
    """Why other workers could give other batches, in words; "" where three samples say that they don't.

    A worker of its own reads these twice from the same random state. So neither the run's random numbers nor what the
    dataset remembers of its reads is touched.
    """
    if isinstance(loader.dataset, IterableDataset):
        return "the order of an IterableDataset depends on its workers"
    if not getattr(loader, "in_order", True):
        return "with in_order=False the order of batches depends on the workers"
    last = len(loader.dataset) - 1  # type: ignore[arg-type]
    collate = loader.collate_fn if loader.batch_sampler is not None else None
    tried = DataLoader(
        _ReadTwice(loader.dataset, sorted({0, last // 2, last}), collate),
        batch_size=None,
        num_workers=1,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator(),
    )
    try:
        return next(iter(tried))
    except Exception as error:
        return f"three of its samples could not be read in a worker ({type(error).__name__}: {str(error)[-200:]})"


class _ReadTwice(Dataset[str]):
    """Its one item says whether the dataset's samples are the same when they are read again."""

    def __init__(self, dataset: Any, samples: list[int], collate: Callable[[Any], Any] | None) -> None:
        self._dataset, self._samples, self._collate = dataset, samples, collate

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> str:
        if held := _handle(self._dataset):
            return f"it holds {held}, which workers would share"
        states = _random_states()
        first = self._read()
        if not _equal(states, _random_states()):
            return RANDOM
        return "" if _equal(first, self._read()) else "a sample is another one when it is read again"

    def _read(self) -> Any:
        if self._collate is None:
            return [self._dataset[sample] for sample in self._samples]
        if hasattr(self._dataset, "__getitems__"):
            return self._collate(self._dataset.__getitems__(self._samples))
        return self._collate([self._dataset[sample] for sample in self._samples])


def _random_states() -> Any:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _equal(a: Any, b: Any) -> bool:
    (leaves, spec), (others, other_spec) = tree_flatten(a), tree_flatten(b)
    return spec == other_spec and all(map(_same, leaves, others))


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return bool(a == b)


class _Handles(pickle.Pickler):
    """Refuses open files, sockets, locks, connections: nothing of that can be sent to another process."""

    def reducer_override(self, value: Any) -> Any:
        # Functions and local classes come along in a fork; tensors are long to write, and nothing but numbers.
        is_local = isinstance(value, type) and "<locals>" in value.__qualname__
        if is_local or isinstance(value, (FunctionType, MethodType, ModuleType, Tensor, np.ndarray)):
            return object, ()
        return NotImplemented


class _Nowhere(io.RawIOBase):
    def write(self, data: Any) -> int:
        return len(data)


def _handle(dataset: Any) -> str:
    """What of it only one process can use: a file has one position, wherever it is read from."""
    try:
        _Handles(_Nowhere()).dump(dataset)
    except Exception as error:
        return f"what can't be sent to another process ({error})"
    return ""
