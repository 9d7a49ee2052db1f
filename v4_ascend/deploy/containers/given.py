"""What was given to docker or Kubernetes: kept, so that `deploy`, `status` and `down` know it."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from v4_ascend import __version__
from v4_ascend.config.private import private_folder, write_private
from v4_ascend.deploy.containers.target import Target
from v4_ascend.deploy.containers.written import STEPS, Written
from v4_ascend.deploy.state import folders, state_root
from v4_ascend.deploy.vllm.launches import reached
from v4_ascend.errors import DeployError

FILE, FILES = "containers.json", "containers"
OWN = ("secret", STEPS)  # written anew or kept by whoever writes: no difference of the deployment


class Given(msgspec.Struct, frozen=True):
    """One deployment, by the launcher it was given to.

    Attributes:
        url: where clients ask, as the first host or the cluster calls it.
        namespace: of Kubernetes.
        has_secret: whether the pods read one that `deploy` made.
    """

    name: str
    launcher: str
    url: str
    model: str
    hosts: tuple[str, ...]
    namespace: str
    has_secret: bool
    version: str = __version__

    @classmethod
    def of(cls, target: Target) -> Given:
        """Describe what a target is as a deployment."""
        t = target.topology
        if t.launcher == "docker":
            host = reached(t.serve.host)
            where = target.hosts[0] if host == "127.0.0.1" != t.serve.host else host
        else:
            where = f"{t.name}-api.{t.kubernetes.namespace}"
        return cls(
            name=t.name,
            launcher=t.launcher,
            url=f"http://{where}:{t.serve.port}",
            model=t.model.name,
            hosts=target.hosts,
            namespace=t.kubernetes.namespace,
            has_secret=target.plan is not None or bool(t.serve.api_keys),
        )

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return folders(self.name)[0] / FILES

    def write(self, written: Written) -> None:
        """Keep the files, then say that they are given."""
        private_folder(self.folder.parent)
        written.write(self.folder)
        write_private(self.folder.parent / FILE, msgspec.json.encode(self).decode())

    def forget(self) -> None:
        """Say that it is no more; its files go too."""
        (self.folder.parent / FILE).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def difference(self, written: Written) -> list[str]:
        """Return how files differ from those that are kept; of private ones only that they do."""
        wanted = written.files | written.private
        lines = []
        for name in sorted({*wanted, *self._names()}):
            file = self.folder / name
            old = file.read_text(encoding="utf-8") if file.is_file() else ""
            new = wanted.get(name, "")
            if old == new:
                continue
            if name in written.private or name not in wanted:
                lines.append(f"{name}: {'differs' if new and old else 'new' if new else 'gone'}")
                continue
            lines += difflib.unified_diff(
                old.splitlines(), new.splitlines(), f"{name} (given)", f"{name} (wanted)", n=1,
                lineterm="",
            )  # fmt: skip
        return lines

    def _names(self) -> Iterator[str]:
        for file in self.folder.rglob("*"):
            name = str(file.relative_to(self.folder))
            if file.is_file() and name not in OWN and file.name != ".env":
                yield name


def read(name: str) -> Given | None:
    """Return what was given under a name, None if nothing was.

    Raises:
        DeployError: it cannot be read.
    """
    file = folders(name)[0] / FILE
    try:
        return msgspec.json.decode(file.read_bytes(), type=Given)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as e:
        raise DeployError(f"{file}: says not what was given: {e}") from e


def names() -> list[str]:
    """Return all that was given and not taken back."""
    return sorted(f.parent.name for f in state_root().glob(f"*/{FILE}"))
