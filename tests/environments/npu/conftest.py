import pytest

from v4_ascend.emulation import install, reset_calls

# One process is one chip: torch_npu loads once. Other chips are asked in processes of their own.
CHIP = install("950dt", devices=2, memory_gib=1)


@pytest.fixture(autouse=True)
def _no_calls():
    reset_calls()
