"""Files of a deployment in a folder, whole or not at all, and what to do with them."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from v4_ascend.errors import ConfigError

STEPS = "RUN.txt"  # by which a folder of ours is known
SECRET_BYTES = 32


@dataclass(frozen=True)
class Written:
    """Text files by name; `steps` are commands, with {out} for the folder and {parent} for its own.

    Files of `private` are written and never shown: they have keys in them. With `has_secret`, a
    file of that name belongs to them.
    """

    files: dict[str, str] = field(hash=False)
    private: dict[str, str] = field(hash=False)
    steps: tuple[str, ...]
    has_secret: bool

    def shown(self) -> str:
        """Return the files as one text of YAML documents."""
        texts = [f"# {name}\n{text}" for name, text in self.files.items()]
        return "---\n".join(texts)

    def steps_for(self, folder: Path | None) -> list[str]:
        """Return what to type, given where the files are."""
        out, parent = Path("DIR"), Path()
        if folder is not None:
            out, parent = folder.absolute(), folder.absolute().parent
        places = {"out": shlex.quote(str(out)), "parent": shlex.quote(str(parent))}
        return [s.format(**places) for s in self.steps]

    def write(self, folder: Path) -> list[str]:
        """Write all, readable by their owner alone; a secret that is there is kept.

        Raises:
            ConfigError: `folder` is something else, or lies in no folder.
        """
        if folder.exists() and not (folder.is_dir() and (folder / STEPS).is_file()):
            raise ConfigError(
                "--out", f"{folder} is there and was not written by deploy; give another folder"
            )
        if not folder.absolute().parent.is_dir():
            raise ConfigError("--out", f"{folder.absolute().parent} is no folder")
        half = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(half, ignore_errors=True)
        try:
            half.mkdir(mode=0o700)
            steps = "".join(f"{s}\n" for s in self.steps_for(folder))
            texts = self.files | self.private | {STEPS: steps}
            if self.has_secret:
                old = folder / "secret"
                new = secrets.token_hex(SECRET_BYTES) + "\n"
                texts["secret"] = old.read_text(encoding="utf-8") if old.is_file() else new
            for name, text in texts.items():
                file = half / name
                file.parent.mkdir(exist_ok=True, mode=0o700)
                file.touch(mode=0o600)
                file.write_text(text, encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)
            half.replace(folder)
        finally:
            shutil.rmtree(half, ignore_errors=True)
        return list(texts)


class _Dumper(yaml.SafeDumper):
    """Lines stay lines, and nothing is an alias: people read it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def as_yaml(*documents: dict[str, Any]) -> str:
    """Spell documents as YAML, their keys in the order they have."""
    texts = [yaml.dump(d, Dumper=_Dumper, sort_keys=False, width=100) for d in documents]
    return "---\n".join(texts)
