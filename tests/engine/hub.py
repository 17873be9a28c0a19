"""A stand-in for the Hub on this machine: one model repository, with what its client asks for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 39 + "1"


class Handler(BaseHTTPRequestHandler):
    """Answers for one repository."""

    name: str
    folder: Path
    asked: list[str]
    """Files whose content was sent."""

    def do_GET(self) -> None:
        content = self.content()
        self.reply(content)
        if content is not None:
            self.wfile.write(content)
            if "/resolve/" in self.path:
                self.asked.append(self.file)

    def do_HEAD(self) -> None:
        self.reply(self.content())

    @property
    def file(self) -> str:
        """The file that a path of the form /NAME/resolve/COMMIT/FILE means."""
        return (
            unquote(urlsplit(self.path).path).removeprefix(f"/{self.name}/resolve/").split("/")[-1]
        )

    def content(self) -> bytes | None:
        """What stands at the path; None where there is nothing."""
        sizes = {path.name: path.stat().st_size for path in sorted(self.folder.iterdir())}
        if self.path.startswith(f"/api/models/{self.name}/tree/"):
            kind = {"type": "file", "oid": "1" * 40}
            tree = [{**kind, "path": name, "size": size} for name, size in sizes.items()]
            return json.dumps(tree).encode()
        if self.path.startswith(f"/api/models/{self.name}"):
            siblings = [{"rfilename": name} for name in sizes]
            return json.dumps({"id": self.name, "sha": COMMIT, "siblings": siblings}).encode()
        return (self.folder / self.file).read_bytes() if self.file in sizes else None

    def reply(self, content: bytes | None) -> None:
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(content or b"")))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content or b"").hexdigest()}"')
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Nothing: its reader is the test."""


@contextlib.contextmanager
def hub(name: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder as a model of that name; its address, and the files that were fetched."""
    served: list[str] = []
    one = type("One", (Handler,), {"name": name, "folder": folder, "asked": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), one)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
