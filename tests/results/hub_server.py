"""A small Hugging Face Hub on the loopback, for tests: the real huggingface_hub client talks to it over HTTP.

```python
with HubServer() as hub:
    os.environ |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}  # before huggingface_hub is imported
```
Everything lives in memory and dies with the `with` block. It keeps what the client relies on: status codes and their
X-Error-Code, ETags, redirects of large files, who may write where. It has no branches and no pull requests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITE, READ, FINE, OTHER = "hf_test_write", "hf_test_read", "hf_test_fine", "hf_test_other"
"""Tokens: `me` writing, `me` reading, `me` with a fine-grained one for `team` and `me/one`, and somebody else's."""

LARGE = (".safetensors", ".bin", ".pt", ".gguf", ".onnx")


def _person(name: str, role: str, orgs: dict[str, str], **access: Any) -> dict[str, Any]:
    token = {"displayName": "test", "role": role, **access}
    organisations = [{"type": "org", "name": org, "roleInOrg": rank} for org, rank in orgs.items()]
    return {"type": "user", "name": name, "orgs": organisations, "auth": {"type": "access_token", "accessToken": token}}


def _scope(kind: str, name: str, *permissions: str) -> dict[str, Any]:
    return {"entity": {"_id": "0", "type": kind, "name": name}, "permissions": list(permissions)}


def people() -> dict[str, dict[str, Any]]:
    orgs = {"team": "write", "readers": "read"}
    scoped = [_scope("user", "me", "repo.content.read"), _scope("org", "team", "repo.content.read", "repo.write")]
    scoped.append(_scope("model", "me/one", "repo.write"))
    return {
        WRITE: _person("me", "write", orgs),
        READ: _person("me", "read", orgs),
        FINE: _person("me", "fineGrained", orgs, fineGrained={"global": [], "scoped": scoped}),
        OTHER: _person("other", "write", {}),
    }


class Refused(Exception):
    """Answered as an HTTP error, with the headers the client reads."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Repo:
    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes]) -> str:
        listing = "".join(f"{path} {_git_sha(data)}\n" for path, data in sorted(files.items()))
        sha = hashlib.sha1(f"{len(self.commits)}\n{listing}".encode()).hexdigest()
        self.commits.append((sha, files))
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        if revision == "main":
            return self.commits[-1]
        for sha, files in self.commits:
            if sha == revision:
                return sha, files
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def _git_sha(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _is_large(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LARGE) or size > 10 * 2**20)


def _numbers(tree: Any) -> Iterator[float]:
    if isinstance(tree, dict | list):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _numbers(part)
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield tree


def card_errors(content: str) -> list[str]:
    """What the Hub would say about a model card's metadata; empty if it would take it."""
    block = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", content, re.S)
    if block is None:
        return []
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {' '.join(str(error).split())}"]
    if not isinstance(data, dict):
        return ['"metadata" must be an object']
    errors = [f"{number} is not a valid number" for number in _numbers(data) if not math.isfinite(number)]
    base = data.get("base_model", [])
    for name in base if isinstance(base, list) else [base]:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)):
            errors.append(f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.')
    if data.get("base_model_relation", "finetune") not in ("adapter", "merge", "quantized", "finetune"):
        errors.append('"base_model_relation" must be one of [adapter, merge, quantized, finetune]')
    for number, entry in enumerate(data.get("model-index", [])):
        errors += _model_index_errors(f"model-index[{number}]", entry)
    return errors


def _model_index_errors(where: str, entry: Any) -> list[str]:
    needed = [(f"{where}.name", entry.get("name")), (f"{where}.results", entry.get("results"))]
    for number, result in enumerate(entry.get("results") or []):
        here = f"{where}.results[{number}]"
        needed += [(f"{here}.task.type", result.get("task", {}).get("type"))]
        needed += [(f"{here}.dataset.{key}", result.get("dataset", {}).get(key)) for key in ("type", "name")]
        needed += [(f"{here}.metrics.{key}", metric.get(key)) for metric in result["metrics"] for key in ("type", "value")]
    return [f'"{name}" is required' for name, value in needed if value is None or value == ""]


class HubServer:
    """The state, and the server's life. `fail_uploads = True` refuses large files and commits from then on."""

    def __init__(self) -> None:
        self.people = people()
        self.repos: dict[str, Repo] = {}
        self.datasets: dict[str, str] = {"glue": "nyu-mll/glue", "nyu-mll/glue": "nyu-mll/glue"}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.fail_uploads = False
        self.lock = threading.RLock()

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(_Handler):
            state = hub

        # Two ports: a redirect to another host is, for the client, the storage of large files; others it follows.
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        self._threads = [
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
            for server in self._servers
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_address[1]}"

    @property
    def storage(self) -> str:
        return f"http://127.0.0.1:{self._servers[1].server_address[1]}"

    def files(self, repo_id: str) -> dict[str, bytes]:
        """What `main` of a repository holds."""
        return self.repos[repo_id].commits[-1][1]

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> None:
        """A repository that was there before."""
        self.repos[repo_id] = Repo(private)
        self.repos[repo_id].commit(files)


ROUTES: list[tuple[str, str, str]] = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", r"/api/datasets/(?P<repo_id>[^/]+(?:/[^/]+)?)", "dataset"),
    ("GET", r"/api/models/(?P<repo_id>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", "tree"),
    ("POST", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", r"/(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", "store"),
    ("POST", r"/api/verify", "verify"),
    ("GET", r"/storage/(?P<oid>[0-9a-f]{64})", "fetch"),
    ("GET", r"/(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 64 * 1024
    state: HubServer

    def log_message(self, *_: Any) -> None:
        """Tests read `HubServer.requests` instead."""

    def _answer(self) -> None:
        # The body is read first, whatever the answer: else its bytes would be taken for the next request.
        self.body = self._read_body()
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        verb = "GET" if self.command == "HEAD" else self.command
        with self.state.lock:
            self.state.requests.append(f"{self.command} {url.path}")
            try:
                for method, pattern, name in ROUTES:
                    if method == verb and (match := re.fullmatch(pattern, url.path)):
                        groups = {key: unquote(value or "") for key, value in match.groupdict().items()}
                        return getattr(self, name)(**groups)
                raise Refused(404, f"no such page: {verb} {url.path}")
            except Refused as refused:
                headers = {"X-Error-Message": refused.message}
                headers |= {"X-Error-Code": refused.code} if refused.code else {}
                self._send(refused.status, {"error": refused.message}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json; charset=utf-8"
        self.send_response(status)
        for key, value in ({"Content-Type": kind, "Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Who asks, and what they may do

    def _me(self) -> dict[str, Any] | None:
        header = self.headers.get("Authorization", "")
        if not header:
            return None
        person = self.state.people.get(header.removeprefix("Bearer "))
        if person is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return person

    def _may_write(self, owner: str, repo_id: str = "") -> bool:
        me = self._me()
        if me is None:
            return False
        token = me["auth"]["accessToken"]
        ranks = {org["name"]: org["roleInOrg"] for org in me["orgs"]} | {me["name"]: "admin"}
        if token["role"] == "fineGrained":
            scoped = token["fineGrained"]["scoped"]
            writable = {scope["entity"]["name"] for scope in scoped if "repo.write" in scope["permissions"]}
            return bool(writable & {owner, repo_id})
        return token["role"] == "write" and ranks.get(owner, "read") != "read"

    def _repo(self, repo_id: str, write: bool = False) -> Repo:
        me, owner = self._me(), repo_id.split("/")[0]
        repo = self.state.repos.get(repo_id)
        owners = {me["name"], *(org["name"] for org in me["orgs"])} if me else set()
        if repo is None or (repo.private and owner not in owners):
            # As the Hub does: a stranger is not told whether a repository is private or missing.
            if me is None:
                raise Refused(401, "Invalid username or password.", "RepoNotFound")
            raise Refused(404, "Repository not found", "RepoNotFound")
        if write and not self._may_write(owner, repo_id):
            raise Refused(403, "You don't have the required permissions to write to this repository")
        return repo

    def _no_token(self) -> None:
        if "Authorization" in self.headers:
            raise Refused(400, "A token was sent to the storage, which is not the Hub")

    # The API

    def whoami(self) -> None:
        me = self._me()
        if me is None:
            raise Refused(401, "Invalid username or password.")
        self._send(200, me)

    def create(self) -> None:
        asked, me = json.loads(self.body), self._me()
        if me is None:
            raise Refused(401, "Invalid username or password.")
        owner = asked.get("organization") or me["name"]
        repo_id = f"{owner}/{asked['name']}"
        if not self._may_write(owner):
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        there = {"url": f"{self.state.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.state.repos:
            return self._send(409, there | {"error": "You already created this model repo"})
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.state.add(repo_id, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, private)
        self._send(200, there)

    def validate_yaml(self) -> None:
        errors = card_errors(json.loads(self.body)["content"])
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        self._send(400 if errors else 200, answer | ({"error": "Invalid metadata"} if errors else {}))

    def dataset(self, repo_id: str) -> None:
        if repo_id not in self.state.datasets:
            raise Refused(404, "Repository not found", "RepoNotFound")
        self._send(200, {"id": self.state.datasets[repo_id], "tags": [], "siblings": []})

    def info(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id)
        sha, files = repo.at(revision or "main")
        card = re.match(r"---\n(.*?)\n---", files.get("README.md", b"").decode(), re.S)
        data = yaml.safe_load(card[1]) if card else {}
        answer = {"id": repo_id, "modelId": repo_id, "sha": sha, "private": repo.private, "cardData": data}
        answer |= {"author": repo_id.split("/")[0], "tags": data.get("tags", []), "gated": False, "disabled": False}
        answer |= {key: data[key] for key in ("pipeline_tag", "library_name") if key in data}
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(files)]
        if self.query.get("blobs"):
            for sibling, (path, data) in zip(siblings, sorted(files.items()), strict=True):
                large = (
                    {"lfs": {"sha256": _sha256(data), "size": len(data), "pointerSize": 134}}
                    if _is_large(path, len(data))
                    else {}
                )
                sibling |= {"blobId": _git_sha(data), "size": len(data), **large}
        self._send(200, answer | {"siblings": siblings})

    def tree(self, repo_id: str, revision: str, path: str) -> None:
        _, files = self._repo(repo_id).at(revision)
        under = f"{path}/" if path else ""
        inside = {name: data for name, data in files.items() if name.startswith(under)}
        if not inside:
            raise Refused(404, f'{path} does not exist on "{revision}"', "EntryNotFound")
        recursive = self.query.get("recursive", ["False"])[0].lower() in ("true", "1")
        entries: dict[str, dict[str, Any]] = {}
        for name, data in sorted(inside.items()):
            parts = name.removeprefix(under).split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                folder = under + "/".join(parts[:depth])
                entries[folder] = {"type": "directory", "path": folder, "oid": _git_sha(folder.encode()), "size": 0}
            if recursive or len(parts) == 1:
                entries[name] = {"type": "file", "path": name, "oid": _git_sha(data), "size": len(data)}
                if _is_large(name, len(data)):
                    entries[name]["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 134}
        self._send(200, list(entries.values()))

    def preupload(self, repo_id: str, revision: str) -> None:
        _, files = self._repo(repo_id, write=True).at(revision)
        answers = []
        for asked in json.loads(self.body)["files"]:
            path, large = asked["path"], _is_large(asked["path"], asked["size"])
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if path in files:
                answer["oid"] = _sha256(files[path]) if large else _git_sha(files[path])
            answers.append(answer)
        self._send(200, {"files": answers})

    def batch(self, repo_id: str) -> None:
        self._repo(repo_id, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.state.storage}/storage/{asked['oid']}"}
            actions = {"upload": upload, "verify": {"href": f"{self.state.endpoint}/api/verify"}}
            objects.append(asked | ({} if asked["oid"] in self.state.objects else {"actions": actions}))
        self._send(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        self._no_token()
        # 507 and not 503: the client would try a 503 again for half a minute.
        if self.state.fail_uploads:
            raise Refused(507, "The storage is full")
        if _sha256(self.body) != oid:
            raise Refused(400, "The content does not match its sha256")
        self.state.objects[oid] = self.body
        self._send(200, b"", {"ETag": f'"{oid}"'})

    def verify(self) -> None:
        asked = json.loads(self.body)
        if len(self.state.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "The object is not there")
        self._send(200, {})

    def fetch(self, oid: str) -> None:
        self._no_token()
        self._send_file(self.state.objects[oid], {"ETag": f'"{oid}"'})

    def commit(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id, write=True)
        if self.state.fail_uploads:
            raise Refused(507, "The storage is full")
        files = dict(repo.at(revision)[1])
        for line in self.body.decode().splitlines():
            operation = json.loads(line)
            self._apply(operation["key"], operation["value"], files)
        if errors := card_errors(files.get("README.md", b"").decode()):
            raise Refused(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
        sha = repo.commit(files)
        url = f"{self.state.endpoint}/{repo_id}/commit/{sha}"
        self._send(200, {"success": True, "commitOid": sha, "commitUrl": url})

    def _apply(self, key: str, value: dict[str, Any], files: dict[str, bytes]) -> None:
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in self.state.objects:
                raise Refused(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
            files[value["path"]] = self.state.objects[value["oid"]]
        elif key in ("deletedFile", "deletedFolder"):
            gone = [path for path in files if path == value["path"] or path.startswith(value["path"].rstrip("/") + "/")]
            if not gone:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            for path in gone:
                del files[path]

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        sha, files = self._repo(repo_id).at(revision)
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        data = files[path]
        if not _is_large(path, len(data)):
            return self._send_file(data, {"X-Repo-Commit": sha, "ETag": f'"{_git_sha(data)}"'})
        # Large files live elsewhere: the answer's own ETag and length are those of the redirect, not of the file.
        oid = _sha256(data)
        self.state.objects[oid] = data
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data)), "X-Repo-Commit": sha}
        linked |= {"Location": f"{self.state.storage}/storage/{oid}", "ETag": '"redirect"'}
        self._send(302, b"Found. Redirecting", linked)

    def _send_file(self, data: bytes, headers: dict[str, str]) -> None:
        headers = {"Accept-Ranges": "bytes"} | headers
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._send(200, data, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
        if first > last:
            return self._send(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
        self._send(206, data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})
