"""`python -m v4_ascend` is the `v4-ascend` command."""

from v4_ascend.cli import main

main()
