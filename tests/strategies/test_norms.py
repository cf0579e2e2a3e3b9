"""The norm of all gradients does not depend on how many process groups there were before."""

from __future__ import annotations

import torch.distributed as dist

from tests.modules import Result, assert_equal, fit
from tests.ranks import run_ranks


def after_groups(strategy: dict | None, groups: int) -> Result:
    """torch names groups by a count, so that those of the layout's axes get names with one and with two digits."""
    if strategy is not None:
        dist.init_process_group("gloo")
        for _ in range(groups):
            dist.new_group()
    return fit("nano", strategy, steps=1, gradient_clip_val=0.2)


def test_ranks_sum_over_axes_in_one_order() -> None:
    expected = run_ranks(after_groups, 1, None, 0)[0]
    for groups in (6, 8):
        for found in run_ranks(after_groups, 4, {"tensor_parallel_size": 2}, groups):
            assert_equal(found, expected)
