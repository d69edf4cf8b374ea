"""FakeHub: a local HTTP server that speaks as much of the Hugging Face hub's API as downloading a model takes."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

COMMIT = "1" * 40


@dataclass
class FakeRepo:
    """One model: files by commit, and the branches and tags that name commits."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    token: str | None = None
    """Requests without this token get 401."""
    gated: bool = False


@dataclass(frozen=True)
class SeenRequest:
    method: str
    path: str
    range: str | None


class FakeHub:
    """Serves ``repos`` on 127.0.0.1 while the ``with`` block lasts.

    The first GET of a file whose name is in ``interrupted`` ends, connection and all, after half of its bytes.
    """

    def __init__(self, repos: dict[str, FakeRepo]) -> None:
        self.repos = repos
        self.interrupted: set[str] = set()
        self.requests: list[SeenRequest] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def downloads(self) -> list[str]:
        """Names of the files whose bytes were asked for."""
        return [seen.path.split("/")[-1] for seen in self.requests if seen.method == "GET" and "/resolve/" in seen.path]

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: object) -> None:
        """Silent: tests read ``FakeHub.requests``."""

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(SeenRequest(self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            parts = parts[2:]
        repo_id, action, rest = "/".join(parts[:2]), "".join(parts[2:3]), parts[3:]
        repo = self.hub.repos.get(repo_id)
        if repo is None:
            return self._refuse(404, "RepoNotFound")
        if repo.token and self.headers.get("Authorization") != f"Bearer {repo.token}":
            return self._refuse(401, "GatedRepo" if repo.gated else "RepoNotFound")
        revision = rest[0] if rest else "main"
        commit = repo.refs.get(revision, revision)
        files = repo.commits.get(commit)
        if files is None:
            return self._refuse(404, "RevisionNotFound")
        if action == "tree":
            return self._json([_tree_entry(name, content) for name, content in files.items()])
        if action == "resolve":
            return self._file(files, "/".join(rest[1:]), commit)
        return self._json({"id": repo_id, "sha": commit, "siblings": [{"rfilename": name} for name in files]})

    def _file(self, files: dict[str, bytes], name: str, commit: str) -> None:
        if name not in files:
            return self._refuse(404, "EntryNotFound")
        content, begin = files[name], 0
        wanted = self.headers.get("Range")
        if wanted:
            begin = int(wanted.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - begin))
        if wanted:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if name in self.hub.interrupted:
            self.hub.interrupted.remove(name)
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self.wfile.write(content[begin:])

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _tree_entry(name: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
