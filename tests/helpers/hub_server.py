"""A local Hugging Face Hub in memory: listing, downloads and commits of model files, private repositories."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "a" * 34
READ_ONLY = "hf_" + "r" * 34


class Hub(ThreadingHTTPServer):
    """`repos` is {id: {branch: {file: content}}}; `asked` lists "METHOD path" of every request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.hidden: dict[str, str] = {}  # id: the error's code, RepoNotFound or GatedRepo
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """One request; a commit's name is the hash of its files."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        """Silent."""

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            repo_id, files = match[1], self.files(match[1], match[3] or "main")
            if files is not None and match[2] == "tree":
                entries = [(name, len(content), oid(content)) for name, content in files.items()]
                self.answer([{"type": "file", "path": n, "size": size, "oid": o} for n, size, o in entries])
            elif files is not None:
                siblings = [{"rfilename": name} for name in files]
                private = repo_id in self.server.hidden
                self.answer({"id": repo_id, "sha": commit(files), "siblings": siblings, "private": private})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            files = self.files(match[1], match[2])
            if files is not None and match[3] not in files:
                self.refuse(404, "EntryNotFound")
            elif files is not None:
                content = files[match[3]]
                self.send(content, {"ETag": f'"{oid(content)}"', "X-Repo-Commit": commit(files)})
        else:
            self.refuse(404, "RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            wrong = "no-such" in json.loads(body)["content"]
            errors = [{"message": '"license" must be one of those known'}] * wrong
            self.answer({"errors": errors, "warnings": []}, 400 if wrong else 200)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refuse(403 if READ_ONLY in self.headers.get("Authorization", "") else 401, "")
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked['organization']}/{asked['name']}"
            there = repo_id in self.server.repos
            self.server.repos.setdefault(repo_id, {"main": {}})
            if not there and (asked.get("private") or asked.get("visibility") == "private"):
                self.server.hidden[repo_id] = "RepoNotFound"
            self.answer({"url": f"{self.server.url}/{repo_id}"}, 409 if there else 200)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            branches = self.server.repos[match[1]]
            self.answer({}, 409 if match[2] in branches else 200)
            branches.setdefault(match[2], dict(branches["main"]))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            how = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": file["path"]} | how for file in json.loads(body)["files"]]})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            files = self.server.repos[match[1]][match[2]]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.url}/{match[1]}/commit/{commit(files)}"
            self.answer({"success": True, "commitOid": commit(files), "commitUrl": url})
        else:
            self.refuse(404, "RepoNotFound")

    def files(self, repo_id: str, revision: str) -> dict[str, bytes] | None:
        """Those of a branch or commit; None once the request was refused."""
        branches, code = self.server.repos.get(repo_id), self.server.hidden.get(repo_id)
        if branches is None or (code and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            return self.refuse(403 if code == "GatedRepo" else 401, code or "RepoNotFound")
        for name, files in branches.items():
            if revision in (name, commit(files)):
                return files
        return self.refuse(404, "RevisionNotFound")

    def answer(self, data: object, status: int = 200) -> None:
        self.send(json.dumps(data).encode(), {"Content-Type": "application/json"}, status)

    def refuse(self, status: int, code: str) -> None:
        """An error as the Hub marks it."""
        self.send(b"{}", {"X-Error-Code": code, "X-Error-Message": code}, status)

    def send(self, body: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def oid(content: bytes) -> str:
    """git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def commit(files: dict[str, bytes]) -> str:
    """A name of these files, 40 hex characters as git's."""
    return oid(json.dumps({name: oid(content) for name, content in files.items()}).encode())


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub that answers until the block ends."""
    with Hub() as hub:
        Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield hub
        hub.shutdown()
