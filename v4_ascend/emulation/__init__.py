"""Checks of accelerator code on machines without the accelerator."""

from v4_ascend.emulation.call_log import calls, reset_calls
from v4_ascend.emulation.npu import install

__all__ = ["calls", "install", "reset_calls"]
