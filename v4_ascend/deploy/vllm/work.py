"""What a deployment of vLLM runs: kept beside it, so that another `deploy` knows it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from v4_ascend.config.private import write_private
from v4_ascend.config.topology import Topology
from v4_ascend.deploy.changes import HIDDEN
from v4_ascend.deploy.vllm.key import VARIABLE, only_key
from v4_ascend.deploy.vllm.launches import Launch
from v4_ascend.errors import DeployError
from v4_ascend.supernode.plan import Plan

FILE = "launches.json"  # readable by its owner alone: it has the key


@dataclass(frozen=True)
class Work:
    """The processes of a deployment, the plan of its first pool, and their key.

    `reference` is what they are compared with at their start; another one changes nothing of them.
    """

    plan: Plan
    launches: tuple[Launch, ...]
    key: str | None
    reference: str | None

    @classmethod
    def of(cls, topology: Topology, plan: Plan, launches: tuple[Launch, ...]) -> Work:
        """Gather what a topology asks for.

        Raises:
            NotYetError: it has several keys.
        """
        return cls(plan, launches, only_key(topology), topology.model.reference)

    @property
    def digest(self) -> str:
        """What tells it from another one."""
        said = [[x.host, x.role, x.argv, sorted(x.env.items())] for x in self.launches]
        text = json.dumps([said, self.key])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def url(self) -> str:
        """Where clients ask: of the proxy, or of the first process."""
        return next(x.url for x in reversed(self.launches) if x.url is not None)

    @property
    def environment(self) -> dict[str, str]:
        """What every process has beside its own: the key as vLLM reads it."""
        return {VARIABLE: self.key} if self.key else {}

    @property
    def headers(self) -> dict[str, str]:
        """What a request of ours has."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def write(self, folder: Path) -> None:
        """Keep it in a deployment's folder."""
        own = {"key": self.key, "reference": self.reference, "plan": self.plan.model_dump_json()}
        said = own | {"launches": [asdict(x) for x in self.launches]}
        write_private(folder / FILE, json.dumps(said))

    @classmethod
    def read(cls, folder: Path) -> Work:
        """Read what is kept in a folder.

        Raises:
            DeployError: nothing of this version is.
        """
        try:
            said = json.loads((folder / FILE).read_text(encoding="utf-8"))
            launches = msgspec.convert(said["launches"], tuple[Launch, ...])
            plan = Plan.model_validate_json(said["plan"])
        except (OSError, ValueError, KeyError, msgspec.ValidationError) as e:
            raise DeployError(
                f"{folder / FILE}: says not what runs: {e}; v4-ascend down {folder.name} first"
            ) from e
        return cls(plan, launches, said["key"], said["reference"])


@dataclass(frozen=True)
class Difference:
    """A flag or a variable, what it is where it runs, what is wanted, and of how many processes."""

    what: str
    running: str
    wanted: str
    n_processes: int


def differences(running: Work, wanted: Work) -> list[Difference]:
    """List what differs, what several processes have in common once."""
    found: dict[tuple[str, str, str], int] = {}
    old, new = ({x.name: _said(x) for x in w.launches} for w in (running, wanted))
    for name in dict.fromkeys((*old, *new)):
        if name not in old or name not in new:
            state = ("runs", "none") if name in old else ("none", "would run")
            found[(name, *state)] = 1
            continue
        for what in dict.fromkeys((*old[name], *new[name])):
            is_, to_be = (side[name].get(what, "not given") for side in (old, new))
            if is_ != to_be:
                found[what, is_, to_be] = found.get((what, is_, to_be), 0) + 1
    changes = [Difference(*entry, n) for entry, n in found.items()]
    if running.key != wanted.key:
        changes.append(Difference("serve.api_keys", HIDDEN, HIDDEN, len(wanted.launches)))
    return changes


def _said(launch: Launch) -> dict[str, str]:
    """Return the command's words and the variables of a process, each by its name."""
    words = dict(_flags(launch.argv[1:]))
    return words | launch.env


def _flags(words: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    name, values = "command", list[str]()
    for word in words:
        if word.startswith("--"):
            yield name, " ".join(values)
            name, values = word, []
        else:
            values.append(word)
    yield name, " ".join(values) or "given"
