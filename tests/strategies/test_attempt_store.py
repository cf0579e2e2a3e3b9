"""Restarts under torchrun's shared store: ranks meet apart from those of the attempts before."""

from __future__ import annotations

import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import TorchElasticEnvironment

from lightning_bharat.strategies import _lightning
from tests.ranks import server


def meets(fails: bool) -> float:
    _lightning.init_process_group(TorchElasticEnvironment(), "gloo", timedelta(seconds=20), torch.device("cpu"))
    total = torch.ones(1)
    dist.all_reduce(total)
    if fails:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(total)
    return total.item()


def test_no_rank_finds_the_address_of_a_dead_one() -> None:
    """With torch's own way every other of these restarts fails."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent has one
    agent = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "1"}
    for attempt in range(5):
        job = server.start(meets, 2, attempt < 4, env={**agent, "TORCHELASTIC_RESTART_COUNT": str(attempt)})
        outcomes = job.wait(30)
        if attempt < 4:
            assert outcomes[1].exit_code == -signal.SIGKILL
            assert "Connection" in outcomes[0].message, outcomes[0].output
        else:
            assert [outcome.value for outcome in outcomes] == [2, 2], outcomes[0].output
