"""What a backend has to say about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from v4_ascend.errors import BackendUnavailableError


@dataclass(frozen=True)
class Backend:
    """One kind of device.

    Attributes:
        name: what users type.
        device: the device type its tensors report.
        why_unavailable: None if the device can be used now, else the reason.
        missing: ops it does not implement, each with the reason.
    """

    name: str
    device: str
    why_unavailable: Callable[[], str | None]
    missing: Mapping[str, str] = field(default_factory=dict)

    def require(self) -> None:
        """Raise BackendUnavailableError, with the reason, unless usable."""
        if why := self.why_unavailable():
            raise BackendUnavailableError(f"backend {self.name}: {why}")
