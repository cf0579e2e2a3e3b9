"""Files in a store that fsspec opens (S3, GCS, HTTP, FTP, archives, …): seen, fetched and removed by URL.

A store is another machine: it may be slow, or gone. Each question to it has an answer or an error in a time that is
known, and an error is never taken for "nothing is there" (fsspec's own ``exists``, ``walk`` and ``find`` do that).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import unquote

from lightning_bharat.checkpoints.directory import hidden
from lightning_bharat.checkpoints.errors import CheckpointError

T = TypeVar("T")
PATIENCE = 60.0  # seconds in which an answer, or more of a file, must come; libraries try again within it
_UPLOAD = 10  # times as long, for what is sent: not all libraries say how far they are
_DEPTH = 16  # of folders below a URL that are looked into


class StoreError(CheckpointError):
    """A store that does not answer, or with an error: what is there is not known."""


@dataclass(frozen=True)
class Remote:
    """A file or a folder in a store.

    Attributes:
        url: as fsspec takes it, chained ones (``zip://run::https://…``) too.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Remote:
        first, chain, rest = self.url.partition("::")
        return Remote(f"{first.rstrip('/')}/{name}{chain}{rest}")

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.url.partition("::")[0].rstrip("/").rpartition("/")[2]

    def relative_to(self, other: Remote) -> str:
        """What the URL has beyond that of ``other``, which it lies below."""
        first, before = self.url.partition("::")[0], other.url.partition("::")[0]
        return first.removeprefix(before).strip("/") or "."

    def look(self) -> tuple[dict[str, int | None], list[str]]:
        """What lies in this folder: sizes of files by name (``None``: the store doesn't say), names of folders.

        Raises:
            FileNotFoundError: there is no such folder.
            StoreError: it is not known.
        """
        store, root = self._opened()
        store.invalidate_cache()
        files: dict[str, int | None] = {}
        folders = []
        for entry in self._ask(lambda: store.ls(root, detail=True)):
            above, _, name = str(entry["name"]).rstrip("/").rpartition("/")
            if above.strip("/") != root.strip("/") or name.startswith("?"):  # itself, or a link of a page
                continue
            name = unquote(name) if self.url.startswith("http") else name
            if entry["type"] == "directory":
                folders.append(name)
            else:
                files[name] = entry["size"]
        return files, sorted(folders)

    def size(self) -> int | None:
        """Of this file, in bytes, as far as the store says.

        Raises:
            FileNotFoundError, StoreError: as :meth:`look`.
        """
        store, path = self._opened()
        return self._ask(lambda: store.info(path))["size"]

    def fetch(self, target: Path) -> None:
        """Write this file to ``target``, which appears when all of it is there.

        Raises:
            FileNotFoundError, StoreError: as :meth:`look`.
            OSError: the disk here.
        """
        store, path = self._opened()
        part = hidden(target)
        try:
            self._ask(lambda: store.get_file(path, str(part)), lambda: part.stat().st_size if part.exists() else 0)
            if not part.is_file():
                raise FileNotFoundError(f"{self} is a folder")
            os.replace(part, target)
        finally:
            if part.is_file():
                part.unlink()

    def put(self, source: Path) -> None:
        """Write the file ``source`` to this place.

        Raises:
            StoreError: it can't be done, or is not known to be.
        """
        from fsspec.callbacks import Callback

        store, path = self._opened()
        sent = Callback()
        store.invalidate_cache()
        self._ask(lambda: store.put_file(str(source), path, callback=sent), lambda: sent.value, _UPLOAD)
        if (size := self.size()) not in (None, source.stat().st_size):
            raise StoreError(f"{self} has {size} bytes, and {source.stat().st_size} were sent to it")

    def make(self) -> None:
        """Let this folder be there.

        Raises:
            StoreError: as :meth:`put`.
        """
        store, path = self._opened()
        self._ask(lambda: store.makedirs(path, exist_ok=True))

    def remove(self, first: str) -> None:
        """Remove this folder, and before all else the file ``first`` in it, by which it is known.

        Raises:
            StoreError: it can't be done, or is not known to be.
        """
        store, path = self._opened()
        try:
            if first in self.look()[0]:
                self._ask(lambda: store.rm_file(f"{path}/{first}"))
            self._ask(lambda: store.rm(path, recursive=True))
        except FileNotFoundError:  # the last file of a folder that is no more than a part of names
            pass

    def below(self, is_end: Callable[[dict[str, int | None]], bool], depth: int = _DEPTH) -> Iterator[Remote]:
        """This folder and those below it for whose files ``is_end`` holds; hidden ones are left out.

        Raises:
            FileNotFoundError, StoreError: as :meth:`look`.
        """
        files, folders = self.look()
        if is_end(files):
            yield self
        elif depth:
            for name in folders:
                if not name.startswith("."):
                    yield from (self / name).below(is_end, depth - 1)

    def _opened(self) -> tuple[Any, str]:
        """The store, and the path in it."""
        from fsspec.core import url_to_fs

        try:
            store, path = url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise CheckpointError(f"{self} can't be opened: {error}") from None
        except Exception as error:  # a chained one is read here
            raise self._unknown(error) from error
        return store, path.rstrip("/")

    def _ask(self, question: Callable[[], T], moved: Callable[[], int] = lambda: 0, times: int = 1) -> T:
        """The answer, as long as it comes, or ``moved`` grows, within PATIENCE, so many ``times``."""
        answer: Future[T] = Future()

        def ask() -> None:
            try:
                answer.set_result(question())
            except BaseException as error:
                answer.set_exception(error)

        Thread(target=ask, daemon=True).start()  # which the end of the process does not wait for
        before = 0
        while not wait([answer], times * PATIENCE).done:
            if moved() <= before:
                raise StoreError(f"{self} does not answer: nothing has come for {times * PATIENCE:.0f} s. {_UNKNOWN}")
            before = moved()
        try:
            return answer.result()
        except NotImplementedError as error:
            raise CheckpointError(f"{self} is in a store that can't do this: {error or 'it is read only'}") from error
        except FileNotFoundError as error:
            if _is_of_the_way(error.__cause__):
                raise self._unknown(error.__cause__) from error
            raise
        except Exception as error:
            raise self._unknown(error) from error

    def _unknown(self, error: object) -> StoreError:
        return StoreError(f"{self} can't be reached: {type(error).__name__}: {error}. {_UNKNOWN}")


Place = Path | Remote
_UNKNOWN = "What is there is not known; try again when it can be reached"


def place_of(where: str | Path | Remote) -> Place:
    """A path, or what lies at a URL."""
    if isinstance(where, Remote):
        return where
    return Remote(str(where).rstrip("/")) if "://" in str(where) else Path(where)


def _is_of_the_way(cause: object) -> bool:
    """Whether a file was not found since the store could not be asked (fsspec's HTTP says so to any error)."""
    status = getattr(cause, "status", None)
    if status is not None:
        return status >= 500
    of_network = isinstance(cause, (OSError, TimeoutError)) or type(cause).__module__.startswith("aiohttp")
    return of_network and not isinstance(cause, FileNotFoundError)
