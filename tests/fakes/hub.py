"""A model hub on this machine: the few requests that a download makes, and what was asked for."""

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
