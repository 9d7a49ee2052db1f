"""Products on machines whose vectors hold eight floats, tried on whatever runs this."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from v4_ascend.backends.cpu.compiled import attention, library
from v4_ascend.ops import act_quant, grouped_gemm, index_select
from v4_ascend.ops.formats import E8M0

CSRC = Path(library.__file__).parent / "csrc"
SIZES = (0, 1, 2, 3, 5, 0, 8, 64, 65, 130)
N, K = 128, 256


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    out = tmp_path_factory.mktemp("narrow") / "narrow.so"
    how = ["-std=c++17", "-O3", "-fopenmp", "-Wno-psabi", "-fPIC", "-shared", "-DNO_AVX512"]
    sources = (CSRC / name for name in ("gemv.cpp", "indexer.cpp"))
    subprocess.run(["g++", *how, *sources, "-o", out], check=True)
    return ctypes.CDLL(str(out))


@pytest.fixture
def rows():
    g = torch.Generator().manual_seed(0)
    return torch.randn(sum(SIZES), K, generator=g), torch.tensor(SIZES), g


def _call(found, arrays, *sizes):
    pointers = (ctypes.c_void_p(a.data_ptr()) for a in arrays)
    found(*pointers, *map(ctypes.c_int64, sizes))


def test_it_is_the_narrow_one(narrow):
    assert narrow.has_wide_vectors() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_products(narrow, rows, dtype):
    x, sizes, g = rows
    x, is_bf16 = x.to(dtype), dtype == torch.bfloat16
    weight = torch.randn(len(SIZES), N - 3, K, generator=g).to(dtype)
    out = torch.full((len(x), N - 3), torch.nan)
    how = (len(x), len(SIZES), N - 3, K, is_bf16, is_bf16, False)
    _call(narrow.gemv_plain, (x, weight, sizes, out), *how)
    right = grouped_gemm.reference(
        x.float(), None, weight.float(), None, sizes, torch.float32
    )  # fmt: skip
    torch.testing.assert_close(out, right, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_fp4", [False, True])
def test_quantised_products(narrow, rows, is_fp4, dtype):
    x, sizes, g = rows
    x, x_scale = act_quant(x.bfloat16(), 128)
    if is_fp4:
        weight = torch.randint(-128, 128, (len(SIZES), N, K // 2), generator=g, dtype=torch.int8)
        groups, rows_each = (len(SIZES), N, K // 32), 1
    else:
        weight = torch.randn(len(SIZES), N, K, generator=g).to(torch.float8_e4m3fn)
        groups, rows_each = (len(SIZES), N // 128, K // 128), 128
    scale = torch.randint(120, 132, groups, generator=g, dtype=torch.uint8)
    right = grouped_gemm.reference(
        x, x_scale, weight, scale.view(E8M0), sizes, torch.float32
    )  # fmt: skip
    out = torch.full((len(x), N), torch.nan, dtype=dtype)
    arrays = (x.view(torch.uint8), x_scale.view(torch.uint8), weight.view(torch.uint8), scale)
    how, is_bf16 = (len(x), len(SIZES), N, K, K // x_scale.shape[1]), dtype == torch.bfloat16
    if is_fp4:
        _call(narrow.gemv_fp4, (*arrays, sizes, out), *how, is_bf16)
    else:
        _call(
            narrow.gemv_fp8, (*arrays, sizes, out), *how, rows_each, 128, groups[1], 0, is_bf16
        )  # fmt: skip
    near = {"rtol": 8e-3 if is_bf16 else 1e-5, "atol": 1e-5 * float(right.abs().max())}
    torch.testing.assert_close(out.float(), right, **near)


PLAIN_ROWS = [case for case in index_select.cases() if case.id.startswith(("fp32", "bf16"))]


@pytest.mark.parametrize("case", PLAIN_ROWS, ids=lambda case: case.id)
def test_choices(narrow, monkeypatch, case):
    inputs = case.make(torch.Generator().manual_seed(0))
    took, types = [], attention._index_select._types

    def call(*args):
        took.append(args)
        makers = (library._TYPES[t] for t in types)
        narrow.index_select(*(make(a) for make, a in zip(makers, args, strict=True)))

    monkeypatch.setattr(attention, "_index_select", call)
    got = attention.index_select_compiled(**inputs)
    assert took
    canonical = index_select.canonical
    assert torch.equal(canonical(got), canonical(index_select.reference(**inputs)))
