"""Opening someone's study to read it: nothing is made, repaired or locked where it is kept."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

from lightning_bharat.tuning.errors import StorageError
from lightning_bharat.tuning.storage import JOURNAL, open_storage


class StudyNotFound(ValueError):
    """There is no such study; the message says what there is."""


def open_study(study: str, name: str | None = None) -> optuna.Study:
    """A study as it is now, in memory.

    Args:
        study: a study's folder, a journal file, or the URL of a storage.
        name: of the study, where the storage has several.

    Raises:
        StudyNotFound: there is none, or several and no ``name``.
    """
    storage = _storage(study)
    names = sorted(found.study_name for found in storage.get_all_studies())
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        told = f"name={name!r}: {study} has no such study" if name else f"{study} has {len(names) or 'no'} studies"
        raise StudyNotFound(told + (f"; write --name with one of: {', '.join(names)}" if names else ""))
    return _in_memory(optuna.load_study(study_name=name, storage=storage))


def _in_memory(study: optuna.Study) -> optuna.Study:
    """A copy: all of a report is then of one moment, also while trials run."""
    copy = optuna.create_study(directions=study.directions, study_name=study.study_name)
    if study.metric_names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna calls this experimental
            copy.set_metric_names(study.metric_names)
    for trial in study.get_trials(deepcopy=False):
        copy.add_trial(trial)
    return copy


def _storage(study: str) -> BaseStorage:
    if "://" in study:
        return _database(study)
    path = Path(study)
    file = path / JOURNAL if path.is_dir() else path
    if not file.is_file():
        raise StudyNotFound(
            f"{study} has no {JOURNAL}; write the folder of a study, its journal file, or a storage's URL such as "
            "sqlite:///study.db with --name"
        )
    return JournalStorage(_Journal(file))


def _database(url: str) -> BaseStorage:
    try:
        if not url.startswith("sqlite"):
            return open_storage(url, must_exist=True)
        return RDBStorage(_only_read(url), skip_table_creation=True)
    except StorageError as error:  # its message has no password in it
        raise StudyNotFound(str(error)) from None
    except (SQLAlchemyError, StorageInternalError, RuntimeError) as error:
        raise StudyNotFound(f"{url} can't be read as a storage of Optuna: {str(error).splitlines()[0]}") from error


def _only_read(url: str) -> str:
    """SQLite would make a file that is not there, and Optuna tables in one of something else."""
    found = make_url(url)
    if not found.database or not Path(found.database).is_file():
        raise StudyNotFound(f"{url}: there is no file {found.database}; write the path of one that holds a study")
    place = f"file:{quote(found.database)}"
    return f"{found.drivername}:///{place}?{urlencode({**found.query, 'mode': 'ro', 'uri': 'true'}, doseq=True)}"


class _Journal(BaseJournalBackend):
    """The whole lines of a journal file: a last one that is torn, or still being written, is not there yet."""

    def __init__(self, file: Path) -> None:
        text = file.read_bytes()
        self._lines = text[: text.rfind(b"\n") + 1].splitlines()
        self._file = file

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(self._lines[log_number_from:], log_number_from + 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise StudyNotFound(
                    f"{self._file}: line {number} is damaged ({error}); it is not a study's journal"
                ) from None

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        raise RuntimeError("a report only reads")
