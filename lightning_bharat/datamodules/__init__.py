"""What plugs into a Trainer's data side, thin over :mod:`lightning_bharat.data`."""

from lightning_bharat.datamodules.tokens import TokenDataModule

__all__ = ["TokenDataModule"]
