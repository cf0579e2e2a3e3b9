"""Stores that are asked over real sockets: folders behind an HTTP server, and servers that fail."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class Torn(Quiet):
    """Sends half of each large file, and then nothing more, with the connection open until the server is closed."""

    stop = threading.Event()

    def copyfile(self, source, outputfile) -> None:  # type: ignore[no-untyped-def, override]
        content = source.read()
        if "rank_" not in self.path:
            outputfile.write(content)
            return
        outputfile.write(content[: len(content) // 2])
        outputfile.flush()
        self.stop.wait()


@contextmanager
def served(folder: Path, kind: type[Quiet] = Quiet) -> Iterator[str]:
    """The URL of ``folder`` behind a server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(kind, directory=str(folder)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        Torn.stop.set()
        server.shutdown()
        thread.join()
        server.server_close()
        Torn.stop.clear()


@contextmanager
def silent() -> Iterator[str]:
    """The URL of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def gone() -> str:
    """A URL at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"
