"""Warms the process server while pytest collects, keeps tests apart, and skips what needs a GPU where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.ranks import server


def pytest_configure(config: pytest.Config) -> None:
    if not getattr(config.option, "numprocesses", None):  # xdist's controller runs no test: its workers have their own
        server.warm_up()


@pytest.fixture(autouse=True)
def _environment_as_before() -> Iterator[None]:
    """A Trainer in this process leaves LOCAL_RANK and its like behind: later ones would take themselves for ranks."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") is not None and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
