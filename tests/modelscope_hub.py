"""ModelScope on loopback, and a package of its name for machines that have none.

The server answers the requests that modelscope 1.40.2 makes for a model: `repo/files`, and `repo`
for a file or a part of it. The package has the two functions that are called, under their names and
with the parameters they have there. `python tests/modelscope_hub.py` runs the commands against the
server with whichever `modelscope` is installed.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, urlsplit

PACKAGE = {
    "__init__.py": "",
    "hub/__init__.py": "",
    "hub/file_download.py": """
import os
from urllib.parse import quote_plus

def get_file_download_url(model_id, file_path, revision, endpoint=None):
    place, asked = endpoint or os.environ["MODELSCOPE_ENDPOINT"], quote_plus(file_path)
    of = f"Revision={quote_plus(revision)}&FilePath={asked}"
    return f"{place}/api/v1/models/{model_id}/repo?{of}"
""",
    "hub/snapshot_download.py": """
import json, os
from fnmatch import fnmatch
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen
from modelscope.hub.file_download import get_file_download_url

def snapshot_download(model_id=None, revision=None, cache_dir=None, user_agent=None,
                      local_files_only=False, cookies=None, ignore_file_pattern=None,
                      allow_file_pattern=None, local_dir=None, allow_patterns=None,
                      ignore_patterns=None, max_workers=None, repo_id=None, repo_type=None,
                      progress_callbacks=None, token=None, endpoint=None):
    place, of = os.environ["MODELSCOPE_ENDPOINT"], revision or "master"
    listing = f"{place}/api/v1/models/{model_id}/repo/files?Revision={of}&Recursive=True"
    try:
        files = json.load(urlopen(listing))["Data"]["Files"]
    except HTTPError as e:
        raise ValueError(f"{model_id}@{of}:\\n{e}") from e
    folder = Path(os.environ["MODELSCOPE_CACHE"]) / "models" / model_id
    folder.mkdir(parents=True, exist_ok=True)
    for name in (f["Path"] for f in files):
        wanted = allow_patterns is None or any(fnmatch(name, p) for p in allow_patterns)
        if wanted and not (folder / name).exists():
            with urlopen(get_file_download_url(model_id, name, of)) as answer:
                (folder / name).write_bytes(answer.read())
    return str(folder)
""",
}


def write_package(folder):
    """Write the stand-in, to be put on the path."""
    for name, text in PACKAGE.items():
        file = folder / "modelscope" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        url = urlsplit(self.path)
        asked = {k: v[0] for k, v in parse_qs(url.query).items()}
        found = re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo(/files)?", url.path)
        folder = found and self.server.repos.get((found[1], asked.get("Revision", "master")))
        if folder is None:
            self.server.unknown.append(self.path)
            self.send(404, json.dumps({"Code": 404, "Success": False}).encode(), {})
        elif found[2]:
            files = [described(f) for f in sorted(folder.iterdir())]
            body = {"Code": 200, "Success": True, "Data": {"Files": files}}
            self.send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        else:
            self.file(folder / asked["FilePath"])

    def file(self, path):
        size = path.stat().st_size
        begin, end, status, more = 0, size, 200, {"Accept-Ranges": "bytes"}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, end = int(part[1]), min(int(part[2] or size - 1) + 1, size)
            status, more["Content-Range"] = 206, f"bytes {begin}-{end - 1}/{size}"
        with path.open("rb") as f:
            f.seek(begin)
            body = f.read(end - begin)
        sent = self.server.sent
        sent[path.name] = sent.get(path.name, 0) + len(body)
        self.send(status, body, more)

    def send(self, status, body, headers):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


def described(file):
    """What a listing says of a file."""
    return {
        "Type": "blob",
        "Name": file.name,
        "Path": file.name,
        "Size": file.stat().st_size,
        "Sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "Revision": "0" * 40,
    }


@contextmanager
def modelscope_hub(repos):
    """Serve ``{(repo, revision): folder}`` until the block ends; `sent` has bytes by file."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.repos, server.sent, server.unknown = repos, {}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=[0.05], daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main():
    """Inspect and shard a tiny model of the loopback hub, as people would."""
    run = [sys.executable, "-m", "v4_ascend"]
    with tempfile.TemporaryDirectory() as scratch:
        tiny = Path(scratch) / "tiny"
        subprocess.run([*run, "init", "--preset", "tiny", "--out", tiny], check=True)
        with modelscope_hub({("org/tiny", "master"): tiny}) as server:
            cache = str(Path(scratch) / "cache")
            env = os.environ | {"MODELSCOPE_ENDPOINT": server.url, "MODELSCOPE_CACHE": cache}
            for words in (
                ["inspect", "modelscope:org/tiny"],
                ["convert", "modelscope:org/tiny", "--to", "fp8", "--out", f"{scratch}/fp8"],
                ["inspect", "modelscope:org/none"],
            ):
                done = subprocess.run([*run, *words], env=env, check=False)
                said = f"{' '.join(words)}: exit code {done.returncode}, sent {server.sent}"
                sys.stdout.write(f"{said}, not known {server.unknown}\n")
                server.sent.clear()


if __name__ == "__main__":
    main()
