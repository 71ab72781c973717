"""Compile linear attention's kernels ahead of time and print their resources as JSON lines.

Arguments: ARCH ROLE:DIM:VARIANT[:DTYPE] ...
"""

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
from longspan.attention.triton_device import has_bulk_copies
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.attention.softmax.aot_worker import kernel_resources

# The chunk scan's roles: whether it runs in reverse, whether the state is transposed, and which of
# the optional tensors it has.
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
# Whether decays are per token, and whether there are documents.
VARIANTS = {"constant": (False, False), "gated": (True, False), "documents": (True, True)}
TYPES = dict.fromkeys(("X", "Y", "Z", "PARTNER"), "*{}") | {"scale": "fp32", "DOCUMENTS": "*i32"}
TYPES |= dict.fromkeys(("DECAY", "STATES", "CARRY", "DOTS", "TOKEN_DOTS", "EDGE_DOTS"), "*fp32")
# Arguments that the launcher cannot promise to be multiples of 16.
UNALIGNED = {"scale", "heads", "x_group", "z_group", "length", "chunks", "segments"}


def compiled(arch: int, role: str, dim: int, variant: str, dtype: str = "bf16") -> dict:
    """Return the resources of the chunk scan in a role, or of one of the two small kernels."""
    per_token, has_documents = VARIANTS[variant]
    config = scan_config(arch, 4 if dtype == "fp32" else 2, dim)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    constants = {} if has_documents else {"DOCUMENTS": None}
    if role in ROLES:
        kernel = chunk_scan_kernel
        reverse, transposed, tensors = ROLES[role]
        constants |= dict.fromkeys({"PARTNER", "CARRY", "OUT", "DOTS"} - tensors) | {
            "DX": dim, "DZ": dim, "BLOCK_X": dim, "BLOCK_Z": min(dim, config.block),
            "CHUNK": config.chunk,
            "PER_TOKEN": per_token, "REVERSE": reverse,
            "TMA": has_bulk_copies(arch) and dtype != "fp32",
            "PRECISION": "ieee" if dtype == "fp32" else "tf32", ("s_x" if transposed else "s_z"): 1,
        }  # fmt: skip
    elif role == "carry":
        kernel = state_passing_kernel
        constants = {"SIZE": dim * dim, "BLOCK": 1024, "REVERSE": True}
        options = {}
    else:
        kernel = decay_kernel
        options = {}
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
        if name not in constants and name not in UNALIGNED
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=hints)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    case = {"role": role, "arch": arch, "dim": dim, "variant": variant, "dtype": dtype}
    return case | {"shape": vars(config)} | kernel_resources(binary.asm["ptx"], binary)


if __name__ == "__main__":
    for case in sys.argv[2:]:
        role, dim, *rest = case.split(":")
        print(json.dumps(compiled(int(sys.argv[1]), role, int(dim), *rest)), flush=True)
