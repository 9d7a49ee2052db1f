"""One rank of test_collectives: every collective the runtime uses, on npu tensors."""

import os
import sys

from v4_ascend.emulation import calls, install

RANK = int(os.environ["RANK"])
install("a3", devices=2)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402


def ranked(*shape):
    return torch.full(shape, float(RANK + 1), device="npu")


torch.npu.set_device(RANK)
dist.init_process_group("hccl")
assert torch.empty(1, device="npu").device.index == RANK

x = ranked(3)
dist.all_reduce(x)
assert x.cpu().tolist() == [3.0] * 3

whole = torch.empty(4, device="npu")
dist.all_gather_into_tensor(whole, ranked(2))
assert whole.cpu().tolist() == [1.0, 1.0, 2.0, 2.0]

piece = torch.empty(2, device="npu")
dist.reduce_scatter_tensor(piece, torch.arange(4.0, device="npu"))
assert piece.cpu().tolist() == [4.0 * RANK, 4.0 * RANK + 2]

# Rank r sends r + 1 rows to rank 0 and 2 rows to rank 1.
sent = [RANK + 1, 2]
got = [1, 2] if RANK == 0 else [2, 2]
out = torch.empty(sum(got), 2, device="npu", dtype=torch.bfloat16)
dist.all_to_all_single(out, ranked(sum(sent), 2).bfloat16(), got, sent)
assert out[:, 0].cpu().tolist() == [1.0] * got[0] + [2.0] * got[1]

fp8 = torch.full((2,), 1.5 + RANK, device="npu").to(torch.float8_e4m3fn)
swapped = torch.empty_like(fp8)
dist.all_to_all_single(swapped.view(torch.uint8), fp8.view(torch.uint8))
assert swapped.float().cpu().tolist() == [1.5, 2.5]

word = ranked(1)
dist.broadcast(word, src=1)
assert word.item() == 2.0

if RANK == 0:
    dist.send(torch.tensor([7.0], device="npu"), dst=1)
else:
    dist.recv(word, src=0)
    assert word.item() == 7.0

dist.barrier()
assert calls("c10d")["c10d::allreduce_"] >= 1
dist.destroy_process_group()
sys.stdout.write(f"rank{RANK}-done\n")
