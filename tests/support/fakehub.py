"""A hub on 127.0.0.1 for tests: what huggingface_hub asks for when it resolves a revision, lists files, fetches and uploads them.

ROOT/models/ORG/NAME/REVISION/... and ROOT/datasets/... hold the files. A commit is a hash of a revision's files. `Hub.gated`,
`private` and `moved` name repositories, `status` is what every request is answered with, and `requests` tells what was asked. `user` is
what the hub knows of whoever shows a token, `is_closed` whether it takes no writes from them.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """The server, on this port or a free one, in a thread of its own until `close`."""

    daemon_threads = True

    def __init__(self, root: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.root = root
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.moved: dict[str, str] = {}
        self.status: int | None = None
        self.user = {"type": "user", "name": "alice", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        self.is_closed = False
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Stop answering: connections are refused."""
        self.shutdown()
        self.server_close()

    def counted(self) -> int:
        """How many requests there were since the last call."""
        number = len(self.requests)
        self.requests.clear()
        return number

    def commit(self, kind: str, name: str, revision: str = "main") -> str | None:
        """40 digits for a branch's files, or for a commit itself; None where there is no such revision."""
        for folder in (self.root / kind / name).iterdir():
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            sha = hashlib.sha1()
            for path in files:
                sha.update(f"{path.relative_to(folder)} ".encode() + path.read_bytes())
            if revision in (folder.name, sha.hexdigest()):
                return sha.hexdigest()
        return None

    def folder(self, kind: str, name: str, revision: str) -> Path:
        """Where the files of a branch or a commit lie."""
        commit = self.commit(kind, name, revision)
        return next(path for path in (self.root / kind / name).iterdir() if self.commit(kind, name, path.name) == commit)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        path = urlsplit(self.path).path.strip("/")
        if path != "api/agent-harnesses":  # the library's own, not about any repository
            self.server.requests.append(f"{self.command} {unquote(path)}")
        if self.server.status:
            return self._error(self.server.status, "told so", "")
        if self.command == "POST":
            return self._write(path, self.rfile.read(int(self.headers["Content-Length"])))
        if path == "api/whoami-v2":
            return self._json(self.server.user) if "Authorization" in self.headers else self._error(401, "Invalid token", "")
        if match := re.fullmatch(r"(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._answer(match[1] or "models", match[2], unquote(match[3]), "file", unquote(match[4]))
        if match := re.fullmatch(r"api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            return self._answer(match[1], match[2], unquote(match[4] or "main"), match[3] or "revision", "")
        return self._error(404, "no such page", "")

    do_HEAD = do_GET = do_POST = _serve

    def _write(self, path: str, body: bytes) -> None:
        """Make a repository, or commit the files that the lines of `body` hold."""
        hub = self.server
        if path == "api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if "Authorization" not in self.headers:
            return self._error(401, "Invalid username or password.", "")
        if hub.is_closed:
            return self._error(403, "You don't have the rights", "")
        if path == "api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or hub.user['name']}/{asked['name']}"
            if (hub.root / "models" / name).exists():
                return self._error(409, "You already created this model repo", "")
            (hub.root / "models" / name / "main").mkdir(parents=True)
            if asked["visibility"] == "private":
                hub.private.add(name)
            return self._json({"url": f"{hub.url}/{name}"})
        name, verb = re.fullmatch(r"api/models/([^/]+/[^/]+)/(preupload|commit)/main", path).groups()
        folder = hub.root / "models" / name / "main"
        if verb == "preupload":
            files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in json.loads(body)["files"]]
            return self._json({"files": files})
        for change in map(json.loads, body.splitlines()):
            if change["key"] == "file":
                (folder / change["value"]["path"]).write_bytes(base64.b64decode(change["value"]["content"]))
            elif change["key"] == "deletedFile":
                (folder / change["value"]["path"]).unlink()
        return self._json({"commitUrl": f"{hub.url}/{name}/commit/main", "commitOid": hub.commit("models", name)})

    def _answer(self, kind: str, name: str, revision: str, verb: str, file: str) -> None:
        hub, has_token = self.server, "Authorization" in self.headers
        if name in hub.moved:
            return self._reply(307, b"", {"Location": self.path.replace(name, hub.moved[name], 1)})
        if not (hub.root / kind / name).is_dir() or (name in hub.private and not has_token):
            return self._error(404 if has_token else 401, "Repository not found", "RepoNotFound")
        if name in hub.gated and not has_token and verb == "file":
            return self._error(401, f"Access to model {name} is restricted", "GatedRepo")
        commit = hub.commit(kind, name, revision)
        if commit is None:
            return self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        folder = hub.folder(kind, name, revision)
        if verb == "file":
            return self._file(folder / file, commit)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        if verb == "tree":
            return self._json([{**_entry(path), "path": path.relative_to(folder).as_posix()} for path in files])
        names = [{"rfilename": path.relative_to(folder).as_posix()} for path in files]
        return self._json(
            {"_id": "0" * 24, "id": name, "modelId": name, "sha": commit, "siblings": names, "private": name in hub.private}
        )

    def _file(self, path: Path, commit: str) -> None:
        if not path.is_file():
            return self._error(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit})
        body = path.read_bytes()
        return self._reply(200, body, {"X-Repo-Commit": commit, "ETag": f'"{_entry(path)["oid"]}"'})

    def _json(self, content: object) -> None:
        self._reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, message: str, code: str, headers: dict[str, str] | None = None) -> None:
        told = {"X-Error-Message": message, "X-Error-Code": code} if code else {}
        self._reply(status, json.dumps({"error": message}).encode(), told | (headers or {}))

    def _reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(path: Path) -> dict[str, object]:
    content = path.read_bytes()
    return {"type": "file", "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), "size": len(content)}
