"""How other hosts are reached."""

from __future__ import annotations

# The user's own ssh configuration holds; nothing is asked, and a host that is gone is noticed.
SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10",
       "-o", "ServerAliveInterval=3", "-o", "ServerAliveCountMax=3", "--")  # fmt: skip
