"""A hub on this machine, for tests: what it holds, and how it answers, is set while it runs."""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

SHA = "a" * 40
PAUSE = 0.4  # seconds before each quarter of a slow file
MISSING = {"X-Error-Code": "RepoNotFound"}
REFUSALS = {
    "missing": (404, MISSING),
    "gated": (403, {"X-Error-Code": "GatedRepo"}),
    "down": (503, {}),
    "odd": (418, {}),
}


class Hub(ThreadingHTTPServer):
    """Serves ``files`` as those of every repository, or refuses as ``mode`` says; ``asked`` lists the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.mode, self.delay, self.asked = "serve", 0.0, list[str]()
        self.slow: set[str] = set()  # files whose content takes long

    def handle_error(self, *_: object) -> None:
        """A client that gave up is expected."""

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is to be."""
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    """One connection per request, so that a closed hub is closed."""

    server: Hub

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        """Headers alone."""
        self.answer(body=False)

    def do_GET(self) -> None:
        """A file or a listing."""
        self.answer()

    def do_POST(self) -> None:
        """Questions about paths."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer()

    def answer(self, body: bool = True) -> None:
        """What the hub's own server would say, as far as the libraries ask."""
        path = unquote(urlparse(self.path).path)
        self.server.asked.append(path)
        time.sleep(self.server.delay)
        if self.server.mode != "serve":
            return self.say(*REFUSALS[self.server.mode])
        if "/resolve/" in path:
            revision, _, name = path.split("/resolve/")[1].partition("/")
            if revision not in ("main", SHA):
                return self.say(404, {"X-Error-Code": "RevisionNotFound"})
            data = self.server.files.get(name)
            if data is None:
                return self.say(404, {"X-Error-Code": "EntryNotFound"})
            return self.say(200, {"X-Repo-Commit": SHA, "ETag": f'"{hash(data) & 0xFFFFFFFF:x}"'}, data, body, name)
        if "/tree/" in path or "/paths-info/" in path:
            below = path.partition(SHA)[2].strip("/")
            return self.say(200, {}, json.dumps(self.entries(below)).encode(), body)
        if path.startswith("/api/datasets/"):
            siblings = [{"rfilename": name} for name in self.server.files]
            return self.say(200, {}, json.dumps({"id": "some/name", "sha": SHA, "siblings": siblings}).encode(), body)
        return self.say(404, {"X-Error-Code": "EntryNotFound"})

    def entries(self, below: str) -> list[dict[str, object]]:
        """The files of the repository below a folder."""
        found = []
        for name, data in self.server.files.items():
            if name.startswith(f"{below}/" if below else ""):
                found.append(
                    {"type": "file", "path": name, "size": len(data), "oid": f"{hash(data) & 0xFFFFFFFF:040x}"}
                )
        return found

    def say(
        self, status: int, headers: Mapping[str, str], data: bytes = b"", body: bool = True, name: str = ""
    ) -> None:
        """One response."""
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        pieces = 4 if name in self.server.slow else 1
        for piece in range(pieces if body else 0):
            time.sleep(PAUSE if pieces > 1 else 0)
            self.wfile.write(data[len(data) * piece // pieces : len(data) * (piece + 1) // pieces])


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
