"""A Hub on localhost: an HTTP server with the endpoints that `huggingface_hub` uses to publish and fetch a model.

Repositories are in memory. Large files (`.safetensors`) go through Git LFS, in parts where `part_size` is set; an
object that has arrived is not asked for again. Xet is not spoken: clients need `HF_HUB_DISABLE_XET=1`.

Failures are the server's own: `hub.fail("commit", 500)` answers the next request of that kind so, `hub.fail("upload",
DROP)` cuts the connection in the middle of its body, `hub.fail("upload", HOLD)` stops reading there until `release`.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

DROP = "drop"
HOLD = "hold"
USERS = {"hf_good": "me", "hf_reader": "reader"}  # token -> user; the second may not write

# Kind of request -> method and path. `repo` is OWNER/NAME.
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES: dict[str, tuple[str, str]] = {
    "whoami": ("GET", r"/api/whoami-v2"),
    "create": ("POST", r"/api/repos/create"),
    "validate": ("POST", r"/api/validate-yaml"),
    "info": ("GET", rf"/api/models/{REPO}(/revision/(?P<revision>.+))?"),
    "branch": ("POST", rf"/api/models/{REPO}/branch/(?P<revision>.+)"),
    "preupload": ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>.+)"),
    "commit": ("POST", rf"/api/models/{REPO}/commit/(?P<revision>.+)"),
    "batch": ("POST", rf"/{REPO}\.git/info/lfs/objects/batch"),
    "upload": ("PUT", r"/lfs/(?P<oid>\w+)(/(?P<part>\d+))?"),
    "complete": ("POST", r"/lfs/(?P<oid>\w+)/complete"),
    "verify": ("POST", r"/lfs/(?P<oid>\w+)/verify"),
    "file": ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
}


@dataclass
class Repository:
    """
    Attributes:
        branches: name -> commits, the oldest first; a commit is path -> content.
    """

    private: bool
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=lambda: {"main": [{".gitattributes": b""}]})

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.branches[revision][-1]

    def sha(self, revision: str = "main") -> str:
        content = f"{revision} {len(self.branches[revision])} {sorted(self.files(revision))}"
        return hashlib.sha1(content.encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """
    Attributes:
        repositories: OWNER/NAME -> repository.
        objects: LFS objects that have arrived, by SHA-256.
        requests: kind of each request so far, and what it was about (a repository or an object).
        part_size: of LFS uploads in bytes; None takes an object in one piece.
        held: set while a request is held.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        self.part_size: int | None = None
        self.held = threading.Event()
        self.release = threading.Event()
        self._failures: list[tuple[str, int | str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fail(self, kind: str, how: int | str, times: int = 1) -> None:
        """Let the next `times` requests of a kind fail: by a status, `DROP` or `HOLD`."""
        self._failures += [(kind, how)] * times

    def next_failure(self, kind: str) -> int | str | None:
        for i, (failing, how) in enumerate(self._failures):
            if failing == kind:
                del self._failures[i]
                return how
        return None

    def reset(self) -> None:
        for collection in (self.repositories, self.objects, self.parts, self.requests, self._failures):
            collection.clear()
        self.part_size = None
        self.held.clear()
        self.release.clear()

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.requests]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that goes away in the middle is what some tests are about


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield hub
        hub.release.set()
        hub.shutdown()


class Refused(Exception):
    """An answer that is no success: status and message."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one packet: a client acknowledges the second of two 40 ms late

    def do_GET(self) -> None:
        self.handle_one()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args: object) -> None:
        pass

    def handle_one(self) -> None:
        route = find_route("GET" if self.command == "HEAD" else self.command, unquote(urlsplit(self.path).path))
        if route is None:
            self.read_body()
            self.answer_json({"error": "not found"}, 404)
            return
        kind, fields = route
        self.server.requests.append((kind, fields.get("repo") or fields.get("oid", "")))
        how = self.server.next_failure(kind)
        try:
            if how in (DROP, HOLD):
                self.read_body(int(self.headers["Content-Length"]) // 2)
                if how == HOLD:
                    self.server.held.set()
                    self.server.release.wait(60)
                self.close_connection = True
                return
            body = self.read_body()
            if how is not None:
                raise Refused(int(how), f"injected {how}")
            Answers(self, body).of(kind, fields)
        except Refused as refused:
            self.answer_json({"error": str(refused)}, refused.status, {"X-Error-Code": refused.code or ""})

    def read_body(self, length: int | None = None) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0) if length is None else length)

    def answer_json(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.answer(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Answers:
    """What the Hub says to one request."""

    def __init__(self, handler: Handler, body: bytes) -> None:
        self.handler, self.hub, self.body = handler, handler.server, body

    def of(self, kind: str, fields: dict[str, str]) -> None:
        getattr(self, kind)(**fields)

    def user(self) -> str:
        token = self.handler.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in USERS:
            raise Refused(401, "Invalid username or password.")
        return USERS[token]

    def writer(self) -> str:
        user = self.user()
        if user != "me":
            raise Refused(403, "You don't have the required permissions")
        return user

    def repository(self, name: str, revision: str = "main") -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self.user() != name.partition("/")[0]):
            raise Refused(404, "Repository not found", "RepoNotFound")
        if revision not in found.branches and revision not in map(found.sha, found.branches):
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def whoami(self) -> None:
        self.handler.answer_json({"type": "user", "name": self.user(), "orgs": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or self.writer()}/{asked['name']}"
        if name.partition("/")[0] != self.writer():
            raise Refused(403, f"You don't have the rights to create a model under the namespace {name}")
        url = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repositories:
            self.handler.answer_json({**url, "error": "You already created this model repo"}, 409)
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[name] = Repository(private)
        self.handler.answer_json(url)

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        metadata = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
        errors = []
        if metadata.get("license") == "other" and "license_name" not in metadata:
            errors.append({"message": '"license_name" is required'})
        self.handler.answer_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def info(self, repo: str, revision: str = "main") -> None:
        found = self.repository(repo, revision)
        siblings = [{"rfilename": path} for path in found.files(self.branch_of(found, revision))]
        facts = {"id": repo, "sha": found.sha(self.branch_of(found, revision)), "private": found.private}
        self.handler.answer_json({**facts, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def branch(self, repo: str, revision: str) -> None:
        self.writer()
        branches = self.repository(repo).branches
        if revision in branches:
            raise Refused(409, "Reference already exists")
        branches[revision] = [branches["main"][-1]]
        self.handler.answer_json({})

    def preupload(self, repo: str, revision: str) -> None:
        self.writer()
        found = self.repository(repo, revision).files(revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                "shouldIgnore": False,
                "oid": oid(file["path"], found[file["path"]]) if file["path"] in found else None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.handler.answer_json({"files": files})

    def batch(self, repo: str) -> None:
        self.writer()
        self.repository(repo)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            known: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                known["actions"] = self.actions(asked["oid"], asked["size"])
            objects.append(known)
        self.handler.answer_json({"transfer": "basic", "objects": objects})

    def actions(self, oid: str, size: int) -> dict[str, Any]:
        url = f"{self.hub.url}/lfs/{oid}"
        verify = {"href": f"{url}/verify"}
        part_size = self.hub.part_size
        if part_size is None:
            return {"upload": {"href": url}, "verify": verify}
        parts = {f"{i:05}": f"{url}/{i}" for i in range(1, -(-size // part_size) + 1)}
        return {
            "upload": {"href": f"{url}/complete", "header": {"chunk_size": str(part_size), **parts}},
            "verify": verify,
        }

    def upload(self, oid: str, part: str | None = None) -> None:
        if part is None:
            self.store(oid, self.body)
        else:
            self.hub.parts.setdefault(oid, {})[int(part)] = self.body
        self.handler.answer(b"", headers={"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def complete(self, oid: str) -> None:
        parts = self.hub.parts.pop(oid)
        self.store(oid, b"".join(parts[number] for number in sorted(parts)))
        self.handler.answer_json({})

    def store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "the content is not what was announced")
        self.hub.objects[oid] = content

    def verify(self, oid: str) -> None:
        if oid not in self.hub.objects:
            raise Refused(404, "no such object")
        self.handler.answer_json({})

    def commit(self, repo: str, revision: str) -> None:
        self.writer()
        found = self.repository(repo, revision)
        files = dict(found.files(revision))
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refused(400, f"LFS object {value['oid']} has not been uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
        found.branches[revision].append(files)
        sha = found.sha(revision)
        self.handler.answer_json({"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha})

    def file(self, repo: str, revision: str, path: str) -> None:
        found = self.repository(repo, revision)
        branch = self.branch_of(found, revision)
        if path not in found.files(branch):
            raise Refused(404, "Entry not found", "EntryNotFound")
        content = found.files(branch)[path]
        self.handler.answer(
            content,
            headers={"X-Repo-Commit": found.sha(branch), "ETag": f'"{oid(path, content)}"', "Accept-Ranges": "bytes"},
        )

    def branch_of(self, found: Repository, revision: str) -> str:
        return next((name for name in found.branches if revision in (name, found.sha(name))), "main")


def find_route(method: str, path: str) -> tuple[str, dict[str, str]] | None:
    """Kind of a request, and what its path says."""
    for kind, (expected, pattern) in ROUTES.items():
        match = re.fullmatch(pattern, path)
        if match and method == expected:
            return kind, {name: value for name, value in match.groupdict().items() if value is not None}
    return None


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def oid(path: str, content: bytes) -> str:
    """What identifies a content: SHA-256 of LFS, or that of a Git blob."""
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
