"""What a backend has to say about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from v4_ascend.errors import BackendUnavailableError, ConfigError

# How a result came about. "executed": on the device the kernel is for. "interpreted": the
# kernel's own program, step by step on the CPU. "emulated call": the call into the vendor's
# API was real and checked, its numbers came from a CPU stand-in.
Proof = Literal["executed", "interpreted", "emulated call"]


def no_chips(chip: str | None) -> None:
    """Refuse a chip by name, where kernels do not differ by it."""
    if chip is not None:
        raise ConfigError("--soc", f"{chip!r}: this backend does not tell chips apart")


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One kind of device.

    Attributes:
        name: what users type.
        device: the torch device type its tensors live on, in this process.
        why_unavailable: None if kernels can run now, else the reason.
        proof: what a run in this process proves.
        missing: ops it does not implement, each with the reason.
        chips: names of the chips whose kernels differ.
        use_chip: from now on try the kernels of that chip, in its order; None for the chip
            that is here.
        records: the cache formats (kv, index) its kernels read, given the streams' dtype name
            and whether quantisation is simulated; see `ops.records`.
        watch_compilations: lets a function hear, by name, of each kernel compiled from now on.
        min_page_rows: fewest rows of a cache page its kernels can address.
    """

    name: str
    device: Callable[[], str]
    why_unavailable: Callable[[], str | None]
    proof: Callable[[], Proof] = lambda: "executed"
    missing: Mapping[str, str] = field(default_factory=dict)
    chips: tuple[str, ...] = ()
    use_chip: Callable[[str | None], None] = no_chips
    records: Callable[[str, bool], tuple[str, str]] = lambda dtype, quant_sim: (dtype, dtype)
    watch_compilations: Callable[[Callable[[str], None]], None] = lambda tell: None
    min_page_rows: int = 1

    def require(self) -> None:
        """Raise BackendUnavailableError, with the reason, unless usable."""
        if why := self.why_unavailable():
            raise BackendUnavailableError(f"backend {self.name}: {why}")
