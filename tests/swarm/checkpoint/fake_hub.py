"""A model hub on loopback: the endpoints, headers and redirects that downloading a model uses.

GET  /api/models/ORG/NAME/revision/REV?blobs=true    commit, file names, sizes, SHA-256 of large files
HEAD /ORG/NAME/resolve/COMMIT/FILE                   ETag, X-Repo-Commit; large files redirect to /cdn/SHA256
GET  the same, or /cdn/SHA256                        content, with Range
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class FakeHub:
    """Repositories are directories; each has one commit, on `main`. Change the attributes to break things."""

    def __init__(self, port: int):
        self.url = f"http://127.0.0.1:{port}"
        self.cdn = f"http://localhost:{port}"
        """Another host name, as on the real hub: a client then takes size and hash from the redirect itself."""
        self.repos: dict[str, Path] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.large = re.compile(r".*\.safetensors")
        """Files that are stored outside git, with a SHA-256."""
        self.corrupt: set[str] = set()
        """Files that are sent with other bytes than announced."""
        self.fetched: list[str] = []
        """Names of files whose content was sent."""
        self.asked = 0
        """How often a repository's listing was asked for."""

    def commit(self, repo: str) -> str:
        names = b"".join(path.name.encode() + path.read_bytes() for path in sorted(self.repos[repo].iterdir()))
        return hashlib.sha1(names).hexdigest()

    def entry(self, path: Path) -> dict[str, object]:
        data = path.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        found: dict[str, object] = {"rfilename": path.name, "size": len(data), "blobId": blob}
        if self.large.fullmatch(path.name):
            found["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return found


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._list(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(found[1], found[2], found[3])
        elif found := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            self._send_file(self.hub.repos[found[1]] / found[2], {})
        else:
            self._send(404, {}, b"")

    def _list(self, repo: str, revision: str) -> None:
        hub = self.hub
        hub.asked += 1
        if repo not in hub.repos or repo in hub.private:
            self._send(401 if repo in hub.private else 404, {"X-Error-Code": "RepoNotFound"}, b"{}")
        elif repo in hub.gated:
            self._send(403, {"X-Error-Code": "GatedRepo"}, b"{}")
        elif revision not in ("main", hub.commit(repo)):
            self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"{}")
        else:
            siblings = [hub.entry(path) for path in sorted(hub.repos[repo].iterdir())]
            body = {"id": repo, "modelId": repo, "sha": hub.commit(repo), "private": False, "siblings": siblings}
            self._send(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        path = self.hub.repos[repo] / name
        commit = self.hub.commit(repo)
        if not path.is_file() or revision not in (commit, "main"):
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b"")
            return
        entry = self.hub.entry(path)
        if "lfs" not in entry:
            self._send_file(path, {"ETag": f'"{entry["blobId"]}"', "X-Repo-Commit": commit})
            return
        headers = {
            "Location": f"{self.hub.cdn}/cdn/{repo}/{name}",
            "X-Repo-Commit": commit,
            "X-Linked-Etag": f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"',
            "X-Linked-Size": str(path.stat().st_size),
        }
        self._send(302, headers, b"")

    def _send_file(self, path: Path, headers: dict[str, str]) -> None:
        data = path.read_bytes()
        if path.name in self.hub.corrupt:
            data = bytes(len(data))
        if self.command == "GET":
            self.hub.fetched.append(path.name)
        status = 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(found[1]), min(int(found[2] or len(data) - 1), len(data) - 1)
            status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"}
            data = data[start : end + 1]
        self._send(status, headers, data)

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serve_hub() -> Iterator[FakeHub]:
    """Run a hub until the end of the block."""

    class Handler(_Handler):
        pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Handler.hub = FakeHub(server.server_port)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield Handler.hub
        finally:
            server.shutdown()
            thread.join()
