"""A small Hub on 127.0.0.1: one model a server, with faults on demand, and a record of what was asked."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

REPOSITORY = "acme/Tiny-MoE"
FIRST, SECOND = "a" * 40, "b" * 40


@dataclass
class Hub:
    """What the server has and does. `commits` are folders of files by commit; `main` the newest one.

    `cut` is how often a body ends after half of its bytes; `status` and `code` answer everything with an
    error; `longer` adds bytes to every size in the listing; `ranges` False ignores range requests; `token`
    is asked of whoever reads or writes. `created` has the repositories that were made, and whether they are
    private; `received` the files of all commits that were pushed, `parents` what each was pushed onto,
    `stored` what came by LFS. `asked` has method, path and range of every request, `sent` the bytes of all
    bodies.
    """

    commits: dict[str, Path]
    main: str = FIRST
    cut: int = 0
    status: int = 200
    code: str = ""
    longer: int = 0
    ranges: bool = True
    token: str | None = None
    created: dict[str, bool] = field(default_factory=dict)
    received: dict[str, bytes] = field(default_factory=dict)
    parents: list[str | None] = field(default_factory=list)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    sent: int = 0
    stored: dict[str, bytes] = field(default_factory=dict)
    endpoint: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def files(self, commit: str) -> dict[str, Path]:
        """Files of a commit by their names."""
        folder = self.commits[commit]
        return {
            file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()
        }

    def commit(self, revision: str) -> str | None:
        """What a revision means."""
        revision = self.main if revision == "main" else revision
        return revision if revision in self.commits else None

    def names(self) -> list[str]:
        """Files whose bytes were asked for, each once."""
        found = [re.search(r"/resolve/[^/]+/(.+)", path) for method, path, _ in self.asked if method == "GET"]
        return sorted({match[1] for match in found if match})


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Run it for the block; `hub.endpoint` says where."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    """The requests that huggingface_hub makes to read a model."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._receive()

    def do_PUT(self) -> None:
        self._receive()

    def _receive(self) -> None:
        """What huggingface_hub sends to publish: a repository, files by LFS, a commit that names them."""
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(self._chunks())
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with hub.lock:
            hub.asked.append((self.command, path, ""))
        if hub.status != 200:
            return self._error(hub.status, hub.code)
        if path.startswith("/lfs/"):
            hub.stored[path.rsplit("/", 1)[1]] = body
            return self._send(200, b"", {})
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._error(401, "")
        if found := re.fullmatch("/api/models/(.+)/commit/main", path):
            return self._commit(found[1], [json.loads(row) for row in body.splitlines() if row])
        told = json.loads(body)
        if path == "/api/repos/create":
            name = f"{told.get('organization') or 'me'}/{told['name']}"
            hub.created[name] = told.get("private") or told.get("visibility") == "private"
            return self._json({"url": f"{hub.endpoint}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self._json({"warnings": [], "errors": []})
        if "/preupload/" in path:
            modes = [
                {"path": each["path"], "shouldIgnore": False}
                | {"uploadMode": "lfs" if each["path"].endswith(".gguf") else "regular"}
                for each in told["files"]
            ]
            return self._json({"files": modes})
        assert path.endswith(".git/info/lfs/objects/batch"), path
        there = [each for each in told["objects"] if each["oid"] not in hub.stored]
        objects = [
            each | {"actions": {"upload": {"href": f"{hub.endpoint}/lfs/{each['oid']}"}}} for each in there
        ] + [each for each in told["objects"] if each["oid"] in hub.stored]
        return self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, rows: list[dict[str, Any]]) -> None:
        hub, parent = self.hub, rows[0]["value"].get("parentCommit")
        if parent is not None and parent != hub.main:
            return self._error(412, "")
        hub.parents.append(parent)
        for row in rows[1:]:
            value = row["value"]
            content = hub.stored[value["oid"]] if row["key"] == "lfsFile" else b64decode(value["content"])
            hub.received[value["path"]] = content
        return self._json({"commitUrl": f"{hub.endpoint}/{name}/commit/{SECOND}", "commitOid": SECOND})

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        with hub.lock:
            hub.asked.append((self.command, path, self.headers.get("Range", "")))
        if hub.status != 200:
            return self._error(hub.status, hub.code)
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._error(401, "GatedRepo")
        api = re.fullmatch(rf"/api/models/{REPOSITORY}(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(rf"/{REPOSITORY}/resolve/([^/]+)/(.+)", path)
        if not api and not file:
            return self._error(404, "RepoNotFound")
        commit = hub.commit((api[2] if api else file[1] if file else None) or "main")
        if commit is None:
            return self._error(404, "RevisionNotFound")
        if api and api[1] == "tree":
            return self._json([self._entry(name, size) for name, size in self._sizes(commit).items()])
        if api:
            siblings = [{"rfilename": name, "size": size} for name, size in self._sizes(commit).items()]
            return self._json({"id": REPOSITORY, "sha": commit, "private": False, "siblings": siblings})
        assert file is not None
        source = hub.files(commit).get(file[2])
        if source is None:
            return self._error(404, "EntryNotFound")
        return self._file(commit, file[2], source.read_bytes())

    def _sizes(self, commit: str) -> dict[str, int]:
        return {name: file.stat().st_size + self.hub.longer for name, file in self.hub.files(commit).items()}

    @staticmethod
    def _entry(name: str, size: int) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": size, "oid": hashlib.sha1(name.encode()).hexdigest()}

    def _file(self, commit: str, name: str, data: bytes) -> None:
        etag = hashlib.sha256(data).hexdigest()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        total, headers = len(data), {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        status = 200
        if asked and self.hub.ranges:
            begin, end = int(asked[1]), min(int(asked[2]) + 1 if asked[2] else total, total)
            data, status = data[begin:end], 206
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{total}"
        if status == 200:
            headers["Content-Length"] = str(total + self.hub.longer)
        self._send(status, data, headers, cut=self._cuts(name))

    def _cuts(self, name: str) -> bool:
        """Whether this body is to end early."""
        with self.hub.lock:
            cuts = self.command == "GET" and self.hub.cut > 0 and name.endswith((".safetensors", ".gguf"))
            self.hub.cut -= cuts
        return cuts

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code} if code else {})

    def _send(self, status: int, data: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        whole = int(headers.get("Content-Length", len(data))) == len(data)
        body = data[: len(data) // 2] if cut else data
        with self.hub.lock:  # before it goes out: whoever has read it finds it counted
            self.hub.sent += len(body)
        self.wfile.write(body)
        if cut or not whole:
            self.wfile.flush()
            self.close_connection = True
