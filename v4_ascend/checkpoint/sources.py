"""Where checkpoints come from: a folder of this machine, or a hub.

A reference is a path, ``hf:org/name@revision`` of the Hugging Face hub (whatever `HF_ENDPOINT`
names; `HF_HUB_OFFLINE` holds) or ``modelscope:org/name@revision`` (`MODELSCOPE_ENDPOINT`). Without
a revision it is the hub's main branch.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import httpx

from v4_ascend.checkpoint.folder import INDEX, SINGLE, shard_names
from v4_ascend.checkpoint.header import MAX_HEADER_BYTES
from v4_ascend.config.quant_types import DESCRIPTION
from v4_ascend.config.topology import is_remote
from v4_ascend.errors import CheckpointError, ConfigError

CONFIG = "config.json"
BESIDE = (CONFIG, INDEX, DESCRIPTION)  # of the headers, what says what tensors there are
# The first request brings most headers whole: a shard of Pro has about 300 KB of them.
FIRST_BYTES = 512 << 10
N_AT_ONCE = 8
Progress = Callable[[int, int], None]


class Hub(Protocol):
    """One repository on a hub.

    Attributes:
        is_offline: whether only what is in the cache may be read.
    """

    is_offline: bool

    def fetch(self, patterns: Sequence[str] | None) -> Path:
        """Bring the files of these patterns, or all, into the hub's cache; return their folder."""
        ...

    def request(self, file: str) -> tuple[str, dict[str, str]]:
        """Return URL and headers that ask for a file."""
        ...


def whole(reference: str) -> Path:
    """Return the folder of a checkpoint, fetched from its hub if it is not here.

    Raises:
        CheckpointError: the hub does not have it, or cannot be reached.
        ConfigError: the reference has not the form of one.
    """
    return _hub(reference).fetch(None) if is_remote(reference) else Path(reference)


def pinned(reference: str, *, with_weights: bool = True) -> str:
    """Return the reference with the revision that is found now, as every process must.

    All of it is fetched, as `whole` does, or `with_weights` False the configuration alone.

    Raises:
        CheckpointError: as `whole`.
    """
    if not reference.startswith("hf:"):
        return reference
    found = whole(reference) if with_weights else configuration(reference)
    # The cache keeps each revision in a folder of its name.
    return f"{reference.partition('@')[0]}@{found.name}"


def configuration(reference: str) -> Path:
    """Return a folder with the checkpoint's config.json, all that planning needs.

    Raises:
        CheckpointError: as `whole`.
    """
    return _hub(reference).fetch([CONFIG]) if is_remote(reference) else Path(reference)


@contextmanager
def headers(reference: str, progress: Progress) -> Iterator[Path]:
    """Give a folder for `CheckpointFolder`: a hub's has headers, sizes, and holes for data.

    Some 30 MB are fetched of a checkpoint of 865 GB; offline, all of it must be in the cache. The
    folder is gone behind the block, so that its zeros are never taken for weights. `progress` sees
    files done and in all.

    Raises:
        CheckpointError: as `whole`, or the hub does not give parts of files.
    """
    if not is_remote(reference):
        yield Path(reference)
        return
    hub = _hub(reference)
    if hub.is_offline:
        yield hub.fetch(None)
        return
    small = hub.fetch(BESIDE)
    with TemporaryDirectory(prefix="v4-ascend-") as scratch:
        folder = Path(scratch)
        for name in BESIDE:
            if (small / name).exists():
                (folder / name).write_bytes((small / name).read_bytes())
        files = _shards(small / INDEX)
        with (
            httpx.Client(follow_redirects=True, timeout=60) as client,
            ThreadPoolExecutor(N_AT_ONCE) as pool,
        ):

            def sketch(file: str) -> None:
                _sketch(client, *hub.request(file), folder / file, f"{reference}: {file}")

            for n, _ in enumerate(pool.map(sketch, files), 1):
                progress(n, len(files))
        yield folder


def _shards(index: Path) -> list[str]:
    if not index.exists():
        return [SINGLE]
    try:
        return shard_names(index, json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{index}: is not a safetensors index: {e!r}") from e


def _sketch(client: httpx.Client, url: str, asked: dict[str, str], file: Path, what: str) -> None:
    """Write a file with the true header and size of the one at `url`, and a hole for its data."""
    start, size = _range(client, url, asked, 0, FIRST_BYTES, what)
    if len(start) >= 8:
        end = 8 + min(struct.unpack("<Q", start[:8])[0], MAX_HEADER_BYTES)
        if len(start) < min(end, size):
            start += _range(client, url, asked, len(start), end, what)[0]
        start = start[:end]
    with file.open("wb") as f:
        f.write(start)
        f.truncate(size)


def _range(
    client: httpx.Client, url: str, asked: dict[str, str], begin: int, end: int, what: str
) -> tuple[bytes, int]:
    """Return bytes [begin, end) of a file, fewer if it is shorter, and its size."""
    # The bytes as they are stored: a compressed answer has other offsets.
    wanted = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    try:
        with client.stream("GET", url, headers=asked | wanted) as answer:
            if answer.status_code != httpx.codes.PARTIAL_CONTENT:
                raise CheckpointError(
                    f"{what}: asked for a part, the hub answers {answer.status_code} "
                    f"{answer.reason_phrase}; fetch the checkpoint and name its folder"
                )
            size = int(answer.headers["Content-Range"].rpartition("/")[2])
            return answer.read(), size
    except (httpx.HTTPError, KeyError, ValueError) as e:
        raise CheckpointError(f"{what}: cannot be fetched: {e!r}") from e


def _hub(reference: str) -> Hub:
    scheme, _, rest = reference.partition(":")
    repo, at, revision = rest.partition("@")
    parts = repo.split("/")
    if len(parts) != 2 or not all(_is_name(p) for p in parts) or bool(at) != bool(revision):
        raise ConfigError(reference, f"must be {scheme}:org/name or {scheme}:org/name@revision")
    return (
        _HuggingFace(repo, revision or None, reference)
        if scheme == "hf"
        else _ModelScope(repo, revision or None, reference)
    )


def _is_name(part: str) -> bool:
    return bool(part.strip(".")) and all(c.isalnum() or c in "-_." for c in part)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _HuggingFace:
    def __init__(self, repo: str, revision: str | None, reference: str) -> None:
        from huggingface_hub import constants

        self._repo, self._revision, self._reference = repo, revision, reference
        self.is_offline = constants.HF_HUB_OFFLINE

    def fetch(self, patterns: Sequence[str] | None) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        allowed = None if patterns is None else list(patterns)
        try:
            folder = snapshot_download(self._repo, revision=self._revision, allow_patterns=allowed)
        except HFValidationError as e:
            raise ConfigError(self._reference, "must be hf:org/name or hf:org/name@revision") from e
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, httpx.HTTPError) as e:
            raise CheckpointError(f"{self._reference}: cannot be fetched: {_one_line(e)}") from e
        # Its folder has the name of the commit: what is asked next is of the same one.
        self._revision = Path(folder).name
        return Path(folder)

    def request(self, file: str) -> tuple[str, dict[str, str]]:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        return hf_hub_url(self._repo, file, revision=self._revision), build_hf_headers()


class _ModelScope:
    is_offline = False

    def __init__(self, repo: str, revision: str | None, reference: str) -> None:
        self._repo, self._revision, self._reference = repo, revision, reference
        try:
            import modelscope.hub.snapshot_download  # noqa: F401
        except ImportError as e:
            raise ConfigError(
                reference, "needs the package modelscope, which is not installed"
            ) from e

    def fetch(self, patterns: Sequence[str] | None) -> Path:
        from modelscope.hub.snapshot_download import snapshot_download

        allowed = None if patterns is None else list(patterns)
        try:
            return Path(
                snapshot_download(self._repo, revision=self._revision, allow_patterns=allowed)
            )
        except Exception as e:  # the package raises what its transport does, and ValueError
            raise CheckpointError(f"{self._reference}: cannot be fetched: {_one_line(e)}") from e

    def request(self, file: str) -> tuple[str, dict[str, str]]:
        from modelscope.hub.file_download import get_file_download_url

        # 1.40.2 has the variable hold for snapshots alone; before, there was neither.
        named = os.environ.get("MODELSCOPE_ENDPOINT")
        place = {"endpoint": named} if named else {}
        return get_file_download_url(self._repo, file, self._revision or "master", **place), {}
