"""An ordinary LightningModule, unchanged, on any number of devices."""

__version__ = "0.1.0"
