"""What plugs into a Trainer: one callback a file."""

from lightning_bharat.callbacks.data_loader_tuner import DataLoaderTuner
from lightning_bharat.callbacks.fault_tolerant_checkpoint import FaultTolerantCheckpoint
from lightning_bharat.callbacks.health_monitor import HealthMonitor
from lightning_bharat.callbacks.optuna_pruning import OptunaPruning
from lightning_bharat.callbacks.pipeline_timeline import PipelineTimeline
from lightning_bharat.callbacks.replica_check import ReplicaCheck, ReplicaError
from lightning_bharat.callbacks.weight_averaging import EMAWeightAveraging, WeightAveraging
from lightning_bharat.checkpoints.tiers import Tier
from lightning_bharat.health.finding import HealthError

__all__ = [
    "DataLoaderTuner",
    "EMAWeightAveraging",
    "FaultTolerantCheckpoint",
    "HealthError",
    "HealthMonitor",
    "OptunaPruning",
    "PipelineTimeline",
    "ReplicaCheck",
    "ReplicaError",
    "Tier",
    "WeightAveraging",
]
