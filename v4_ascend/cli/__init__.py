"""The `v4-ascend` command."""

from v4_ascend.cli.app import main

__all__ = ["main"]
