"""Imported by the process server alone: what the ranks of all trials find imported and built."""

import optuna  # noqa: F401
import torch.distributed.fsdp  # noqa: F401

from lightning_bharat.tuning import (
    fit_parser,
    run,  # noqa: F401 - the script that called it is imported in each rank, as multiprocessing does
    trial_run,  # noqa: F401
)

fit_parser.build()
