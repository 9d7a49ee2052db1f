"""What is asked of the kernel before it is read, seen at the system call."""

import os
import random
from pathlib import Path

import pytest

from v4_ascend.checkpoint import read_ahead
from v4_ascend.checkpoint.header import TensorHeader
from v4_ascend.checkpoint.read_ahead import ReadAhead
from v4_ascend.supernode.holdings import Part

ROW = 8  # bytes


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Every byte that is asked for, as (file, offset), in order."""
    found = []

    def note(fd, at, size, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        file = Path(os.readlink(f"/proc/self/fd/{fd}")).name
        found.extend((file, at + i) for i in range(size))

    monkeypatch.setattr(os, "posix_fadvise", note)
    monkeypatch.setattr(read_ahead, "AHEAD_BYTES", 100)
    return found


def headers(folder, sizes):
    """Tensors of so many rows, by turns in three files."""
    ends, out = [0, 0, 0], []
    for i, n in enumerate(sizes):
        file = folder / f"{i % 3}"
        file.touch()
        begin = ends[i % 3]
        ends[i % 3] += n * ROW
        out.append(TensorHeader(f"t{i}", "F32", (n, 2), file, begin, ends[i % 3]))
    return out


@pytest.mark.parametrize("seed", range(5))
def test_what_is_read_next_is_asked_for_once_in_order_and_not_too_far(tmp_path, asked, seed):
    rng = random.Random(seed)
    tensors = headers(tmp_path, [rng.randint(0, 9) for _ in range(60)])
    ahead, n_read = ReadAhead((t, None) for t in tensors), 0
    for t in tensors:
        ahead.reading(t.name)
        n_read += t.nbytes
        n_asked = tensors[0].nbytes + len(asked)  # the first one is read at once
        assert n_read <= n_asked <= n_read + 100 + 9 * ROW
    wanted = [(t.file.name, at) for t in tensors[1:] for at in range(t.begin, t.end)]
    assert asked == wanted


def test_of_a_part_only_its_bytes_are_asked_for(tmp_path, asked):
    first, second = headers(tmp_path, [1, 4])
    ahead = ReadAhead([(first, None), (second, Part(dim=0, index=1, count=2))])
    ahead.reading("t0")
    assert asked == [("1", at) for at in range(2 * ROW, 4 * ROW)]


def test_a_part_of_very_many_pieces_is_left_to_the_kernel(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(read_ahead, "MOST_PIECES", 3)
    tensors = headers(tmp_path, [1, 4, 3])
    part = Part(dim=1, index=0, count=2)
    ahead = ReadAhead((t, part) for t in tensors)
    ahead.reading("t0")
    assert {file for file, _ in asked} == {"2"}


def test_one_read_before_its_turn_is_not_asked_for(tmp_path, asked):
    tensors = headers(tmp_path, [20, 1, 1])
    ahead = ReadAhead((t, None) for t in tensors)
    ahead.reading("t2")
    ahead.reading("t0")
    assert {file for file, _ in asked} <= {"0", "1"}
