"""A deployment of containers on hosts with docker: here, and on others over ssh."""

from __future__ import annotations

import io
import json
import os
import shlex
import socket
import tarfile
from typing import Any

from v4_ascend.deploy.containers.given import Given
from v4_ascend.deploy.containers.orchestrator import Container, run
from v4_ascend.deploy.containers.target import STOP_SECONDS
from v4_ascend.deploy.ssh import SSH
from v4_ascend.deploy.torchrun import address_of, interface_of
from v4_ascend.errors import BackendUnavailableError, ConfigError, DeployError

ADDRESS, NIC = "V4_ASCEND_ADDRESS", "V4_ASCEND_NIC"  # asked for by the files of engine vllm


class Compose:
    """The compose files of one deployment, a host each."""

    def __init__(self, given: Given) -> None:
        self._given = given
        self._local = {h for h in given.hosts if _is_here(h)}

    def up(self) -> None:
        """Bring the files to each host and start; the first one last, for it waits for all."""
        for host in self._given.hosts:
            self._require_compose(host)  # before anything is started anywhere
            self._write_answers(host)
        for host in reversed(self._given.hosts):
            if host not in self._local:
                self._send(host)
            self._compose(host, "up", "--detach")

    def containers(self) -> list[Container]:
        """Ask every host."""
        found = []
        for host in self._given.hosts:
            said = self._compose(host, "ps", "--all", "--format", "json")
            found += [_container(host, row) for row in _rows(said)]
        return found

    def down(self) -> None:
        """Remove the containers; on other hosts the files too."""
        for host in self._given.hosts:
            self._compose(host, "down", "--timeout", str(STOP_SECONDS))
            if host not in self._local:
                self._there(host, f"rm -rf {shlex.quote(str(self._given.folder))}")

    def logs(self) -> str:
        """Return what shows the first host's logs."""
        host = self._given.hosts[0]
        file = shlex.quote(str(self._given.folder / host / "compose.yaml"))
        return f"docker compose --file {file} logs --follow  # on {host}"

    def _require_compose(self, host: str) -> None:
        try:
            self._compose(host, "version")
        except DeployError as e:
            raise BackendUnavailableError(
                f"{host}: docker compose does not run there: {e}; install its plugin"
            ) from e

    def _compose(self, host: str, *words: str) -> str:
        command = ["docker", "compose"]
        if words != ("version",):
            command += ["--file", str(self._given.folder / host / "compose.yaml")]
        command += words
        if host in self._local:
            return run(command)
        return self._there(host, shlex.join(command))

    def _there(self, host: str, line: str, stdin: bytes | None = None) -> str:
        """Run a line of another host's shell; every word of it is quoted."""
        return run([*SSH, host, line], stdin)

    def _send(self, host: str) -> None:
        """Bring what a host reads to the same place there, for its owner alone."""
        packed, folder = io.BytesIO(), self._given.folder
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for file in sorted(folder.iterdir()):
                if file.is_file() or file.name == host:
                    tar.add(file, file.name)
        place = shlex.quote(str(folder))
        line = f"umask 077 && mkdir -p {place} && tar -x -p -C {place}"
        self._there(host, line, packed.getvalue())

    def _write_answers(self, host: str) -> None:
        """Answer what a host's file asks whoever types `docker compose`, where it asks."""
        file = self._given.folder / host / "compose.yaml"
        text = file.read_text(encoding="utf-8")
        answers = {}
        if f"${{{ADDRESS}" in text:
            answers[ADDRESS] = self._address(host)
        if f"${{{NIC}" in text:
            answers[NIC] = os.environ.get(NIC) or self._interface(host)
        if answers:
            env = file.with_name(".env")
            env.touch(mode=0o600)
            env.write_text("".join(f"{k}={v}\n" for k, v in answers.items()), encoding="utf-8")

    def _address(self, host: str) -> str:
        if host in self._local:
            return address_of(host)
        try:
            return socket.gethostbyname(host)
        except OSError as e:
            raise DeployError(f"{host}: its name does not resolve here ({e.strerror})") from e

    def _interface(self, host: str) -> str:
        if host in self._local:
            return interface_of(address_of(host), host)
        raise ConfigError(
            NIC, f"not set; {host} is another host: give the interface by which hosts meet"
        )


def _is_here(host: str) -> bool:
    try:
        interface_of(address_of(host), host)
    except DeployError:
        return False
    return True


def _rows(said: str) -> list[dict[str, Any]]:
    """Read `docker compose ps --format json`: an object a line, or of old versions one list."""
    text = said.strip()
    if text.startswith("["):
        return list(json.loads(text))
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _container(host: str, row: dict[str, Any]) -> Container:
    state, health = str(row.get("State", "")), str(row.get("Health", ""))
    code = row.get("ExitCode", 0)
    shown = f"{state}, {health}" if health else state
    trouble = f"exit code {code}" if state in ("exited", "dead") else ""
    is_ready = state == "running" and health in ("", "healthy")
    return Container(str(row.get("Name", row.get("Service", ""))), host, shown, is_ready, trouble)
