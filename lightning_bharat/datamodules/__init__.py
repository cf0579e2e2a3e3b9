"""What plugs into a Trainer's data side, thin over :mod:`lightning_bharat.data`."""

from lightning_bharat.datamodules.text import TextDataModule
from lightning_bharat.datamodules.tokens import TokenDataModule

__all__ = ["TextDataModule", "TokenDataModule"]
