"""Hyper-connections: vllm-ascend's fused operators, and torch_npu's three.

Sources: vllm-ascend models/deepseek_v4/model.py (the calls), op-plugin npu_mhc_*.md.
"""

from __future__ import annotations

import torch

from v4_ascend.emulation.checks import Checks
from v4_ascend.emulation.stand_in import stand_in

STREAMS = 4


def sinkhorn(logits: torch.Tensor, n_iters: int, eps: float) -> torch.Tensor:
    """Softmax over rows, then columns; then rows and columns in turn, n_iters in all."""
    a = torch.softmax(logits, -1) + eps
    a = a / (a.sum(-2, keepdim=True) + eps)
    for _ in range(n_iters - 1):
        a = a / (a.sum(-1, keepdim=True) + eps)
        a = a / (a.sum(-2, keepdim=True) + eps)
    return a


def _mix(
    x: torch.Tensor, phi: torch.Tensor, norm_eps: float, gamma: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The projected streams before scaling, and 1 / rms of all streams together."""
    flat = x.float().flatten(-2)
    inv_rms = torch.rsqrt(flat.square().mean(-1) + norm_eps)
    if gamma is not None:
        flat = flat * gamma.float().flatten()
    return flat @ phi.T, inv_rms


@stand_in("_C_ascend::npu_hc_pre_v2")
def npu_hc_pre_v2(
    x: torch.Tensor,
    hc_fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    hc_mult: int,
    hc_sinkhorn_iters: int,
    norm_eps: float,
    hc_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y [T, D], post [T, 4] and the doubly stochastic comb [T, 4, 4], both fp32.

    Shapes: x [T, 4, D] bf16, hc_fn [24, 4 D], hc_scale [3], hc_base [24], all three fp32.
    """
    check = Checks("npu_hc_pre_v2", "vllm-ascend models/deepseek_v4/model.py")
    check.one_of((STREAMS,), hc_mult=hc_mult)
    check.shape(None, STREAMS, None, x=x)
    dim = x.shape[-1]
    check.one_of((4096, 7168), **{"x's D": dim})
    check.dtype(torch.bfloat16, x=x)
    n_mix = STREAMS * (STREAMS + 2)
    check.shape(n_mix, STREAMS * dim, hc_fn=hc_fn)
    check.shape(3, hc_scale=hc_scale)
    check.shape(n_mix, hc_base=hc_base)
    check.dtype(torch.float32, hc_fn=hc_fn, hc_scale=hc_scale, hc_base=hc_base)
    check.contiguous(x=x, hc_fn=hc_fn)
    check.need(hc_sinkhorn_iters > 0, "hc_sinkhorn_iters", hc_sinkhorn_iters, "at least 1")
    mixed, inv_rms = _mix(x, hc_fn, norm_eps)
    pre, post, comb = (mixed * inv_rms.unsqueeze(-1)).split((STREAMS, STREAMS, STREAMS**2), -1)
    base = hc_base.split((STREAMS, STREAMS, STREAMS**2))
    pre = torch.sigmoid(pre * hc_scale[0] + base[0]) + hc_eps
    post = 2 * torch.sigmoid(post * hc_scale[1] + base[1])
    comb = (comb * hc_scale[2] + base[2]).unflatten(-1, (STREAMS, STREAMS))
    y = (pre.unsqueeze(-1) * x.float()).sum(-2).to(x.dtype)
    return y, post, sinkhorn(comb, hc_sinkhorn_iters, hc_eps)


@stand_in("_C_ascend::npu_hc_post")
def npu_hc_post(
    x: torch.Tensor, residual: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> torch.Tensor:
    """Return ``post_k x + sum_j comb_jk residual_j``.

    Shapes: x [B, S, D], residual [B, S, 4, D], post [B, S, 4], comb [B, S, 4, 4] fp32.
    """
    check = Checks("npu_hc_post", "vllm-ascend models/deepseek_v4/model.py: a leading dim of batch")
    check.shape(None, None, None, x=x)
    b, s, dim = x.shape
    check.shape(b, s, STREAMS, dim, residual=residual)
    check.shape(b, s, STREAMS, post=post)
    check.shape(b, s, STREAMS, STREAMS, comb=comb)
    check.dtype(torch.bfloat16, x=x, residual=residual)
    check.dtype(torch.float32, post=post, comb=comb)
    return _merge(x, residual, post, comb)


def _merge(
    x: torch.Tensor, residual: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> torch.Tensor:
    mixed = comb.transpose(-1, -2).float() @ residual.float()
    return (post.unsqueeze(-1) * x.float().unsqueeze(-2) + mixed).to(residual.dtype)


def _check_streams(check: Checks, x: torch.Tensor) -> int:
    check.dtype(torch.bfloat16, torch.float16, x=x)
    check.need(x.dim() in (3, 4), "x.dim()", x.dim(), "[T, n, D] or [B, S, n, D]")
    n, dim = x.shape[-2:]
    check.one_of((4, 6, 8), **{"x's n": n})
    limit = "it must be a multiple of 16, at most 16384"
    check.need(dim % 16 == 0 and dim <= 16384, "x's D", dim, limit)
    return n


@stand_in("npu::npu_mhc_pre", ("950",))
def npu_mhc_pre(
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    *,
    gamma: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    hc_eps: float = 1e-6,
    out_flag: int = 0,
    inner_precise: int = 0,
) -> tuple[torch.Tensor, ...]:
    """Return h_in, h_post, h_res BEFORE Sinkhorn, inv_rms, h_mix and h_pre."""
    check = Checks("npu_mhc_pre", "op-plugin npu_mhc_pre.md")
    n = _check_streams(check, x)
    check.shape(n * n + 2 * n, n * x.shape[-1], phi=phi)
    check.shape(3, alpha=alpha)
    check.shape(n * n + 2 * n, bias=bias)
    check.dtype(torch.float32, phi=phi, alpha=alpha, bias=bias, gamma=gamma)
    check.one_of((0, 1), inner_precise=inner_precise, out_flag=out_flag)
    mixed, inv_rms = _mix(x, phi, norm_eps, gamma)
    pre, post, res = (mixed * inv_rms.unsqueeze(-1)).split((n, n, n * n), -1)
    base = bias.split((n, n, n * n))
    pre = torch.sigmoid(pre * alpha[0] + base[0]) + hc_eps
    post = 2 * torch.sigmoid(post * alpha[1] + base[1])
    res = (res * alpha[2] + base[2]).unflatten(-1, (n, n))
    h_in = (pre.unsqueeze(-1) * x.float()).sum(-2).to(x.dtype)
    return h_in, post, res, inv_rms, mixed, pre


@stand_in("npu::npu_mhc_sinkhorn", ("950",))
def npu_mhc_sinkhorn(
    x: torch.Tensor, *, eps: float = 1e-6, num_iters: int = 20, out_flag: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return x [..., n, n] fp32 made doubly stochastic; the gradient's inputs are not kept."""
    check = Checks("npu_mhc_sinkhorn", "op-plugin npu_mhc_sinkhorn.md")
    check.dtype(torch.float32, x=x)
    check.one_of((4, 6, 8), n=x.shape[-1])
    check.need(x.shape[-1] == x.shape[-2], "x.shape", list(x.shape), "its last dims must be equal")
    check.need(1 <= num_iters <= 100, "num_iters", num_iters, "it must be 1 to 100")
    check.one_of((0,), out_flag=out_flag)
    return sinkhorn(x, int(num_iters), eps), None, None


@stand_in("npu::npu_mhc_post", ("950",))
def npu_mhc_post(
    x: torch.Tensor, h_res: torch.Tensor | None, h_out: torch.Tensor, h_post: torch.Tensor
) -> torch.Tensor:
    """Return ``h_res^T x + h_out h_post``, streams [..., n, D]."""
    check = Checks("npu_mhc_post", "op-plugin npu_mhc_post.md")
    n = _check_streams(check, x)
    lead = x.shape[:-2]
    check.given(h_res=h_res)
    assert h_res is not None
    check.shape(*lead, n, n, h_res=h_res)
    check.shape(*lead, x.shape[-1], h_out=h_out)
    check.shape(*lead, n, h_post=h_post)
    check.dtype(torch.float32, h_res=h_res, h_post=h_post)
    check.dtype(x.dtype, h_out=h_out)
    return _merge(h_out, x, h_post, h_res)
