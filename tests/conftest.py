"""Warms the process server while pytest collects, and keeps every test from hanging."""

from __future__ import annotations

import pytest

from tests.ranks import server

# A hang is a failure in seconds: run_ranks has its own, shorter limit, which brings back the ranks' stacks.
SECONDS_PER_TEST = 120


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped without one")
    server.warm_up()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SECONDS_PER_TEST))
        if item.get_closest_marker("gpu") is not None and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
