"""Runs the command lines it reads, each in a process of its own, forked after torch is there.

A line in is JSON, a list of words; a line out is JSON, [exit status, what it printed].
"""

import json
import os
import runpy
import sys
import tempfile

import pytest  # noqa: F401  # imported once for all commands
import torch

PROGRAMS = {"v4-ascend": "v4_ascend", "pytest": "pytest"}


def run(words, file):
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = words
    runpy.run_module(PROGRAMS[words[0]], run_name="__main__", alter_sys=True)


def main():
    sys.path[0] = os.getcwd()  # as `python -m` has it, in place of this file's folder
    torch.set_num_threads(1)
    for line in sys.stdin:
        with tempfile.TemporaryFile() as printed:
            child = os.fork()
            if not child:
                run(json.loads(line), printed.fileno())
                sys.exit(0)
            _, status = os.waitpid(child, 0)
            printed.seek(0)
            said = printed.read().decode()
        sys.stdout.write(json.dumps([os.waitstatus_to_exitcode(status), said]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
