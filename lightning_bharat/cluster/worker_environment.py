"""What the launcher tells a rank of its place: torchelastic's variables, and the name before its lines."""

from __future__ import annotations

import os
import socket
from string import Template
from typing import Any

from torch.distributed.elastic.agent.server.api import Worker, WorkerGroup


def variables(group: WorkerGroup, worker: Worker, attempt: int) -> dict[str, str]:
    """As torchrun sets them, for a worker of ``group`` in an attempt."""
    spec: Any = group.spec
    return {
        "LOCAL_RANK": str(worker.local_rank),
        "RANK": str(worker.global_rank),
        "GROUP_RANK": str(group.group_rank),
        "ROLE_RANK": str(worker.role_rank),
        "ROLE_NAME": spec.role,
        "LOCAL_WORLD_SIZE": str(spec.local_world_size),
        "WORLD_SIZE": str(worker.world_size),
        "GROUP_WORLD_SIZE": str(group.group_world_size),
        "ROLE_WORLD_SIZE": str(worker.role_world_size),
        "MASTER_ADDR": str(group.master_addr),
        "MASTER_PORT": str(group.master_port),
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        "TORCHELASTIC_MAX_RESTARTS": str(spec.max_restarts),
        "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.getenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
    }


def named(template: str, group: WorkerGroup, worker: Worker) -> str:
    """What stands before each line of a rank that --tee shows; empty: torchelastic's own."""
    return Template(template).safe_substitute(
        role_name=group.spec.role,
        rank=worker.global_rank,
        local_rank=worker.local_rank,
        hostname=socket.gethostname(),
    )
