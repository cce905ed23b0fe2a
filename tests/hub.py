"""A Hugging Face hub of one repository on this machine: what was uploaded, by whom, and answers that refuse."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


class Hub:
    """Takes commits of small files as the hub does; use it as a context manager.

    Args:
        refuses: Status that every request about a repository gets; None: they are served.
    """

    def __init__(self, refuses: int | None = None) -> None:
        self.refuses = refuses
        self.files: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.commits = 0
        self._server = ThreadingHTTPServer(("localhost", 0), _handler(self))
        self.address = f"http://localhost:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and content for a request."""
        if self.refuses is not None and path.startswith(("/api/repos", "/api/models")):
            return self.refuses, {"error": "no"}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            self.created.append(wanted)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            return 200, {"url": f"{self.address}/{name}", "name": name}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return 200, {"files": modes}
        if "/commit/" in path:
            self.commits += 1
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    assert value["encoding"] == "base64"
                    self.files[value["path"]] = base64.b64decode(value["content"])
            return 200, {
                "commitUrl": f"{self.address}/someone/model/commit/{'a' * 40}",
                "commitOid": "a" * 40,
            }
        return 200, {"id": "someone/model", "sha": "a" * 40, "siblings": [], "tags": []}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            hub.tokens.add(self.headers.get("authorization"))
            status, content = hub.answer(self.path.partition("?")[0], body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = _serve

        def log_message(self, *args: Any) -> None:
            """Nothing: the test says what it saw."""

    return Handler
