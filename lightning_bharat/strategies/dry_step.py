"""One training step of a LightningModule without a trainer's side effects, for the dry run that a plan is made of."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache, partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torchmetrics import Metric, MetricCollection

from lightning_bharat.strategies import _lightning, _lightning_loops


class _Still:
    """An optimizer or a scheduler that can be asked all it knows, and does not step."""

    def __init__(self, inside: Any) -> None:
        self._inside = inside

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inside, name)

    def step(self, closure: Any = None, *args: Any, **kwargs: Any) -> Any:
        return closure() if callable(closure) else None

    def toggle_model(self, sync_grad: bool = True) -> AbstractContextManager:
        return nullcontext()


def dry_step(trainer: pl.Trainer) -> Callable[[Any, Any], Any]:
    """The step for :func:`~lightning_bharat.plan.find.find_plan`: ``step(copy of the module, batch)``.

    The copy logs nothing, its metrics count nothing, its optimizers do not step.
    """

    def step(copy: pl.LightningModule, batch: Any) -> Any:
        _lightning.attach(copy, trainer)
        _silence(copy)
        called = getattr(copy, _lightning_loops.step_and_source(trainer)[0])
        parameters = inspect.signature(called).parameters
        kwargs = {"batch_idx": 0} if "batch_idx" in parameters else {}
        named = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        positional = [batch] + ([0] if not kwargs and len(named) > 1 else [])
        return called(*positional, **kwargs)

    return step


def _silence(copy: pl.LightningModule) -> None:
    object.__setattr__(copy, "log", _logged)
    for name in (
        "log_dict",
        "print",
        "clip_gradients",
        "toggle_optimizer",
        "untoggle_optimizer",
    ):
        object.__setattr__(copy, name, lambda *args, **kwargs: None)
    object.__setattr__(copy, "manual_backward", lambda *args, **kwargs: _make_gradients(copy))
    object.__setattr__(copy, "toggled_optimizer", lambda *args, **kwargs: nullcontext())
    object.__setattr__(copy, "all_gather", lambda data, *args, **kwargs: data)
    made = cache(partial(_optimizers_and_schedulers, copy))
    object.__setattr__(copy, "optimizers", lambda *args, **kwargs: made()[0])
    object.__setattr__(copy, "lr_schedulers", lambda: made()[1])
    for module in copy.modules():
        if isinstance(module, (Metric, MetricCollection)):
            object.__setattr__(module, "update", lambda *args, **kwargs: None)
            for name in ("compute", "forward"):
                object.__setattr__(module, name, partial(_nothing_counted, module))


def _nothing_counted(metric: Metric | MetricCollection, *args: Any, **kwargs: Any) -> Any:
    if isinstance(metric, MetricCollection):  # looks at the values of its metrics' states to see which are equal
        return {name: torch.zeros(()) for name in metric.keys()}  # noqa: SIM118 - its items are others
    return torch.zeros(())


def _make_gradients(copy: pl.LightningModule) -> None:
    """What the step may look at after a backward pass, without reading a parameter."""
    for parameter in copy.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)


def _logged(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
    """Whatever is logged is looked at."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value.item()


def _optimizers_and_schedulers(copy: pl.LightningModule) -> tuple[Any, Any]:
    """What ``optimizers()`` and ``lr_schedulers()`` return: one, or a list of several, of the copy's own parameters."""
    optimizers, schedulers = (list(map(_Still, made)) for made in _lightning.optimizers_of(copy))
    one = {0: None, 1: next(iter(schedulers), None)}
    return optimizers[0] if len(optimizers) == 1 else optimizers, one.get(len(schedulers), schedulers)


def first_batch(trainer: pl.Trainer) -> Any:
    """A batch as the loaders of the loop that runs would give it, without starting workers, moving samplers or drawing
    random numbers. The trainer goes on with the same loaders, unless they had to be gone through.

    Raises:
        ValueError: there is no loader to take one from.
    """
    with ExitStack() as asked_in_vain:
        asked_in_vain.enter_context(isolate_rng())
        loaders, of_each, keep = _lightning_loops.loaders_of(trainer)
        if all(map(_is_indexed, tree_leaves(loaders))):
            keep()
            asked_in_vain.pop_all()
        while not of_each and isinstance(loaders, (dict, list, tuple)) and loaders:
            loaders = next(iter(loaders.values() if isinstance(loaders, dict) else loaders))
        with isolate_rng():
            return tree_map(_first, loaders)


def _is_indexed(loader: Any) -> bool:
    """Whether a batch can be made of items of its dataset."""
    dataset = getattr(loader, "dataset", None)
    indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    return isinstance(loader, torch.utils.data.DataLoader) and indexed


def _first(loader: Any) -> Any:
    if loader is None or isinstance(loader, Tensor):
        raise ValueError("there is no loader to observe a step with")
    if _is_indexed(loader):
        dataset, size = loader.dataset, loader.batch_size or 2
        count = min(size, len(dataset))
        if not count:
            raise ValueError("the dataset is empty: there is no batch to observe a step with")
        whole = loader.batch_sampler is None  # batch_size=None: the dataset's items are batches
        return loader.collate_fn(dataset[0] if whole else [dataset[i] for i in range(count)])
    batches = iter(loader)
    if batches is loader:
        raise ValueError(
            f"the loader is a {type(loader).__name__} that can be gone through once only, and its first batch "
            "is needed to see what a step does; give an object whose __iter__ starts anew"
        )
    batch = next(batches, None)
    if batch is None:
        raise ValueError("the loader gives no batch: there is none to observe a step with")
    return batch
