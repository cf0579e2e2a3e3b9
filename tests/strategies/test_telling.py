"""One rank's values on all ranks of a group, in one message or two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_bharat.strategies.telling import SHORT, tell
from tests.ranks import run_ranks

VALUES: tuple[Any, ...] = (
    None,
    {"loss": torch.tensor(0.1, dtype=torch.float64), "steps": [1, 2]},
    torch.arange(3, dtype=torch.bfloat16),
    *("x" * length for length in (1, SHORT - 40, SHORT, 100 * SHORT)),
)


def _told(source: int) -> list[Any]:
    dist.init_process_group("gloo")
    mine = VALUES if dist.get_rank() == source else [object] * len(VALUES)
    assert dist.group.WORLD is not None
    return [tell(value, source, dist.group.WORLD, torch.device("cpu")) for value in mine]


@pytest.mark.parametrize("source", [0, 2])
def test_all_ranks_have_it(source: int) -> None:
    for found in run_ranks(_told, 3, source):
        assert found[0] is None and found[3:] == list(VALUES[3:])
        torch.testing.assert_close(found[1:3], list(VALUES[1:3]), rtol=0, atol=0)
