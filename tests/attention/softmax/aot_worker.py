"""Compile kernels ahead of time, without a GPU, and print their resources as JSON lines.

Arguments: ARCH KERNEL:DIM:VARIANT ...
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import triton
from longspan.attention.softmax.triton.dkv import dkv_kernel
from longspan.attention.softmax.triton.forward_dq import forward_dq_kernel
from longspan.attention.softmax.triton.launch_config import kernel_config
from longspan.attention.triton_device import has_bulk_copies
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# (bands, fixed far rules, all far rules, far rule of the launch, lists)
VARIANTS = {
    "causal": (1, 0, 0, -1, False),
    "s2": (1, 1, 1, -1, False),
    "s2-far": (1, 1, 1, 0, False),
    "dilated-far": (1, 0, 1, 0, False),
    "lists": (0, 0, 0, -1, True),
}
TENSORS = dict.fromkeys(("Q", "K", "V", "OUT", "DO"), "*bf16")
TENSORS |= dict.fromkeys(("LSE", "DELTA", "DK", "DV_OUT"), "*fp32") | dict.fromkeys(
    ("TABLE", "LISTS", "POINTERS", "PLACES", "PROGRAMS"), "*i32"
)
# Arguments that may not be multiples of 16.
UNALIGNED = {
    "group",
    "k_step",
    "k_size",
    "l_b",
    "l_h",
    "list_b",
    "list_h",
    "list_q",
}


def compiled(arch: int, kernel: str, dim: int, variant: str) -> dict:
    """Compile one kernel. Returns its registers, spills, shared memory and instructions."""
    config_of = "dkv relative" if variant == "dilated-far" else kernel
    config = kernel_config(config_of, arch, 2, dim)
    bands, fixed, far_rules, far, lists = VARIANTS[variant]
    function = dkv_kernel if kernel == "dkv" else forward_dq_kernel
    if lists:
        config = config.fit(64, 64)
    constants = {
        "D": dim, "DV": dim, "BLOCK_D": dim, "BLOCK_DV": dim, "BM": config.queries,
        "BN": config.keys, "BANDS": bands, "FIXED": fixed, "FARS": far_rules, "LISTED": lists,
        "ADD": False, "SOFTCAP": False, "SIGMOID": False, "TMA": has_bulk_copies(arch),
        "PRECISION": "tf32",
    } | ({"FAR": far} if kernel == "dkv" else {"GRAD": kernel == "dq"})  # fmt: skip
    signature = {}
    hints = {}
    float_scalars = ("scale", "softcap", "sigmoid_bias")
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name == "OUT" and kernel == "dq":
            signature[name] = "*fp32"
        elif name in float_scalars:
            signature[name] = "fp32"
        else:
            signature[name] = TENSORS.get(name, "i32")
        if name not in float_scalars and name not in UNALIGNED:
            hints[(index,)] = [["tt.divisibility", 16]]
    values = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=values, attrs=hints)
    target = GPUTarget("cuda", arch, 32)
    binary = triton.compile(
        source, target=target, options={"num_warps": config.warps, "num_stages": config.stages}
    )
    assembly = binary.asm["ptx"]
    return {
        "kernel": kernel,
        "arch": arch,
        "dim": dim,
        "variant": variant,
        "config": vars(config),
    } | kernel_resources(assembly, binary)


def kernel_resources(assembly: str, compiled_kernel) -> dict:
    """Assemble the PTX. Returns what the kernel needs, and counts of some of its instructions."""
    chip = re.search(r"\.target (\w+)", assembly).group(1)
    name = "ptxas-blackwell" if chip.startswith(("sm_10", "sm_12")) else "ptxas"
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(assembly)
        file.flush()
        command = [str(ptxas), "-v", f"--gpu-name={chip}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    stores, loads = map(int, spills.groups())
    return {
        "registers": int(re.search(r"Used (\d+) registers", report).group(1)),
        "spills": max(stores, loads),
        "shared": compiled_kernel.metadata.shared,
        "exponentials": assembly.count("ex2.approx"),
        "products": Counter(re.findall(r"(?:wgmma|mma)\.\S*?\.(m\d+n\d+k\d+)", assembly)),
        "wgmma": assembly.count("wgmma.mma_async"),
        "tma": assembly.count("cp.async.bulk.tensor"),
    }


if __name__ == "__main__":
    for case in sys.argv[2:]:
        kernel, dim, variant = case.split(":")
        print(json.dumps(compiled(int(sys.argv[1]), kernel, int(dim), variant)), flush=True)
