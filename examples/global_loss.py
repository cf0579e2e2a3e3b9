"""A loss that is the same on every layout."""

from __future__ import annotations

from typing import Any

import lightning as L


class GlobalLoss(L.Callback):
    """Logs ``loss``, the mean over all ranks, at each step.

    A module's own ``self.log("train_loss", loss)`` shows what the first rank computed of its share of the batch, as
    everywhere in Lightning. The mean is what one process computes of the whole batch.
    """

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        pl_module.log("loss", outputs["loss"], sync_dist=True)
