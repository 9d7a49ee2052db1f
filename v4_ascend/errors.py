"""Every error a user can meet, and the exit code each one ends a command with.

V4AscendError                1  the work failed
  CheckpointError            1  a checkpoint is damaged, incomplete or not what its config says
  ShardError                 1  a checkpoint cannot be laid out for a plan, or not there
  UnsupportedOpError         1  no kernel on this device accepts the call
  KernelRegistrationError    1  two kernels of one name, or one with another signature
  ConfigError                2  a file, option or value is wrong; `where` says the place
    NotYetError              2  the key is known, its feature is not built yet
    RankTableError           2  a rank table breaks rules of its version; `problems` has each
  RequestError               2  an API request is wrong (HTTP 400, or its own status)
  PlanError                  3  it does not fit, or no layout is legal
  BackendUnavailableError    4  the device or its library is not on this machine
  PortInUseError             4  the port we were asked to listen on is taken
  PreflightError             4  a host is not fit for what is asked of it
  ParityError                5  two sides disagree
  CaptureError               5  a step cannot be recorded and replayed
  DeployError                6  a deployment failed to start or died
  DeadlineError              7  something did not happen in time

A message reads: where: what is wrong, with the value; what would be right.
"""

from __future__ import annotations

from collections.abc import Sequence


class V4AscendError(Exception):
    """Base of all errors this package raises on purpose."""

    exit_code = 1


class CheckpointError(V4AscendError):
    """A checkpoint is damaged, incomplete or not what its config says."""


class ShardError(V4AscendError):
    """A checkpoint cannot be laid out for this plan, or not in this place."""


class UnsupportedOpError(V4AscendError):
    """No kernel on this device accepts the call."""

    def __init__(self, op: str, device: str, call: str, refusals: Sequence[str]) -> None:
        reasons = "\n".join(f"  - {r}" for r in refusals) or "  - no kernel is registered"
        super().__init__(
            f"{op} cannot run on {device}: {call}\n{reasons}\n"
            f"  to run the reference on {device} instead (slow): runtime.fallback: reference"
        )


class KernelRegistrationError(V4AscendError):
    """A kernel was declared wrongly; raised at import."""


class ConfigError(V4AscendError):
    """A configuration value is wrong; `where` is ``file:line``, an option or a key."""

    exit_code = 2

    def __init__(self, where: str, message: str) -> None:
        key = where.removeprefix("--set ")
        if key != where:  # the option names the key already
            message = message.removeprefix(f"{key}: ")
        super().__init__(f"{where}: {message}")
        self.where = where


class NotYetError(ConfigError):
    """The key is part of the schema; what it asks for is not built yet."""


class RankTableError(ConfigError):
    """A rank table breaks rules of its version; each of `problems` is ``file: where: what``."""

    def __init__(self, file: str, problems: Sequence[str]) -> None:
        super().__init__(file, f"\n{file}: ".join(problems))
        self.problems = tuple(f"{file}: {p}" for p in problems)


class RequestError(V4AscendError):
    """An API request is wrong; `param` names the field, `status` is the HTTP status.

    `retry_after` are the seconds after which the same request may be answered.
    """

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int = 400,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.retry_after = retry_after if retry_after or status not in (429, 503) else 1


class PlanError(V4AscendError):
    """It does not fit, or no layout is legal."""

    exit_code = 3


class BackendUnavailableError(V4AscendError):
    """The device or its library is not on this machine."""

    exit_code = 4


class PortInUseError(V4AscendError):
    """The port we were asked to listen on is taken."""

    exit_code = 4


class PreflightError(V4AscendError):
    """A host is not fit for what is asked of it: the message has the cause and the next step."""

    exit_code = 4


class ParityError(V4AscendError):
    """Two sides that must agree do not."""

    exit_code = 5


class CaptureError(V4AscendError):
    """A step cannot be recorded: what it does depends on values that the host reads."""

    exit_code = 5


class DeployError(V4AscendError):
    """A deployment failed to start or died."""

    exit_code = 6


class DeadlineError(V4AscendError):
    """Something did not happen in time."""

    exit_code = 7
