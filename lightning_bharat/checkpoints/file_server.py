"""Files of a folder, given to those that know a token, over HTTP."""

from __future__ import annotations

import hmac
import json
import shutil
import threading
import urllib.error
import urllib.request
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lightning_bharat.checkpoints.digest import digest_of
from lightning_bharat.checkpoints.errors import CheckpointError

PATIENCE = 20.0  # seconds without a byte


class FileServer:
    """Serves `DIRECTORY/FILE` below ``folder``, in threads, until it is closed.

    Args:
        folder: of directories.
        host: the address that it listens at.
        token: without which nothing is given.

    Attributes:
        address: "host:port".
    """

    def __init__(self, folder: Path, host: str, token: str) -> None:
        kind = type("Handler", (_Handler,), {"folder": folder, "token": token})
        self._server = ThreadingHTTPServer((host, 0), kind)
        self._server.daemon_threads = True
        self.address = f"{host}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="file-server", daemon=True).start()

    def close(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    token: str
    timeout = PATIENCE

    def do_GET(self) -> None:
        given = self.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            self.send_error(403)
            return
        path, _, what = self.path.partition("?")
        names = path.strip("/").split("/")
        if len(names) != 2 or {"", ".", ".."} & set(names):
            self.send_error(404)
            return
        try:
            if what == "digest":
                self._say(json.dumps({"digest": digest_of(self.folder / names[0] / names[1])}).encode())
            else:
                self._send(self.folder / names[0] / names[1])
        except FileNotFoundError:
            self.send_error(404)

    def _send(self, path: Path) -> None:
        with path.open("rb") as file:
            self.send_response(200)
            self.send_header("Content-Length", str(path.stat().st_size))
            self.end_headers()
            shutil.copyfileobj(file, self.wfile, 2**20)

    def _say(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what goes wrong is told to the one that asked."""


def pull(address: str, token: str, name: str, target: Path) -> None:
    """Write the file ``name`` that a :class:`FileServer` has to ``target``.

    Raises:
        CheckpointError: it could not be had, with the address.
    """
    try:
        with _opened(address, token, name) as answer, target.open("wb") as file:
            shutil.copyfileobj(answer, file, 2**20)
            size, said = file.tell(), int(answer.headers["Content-Length"])
    except (OSError, HTTPException) as error:
        raise CheckpointError(f"{name} could not be fetched from {address}: {error}") from error
    if size != said:
        raise CheckpointError(f"{name} could not be fetched from {address}: {size} of {said} bytes came")


def ask(address: str, token: str, name: str) -> dict[str, Any]:
    """What a :class:`FileServer` says of a file, ``name`` with "?digest" behind it.

    Raises:
        CheckpointError: it does not, with the address.
    """
    try:
        with _opened(address, token, name) as answer:
            return json.loads(answer.read())
    except (OSError, HTTPException, ValueError) as error:
        raise CheckpointError(f"{address} does not say what {name} is: {error}") from error


def _opened(address: str, token: str, name: str) -> Any:
    request = urllib.request.Request(f"http://{address}/{name}", headers={"Authorization": f"Bearer {token}"})
    return _DIRECT.open(request, timeout=PATIENCE)


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # hosts of a run are not behind a proxy
