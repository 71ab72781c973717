"""What a rehearsal records, in a process that believes in a GPU; run by ``test_rehearsal.py``."""

# ruff: noqa: E402, N803

import random
from collections import Counter

from longspan.launch.rehearsal.fake_cuda import install_fake_cuda

install_fake_cuda()

import pytest
import torch
import torch.distributed as dist
import triton
import triton.language as tl
from longspan.attention.documents import document_spans, ids_of_tokens
from longspan.launch.rehearsal.device_memory import DeviceMemory
from longspan.launch.rehearsal.fake_gpu import pretend_gpu
from longspan.launch.rehearsal.fake_ranks import pretend_ranks
from longspan.launch.rehearsal.fake_triton import record_launches
from longspan.launch.rehearsal.known_values import KnownValues
from longspan.launch.rehearsal.recorder import Recorder
from longspan.trainer.predict.estimate import DEVICES
from torch._subclasses.fake_tensor import FakeTensorMode

memory = DeviceMemory()
recorder = Recorder(memory, KnownValues())
pretend_gpu(DEVICES["h100"], recorder)
pretend_ranks(3, 8, recorder)
variants = record_launches(recorder)
MIB = 2**20


def waits(phase):
    return in_phase(recorder.waits, phase)


def faults(phase):
    return in_phase(recorder.faults, phase)


def in_phase(found, phase):
    """Count what was found in a phase, at any place."""
    counts = Counter()
    for (at, what, _), times in found.items():
        if at == phase:
            counts[what] += times
    return counts


def check_waits():
    recorder.phase = "waits"
    x = torch.ones(4, device="cuda")
    x.sum().item()
    x.tolist()
    x.cpu()
    x.to("cpu", non_blocking=True)
    torch.zeros(4).to("cuda")
    torch.zeros(4).to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    torch.full((), 3.0, device="cuda")
    assert waits("waits") == {
        "item": 1,
        "tolist": 1,
        "copy to the host": 1,
        "copy from pageable memory": 1,
        "torch.cuda.synchronize": 1,
    }, waits("waits")


def check_known_values():
    """Random operations on whole numbers give what they give without a rehearsal."""

    def compute(device, seed):
        choose = random.Random(seed).choice
        x = torch.arange(60, device=device) % 7
        for _ in range(6):
            x = choose(
                [
                    lambda x: x.flip(0),
                    lambda x: x.cumsum(0),
                    lambda x: torch.where(x > 5, x, -x),
                    lambda x: x[x % 3 != 1],
                    lambda x: x.add_(2),
                    lambda x: torch.cat([x, x[:2]])[: len(x) // 2 * 2],
                    lambda x: x.clone().index_fill_(0, torch.tensor([1], device=x.device), 9),
                    lambda x: x.unique().repeat(2),
                ]
            )(x)
            x[:2] = 5
        return x.tolist()

    with torch.utils._python_dispatch._disable_current_modes():
        expected = [compute("cpu", seed) for seed in range(30)]
    assert [compute("cuda", seed) for seed in range(30)] == expected

    # What an unknown number was written to is unknown.
    x = torch.arange(4, device="cuda")
    known = x.view(2, 2)
    assert recorder.values.get(known) is not None
    x[0] = torch.rand(1, device="cuda").long()[0]
    assert recorder.values.get(known) is None


def check_parts_of_documents():
    """The host asks the GPU once where documents begin, also for parts of a sequence."""
    recorder.phase = "documents"
    documents = torch.arange(12, device="cuda") // torch.tensor([[5], [12]], device="cuda")
    recorder.waits.clear()
    for tokens in (slice(3, 9), slice(0, 5), slice(5, 12)):
        part = ids_of_tokens(documents, tokens)
        known = recorder.values.get(part)
        with torch.utils._python_dispatch._disable_current_modes():
            expected = document_spans(known)
        assert document_spans(part) == expected
        assert ids_of_tokens(documents, tokens) is part
    assert waits("documents") == {"copy to the host": 1}, waits("documents")

    documents[:, 6:] = 7
    assert document_spans(ids_of_tokens(documents, slice(5, 12)))[0].stop == 1
    assert waits("documents") == {"copy to the host": 2}, waits("documents")


def check_memory():
    before = memory.used
    memory.restart_peak()
    x = torch.empty(MIB, dtype=torch.uint8, device="cuda")
    y = torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")
    view = y[: MIB // 2]
    del x, y
    assert memory.used - before == 3 * MIB
    z = torch.empty(100, dtype=torch.uint8, device="cuda")
    assert memory.used - before == 3 * MIB + 512
    del view, z
    assert memory.used == before
    assert memory.peak - before == 4 * MIB
    assert sum(memory.kinds_at_peak.values()) == memory.peak


def check_collectives():
    recorder.phase = "collectives"
    x = torch.zeros(1000, device="cuda")
    work = dist.all_reduce(x, async_op=True)
    x + 1
    work.wait()
    dist.all_reduce(x)
    dist.all_reduce(torch.zeros(1000, 2, device="cuda")[:, 0])
    dist.all_reduce(torch.zeros(4))
    totals = {}
    for kind, each in recorder.collectives.items():
        if kind.phase == "collectives":
            assert (kind.name, kind.ranks) == ("allreduce", 8)
            for key, number in vars(each).items():
                totals[key] = totals.get(key, 0) + number
    assert totals == {"count": 4, "bytes": 3 * 4000 + 16, "hidden": 1}, totals
    assert faults("collectives") == {
        "allreduce of a tensor that is not contiguous": 1,
        "allreduce of a tensor on the host": 1,
    }


@triton.jit
def kernel(X, n, SIZE: tl.constexpr):
    pass


def check_launches():
    recorder.phase = "launches"
    x = torch.zeros(64, device="cuda")
    kernel[4, 2](x, 64, SIZE=16)
    kernel[4, 2](x, 128, SIZE=16)  # the same kind of argument
    kernel[4, 2](x, 65, SIZE=16)
    kernel[lambda arguments: (arguments["SIZE"],)](x, 64, SIZE=32)
    assert not faults("launches")
    assert len(variants.of_kernel["kernel"]) == 3
    assert recorder.launches["launches", "kernel"] == 4
    kernel[0, 2](x, 64, SIZE=16)
    kernel[1, 1, 65536](x, 64, SIZE=16)
    kernel[4, 2](torch.zeros(64), 64, SIZE=16)
    found = " ".join(faults("launches"))
    assert "the grid (0, 2) is empty" in found
    assert "the grid (1, 1, 65536) exceeds" in found
    assert "X is on cpu" in found


def check_mixed_devices():
    with pytest.raises(RuntimeError, match="device"):
        torch.zeros(4, device="cuda") + torch.zeros(4)


with FakeTensorMode(allow_non_fake_inputs=True), recorder:
    for check in (
        check_waits,
        check_known_values,
        check_parts_of_documents,
        check_memory,
        check_collectives,
        check_launches,
        check_mixed_devices,
    ):
        check()
