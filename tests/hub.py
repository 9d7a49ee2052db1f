"""A small hub on loopback: what huggingface_hub asks for, served from folders of this machine.

Written from the requests that huggingface_hub 1.x makes: model info, a file's metadata (HEAD), and
a file or a part of it (GET).
"""

import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread


class Hub(ThreadingHTTPServer):
    """Serves ``{repo: {revision: folder}}``; `sent` counts bytes of bodies by file name."""

    daemon_threads = True

    def __init__(self, repos):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.sent, self.asked = repos, {}, []
        self.cut_after = {}  # file name -> bytes of its next answer before the line breaks
        self.gives_parts = True

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repo, revision):
        """The commit of a branch; a commit is its own."""
        branches = self.repos.get(repo, {})
        commits = {hashlib.sha1(f"{repo}@{b}".encode()).hexdigest(): b for b in branches}
        found = (
            revision
            if revision in commits
            else next((c for c, b in commits.items() if b == revision), None)
        )
        return found, branches.get(commits.get(found))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        self.server.asked.append((self.command, self.path, self.headers.get("Range")))
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self.info(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self.tree(*found.groups())
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(*found.groups(), with_body)
        else:
            self.send_error(404)

    def info(self, repo, revision):
        commit, folder = self.server.commit(repo, revision)
        if folder is None:
            known = repo in self.server.repos
            return self.refuse("RevisionNotFound" if known else "RepoNotFound")
        files = [{"rfilename": p.name} for p in sorted(Path(folder).iterdir())]
        body = {"id": repo, "modelId": repo, "sha": commit, "siblings": files, "tags": []}
        return self.send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def tree(self, repo, commit):
        files = sorted(Path(self.server.commit(repo, commit)[1]).iterdir())
        body = [{"type": "file", "path": p.name, "size": p.stat().st_size,
                 "oid": hashlib.sha1(p.name.encode()).hexdigest()} for p in files]  # fmt: skip
        self.send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def file(self, repo, revision, name, with_body):
        commit, folder = self.server.commit(repo, revision)
        if folder is None or not (Path(folder) / name).is_file():
            return self.refuse("EntryNotFound" if folder else "RepoNotFound")
        file = Path(folder) / name
        size = file.stat().st_size
        etag = hashlib.sha256(f"{commit} {name}".encode()).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status, begin, end = 200, 0, size
        if asked and self.server.gives_parts:
            status, begin, end = 206, int(asked[1]), min(int(asked[2] or size - 1) + 1, size)
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        headers["Content-Length"] = str(end - begin)
        data = b""
        if with_body:
            with file.open("rb") as f:
                f.seek(begin)
                data = f.read(end - begin)
        return self.send(status, data, headers, name if with_body else "")

    def refuse(self, code):
        headers = {"X-Error-Code": code, "X-Error-Message": f"{code} here"}
        self.send(404, b"", headers)

    def send(self, status, body, headers, name=""):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if (cut := self.server.cut_after.pop(name, None)) is not None:
            body = body[:cut]
            self.close_connection = True
        self.server.sent[name] = self.server.sent.get(name, 0) + len(body)
        self.wfile.write(body)


@contextmanager
def hub(repos):
    """Run one until the block ends."""
    server = Hub(repos)
    thread = Thread(target=server.serve_forever, args=[0.05], daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
