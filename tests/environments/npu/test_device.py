"""The emulated device: torch_npu's own allocator, dispatcher and schemas on host memory."""

import subprocess
import sys

import pytest
import torch
import torch_npu

from v4_ascend.backends.ascend import soc
from v4_ascend.emulation import calls, install
from v4_ascend.emulation.chips import CHIPS
from v4_ascend.emulation.stand_in import OF_V32, STAND_INS, schemas
from v4_ascend.errors import V4AscendError

NPU = "npu:0"


def elsewhere(code: str) -> subprocess.CompletedProcess:
    """Run `code` in a process without a device yet."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_chip_is_what_torch_npu_sees():
    assert torch.npu.device_count() == 2
    assert torch_npu.npu.get_soc_version() == 260
    assert torch.npu.get_device_name(0) == CHIPS["950dt"].soc_name


@pytest.mark.parametrize("name", ["a2", "a3", "950pr"])
def test_other_chips(name):
    done = elsewhere(
        f"from v4_ascend.emulation import install; chip = install({name!r})\n"
        "import torch, torch_npu\n"
        "assert torch_npu.npu.get_soc_version() == chip.soc_version\n"
        "assert torch.npu.get_device_properties(0).total_memory == chip.memory_gib << 30\n"
        "print(hasattr(torch.ops._C_ascend, 'npu_sparse_attn_sharedkv'))\n"
        "x = torch.zeros(1, 4, 16, dtype=torch.bfloat16, device='npu')\n"
        "try: torch_npu.npu_mhc_sinkhorn(torch.zeros(1, 4, 4, device='npu')); print('there')\n"
        "except RuntimeError as e: print('161002' in str(e) and chip.soc_name in str(e))\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == (["False", "there"] if name == "950pr" else ["True", "True"])


def test_a_process_stays_what_it_is():
    assert install("950dt", devices=2) is CHIPS["950dt"]
    with pytest.raises(V4AscendError, match="2 x 950dt already, and cannot become 2 x a2"):
        install("a2", devices=2)


def test_an_unknown_acl_call_ends_the_process_with_its_name():
    done = elsewhere(
        "from v4_ascend.emulation import install; install()\nimport ctypes\n"
        "ctypes.CDLL('libascendcl.so').aclmdlRICaptureBegin()\n"
    )
    assert done.returncode < 0
    assert "aclmdlRICaptureBegin is not emulated" in done.stderr


def test_memory_is_limited():
    half = torch.empty(600 << 20, dtype=torch.uint8, device=NPU)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(600 << 20, dtype=torch.uint8, device=NPU)
    assert torch.empty(600 << 20, dtype=torch.uint8, device="npu:1").device.index == 1
    del half
    torch.npu.empty_cache()
    assert torch.empty(900 << 20, dtype=torch.uint8, device=NPU).numel() == 900 << 20
    torch.npu.empty_cache()


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x @ x.T,
        lambda x: x[1:3, ::2].contiguous(),
        lambda x: x.t()[2].softmax(-1),
        lambda x: x.to(torch.float8_e4m3fn).float(),
        lambda x: x.sort(-1).indices,
        lambda x: x.topk(3).values,
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: torch.cat((x, x)).sum(0),
        lambda x: x.index_put(
            (torch.tensor([0], device=x.device),), torch.ones((), device=x.device)
        ),
        lambda x: x[torch.tensor([2, 0])],
        lambda x: torch.einsum("ab,cb->ac", x, x),
        lambda x: x.clone().view(-1)[::3].mul_(2),
        lambda x: x.view(torch.int32).view(torch.float32).bfloat16(),
        lambda x: torch.nn.functional.layer_norm(x, (8,)),
        lambda x: torch.add(x, x, out=torch.empty(0, device=x.device)),
        lambda x: torch.ones(2, device=x.device) * torch.tensor(3.0),
        lambda x: x.chunk(2, -1)[1].cumsum(-1),
    ],
)
def test_plain_operators_compute_what_the_cpu_computes(compute):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    got = compute(x.to(NPU))
    want = compute(x)
    assert got.device == torch.device(NPU)
    assert got.stride() == want.stride()
    assert torch.equal(got.cpu(), want)


def test_views_share_memory():
    x = torch.zeros(4, 8, device=NPU)
    x[1:3].t()[2:4].add_(5)
    assert x.cpu().sum() == 5 * 4
    out = torch.zeros(4, 8, device=NPU)
    torch.mul(x, 2, out=out[:])
    assert torch.equal(out.cpu(), x.cpu() * 2)


@pytest.mark.parametrize(
    ("a", "b"),
    [(NPU, "cpu"), ("cpu", NPU), (NPU, "npu:1")],
)
def test_operands_on_two_devices_are_refused(a, b):
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device=a) + torch.ones(3, device=b)
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, 3, device=a) @ torch.ones(3, 3, device=b)


def test_vendor_operators_refuse_cpu_tensors():
    with pytest.raises(RuntimeError, match="same device"):
        torch_npu.npu_rms_norm(torch.ones(2, 8, device=NPU), torch.ones(8))
    with pytest.raises(NotImplementedError):
        torch_npu.npu_rms_norm(torch.ones(2, 8), torch.ones(8))


def test_calls_are_counted():
    x = torch.ones(2, 8, device=NPU)
    for _ in range(3):
        torch_npu.npu_rms_norm(x, x[0])
    assert calls("npu") == {"npu::npu_rms_norm": 3}


def test_an_operator_without_a_stand_in_fails_with_its_name():
    with pytest.raises(RuntimeError, match="aclnnSwiGlu"):
        torch_npu.npu_swiglu(torch.ones(2, 8, device=NPU))


def _some_call(schema):
    """Arguments that an operator's schema takes: tensors of one element, zeros and empty names."""
    of_kind = {
        "Tensor": torch.ones(1, device=NPU),
        "int": 0,
        "float": 0.0,
        "str": "",
        "bool": False,
    }
    required = [a for a in schema.arguments if not a.has_default_value() and not a.kwarg_only]
    named = [a for a in schema.arguments if not a.has_default_value() and a.kwarg_only]
    args = [of_kind.get(str(a.type)) for a in required]  # None for what is optional
    return args, {a.name: of_kind.get(str(a.type)) for a in named}


@pytest.mark.parametrize("name", soc.NEVER)
def test_v32s_indexer_and_attention_are_refused(name):
    """They take V4's tensors: what is emulated must not let a call to them pass."""
    op = getattr(torch.ops.npu, name).default
    args, kwargs = _some_call(op._schema)
    with pytest.raises(RuntimeError, match=f"{name} is V3.2's: its causal limit"):
        op(*args, **kwargs)
    assert f"npu::{name}" not in STAND_INS
    assert name in OF_V32


def test_every_stand_in_has_a_schema():
    recorded = schemas()
    for name, known in STAND_INS.items():
        namespace, _, operator = name.partition("::")
        if namespace == "npu":
            assert hasattr(torch.ops.npu, operator)
        else:
            assert recorded[operator][0] == known.generations
    without = set(recorded) - {n.partition("::")[2] for n in STAND_INS if n.startswith("_C")}
    assert without == set()


def test_stand_ins_take_what_the_schema_says():
    import inspect

    for name, known in STAND_INS.items():
        namespace, _, operator = name.partition("::")
        if known.name.startswith("_C_ascend") and "950" not in known.generations:
            schema = torch._C.parse_schema(schemas()[operator][1])
        else:
            schema = getattr(getattr(torch.ops, namespace), operator).default._schema
        wanted = [a.name for a in schema.arguments]
        assert list(inspect.signature(known.function).parameters) == wanted, name
