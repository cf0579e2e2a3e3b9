"""Where a study is kept: a journal file, a database, or a server in front of one. docs/tuning-storage.md says which
when."""

from __future__ import annotations

import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage

from lightning_bharat.tuning.errors import StorageError
from lightning_bharat.tuning.journal import Journal

JOURNAL = "study.journal"
PATIENCE = 10  # seconds that a server may take to answer
_SQLITE_WAIT = 60  # seconds for another process's transaction to end
_OPENINGS = 5  # hosts that come at once to an empty database all try to make its tables
_FORMS = "a folder, sqlite:///FILE, postgresql://USER:PASSWORD@HOST/DATABASE or grpc://HOST:PORT"


def open_storage(where: str | Path, must_exist: bool = False) -> BaseStorage:
    """Open the storage of one or more studies, mended if it was left torn.

    Args:
        where: A folder (its ``study.journal``), a ``.journal`` file, or a URL: ``sqlite:///FILE``,
            ``postgresql://USER:PASSWORD@HOST/DATABASE`` or ``grpc://HOST:PORT`` (Optuna's ``run_grpc_proxy_server``).
        must_exist: Refuse a file that is not there instead of making it: for who only reads.

    Returns:
        One of Optuna's storages, as ``optuna.create_study(storage=...)`` takes it.

    Raises:
        ValueError: ``where`` is none of these.
        StorageError: it can't be opened, with the cause; within seconds where a server does not answer.
        ModuleNotFoundError: the database's driver is missing.
    """
    scheme = str(where).partition("://")[0] if "://" in str(where) else ""
    if not scheme:
        return _open_journal(Path(where), must_exist)
    if scheme == "sqlite":
        return _open_sqlite(str(where), must_exist)
    if scheme in ("postgresql", "postgres", "postgresql+psycopg"):
        return _open_postgresql(str(where))
    if scheme == "grpc":
        return _open_grpc(str(where))
    raise ValueError(f"storage={_masked(str(where))!r}: {scheme}:// is not known. Write {_FORMS}")


def _open_journal(path: Path, must_exist: bool) -> BaseStorage:
    file = path if path.suffix == ".journal" or path.is_file() else path / JOURNAL
    if must_exist and not file.is_file():
        raise StorageError(f"storage={str(path)!r}: there is no study; {file} is not there")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(Journal(file))
    except OSError as error:
        raise StorageError(f"storage={str(path)!r}: {file} can't be opened: {error.strerror}") from error


def _open_sqlite(url: str, must_exist: bool) -> BaseStorage:
    import sqlalchemy

    name = sqlalchemy.make_url(url).database
    if not name or name == ":memory:":
        raise ValueError(f"storage={url!r} names no file, so nothing would be kept. Write sqlite:///FILE")
    file = Path(name)
    if must_exist and not file.is_file():
        raise StorageError(f"storage={url!r}: there is no study; {file} is not there")
    file.parent.mkdir(parents=True, exist_ok=True)
    storage = _open_database(url, {"connect_args": {"timeout": _SQLITE_WAIT}})
    _lock_when_reading(storage)
    return storage


def _lock_when_reading(storage: RDBStorage) -> None:
    """Let a transaction have the file to itself from its first read on.

    Optuna reads a trial's state and then writes the new one. SQLite knows no ``FOR UPDATE`` and locks at the first
    write, so two processes could both see a trial as running and both end it. (The recipe is in SQLAlchemy's
    documentation of its SQLite dialect.)
    """
    from sqlalchemy import event

    @event.listens_for(storage.engine, "connect")
    def leave_transactions_to_us(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(storage.engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    storage.engine.dispose()  # connections from before


def _open_postgresql(url: str) -> BaseStorage:
    if find_spec("psycopg") is None:
        raise ModuleNotFoundError(f"storage={_masked(url)!r} needs psycopg: pip install 'psycopg[binary]'")
    connect = {
        "connect_timeout": PATIENCE,
        # A connection whose other side is gone is noticed in about a minute, not in hours.
        "keepalives": 1,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "application_name": "bharat tune",
    }
    # Looked at before each use: the server may have been restarted since, or a firewall have dropped it.
    pool = {"pool_pre_ping": True, "pool_recycle": 1800, "pool_size": 2, "max_overflow": 8}
    return _open_database(f"postgresql+psycopg://{url.partition('://')[2]}", {"connect_args": connect, **pool})


def _open_database(url: str, engine: dict[str, Any]) -> RDBStorage:
    from sqlalchemy import exc

    for opening in range(1, _OPENINGS + 1):
        try:
            return RDBStorage(url, engine_kwargs=engine)
        except (exc.IntegrityError, exc.ProgrammingError) as error:
            failure: Exception = error
        except exc.OperationalError as error:
            failure = error
            if "already exists" not in str(error):
                break
        except (exc.ArgumentError, exc.SQLAlchemyError, RuntimeError) as error:
            failure = error
            break
        time.sleep(0.2 * opening)
    cause = str(getattr(failure, "orig", None) or failure).strip().splitlines()[0]
    raise StorageError(f"storage={_masked(url)!r} can't be opened: {cause}") from failure


def _open_grpc(url: str) -> BaseStorage:
    if find_spec("grpc") is None or find_spec("google.protobuf") is None:
        raise ModuleNotFoundError(f"storage={url!r} needs gRPC: pip install grpcio protobuf")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port:
        raise ValueError(f"storage={url!r}: write grpc://HOST:PORT")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        storage = GrpcStorageProxy(host=f"[{host}]" if ":" in host else host, port=port)
    try:
        storage.wait_server_ready(timeout=PATIENCE)
    except ConnectionError as error:
        storage.close()
        raise StorageError(
            f"storage={url!r}: no server answers within {PATIENCE} s. Is optuna.storages.run_grpc_proxy_server running "
            "there, with a host that other machines can reach (host='0.0.0.0')?"
        ) from error
    return storage


def _masked(url: str) -> str:
    """Without the password, for a message."""
    before, at, after = url.rpartition("@")
    scheme, _, user = before.partition("://")
    return f"{scheme}://{user.partition(':')[0]}:***@{after}" if at and ":" in user else url
