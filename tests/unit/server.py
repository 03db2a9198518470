"""A package index on loopback whose faults are chosen by the test."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from local_server import serving


@dataclass
class Faults:
    """What the server does wrong, in order; then it behaves."""

    statuses: list[int] = field(default_factory=list)
    """Answer these statuses to the first file requests."""
    cut_after: list[int] = field(default_factory=list)
    """Close the connection after so many bytes of the body."""
    no_ranges: bool = False
    """Answer 200 with the whole file whatever Range asks."""
    body: bytes | None = None
    """Serve these bytes in place of the file's."""
    yanked: dict[str, str] = field(default_factory=dict)
    """Files listed as yanked, with the reason."""
    no_hashes: bool = False
    """List files without their sha256."""
    requests: list[str] = field(default_factory=list)
    """What was asked, with the Range header if there was one."""


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    faults: Faults
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[1]
        self.faults.requests.append(f"{name} {self.headers.get('Range', '')}".strip())
        if self.path.endswith("/simple/vllm/"):
            self._send(200, self._listing(), "text/html")
        elif not self.path.startswith("/files/") or not (self.folder / name).is_file():
            self._send(404, b"", "text/plain")
        elif self.faults.statuses:
            self._send(self.faults.statuses.pop(0), b"", "text/plain")
        else:
            self._file(self.faults.body or (self.folder / name).read_bytes())

    def do_HEAD(self) -> None:
        file = self.folder / self.path.rsplit("/", 1)[1]
        self.send_response(200 if file.is_file() else 404)
        self.send_header("Content-Length", str(file.stat().st_size if file.is_file() else 0))
        self.end_headers()

    def _listing(self) -> bytes:
        return "".join(map(self._anchor, sorted(self.folder.iterdir()))).encode()

    def _anchor(self, file: Path) -> str:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        fragment = "" if self.faults.no_hashes else f"#sha256={digest}"
        reason = self.faults.yanked.get(file.name)
        yanked = "" if reason is None else f' data-yanked="{reason}"'
        return f'<a href="/files/{file.name}{fragment}"{yanked}>{file.name}</a>\n'

    def _file(self, data: bytes) -> None:
        start, status = 0, 200
        asked = self.headers.get("Range")
        if asked and not self.faults.no_ranges:
            start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
        body = data[start:]
        if self.faults.cut_after:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: self.faults.cut_after.pop(0)])
            self.wfile.flush()
            self.close_connection = True
        else:
            self._send(status, body, "application/octet-stream")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


def serve(folder: Path, faults: Faults) -> AbstractContextManager[str]:
    """Serve the files of `folder`; gives the index's root URL."""
    handler = type("Handler", (_Handler,), {"folder": folder, "faults": faults})
    return serving(handler)
