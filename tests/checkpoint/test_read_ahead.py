"""Tensors read before they are asked for, in every way that bytes can come."""

import errno
import os
import random
import tempfile
import threading
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch

from v4_ascend.checkpoint import read_ahead
from v4_ascend.checkpoint.header import TensorHeader
from v4_ascend.checkpoint.read_ahead import ReadAhead
from v4_ascend.checkpoint.reader import read_tensor
from v4_ascend.errors import CheckpointError
from v4_ascend.supernode.holdings import Part

WAYS = ("cached", "direct", "plain")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Sizes at which a few kilobytes take every turn."""
    monkeypatch.setattr(read_ahead, "AHEAD_BYTES", 64 << 10)
    monkeypatch.setattr(read_ahead, "BATCH_BYTES", 16 << 10)
    monkeypatch.setattr(read_ahead, "RUN_BYTES", 16 << 10)
    monkeypatch.setattr(read_ahead, "GAP_BYTES", 2 << 10)
    monkeypatch.setattr(read_ahead, "DIRECT_BYTES", 1 << 10)


@pytest.fixture
def calls(monkeypatch, request):
    """Every read as (way, file, offset, bytes asked for), of files in the cache or not."""
    found, real_open, real_read, direct = [], os.open, os.preadv, set()
    want = getattr(request, "param", "cached")
    monkeypatch.setattr(read_ahead, "_is_cached", lambda *_: want == "cached")

    def opened(path, flags, *rest):
        if flags & os.O_DIRECT and want == "plain":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
        fd = real_open(path, flags, *rest)
        (direct.add if flags & os.O_DIRECT else direct.discard)(fd)
        return fd

    def read(fd, into, at):
        way = "direct" if fd in direct else "plain"
        size = sum(len(x) for x in into)
        if way == "direct":
            assert at % 4096 == size % 4096 == 0
        found.append((way, os.readlink(f"/proc/self/fd/{fd}"), at, size))
        return real_read(fd, into, at)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "preadv", read)
    return found


def headers(folder, rows, width=16):
    """Tensors of so many rows, by turns in three files, with other bytes between some."""
    rng, out = random.Random(0), []
    files = [bytearray(b"header"), bytearray(), bytearray(1)]
    for i, n in enumerate(rows):
        data = files[i % 3]
        data += rng.randbytes(rng.choice([0, 0, 40, 5000]))
        begin = len(data)
        data += rng.randbytes(n * width)
        out.append(TensorHeader(f"t{i}", "U8", (n, width), folder / f"{i % 3}", begin, len(data)))
    for i, data in enumerate(files):
        (folder / f"{i}").write_bytes(data)
    return out


def some(rng):
    return [rng.choice([0, 1, 3, 60, 64, 900, 5000]) for _ in range(80)]


def drawn_part(rng, header):
    n = rng.choice([1, 2, 4])
    dim = 1 if header.shape[0] % n else rng.choice([0, 1])
    return rng.choice([None, Part(dim=dim, index=rng.randrange(n), count=n)])


@pytest.mark.parametrize("calls", WAYS, indirect=True)
@pytest.mark.parametrize("seed", range(3))
def test_every_way_gives_the_bytes_that_a_plain_read_gives(tmp_path, calls, seed, request):
    rng = random.Random(seed)
    tensors = headers(tmp_path, some(rng))
    parts = [(h, drawn_part(rng, h) if h.nbytes else None) for h in tensors]
    want = {h.name: read_tensor(h, part) for h, part in parts}
    shared = {h.name for h in tensors if rng.random() < 0.3}
    order = list(want)
    for i in rng.sample(range(len(order)), 5):  # a few are not asked for in their turn
        order[i], order[-i] = order[-i], order[i]
    calls.clear()
    with ReadAhead(parts, shared) as ahead:
        for name in order:
            got = ahead.tensor(name)
            assert got.dtype == want[name].dtype
            assert torch.equal(got, want[name]), name
    is_direct = request.node.callspec.params["calls"] == "direct"
    assert {way for way, *_ in calls} == ({"direct", "plain"} if is_direct else {"plain"})


@pytest.mark.parametrize("calls", ["plain"], indirect=True)
def test_of_parts_no_other_byte_is_read_and_each_once(tmp_path, calls):
    tensors = headers(tmp_path, [100, 60, 8, 900])
    parts = [(h, Part(dim=i % 2, index=1, count=4)) for i, h in enumerate(tensors)]
    with ReadAhead(parts) as ahead:
        for h, _ in parts:
            ahead.tensor(h.name)
    assert sum(size for *_, size in calls) == sum(h.nbytes // 4 for h in tensors)


@pytest.mark.parametrize("calls", ["direct"], indirect=True)
def test_small_neighbours_share_a_read_and_shared_ones_go_through_the_cache(tmp_path, calls):
    tensors = headers(tmp_path, [20] * 90)
    with ReadAhead(((h, None) for h in tensors), {"t0", "t3"}) as ahead:
        for h in tensors:
            ahead.tensor(h.name)
    ways = [way for way, *_ in calls]
    assert ways.count("direct") < 45
    begins = {at for way, file, at, _ in calls if way == "plain" and file.endswith("/0")}
    assert {tensors[0].begin, tensors[3].begin} <= begins


def test_no_more_is_read_ahead_than_was_said(tmp_path):
    rng = random.Random(1)
    tensors = headers(tmp_path, [rng.randrange(1, 1200) for _ in range(60)] + [9000, 1, 9000])
    with ReadAhead((h, None) for h in tensors) as ahead:
        held = []
        for h in tensors:
            ahead.tensor(h.name)
            held.append(sum(c.data.nbytes for c in ahead._coming.values()))
            most = max((c.data.nbytes for c in ahead._coming.values()), default=0)
            assert held[-1] <= max(64 << 10, most)
    assert max(held) > 40 << 10  # it does read ahead
    assert held[-1] == 0


def test_a_tensor_comes_once_and_only_if_listed(tmp_path):
    (header,) = headers(tmp_path, [5])
    with ReadAhead([(header, None)]) as ahead:
        ahead.tensor("t0")
        for name in ("t0", "t1"):
            with pytest.raises(CheckpointError, match=f"no tensor {name} is left to read"):
                ahead.tensor(name)


def test_what_the_page_cache_has_is_known(tmp_path):
    (header,) = headers(tmp_path, [5000])
    found = read_ahead._Coming(header, None, read_ahead.empty_bytes(header, None))
    (run,) = read_ahead._runs([read_ahead._Piece(header, header.begin, found.data.numpy())], 0)
    fd = os.open(header.file, os.O_RDONLY)
    try:
        for _ in range(2):
            assert read_ahead._is_cached(fd, run)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert not read_ahead._is_cached(fd, run)
            assert not read_ahead._is_cached(fd, run)  # asking brings nothing in
            os.pread(fd, header.end, 0)
        os.truncate(header.file, 1)
        assert not read_ahead._is_cached(fd, run)
    finally:
        os.close(fd)


def read_all(tensors):
    with ReadAhead((h, None) for h in tensors) as ahead:
        for h in tensors:
            ahead.tensor(h.name)


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("read-ahead")]


@pytest.mark.parametrize("calls", WAYS, indirect=True)
def test_a_file_that_became_shorter_is_named_with_the_tensor_and_nothing_runs_on(tmp_path, calls):
    tensors = headers(tmp_path, [900] * 30)
    last = tensors[-1]
    os.truncate(last.file, last.end - 1)
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match=rf"{last.file}: t29: the file became shorter"):
        read_all(tensors)
    assert not threads()
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_disk_that_cannot_read_is_an_error_of_the_file(tmp_path, monkeypatch):
    tensors, real = headers(tmp_path, [900] * 30), os.preadv
    bad = tensors[16]

    def failing(fd, into, at):
        if os.readlink(f"/proc/self/fd/{fd}") == str(bad.file) and at + sum(map(len, into)) > (
            bad.begin + 100
        ):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, into, at)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(OSError, match="Input/output error") as e:
        read_all(tensors)
    assert e.value.filename == str(bad.file)
    assert not threads()


def test_leaving_early_ends_what_was_begun(tmp_path):
    tensors = headers(tmp_path, [900] * 30)
    with ReadAhead((h, None) for h in tensors) as ahead:
        ahead.tensor("t0")
        assert threads()
    assert not threads()


def test_on_memory_file_systems_the_bytes_are_the_same():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        tensors = headers(Path(folder), [900, 3, 0, 5000] * 3)
        with ReadAhead((h, None) for h in tensors) as ahead:
            for h in tensors:
                assert torch.equal(ahead.tensor(h.name), read_tensor(h))


def test_checksums_are_compared(tmp_path):
    good, bad = headers(tmp_path, [900, 900])
    bad = replace(bad, crc32=1)
    with ReadAhead((h, None) for h in (good, bad)) as ahead:
        ahead.tensor("t0")
        with pytest.raises(CheckpointError, match=rf"{bad.file}: t1: bytes .* have the CRC-32"):
            ahead.tensor("t1")


def test_another_order_than_the_listed_one_gives_the_same(tmp_path):
    tensors = headers(tmp_path, [900] * 40)
    turned = list(chain(*zip(tensors[:20], reversed(tensors[20:]), strict=True)))
    with ReadAhead((h, None) for h in tensors) as ahead:
        for h in turned:
            assert torch.equal(ahead.tensor(h.name), read_tensor(h))
