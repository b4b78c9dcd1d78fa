"""A Hub on 127.0.0.1 that speaks as much of the real one's HTTP API as reading and uploading SAEs needs.

`hub.add(...)` makes repositories. `hub.next(...)` scripts what happens to the following requests: a status, a cut
connection, damaged bytes. Every request is kept in `hub.log`. Large files are served as the real Hub serves them, by a
redirect to another host (here: another name of this one), which must never see the user's token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import pytest


def git_blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    files: dict[str, bytes]
    lfs: frozenset[str] = frozenset()
    gated: bool = False
    private: bool = False
    history: list[str] = field(default_factory=list)

    @property
    def commit(self) -> str:
        return self.history[-1]

    def commit_now(self) -> str:
        content = repr(sorted(self.files.items())) + str(len(self.history))
        self.history.append(hashlib.sha1(content.encode()).hexdigest())
        return self.commit


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]

    def __repr__(self) -> str:
        return f"{self.method} {self.path}" + (f" [{self.headers['range']}]" if "range" in self.headers else "")


@dataclass
class Fault:
    """What goes wrong with the next request whose line contains `where`."""

    where: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # bytes of the body that still arrive
    reset: bool = False  # the connection is reset instead of closed
    damage: bool = False  # one byte of the body is flipped
    ignore_range: bool = False
    body: bytes = b"scripted"  # of an answer with a scripted status


class Hub:
    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.log: list[Request] = []
        self.faults: deque[Fault] = deque()
        self.token = "hf_right"
        self.staged: dict[str, bytes] = {}  # uploaded LFS objects
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, repo_id: str, files: dict[str, bytes], *, lfs: tuple[str, ...] = (), **kinds: bool) -> Repository:
        repository = Repository(dict(files), frozenset(lfs), **kinds)
        repository.commit_now()
        self.repositories[repo_id] = repository
        return repository

    def next(self, where: str, times: int = 1, **what: Any) -> None:
        self.faults.extend(Fault(where, **what) for _ in range(times))

    def lines(self, method: str = "", where: str = "") -> list[Request]:
        return [request for request in self.log if method in request.method and where in request.path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.fault = Fault("")
        path = unquote(self.path.partition("?")[0])
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.hub.log.append(Request(self.command, path, headers))
        line = f"{self.command} {path}"
        for fault in self.hub.faults:
            if fault.where in line:
                self.hub.faults.remove(fault)
                self.fault = fault
                break
        if self.fault.status is not None:
            return self.send(self.fault.status, self.fault.body, self.fault.headers)
        if path.startswith("/cdn/"):
            return self.send_file(self.blob(path.removeprefix("/cdn/")), {"ETag": '"of-the-cdn"'})
        if path.startswith("/api/"):
            return self.api(path.removeprefix("/api/"))
        if path.startswith("/staged/"):
            self.hub.staged[path.removeprefix("/staged/")] = self.body
            return self.send(200, b"")
        if path.endswith("/info/lfs/objects/batch"):
            return self.lfs_batch()
        return self.resolve(path)

    # -- reading --

    def resolve(self, path: str) -> None:
        repo_id, _, rest = path.removeprefix("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        repository = self.repository(repo_id, revision)
        if repository is None:
            return None
        commit = revision if revision in repository.history else repository.commit
        common = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if name not in repository.files:
            return self.send(
                404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", **common}
            )
        data = repository.files[name]
        if name in repository.lfs:
            sha = hashlib.sha256(data).hexdigest()
            location = f"http://localhost:{self.hub.port}/cdn/{sha}"  # another host, as far as a client can tell
            linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{sha}"', "Location": location}
            return self.send(302, b"", {**common, **linked})
        return self.send_file(data, {**common, "ETag": f'"{git_blob_id(data)}"'})

    def repository(self, repo_id: str, revision: str) -> Repository | None:
        """The repository, unless it may not be seen; then the refusal is already sent."""
        repository = self.hub.repositories.get(repo_id)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token != self.hub.token:
            self.send(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repository is None or (repository.private and not token):
            self.send(401 if not token else 404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Not found"})
        elif repository.gated and "/resolve/" in self.path and not repository.private:
            self.send(
                403 if token else 401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}
            )
        elif revision not in ("main", *repository.history):
            self.send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        else:
            return repository
        return None

    def blob(self, sha: str) -> bytes:
        files = (data for repository in self.hub.repositories.values() for data in repository.files.values())
        return next(data for data in files if hashlib.sha256(data).hexdigest() == sha)

    def send_file(self, data: bytes, headers: dict[str, str]) -> None:
        wanted = self.headers.get("Range")
        if wanted is None or self.fault.ignore_range or self.command == "HEAD":
            return self.send(200, data, headers)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
        if start >= len(data):
            return self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        return self.send(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    # -- the API --

    def api(self, path: str) -> None:
        if path == "whoami-v2":
            return self.send_json({"name": "lab", "type": "user", "orgs": [], "auth": {}})
        if path == "repos/create":
            asked = json.loads(self.body)
            repo_id = f"{asked.get('organization', 'lab')}/{asked['name']}"
            if asked.get("type") == "dataset":
                repo_id = f"datasets/{repo_id}"  # as its address begins
            if repo_id in self.hub.repositories:
                return self.send_json({"error": "exists", "url": f"{self.hub.url}/{repo_id}"}, 409)
            self.hub.add(
                repo_id, {}, private="private" in (asked.get("visibility"), asked.get("private") and "private")
            )
            return self.send_json({"url": f"{self.hub.url}/{repo_id}", "id": repo_id, "name": repo_id})
        if path == "validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        parts = path.removeprefix("models/").split("/")
        named = 3 if parts[0] == "datasets" else 2
        repo_id, action = "/".join(parts[:named]), parts[named:]
        if action[:1] in (["preupload"], ["commit"]):
            repository = self.hub.repositories[repo_id]
            return self.preupload() if action[0] == "preupload" else self.commit(repo_id, repository)
        if action[:1] == ["paths-info"]:
            return self.paths_info(self.hub.repositories[repo_id])
        return self.model_info(repo_id, action[1] if action[:1] == ["revision"] else "main")

    def model_info(self, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id, revision)
        if repository is not None:
            siblings = [{"rfilename": name} for name in repository.files]
            self.send_json({"id": repo_id, "sha": repository.commit, "siblings": siblings, "gated": repository.gated})

    def paths_info(self, repository: Repository) -> None:
        from urllib.parse import parse_qs

        asked = parse_qs(self.body.decode())["paths"]
        answer: list[dict[str, Any]] = []
        for name in asked:
            data = repository.files[name]
            answer.append({"type": "file", "path": name, "size": len(data), "oid": git_blob_id(data)})
            if name in repository.lfs:
                oid = hashlib.sha256(data).hexdigest()
                answer[-1]["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
        self.send_json(answer)

    def preupload(self) -> None:
        asked = json.loads(self.body)["files"]
        answer = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in asked
        ]
        self.send_json({"files": answer})

    def lfs_batch(self) -> None:
        asked = json.loads(self.body)["objects"]
        answer = [
            {
                "oid": item["oid"],
                "size": item["size"],
                "actions": {"upload": {"href": f"{self.hub.url}/staged/{item['oid']}"}},
            }
            for item in asked
        ]
        self.send_json({"transfer": "basic", "objects": answer})

    def commit(self, repo_id: str, repository: Repository) -> None:
        for line in self.body.decode().splitlines():
            record = json.loads(line)
            value = record["value"]
            if record["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif record["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.staged[value["oid"]]
                repository.lfs |= {value["path"]}
        sha = repository.commit_now()
        url = f"{self.hub.url}/{repo_id}/commit/{sha}"
        self.send_json({"commitOid": sha, "commitUrl": url, "hookOutput": "", "success": True})

    # -- sending --

    def send_json(self, data: Any, status: int = 200) -> None:
        self.send(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault.damage:
            body = bytes([body[0] ^ 1]) + body[1:]
        if self.fault.cut_after is None:
            self.wfile.write(body)
            return
        self.wfile.write(body[: self.fault.cut_after])
        self.wfile.flush()
        self.close_connection = True
        if self.fault.reset:
            import socket
            import struct

            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


class Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone away, or a connection that was reset on purpose, is no news."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    handler = type("ThisHub", (Handler,), {"hub": server})
    http = Server(("127.0.0.1", 0), handler)
    server.port = http.server_port
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _private_hub_settings(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads this user's token, cache or catalogue."""
    from huggingface_hub import constants

    home = tmp_path_factory.mktemp("hf")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        constants, "HF_HUB_DISABLE_XET", True
    )  # a protocol of its own, which this server does not speak
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "SAE_CORE_CATALOGUE"):
        monkeypatch.delenv(name, raising=False)
