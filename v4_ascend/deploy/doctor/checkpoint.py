"""A checkpoint as a host sees it, from names, sizes and headers alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

from v4_ascend.checkpoint.folder import INDEX, MANIFEST
from v4_ascend.checkpoint.header import MAX_HEADER_BYTES
from v4_ascend.deploy.doctor.facts import Checkpoint


def look_at(path: str | None, *, digest: bool) -> Checkpoint | None:
    """Say what is wrong with a checkpoint's folder, or what is in it; None if none is asked for.

    The digest covers config, index, manifest, and each safetensors file's name, size and header:
    equal ones mean the same tensors in the same places, not the same weights.
    """
    if path is None:
        return None
    folder = Path(path)
    try:
        if not folder.is_dir():
            return Checkpoint(f"{path}: {'is no folder' if folder.exists() else 'does not exist'}")
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            return Checkpoint(f"{path}: has no safetensors files")
        n_bytes = sum(f.stat().st_size for f in files)
        return Checkpoint("", n_bytes, _digest(folder, files) if digest else "")
    except OSError as e:
        return Checkpoint(f"{e.filename or path}: {e.strerror}")


def _digest(folder: Path, files: list[Path]) -> str:
    seen = hashlib.sha256()
    for name in ("config.json", INDEX, MANIFEST):
        if (file := folder / name).exists():
            seen.update(name.encode() + file.read_bytes())
    for file in files:
        with file.open("rb") as f:
            length = min(int.from_bytes(f.read(8), "little"), MAX_HEADER_BYTES)
            seen.update(f"{file.name} {file.stat().st_size} ".encode() + f.read(length))
    return seen.hexdigest()
