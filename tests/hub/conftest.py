"""A Hub on loopback: the part of its file protocol that huggingface_hub speaks, over repositories made by the tests."""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants


@dataclass
class Repo:
    """A repository at one commit; large files are redirected to a store of blobs on another host, as on the Hub."""

    files: dict[str, bytes]
    branches: tuple[str, ...] = ("main",)
    gated: bool = False
    private: bool = False

    @property
    def commit(self):
        return hashlib.sha1(b"".join(name.encode() + content for name, content in sorted(self.files.items()))).hexdigest()


@dataclass
class Hub:
    """What is served, what went wrong on purpose, and what was asked for."""

    repos: dict[str, Repo] = field(default_factory=dict)
    faults: list[tuple[str, object]] = field(
        default_factory=list
    )  # (part of a path, (status, headers) or number of bytes to cut after)
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""
    token: str = "hf_loopback"

    def add(self, key, files):
        """A repository, such as models/owner/name."""
        return self.repos.setdefault(key, Repo(dict(files)))

    def fault(self, path):
        """The next thing that goes wrong for this path, once."""
        for i, (part, what) in enumerate(self.faults):
            if part in path:
                del self.faults[i]
                return what
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        fault = hub.fault(f"{self.command} {path}")
        range_asked = self.headers.get("Range", "")
        hub.requests.append(f"{self.command} {path} {range_asked}".strip())
        if isinstance(fault, tuple):
            return self.send(fault[0], b"busy", fault[1])
        if api := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            kind, name, what, revision = api.groups()
            repo = self.allowed(f"{kind}/{name}", revision or "main")
            if repo is None:
                return None
            if what == "tree":
                return self.send_json([self.entry(file, content) for file, content in repo.files.items()])
            siblings = [{"rfilename": file} for file in repo.files]
            return self.send_json({"id": name, "sha": repo.commit, "siblings": siblings, "private": repo.private, "tags": []})
        if file := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            dataset, name, revision, filename = file.groups()
            key = f"{'datasets' if dataset else 'models'}/{name}"
            repo = self.allowed(key, revision)
            if repo is None:
                return None
            if filename not in repo.files:
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return self.send_file(key, repo, filename, fault)
        if blob := re.fullmatch(r"/cdn/(models|datasets)/([^/]+/[^/]+)/(.+)", path):
            kind, name, filename = blob.groups()
            return self.send_content(hub.repos[f"{kind}/{name}"].files[filename], fault, {})
        return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def allowed(self, key, revision):
        repo = self.server.hub.repos.get(key)
        known = self.headers.get("Authorization") == f"Bearer {self.server.hub.token}"
        if repo is None or (repo.private and not known):
            self.send(404 if known else 401, b"", {"X-Error-Code": "RepoNotFound"})
        elif repo.gated and not known:
            self.send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif revision not in (*repo.branches, repo.commit):
            self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            return repo
        return None

    def entry(self, file, content):
        entry = {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if is_large(file):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def send_file(self, key, repo, filename, fault):
        content = repo.files[filename]
        headers = {"X-Repo-Commit": repo.commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        if not is_large(filename):
            return self.send_content(content, fault, headers)
        headers |= {"X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
        return self.send(302, b"", {**headers, "Location": f"http://localhost:{self.server.server_port}/cdn/{key}/{filename}"})

    def send_content(self, content, cut_after, headers):
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begin = int(asked[1]) if asked else 0
        headers = {**headers, "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        return self.send(206 if asked else 200, content[begin:], headers, cut_after)

    def send_json(self, value):
        return self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status, body, headers, cut_after=None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut_after])
            if cut_after is not None:
                self.wfile.flush()
                self.close_connection = True


def is_large(file):
    return file.endswith((".safetensors", ".parquet"))


@pytest.fixture(scope="session")
def hub_server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub(endpoint=f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(hub_server, monkeypatch, tmp_path):
    """An empty Hub, and this process's huggingface_hub pointed at it with an empty cache and no token."""
    hub = hub_server.hub = Hub(endpoint=hub_server.hub.endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # what arrived before a cut is kept by the chunk
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("peftbench.hub.PAUSES", (0.01, 0.01))
    monkeypatch.setattr("time.sleep", lambda _: None)
    return hub
