"""Checkpoints that any layout loads, whatever layout saved them: form, manifest, shares, export. Free of Lightning."""

from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.share import Share
from lightning_bharat.checkpoints.stored import Checkpoint, StoredTensor, is_checkpoint, load_into, save
from lightning_bharat.checkpoints.weights import load_weights

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Share",
    "StoredTensor",
    "is_checkpoint",
    "load_into",
    "load_weights",
    "save",
]
