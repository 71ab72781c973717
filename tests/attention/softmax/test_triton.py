"""The Triton kernels without a GPU: interpreted, and compiled ahead of time."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
# Cases that a launch configuration must support for every head dim.
AHEAD = [
    "forward:{}:s2",
    "forward:{}:lists",
    "dq:{}:s2",
    "dkv:{}:causal",
    "dkv:{}:s2-far",
    "dkv:{}:lists",
]
WIDE = ["forward:{}:causal", "dq:{}:causal", "dq:{}:lists", "dkv:{}:dilated-far"]
SHARED = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}

INTERPRETED = [
    ["causal", "s2", "window", "streaming"],
    ["documents", "other sinks in each head", "shorter than the stride", "sink and softcap"],
]
INTERPRETED_WIDE = [
    ["mutants"],
    ["stripes alone", "dilated", "two ranges", "lists"],
    ["sigmoid", "odd dims", "tiles"],
    ["all at once", "two dilations"],
    ["each head its own", "lists of each row", "documents and lists"],
    ["grouped queries", "sigmoid and softcap on lists"],
]


def python(script: str | Path, *args: object, **env: str) -> str:
    command = [sys.executable, str(HERE / script), *map(str, args)]
    completed = subprocess.run(
        command, env={**os.environ, **env}, capture_output=True, text=True, timeout=500, check=False
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    return completed.stdout


@pytest.mark.parametrize(
    "cases",
    [*INTERPRETED, *(pytest.param(cases, marks=pytest.mark.wide) for cases in INTERPRETED_WIDE)],
    ids=", ".join,
)
def test_parity_in_the_interpreter(cases):
    python("triton_worker.py", *cases)


@pytest.mark.parametrize(
    "arch", [90, *(pytest.param(arch, marks=pytest.mark.wide) for arch in SHARED if arch != 90)]
)
@pytest.mark.parametrize("dim", [pytest.param(64, marks=pytest.mark.wide), 128])
@pytest.mark.parametrize(
    "cases", [AHEAD, pytest.param(WIDE, marks=pytest.mark.wide)], ids=["most", "rest"]
)
def test_compiled_ahead_of_time(arch, dim, cases):
    """Few register spills, shared memory in bounds, and the instructions of the GPU are used."""
    for line in python("aot_worker.py", arch, *(case.format(dim) for case in cases)).splitlines():
        kernel = json.loads(line)
        assert kernel["spills"] <= 64, kernel
        assert kernel["shared"] <= SHARED[arch], kernel
        assert arch != 90 or (kernel["wgmma"] and kernel["tma"]), kernel
        assert arch != 100 or kernel["tma"], kernel
        assert arch != 120 or not kernel["tma"], kernel
        if kernel["variant"] != "dilated-far":
            assert_nothing_is_computed_twice(kernel)


def assert_nothing_is_computed_twice(kernel):
    """Count exponentials and products of the compiled code against what its loops' tiles need.

    A tile that its warps compute twice shows in no register and in no result.
    """
    config = kernel["config"]
    pairs = config["queries"] * config["keys"]
    if kernel["kernel"] == "dkv":
        num_loops = 2  # over tiles with a mask, and without
    else:
        num_loops = {"causal": 2, "s2": 4, "lists": 1}[kernel["variant"]]

    # Beside those of the pairs, each warp of forward scales what its queries have so far.
    rescaling = 1.5 if kernel["kernel"] == "forward" else 1.0
    if kernel["arch"] == 100:
        return  # its loops are unrolled, and the sizes of its products are in descriptors
    exponentials = 32 * config["warps"] * kernel["exponentials"]
    assert exponentials <= rescaling * num_loops * pairs, kernel

    warps_of_a_product = 4 if kernel["arch"] == 90 else 1
    multiplications = 0
    for shape, count in kernel["products"].items():
        m, n, k = map(int, re.findall(r"\d+", shape))
        multiplications += m * n * k * count
    multiplications *= config["warps"] // warps_of_a_product
    num_products = {"forward": 2, "dq": 3, "dkv": 4}[kernel["kernel"]]
    assert multiplications == num_loops * num_products * pairs * kernel["dim"], kernel


def test_without_a_gpu_the_error_names_another_backend():
    import torch
    from longspan.attention import Causal, attend

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    x = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="backend triton needs CUDA, but q is on cpu; use torch"):
        attend(x, x, x, Causal(), backend="triton")


def test_kernels_are_not_specialized_for_lengths():
    from longspan.attention.softmax.triton.dkv import dkv_kernel
    from longspan.attention.softmax.triton.forward_dq import forward_dq_kernel

    for kernel in (forward_dq_kernel, dkv_kernel):
        general = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        assert {"l_b", "l_h", "list_b", "list_h"} <= general
        # What differs between documents is in tables.
        assert not {"q_start", "q_len", "k_start", "k_len"} & set(kernel.arg_names)
