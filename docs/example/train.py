"""Trains story.py's module on four ranks: two data ranks, each of two tensor ranks."""

import lightning as L
from story import Story

import lightning_bharat
from lightning_bharat.datamodules import TokenDataModule

if __name__ == "__main__":
    L.seed_everything(1)
    strategy = lightning_bharat.HybridStrategy(tensor_parallel_size=2)
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", devices=4, max_epochs=1, limit_train_batches=100, val_check_interval=50
    )
    trainer.fit(Story(), datamodule=TokenDataModule("prepared", sequence_length=128, batch_size=8))
    trainer.print(strategy.explain())
