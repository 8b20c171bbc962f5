"""A model hub on this machine: the few requests that a download makes, and what was asked for."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as hub repositories; give the address, and the files asked for as they are."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Be quiet."""

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = self.path.partition("?")[0].removeprefix("/").removeprefix("api/models/")
            owner, name, what, revision, *rest = [*path.split("/"), "", "", ""]
            folder = repositories.get(f"{owner}/{name}")
            if folder is None:
                self.refuse("RepoNotFound")
            elif revision not in {"main", "v1", COMMIT}:
                self.refuse("RevisionNotFound")
            elif what == "revision":
                self.send(json.dumps({"id": f"{owner}/{name}", "sha": COMMIT}).encode())
            elif what == "tree":
                files = [
                    {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": etag(p)}
                    for p in sorted(folder.iterdir())
                ]
                self.send(json.dumps(files).encode())
            else:
                asked.append(rest[0])
                self.send((folder / rest[0]).read_bytes(), ETag=f'"{etag(folder / rest[0])}"')

        def refuse(self, code: str) -> None:
            self.send(b"{}", status=404, **{"X-Error-Code": code})

        def send(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for header, value in headers.items():
                self.send_header(header, value)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()


def cached(home: Path, name: str, folder: Path, revision: str = "main") -> None:
    """Lay a folder's files out as huggingface_hub keeps them below HF_HOME."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (repository / "refs" / revision).write_text(COMMIT)
    for path in folder.iterdir():
        blob = repository / "blobs" / etag(path)
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(blob)


@contextmanager
def receive(*, private: bool = False, refuse: str = "") -> Iterator[tuple[str, dict[str, bytes]]]:
    """Take uploads as a hub does; give the address, and the files that were committed.

    ``private``: the repository is private already. ``refuse`` is the part of a request's path that
    is answered with 403.
    """
    sent: dict[str, bytes] = {}
    committed: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Be quiet."""

        def do_GET(self) -> None:
            self.send({"id": "me/model", "private": private})

        def do_POST(self) -> None:
            body = self.read()
            host = f"http://127.0.0.1:{self.server.server_port}"
            if refuse and refuse in self.path:
                self.send({"error": "no write access"}, 403)
            elif self.path == "/api/repos/create":
                self.send({"url": f"{host}/me/model"})
            elif "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                self.send({"files": [
                    {"path": name, "uploadMode": "lfs" if name.endswith(".onnx") else "regular",
                     "shouldIgnore": False} for name in names
                ]})  # fmt: skip
            elif self.path.endswith("/objects/batch"):
                self.send({"transfer": "basic", "objects": [
                    {**one, "authenticated": True,
                     "actions": {"upload": {"href": f"{host}/{one['oid']}"}}}
                    for one in json.loads(body)["objects"]
                ]})  # fmt: skip
            elif "/commit/" in self.path:
                self.commit(body)
                self.send({"success": True, "commitOid": COMMIT, "commitUrl": f"{host}/me/model"})
            else:
                self.send({"errors": [], "warnings": []})  # of the card's YAML

        def do_PUT(self) -> None:
            sent[self.path.removeprefix("/")] = self.read()
            self.send({})

        def commit(self, body: bytes) -> None:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    committed[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    committed[value["path"]] = sent[value["oid"]]

        def read(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content

        def send(self, answer: object, status: int = 200) -> None:
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", committed
        finally:
            server.shutdown()
            thread.join()
