"""FRACTAL_NZ: weights in the tiles that the cube unit reads."""

from __future__ import annotations

import torch

from v4_ascend.backends import prepared
from v4_ascend.backends.ascend.custom_ops import torch_npu

FRACTAL_NZ = 29
TILES = "tiles"  # of a weight that lies in them


def store_in_tiles(weight: torch.Tensor) -> None:
    """Let a weight [.., n, k] lie as its transpose [.., k, n] in FRACTAL_NZ, from now on.

    It keeps its shape and values, and is kept once: a copy beside it would be the model again.
    Elsewhere than on an NPU, where kernels are only asked about, nothing happens; nor with a side
    of 1, which the vendor's products do not take.

    Source: op-plugin npu_quant_matmul, x2; vllm-ascend quantization methods.
    """
    if weight.device.type != "npu" or 1 in weight.shape or not weight.numel():
        return
    if not prepared.has(weight, TILES):  # an op that joins two others prepares their weights again
        weight.data = in_tiles(weight.transpose(-1, -2).contiguous()).transpose(-1, -2)
        prepared.keep(weight, TILES, True)


def in_tiles(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix [.., k, n] in FRACTAL_NZ; without an NPU the question is of shapes alone."""
    if matrix.device.type != "npu":
        return matrix
    tiles: torch.Tensor = torch_npu().npu_format_cast(matrix, FRACTAL_NZ)
    return tiles
