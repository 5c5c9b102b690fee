"""A small server that speaks as much of the Hugging Face Hub's protocol as rl_zoo3's two commands use."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """
    Repositories of models in memory.

    :param url: Where they are
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.files: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []

    def revision(self, repository: str) -> str:
        content = b"".join(name.encode() + data for name, data in sorted(self.files[repository].items()))
        return hashlib.sha1(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, content: Any, code: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, what: str) -> None:
        self._answer({"error": f"{what} not found"}, 404, X_Error_Code=what, X_Error_Message=f"{what} not found")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        path = urlsplit(self.path).path
        self.hub.requests.append(f"POST {path}")
        if path == "/api/repos/create":
            facts = json.loads(body)
            repository = f"{facts['organization']}/{facts['name']}"
            is_new = repository not in self.hub.files
            self.hub.files.setdefault(repository, {".gitattributes": b"*.zip filter=lfs diff=lfs merge=lfs -text\n"})
            self._answer({"url": f"{self.hub.url}/{repository}"}, 200 if is_new else 409)
            return
        if path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
            return
        repository, _, action = path.removeprefix("/api/models/").partition("/preupload/")
        if action:
            wanted = json.loads(body)["files"]
            files = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in wanted]
            self._answer({"files": files})
            return
        repository, _, _ = path.removeprefix("/api/models/").partition("/commit/")
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.hub.files[repository][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        revision = self.hub.revision(repository)
        self._answer({"commitUrl": f"{self.hub.url}/{repository}/commit/{revision}", "commitOid": revision})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if path.startswith("/api/models/"):
            repository = "/".join(path.removeprefix("/api/models/").split("/")[:2])
            if repository not in self.hub.files:
                self._missing("RepoNotFound")
                return
            names, sha = self.hub.files[repository], self.hub.revision(repository)
            if "/tree/" in path:
                self._answer(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for name, data in names.items()
                    ]
                )
            else:
                self._answer(
                    {"id": repository, "modelId": repository, "sha": sha, "siblings": [{"rfilename": name} for name in names]}
                )
            return
        repository, _, rest = path.strip("/").partition("/resolve/")
        name = rest.partition("/")[2]
        if repository not in self.hub.files:
            self._missing("RepoNotFound")
        elif name not in self.hub.files[repository]:
            self._missing("EntryNotFound")
        else:
            data = self.hub.files[repository][name]
            tag = f'"{hashlib.sha1(data).hexdigest()}"'
            self._answer(data, ETag=tag, X_Repo_Commit=self.hub.revision(repository))

    do_HEAD = do_GET


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on this machine for the duration of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": hub})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
