"""Compile linear attention's kernels ahead of time, print what each needs as JSON lines. ARCH ROLE:DIM:VARIANT[:DTYPE] ..."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import triton
from longspan.attention.linear.triton import (
    chunk_scan_kernel,
    decay_kernel,
    scan_config,
    state_passing_kernel,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.attention.softmax.aot_worker import kernel_resources

# Of the walk: whether it goes back, whether the state is transposed, and what it is given.
ROLES = {
    "state": (False, False, {"CARRY"}),
    "out": (False, False, {"OUT"}),
    "state-back": (True, False, {"CARRY"}),
    "dv": (True, False, {"OUT"}),
    "dq": (False, True, {"OUT"}),
    "dk": (True, True, {"OUT"}),
    "dq-decay": (False, True, {"OUT", "PARTNER", "DOTS"}),
    "dk-decay": (True, True, {"OUT", "PARTNER", "DOTS"}),
}
# Decays per token, documents.
VARIANTS = {"constant": (False, False), "gated": (True, False), "documents": (True, True)}
TYPES = dict.fromkeys(("X", "Y", "Z", "PARTNER"), "*{}") | {"scale": "fp32", "DOCUMENTS": "*i32"}
TYPES |= dict.fromkeys(("DECAY", "STATES", "CARRY", "DOTS", "TOKEN_DOTS", "EDGE_DOTS"), "*fp32")
# What the launcher cannot promise to be a multiple of 16.
ODD = {"scale", "heads", "x_group", "z_group", "length", "chunks", "segments"}


def compiled(arch: int, role: str, dim: int, variant: str, dtype: str = "bf16") -> dict:
    """Registers, spills and shared memory of the walk in a role, or of one of the two small kernels."""
    per_token, documented = VARIANTS[variant]
    config = scan_config(arch, 4 if dtype == "fp32" else 2, dim)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    constants = {} if documented else {"DOCUMENTS": None}
    if role in ROLES:
        kernel, (reverse, transposed, given) = chunk_scan_kernel, ROLES[role]
        constants |= dict.fromkeys({"PARTNER", "CARRY", "OUT", "DOTS"} - given) | {
            "DX": dim, "DZ": dim, "BLOCK_X": dim, "BLOCK_Z": min(dim, config.block), "CHUNK": config.chunk,
            "PER_TOKEN": per_token, "REVERSE": reverse, "TMA": arch >= 90 and dtype != "fp32",
            "PRECISION": "ieee" if dtype == "fp32" else "tf32", ("s_x" if transposed else "s_z"): 1,
        }  # fmt: skip
    elif role == "carry":
        kernel, constants, options = (
            state_passing_kernel,
            {"SIZE": dim * dim, "BLOCK": 1024, "REVERSE": True},
            {},
        )
    else:
        kernel, options = decay_kernel, {}
        constants["CHUNK"] = 64
    types = TYPES | {"OUT": "*fp32" if role == "decay" else f"*{dtype}"}
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32").format(dtype)
        for name in names
    }
    hints = {
        (n,): [["tt.divisibility", 16]]
        for n, name in enumerate(names)
        if name not in constants and name not in ODD
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=hints)
    found = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    case = {"role": role, "arch": arch, "dim": dim, "variant": variant, "dtype": dtype}
    return case | {"shape": vars(config)} | kernel_resources(found.asm["ptx"], found)


if __name__ == "__main__":
    for case in sys.argv[2:]:
        role, dim, *rest = case.split(":")
        print(json.dumps(compiled(int(sys.argv[1]), role, int(dim), *rest)), flush=True)
