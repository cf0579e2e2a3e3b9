"""Warms the process server while pytest collects, and skips what needs a GPU where there is none."""

from __future__ import annotations

import pytest

from tests.ranks import server


def pytest_configure() -> None:
    server.warm_up()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") is not None and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
