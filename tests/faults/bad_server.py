"""A package index on loopback that does one wrong thing after the other, then behaves."""

from __future__ import annotations

import hashlib
import socket
import struct
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from local_server import serving

#: Seconds of silence after which the tests' client gives up.
PATIENCE = 0.5


@dataclass
class Script:
    """What happens to the requests for one kind of page, in order."""

    acts: list[Act]
    always: bool = False
    """The last act is repeated without end."""
    times: list[float] = field(default_factory=list)
    """When each request came, in seconds."""

    def next(self) -> Act:
        self.times.append(time.monotonic())
        if self.always and len(self.acts) == 1:
            return self.acts[0]
        return self.acts.pop(0) if self.acts else whole


class Handler(BaseHTTPRequestHandler):
    """Serves `folder` as an index of one project, by its scripts."""

    folder: Path
    pages: Script
    files: Script

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[1]
        if self.path == "/simple/vllm/":
            self.pages.next()(self, self._listing(), "text/html")
        elif (self.folder / name).is_file():
            self.files.next()(self, (self.folder / name).read_bytes(), "application/zip")
        else:
            self.send_error(404)

    def _listing(self) -> bytes:
        files = sorted(self.folder.iterdir())
        digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        return "".join(
            f'<a href="/files/{name}#sha256={digest}">{name}</a>\n'
            for name, digest in digests.items()
        ).encode()

    def head(self, status: int, **headers: object) -> None:
        """Status line and headers, `_` in their names for `-`."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


Act = Callable[[Handler, bytes, str], None]


def whole(to: Handler, data: bytes, kind: str) -> None:
    to.head(200, Content_Type=kind, Content_Length=len(data))
    to.wfile.write(data)


def status(number: int, **headers: object) -> Act:
    def act(to: Handler, data: bytes, kind: str) -> None:
        to.head(number, Content_Length=0, **headers)

    return act


def other(change: Callable[[bytes], bytes], kind: str | None = None, number: int = 200) -> Act:
    """Other bytes, honestly labelled."""

    def act(to: Handler, data: bytes, own: str) -> None:
        changed = change(data)
        to.head(number, Content_Type=kind or own, Content_Length=len(changed))
        to.wfile.write(changed)

    return act


def stated(length: Callable[[int], object], **headers: object) -> Act:
    """The bytes under a Content-Length that is not theirs."""

    def act(to: Handler, data: bytes, kind: str) -> None:
        to.head(200, Content_Type=kind, Content_Length=length(len(data)), **headers)
        to.wfile.write(data)

    return act


def cut(to: Handler, data: bytes, kind: str) -> None:
    to.head(200, Content_Type=kind, Content_Length=len(data))
    to.wfile.write(data[: len(data) // 2])


def without_length(to: Handler, data: bytes, kind: str) -> None:
    """Half of it, and nothing tells that it is not all."""
    to.head(200, Content_Type=kind)
    to.wfile.write(data[: len(data) // 2])


def stall(to: Handler, data: bytes, kind: str) -> None:
    to.head(200, Content_Type=kind, Content_Length=len(data))
    to.wfile.write(data[:10])
    to.wfile.flush()
    time.sleep(4 * PATIENCE)


def silence(to: Handler, data: bytes, kind: str) -> None:
    time.sleep(4 * PATIENCE)
    to.close_connection = True


def reset(to: Handler, data: bytes, kind: str) -> None:
    to.head(200, Content_Type=kind, Content_Length=len(data))
    to.wfile.write(data[: len(data) // 2])
    to.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    to.connection.close()


def raw(text: bytes) -> Act:
    """An answer that is no HTTP."""

    def act(to: Handler, data: bytes, kind: str) -> None:
        to.wfile.write(text)

    return act


def serve(folder: Path, pages: Script, files: Script) -> AbstractContextManager[str]:
    """Serve the files of `folder`; gives the index's root URL."""
    handler = type("Bound", (Handler,), {"folder": folder, "pages": pages, "files": files})
    return serving(handler)
