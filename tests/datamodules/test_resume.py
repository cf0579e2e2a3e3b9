"""A Trainer that is stopped anywhere and resumed reads what the uninterrupted one reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from lightning_bharat.data import DataError
from tests.datamodules.recorder import Recorder, data, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


class SaveEverywhere(L.Callback):
    """Saves in every hook at which people save; ``at`` is the number of batches trained on before, by checkpoint."""

    def __init__(self, folder: Path, steps: tuple[int, ...]) -> None:
        self.folder = folder
        self.steps = steps
        self.at: dict[Path, int] = {}

    def save(self, trainer: L.Trainer, hook: str) -> None:
        path = self.folder / f"{hook}-epoch{trainer.current_epoch}-step{trainer.global_step}.ckpt"
        self.at[path] = len(trainer.lightning_module.seen)
        trainer.save_checkpoint(path)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx in self.steps:
            self.save(trainer, "batch_start")

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in self.steps or batch_idx + 1 == trainer.num_training_batches:
            self.save(trainer, "batch_end")

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.save(trainer, "epoch_start")

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.save(trainer, "epoch_end")

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.save(trainer, "validation_end")


def run(folder: Path, checkpoint: Path | None = None, batch_size: int = 8, workers: int = 0, **options: Any) -> list:
    module = Recorder(reads_steps_early=options.pop("reads_steps_early", False))
    trainer(**options).fit(module, data(folder, batch_size, num_workers=workers), ckpt_path=checkpoint)
    return module.seen


@pytest.mark.parametrize(
    "options", [{}, {"reads_steps_early": True}, {"val_check_interval": 8}, {"limit_train_batches": 7}], ids=str
)
def test_saved_anywhere(options: dict[str, Any], tmp_path: Path) -> None:
    options |= {"max_epochs": 2, "limit_val_batches": 1}
    saving = SaveEverywhere(tmp_path, steps=(4,))
    whole = run(tmp_path, callbacks=[saving], **options)
    assert {epoch for epoch, _, _ in whole} == {0, 1}
    assert len({batch for _, _, batch in whole}) == len(whole)
    for checkpoint, trained in saving.at.items():
        rest = run(tmp_path, checkpoint, **options)
        assert rest == whole[trained:], checkpoint.name


@pytest.mark.parametrize("before, after", [(2, 0), (0, 2), (2, 2)])
def test_with_workers(before: int, after: int, tmp_path: Path) -> None:
    saving = SaveEverywhere(tmp_path, steps=(4,))
    whole = run(tmp_path, callbacks=[saving], workers=before, max_epochs=2)
    checkpoint = next(path for path in saving.at if path.name.startswith("batch_end-epoch1"))
    assert run(tmp_path, checkpoint, workers=after, max_epochs=2) == whole[saving.at[checkpoint] :]


def sequences(seen: list, epoch: int) -> list:
    return [sequence for its, _, batch in seen if its == epoch for sequence in batch]


@pytest.mark.parametrize("after", [4, 16, 5])
def test_with_another_batch_size(after: int, tmp_path: Path) -> None:
    saving = SaveEverywhere(tmp_path, steps=(3,))
    whole = run(tmp_path, callbacks=[saving], max_epochs=3)
    anew = run(tmp_path, batch_size=after, max_epochs=3)  # what the later epochs hold with the other batch size
    validations: list[int] = []

    class CountValidations(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            validations.append(trainer.global_step)

    for checkpoint, trained in saving.at.items():
        validations.clear()
        rest = run(
            tmp_path, checkpoint, batch_size=after, max_epochs=3, callbacks=[CountValidations()], num_sanity_val_steps=0
        )
        seen, epochs = whole[:trained], {epoch for epoch, _, _ in rest}
        for epoch in epochs:
            read = sequences(seen, epoch) + sequences(rest, epoch)
            full = sequences(anew, epoch) if not sequences(seen, epoch) else sequences(whole, epoch)
            # The rest of an epoch that does not fill a step is left out, and the step is of another size now.
            shorter = min(len(read), len(full))
            assert read[:shorter] == full[:shorter], checkpoint.name
            assert abs(len(read) - len(full)) < max(after, 8), checkpoint.name
            assert len(set(read)) == len(read)
        assert epochs | {epoch for epoch, _, _ in seen} == {0, 1, 2}, checkpoint.name
        assert len(validations) >= len(epochs), "each epoch's end is seen, and validated"


def test_after_an_exception(tmp_path: Path) -> None:
    class Breaks(Recorder):
        def training_step(self, batch: dict, batch_idx: int) -> Any:
            if self.global_step == 9:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    whole = run(tmp_path, max_epochs=1)
    module = Breaks()
    with pytest.raises(RuntimeError, match="broken"):
        saving = OnExceptionCheckpoint(tmp_path, filename="broken")
        trainer(callbacks=[saving], enable_checkpointing=True).fit(module, data(tmp_path, num_workers=2))
    assert module.seen == whole[:9]
    assert run(tmp_path, tmp_path / "broken.ckpt", max_epochs=1) == whole[9:], "the batch that broke is read again"


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    saving = SaveEverywhere(tmp_path, steps=(4,))
    run(tmp_path, callbacks=[saving], max_epochs=1)
    checkpoint = next(path for path in saving.at if path.name.startswith("batch_end"))
    with pytest.raises(DataError, match="one is shuffled and the other is not"):
        trainer().fit(Recorder(), data(tmp_path, shuffle=False), ckpt_path=checkpoint)
