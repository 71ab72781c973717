"""Losses, checkpoints and results of operations: to the bit on the kind of machine that made them.

Elsewhere sums are added up in another order, and the norms beside the hashes are compared.
"""

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from longspan import attention, parallel
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

_PACKAGES = ("torch", "numpy", "deepspeed")
"""Not Megatron-core: with every supported version of it the bits are the same."""
_VARIABLES = ("OPENBLAS_CORETYPE", "ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA")
_HEX = re.compile(r"-?0x[01](?:\.[0-9a-f]+)?p[+-]\d+")
_HASH = re.compile(r"\b[0-9a-f]{64}\b")
_TOLERANCES = {"grad_norm": 1e-4, "optimizer.": 1e-3, "bfloat16": 5e-3}
"""Of lines that have this; of all others 1e-5."""


def machine() -> str:
    """What bits depend on: the kind of CPU, threads, libraries."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    parts = [
        names[0] if names else "unknown CPU",
        torch.backends.cpu.get_cpu_capability(),
        "1 thread",
        *(f"{package} {version(package)}" for package in _PACKAGES),
        *(f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ),
    ]
    return f"made on {', '.join(parts)}"


def same(before: str, now: str) -> bool:
    """Whether two files say the same: to the bit if they were made on the same kind of machine."""
    (made_before, *old), (made_now, *new) = before.splitlines() or [""], now.splitlines()
    if made_before == made_now:
        return old == new
    return len(old) == len(new) and all(map(_close, old, new))


def _close(old: str, new: str) -> bool:
    if _blank(old) != _blank(new):
        return False
    tolerance = next((each for part, each in _TOLERANCES.items() if part in old), 1e-5)
    numbers = (map(float.fromhex, _HEX.findall(line)) for line in (old, new))
    return all(
        math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-12) for a, b in zip(*numbers, strict=True)
    )


def _blank(line: str) -> str:
    return _HASH.sub("#", _HEX.sub("#", line))


# Runs.

OPTIONS: dict[str, tuple[str, int, list[str]]] = {
    "tiny": ("tiny.yaml", 1, ["data.validation=corpus", "evaluation.interval=3"]),
    "tiny-cp2": ("tiny.yaml", 2, ["parallel.cp=2"]),
}
"""Of each run its recipe, ranks and overrides."""

WIDE: dict[str, tuple[str, int, list[str]]] = {
    "experts": ("experts.yaml", 1, []),
    "tiny-deepspeed": ("tiny.yaml", 2, ["parallel.cp=2", "engine.name=deepspeed"]),
    "tiny-dp2": ("tiny.yaml", 2, []),
    "tiny-tp2": ("tiny.yaml", 2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "tiny-pp2": ("tiny.yaml", 2, ["parallel.pp=2"]),
    "tiny-bf16": ("tiny.yaml", 1, ["training.dtype=bfloat16"]),
    "tiny-zero3": ("tiny.yaml", 2, ["engine.name=deepspeed", "engine.zero_stage=3"]),
    "tiny-memory": (
        "tiny.yaml",
        1,
        ["memory={recompute: full, offload_inputs: true, mlp_tile: 20, loss_tile: 50}"],
    ),
    "tiny-buckets": (
        "tiny.yaml",
        1,
        ["data.packing=buckets", "data.buckets={shortest: 24, cycle_steps: 6}"],
    ),
    "tiny-stages": (
        "tiny.yaml",
        1,
        [
            "stages=[{from_step: 3, training: {seq_length: 192, global_batch_size: 2}, "
            "model: {rope_theta: 50000.0}, data: {sources: {corpus: 1.0}, packing: best_fit}}]",
        ],
    ),
    "experts-ep2": ("experts.yaml", 2, ["parallel.ep=2"]),
    "recall": ("recall.yaml", 1, ["checkpoint.interval=3", "metrics.log_interval=1"]),
}


def metrics(run: Path) -> Iterator[str]:
    """Losses and gradient norms, a line for each step."""
    for line in run.joinpath("metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        kept = {
            name.partition("/")[2] if name.startswith("train/") else name: value
            for name, value in record.items()
            if name in ("train/loss", "train/grad_norm", "train/balance_loss", "eval/loss")
        }
        for name, value in kept.items():
            yield f"step {record['step']}: {name} {value.hex()}"


def checkpoint(folder: Path) -> Iterator[str]:
    """The tensors of a checkpoint by name, read by torch alone."""
    reader = FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.load(state, storage_reader=reader, no_dist=True)
    return tensors(sorted(state.items()))


def exported(folder: Path) -> Iterator[str]:
    """The tensors of a model for transformers."""
    from safetensors.torch import load_file

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return tensors(sorted(found.items()))


def tensors(named: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """A line for each: its shape, the hash of its bytes and its norm."""
    for name, tensor in named:
        data = tensor.detach().contiguous()
        digest = hashlib.sha256(data.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        kind = str(data.dtype).removeprefix("torch.")
        norm = "" if name.startswith("rng.") else f" norm {float(data.double().norm()).hex()}"
        yield f"{name} {kind} {list(data.shape)} {digest}{norm}"


# Operations.


def numbers_of(seed: int, *shape: int) -> Tensor:
    """Numbers between -1 and 1 that look drawn, and are the same bits on any machine."""
    at = torch.arange(math.prod(shape), dtype=torch.int64) + 7919 * seed
    mixed = (at * 2654435761 + 12345) % 2**32
    mixed = (mixed ^ (mixed >> 15)) * 2246822519 % 2**32
    return ((mixed >> 8).float() / 2**23 - 1).view(*shape)


DOCUMENTS = torch.tensor([[0] * 20 + [1] * 4 + [2] * 48 + [3] * 24, [0] * 48 + [1] * 48])
"""Of two rows of 96 tokens."""


def _leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [(3 * numbers_of(n, *shape)).requires_grad_() for n, shape in enumerate(shapes, 1)]


def _differentiated(out, leaves: list[Tensor]) -> list[Tensor]:
    outs = [*out] if isinstance(out, tuple) else [out]
    upstream = [numbers_of(50 + n, *x.shape) for n, x in enumerate(outs)]
    return [*outs, *torch.autograd.grad(outs, leaves, upstream)]


def attended(patterns: dict) -> Iterator[str]:
    """``attend`` under each pattern, with documents and without, and its other options once."""
    qkv = [(2, 96, 4, 8), (2, 96, 2, 8), (2, 96, 2, 12)]
    for name, pattern in patterns.items():
        for which, documents in (("one", None), ("packed", DOCUMENTS)):
            leaves = _leaves(*qkv)
            out = attention.attend(*leaves, pattern, documents=documents, return_lse=True)
            yield from _told(f"attend {name} {which}", _differentiated(out, leaves))
    for name, options in (
        ("softcap", {"softcap": 3.0}),
        ("sigmoid", {"sigmoid_bias": -2.0}),
        ("sinks", {"sinks": True}),
        ("scale", {"scale": 0.7}),
    ):
        leaves = _leaves(*qkv, *([(4,)] if "sinks" in options else []))
        if "sinks" in options:
            options = {"sinks": leaves[3]}
        out = attention.attend(*leaves[:3], attention.S2(4, 2, 3), documents=DOCUMENTS, **options)
        yield from _told(f"attend {name}", _differentiated(out, leaves))
    leaves = _leaves(*qkv)
    out = attention.attend(*leaves, attention.MoBA(8, 3))
    yield from _told("attend moba", _differentiated(out, leaves))


def linear_families() -> Iterator[str]:
    """``linear_attention`` of each family, and the short convolution."""
    shapes = {"none": [], "head": [(4,)], "token": [(2, 96, 4)], "key": [(2, 96, 4, 8)]}
    for name, shape in shapes.items():
        for delta in (False, True):
            for which, documents in (("one", None), ("packed", DOCUMENTS)):
                leaves = _leaves((2, 96, 2, 8), (2, 96, 2, 8), (2, 96, 4, 12), *shape)
                q, k, v, *decay = leaves
                options = {"decay": -decay[0].abs() / 16} if decay else {}
                if delta:
                    leaves.append(numbers_of(9, 2, 96, 4).requires_grad_())
                    options["beta"] = leaves[-1].sigmoid()
                    k = torch.nn.functional.normalize(k, dim=-1)
                given = {"documents": documents, "return_state": True, **options}
                out = attention.linear_attention(q, k, v, **given)
                told = f"linear {name}{' delta' * delta} {which}"
                yield from _told(told, _differentiated(out, leaves))
    leaves = _leaves((2, 96, 6), (6, 4), (6,))
    for which, documents in (("one", None), ("packed", DOCUMENTS)):
        out = attention.short_convolution(*leaves, documents=documents, return_state=True)
        yield from _told(f"convolution {which}", _differentiated(out, leaves))


def over_ranks(threads, layouts: dict, schedules: tuple[str, ...], patterns: dict) -> Iterator[str]:
    """``parallel.attend`` over threads that are ranks, its parts put together again."""
    for layout_name, layout in layouts.items():
        for name, pattern in patterns.items():
            for schedule in schedules:
                try:
                    yield from _of_ranks(threads, layout_name, layout, name, pattern, schedule)
                except ValueError as error:
                    yield f"{layout_name} {name} {schedule}: {error}"


def _of_ranks(threads, layout_name, layout, name, pattern, schedule) -> list[str]:
    whole = [3 * numbers_of(n, 2, 96, heads, 8) for n, heads in enumerate((4, 2, 2), 1)]

    def work(rank, group):
        leaves = [layout.shard(x, rank).clone().requires_grad_() for x in whole]
        documents = DOCUMENTS.int()
        out = parallel.attend(
            *leaves, pattern, layout, group, documents=documents, schedule=schedule
        )
        upstream = layout.shard(numbers_of(50, 2, 96, 4, 8), rank)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    parts = zip(*threads(layout.ranks, work), strict=True)
    found = [layout.unshard(list(each)) for each in parts]
    return list(_told(f"{layout_name} {name} {schedule}", found))


def _told(what: str, found: list[Tensor]) -> Iterator[str]:
    return tensors((f"{what} {n}", tensor) for n, tensor in enumerate(found))
