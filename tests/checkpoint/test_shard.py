"""shard: whatever the plan, the ranks load what was there; whatever happens, nothing half is."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, make_plan, write_tiny
from safetensors import safe_open

from v4_ascend.checkpoint import rank_files, write_behind
from v4_ascend.checkpoint.folder import CheckpointFolder
from v4_ascend.checkpoint.manifest import read_record
from v4_ascend.checkpoint.reader import Checkpoint, RankCheckpoint
from v4_ascend.checkpoint.shard import Sharding
from v4_ascend.checkpoint.sharded import ShardedFolder
from v4_ascend.checkpoint.sparse import write_sparse
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.errors import CheckpointError, ConfigError, ShardError
from v4_ascend.ops import use_policy
from v4_ascend.runtime.engine import Engine
from v4_ascend.runtime.kv_cache import Chunk
from v4_ascend.supernode.holdings import holdings

DRILL = Path(__file__).with_name("shard_drill.py")
FEW = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("shard") / "checkpoint")


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(rank_files, "MAX_FILE_BYTES", 400_000)


def shard(checkpoint, plan, out, link=False, **how):
    return Sharding(CheckpointFolder(checkpoint), plan, is_linked=link).run(out, **how)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def require_same(checkpoint, plan, out):
    """Every rank reads from its files what it would read from the checkpoint."""
    original, folder = Checkpoint(checkpoint), ShardedFolder(out)
    folder.require_complete()
    for rank in plan.ranks:
        own = RankCheckpoint(folder, plan, rank.rank)
        held = holdings(original.config, plan, rank)
        assert own.headers.keys() == held.keys()
        for name, h in held.items():
            got, want = own.tensor(name), original.tensor(name, h.part)
            assert got.shape == want.shape
            assert same_bits(got, want), (rank.rank, name)


@st.composite
def layouts(draw):
    pp, dp = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2]))
    cp, tp = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 4]))
    of_stage = dp * cp * tp
    ep = draw(st.sampled_from([n for n in (1, 2, 4, 8) if of_stage % n == 0]))
    more = draw(st.sampled_from([0, ep])) if ep > 1 else 0
    return {
        "pp_size": pp,
        "dp_size": dp,
        "cp_size": cp,
        "tp_size": tp,
        "ep_size": ep,
        "n_redundant_experts": more,
        "dsa_cp": tp > 1 and draw(st.booleans()),
    }


@FEW
@given(layout=layouts(), link=st.booleans(), workers=st.integers(1, 3))
def test_all_ranks_load_the_original_bit_for_bit(
    tmp_path_factory, checkpoint, layout, link, workers
):
    out, plan = tmp_path_factory.mktemp("any") / "out", make_plan(checkpoint, layout)
    shard(checkpoint, plan, out, link, workers=workers)
    require_same(checkpoint, plan, out)


def test_a_rank_reads_its_file_from_begin_to_end_and_it_is_safetensors(tmp_path, checkpoint):
    plan = make_plan(checkpoint, LAYOUTS["pp2-tp2-ep2"])
    shard(checkpoint, plan, tmp_path / "out")
    config = CheckpointFolder(checkpoint).config
    for rank in plan.ranks:
        (file,) = (tmp_path / "out").glob(f"rank-{rank.rank:05d}*.safetensors")
        record = read_record(file)
        assert [t.name for t in record.tensors] == list(holdings(config, plan, rank))
        assert record.tensors[0].begin % 4096 == 0
        ends = [t.end for t in record.tensors]
        assert [t.begin for t in record.tensors[1:]] == ends[:-1]
        own = RankCheckpoint(ShardedFolder(tmp_path / "out"), plan, rank.rank)
        with safe_open(file, framework="pt") as f:
            for name in own.headers:
                assert same_bits(f.get_tensor(name), own.tensor(name))


def test_a_rank_may_have_several_files(tmp_path, checkpoint, small_files):
    plan = make_plan(checkpoint, LAYOUTS["ep4-copies"])
    done = shard(checkpoint, plan, tmp_path / "out")
    assert len(done.manifest.of_rank(0)) > 1
    require_same(checkpoint, plan, tmp_path / "out")


@pytest.mark.parametrize("link", [False, True])
def test_an_engine_answers_alike_from_the_checkpoint_and_from_its_rank_file(
    tmp_path, checkpoint, link
):
    plan = make_plan(checkpoint, {}, kernels="reference")
    shard(checkpoint, plan, tmp_path / "out", link)
    moved = plan.model_copy(update={"checkpoint": str(tmp_path / "out"), "port": 9999})
    logits, read = [], []
    for p in (plan, moved):
        with use_policy(kernels="reference"):
            engine = Engine.load(p, lambda done, total: read.append((done, total)))
            logits.append(engine.logits([Chunk(0, list(range(20)), 0)]))
        assert read[-1][0] == read[-1][1]
    assert torch.equal(*logits)


def test_linked_files_take_no_space_and_others_are_copied(tmp_path, checkpoint):
    plan = make_plan(checkpoint, LAYOUTS["pp2"])
    done = shard(checkpoint, plan, tmp_path / "out", link=True)
    sources = {f.stat().st_ino for f in checkpoint.glob("*.safetensors")}
    assert {f.stat().st_ino for f in (tmp_path / "out").glob("*.safetensors")} <= sources
    assert done.bytes_written == 0  # every file of the checkpoint goes to one stage as it is
    require_same(checkpoint, plan, tmp_path / "out")
    split = shard(checkpoint, make_plan(checkpoint, LAYOUTS["tp2"]), tmp_path / "tp", link=True)
    assert split.bytes_written == sum(
        t.end - t.begin
        for f in split.manifest.files
        for t in read_record(tmp_path / "tp" / f.name).tensors
    )


def peak_of_command(*args):
    """Run a command; return whether it loaded torch, and the most memory it had, in bytes."""
    code = (
        "import pathlib, re, sys\n"
        "from v4_ascend.cli.app import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "status = pathlib.Path('/proc/self/status').read_text()\n"
        "print('torch' in sys.modules, re.search(r'VmHWM:\\s*(\\d+)', status)[1])\n"
    )
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    has_torch, kib = done.stdout.split()[-2:]
    return has_torch == "True", int(kib) * 1024


def test_the_command_needs_no_torch_and_little_memory(tmp_path, checkpoint):
    make_plan(checkpoint, LAYOUTS["ep2"]).write(tmp_path / "plan.json")
    has_torch, peak = peak_of_command(
        "shard", checkpoint, "--plan", tmp_path / "plan.json", "--out", tmp_path / "out"
    )
    assert not has_torch
    assert peak < 150 * 2**20


@pytest.mark.slow
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    config = ModelConfig.read(preset_path("ascend-slice"))
    config = config.model_copy(update={"n_routed_experts": 64})
    write_sparse(config, tmp_path / "c")
    nbytes = sum(f.stat().st_size for f in (tmp_path / "c").glob("*.safetensors"))
    assert nbytes > 3 * 2**30
    make_plan(tmp_path / "c", LAYOUTS["tp4-ep4"]).write(tmp_path / "plan.json")
    args = (tmp_path / "c", "--plan", tmp_path / "plan.json", "--out", tmp_path / "out")
    _, peak = peak_of_command("shard", *args, "--workers", 8)
    assert peak < 200 * 2**20  # promised: 1 GiB and the largest tensor
    shutil.rmtree(tmp_path / "out")


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def run_drill(tmp_path, checkpoint, n):
    make_plan(checkpoint, LAYOUTS["pp2"]).write(tmp_path / "plan.json")
    command = [sys.executable, str(DRILL), str(checkpoint), str(tmp_path / "plan.json")]
    done = subprocess.run(
        [*command, str(tmp_path), str(n)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    assert said["failed"] == []
    assert not said["torch"]


def test_killed_at_random_points_it_ends_with_the_same_bytes(tmp_path, checkpoint):
    run_drill(tmp_path, checkpoint, 16)


@pytest.mark.slow
def test_killed_at_200_random_points_it_ends_with_the_same_bytes(tmp_path, checkpoint):
    run_drill(tmp_path, checkpoint, 200)


def test_the_disk_is_kept_busy_and_the_bytes_are_the_same(tmp_path, checkpoint, monkeypatch):
    plan, told = make_plan(checkpoint, LAYOUTS["ep2"]), []
    shard(checkpoint, plan, tmp_path / "a")
    real = write_behind._start
    monkeypatch.setattr(write_behind, "BEHIND_BYTES", 100_000)
    monkeypatch.setattr(write_behind, "_start", lambda *args: told.append(real(*args)))
    shard(checkpoint, plan, tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    n_bytes = sum(f.stat().st_size for f in (tmp_path / "b").glob("*.safetensors"))
    assert n_bytes // 200_000 < len(told) <= n_bytes // 100_000
    assert set(told) == {0}


def test_the_same_work_twice_gives_the_same_bytes_and_resume_writes_nothing(tmp_path, checkpoint):
    plan = make_plan(checkpoint, LAYOUTS["ep2"])
    shard(checkpoint, plan, tmp_path / "a", workers=1)
    shard(checkpoint, plan, tmp_path / "b", workers=3)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    again = shard(checkpoint, plan, tmp_path / "a", resume=True)
    assert (again.n_kept, again.bytes_written) == (2, 0)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


@pytest.mark.parametrize("damage", ["flip", "truncate", "record", "gone"])
def test_resume_makes_again_what_is_damaged_and_no_more(tmp_path, checkpoint, damage):
    plan = make_plan(checkpoint, LAYOUTS["ep4"])
    out = tmp_path / "out"
    shard(checkpoint, plan, out)
    want, file = files_of(out), out / "rank-00002.safetensors"
    hurt(file, damage)
    again = shard(checkpoint, plan, out, resume=True)
    assert again.n_kept == 3
    assert files_of(out) == want


def hurt(file, damage):
    raw = bytearray(file.read_bytes())
    if damage == "flip":
        raw[-1000] ^= 4
        file.write_bytes(raw)
    elif damage == "truncate":
        file.write_bytes(raw[:-7])
    elif damage == "record":
        file.with_name("rank-00002.record.json").write_text("{")
    else:
        file.unlink()


def test_a_folder_with_something_in_it_is_refused(tmp_path, checkpoint):
    plan = make_plan(checkpoint, LAYOUTS["ep2"])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty; give a new folder, or --resume"):
        shard(checkpoint, plan, tmp_path)
    with pytest.raises(ConfigError, match=r"was not made by shard; it has notes\.txt"):
        shard(checkpoint, plan, tmp_path, resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_of_another_plan_or_checkpoint_is_refused_with_both_digests(tmp_path, checkpoint):
    plan, out = make_plan(checkpoint, LAYOUTS["ep2"]), tmp_path / "out"
    shard(checkpoint, plan, out)
    other = make_plan(checkpoint, LAYOUTS["pp2"])
    with pytest.raises(ShardError, match="of another plan: its layout is [0-9a-f]{64}, that of"):
        shard(checkpoint, other, out, resume=True)
    with pytest.raises(CheckpointError, match="made for the layout [0-9a-f]{64} of 2 ranks, this"):
        Engine.load(other.model_copy(update={"checkpoint": str(out)}), lambda done, total: None)
    second = write_tiny(tmp_path / "second", seed=4)
    with pytest.raises(ShardError, match="second/model-.* is not the file it was when"):
        shard(second, plan, out, resume=True)
    changed = json.loads((second / "config.json").read_text()) | {"rope_theta": 20000}
    (second / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ShardError, match="of another plan"):  # the model is part of a layout
        shard(second, plan, out, resume=True)
    with pytest.raises(ShardError, match="was begun without --link; go on without it"):
        shard(checkpoint, plan, out, link=True, resume=True)


def test_a_plan_of_another_model_is_refused(tmp_path, checkpoint):
    plan = make_plan(checkpoint, LAYOUTS["ep2"])
    first, second = plan.ranks

    def refused(says, *ranks):
        with pytest.raises(ShardError, match=says):
            shard(checkpoint, plan.model_copy(update={"ranks": ranks}), tmp_path / "out")

    refused(r"rank 1 holds layers 0\.\.42, the checkpoint has 0\.\.5", first,
            second.model_copy(update={"layers": (0, 43)}))  # fmt: skip
    refused(r"rank 1 holds experts 4\.\.255, .* has 0\.\.7", first,
            second.model_copy(update={"experts": (4, 256)}))  # fmt: skip
    refused("expert 4 of layer 0 is on no rank", first)
    short = [r.model_copy(update={"layers": (0, 3)}) for r in plan.ranks]
    refused("layer 3 of the checkpoint is on no rank", *short)
    three = make_plan(checkpoint, {"tp_size": 3})
    with pytest.raises(ShardError, match=r"tp_size 3: .* in 3 equal parts"):
        shard(checkpoint, three, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("full", ["tensors", "records"])
def test_a_full_disk_is_an_error_that_names_the_file_and_resume_goes_on(
    tmp_path, checkpoint, monkeypatch, small_files, full
):
    plan, out, real = make_plan(checkpoint, LAYOUTS["ep2"]), tmp_path / "out", os.write
    n = [0]

    def write(fd, data):
        name = os.readlink(f"/proc/self/fd/{fd}")
        n[0] += ".record.json" in name if full == "records" else 1
        if n[0] > (3 if full == "records" else 400):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data)

    with monkeypatch.context() as m:
        m.setattr(os, "write", write)
        with pytest.raises(ShardError, match=r"rank-0.*\.partial: No space left on device"):
            shard(checkpoint, plan, out)
    assert not (out / "manifest.json").exists()
    assert not list(out.glob("*rank-*.partial"))
    with pytest.raises(CheckpointError, match="shard has not ended there; go on with --resume"):
        Engine.load(plan.model_copy(update={"checkpoint": str(out)}), lambda done, total: None)
    assert shard(checkpoint, plan, out, resume=True).n_kept > 0
    require_same(checkpoint, plan, out)


def test_a_disk_that_is_too_small_is_refused_before_a_tensor_is_written(
    tmp_path, checkpoint, monkeypatch
):
    small = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small)
    with pytest.raises(ShardError, match=r"bytes to write, its disk has 1,000 free"):
        shard(checkpoint, make_plan(checkpoint, {}), tmp_path / "out")
    assert not list((tmp_path / "out").glob("rank-*"))


@pytest.mark.parametrize("where", ["model-00003", "rank-00001"])
def test_permission_denied_names_the_file(tmp_path, checkpoint, monkeypatch, where):
    real = os.open

    def denied(path, *args, **kwargs):
        if where in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(ShardError, match=f"{where}.*: Permission denied"):
        shard(checkpoint, make_plan(checkpoint, LAYOUTS["ep2"]), tmp_path / "out")


def test_the_file_size_limit_of_a_process_is_an_error_with_exit_code_1(tmp_path, checkpoint):
    make_plan(checkpoint, {}).write(tmp_path / "plan.json")
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "from v4_ascend.cli import main\n"
        "main()\n"
    )
    args = [str(checkpoint), "--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, "shard", *args], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "rank-00000.safetensors.partial: File too large" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("change", ["append", "truncate", "touch", "replace"])
def test_a_source_that_changes_while_it_is_read_is_an_error_that_names_it(
    tmp_path, checkpoint, change
):
    source = shutil.copytree(checkpoint, tmp_path / "source")
    file, out = source / "model-00003-of-00009.safetensors", tmp_path / "out"
    changed = []

    def progress(done, total):
        if changed or not done:
            return
        changed.append(change)
        raw = file.read_bytes()
        if change == "append":
            file.write_bytes(raw + b"x")
        elif change == "truncate":
            file.write_bytes(raw[:-1000])
        elif change == "touch":
            os.utime(file, ns=(1, 1))
        else:
            (source / "new").write_bytes(bytes(len(raw)))
            (source / "new").rename(file)

    plan = make_plan(checkpoint, LAYOUTS["ep2"])
    with pytest.raises(CheckpointError, match=r"model-00003.*: (changed while|.*became shorter)"):
        shard(source, plan, out, workers=1, progress=progress)
    assert not list(out.glob("rank-00000*"))
    assert not (out / "manifest.json").exists()


def test_two_at_once_in_one_folder_are_refused(tmp_path, checkpoint):
    plan, out = make_plan(checkpoint, LAYOUTS["ep2"]), tmp_path / "out"
    said = []

    def progress(done, total):
        if not said:
            said.append("")
            with pytest.raises(ShardError, match="another shard writes there") as e:
                shard(checkpoint, plan, out, resume=True)
            said[0] = str(e.value)

    shard(checkpoint, plan, out, workers=1, progress=progress)
    assert said[0]
