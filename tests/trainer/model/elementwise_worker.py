"""The kernels of rotary positions, of gated MLPs and of the loss: run by ``test_elementwise.py``.

Arguments: ``interpret``, to compare them in Triton's interpreter in fp32 with torch's formulas in
fp64; or ``compile ARCH``, to print what each needs on a GPU as JSON lines.
"""

import json
import os
import sys
from pathlib import Path

if sys.argv[1] == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
import torch.nn.functional as F
from longspan.attention import rotary, rotary_triton
from longspan.trainer.model import gated_mlp, gated_triton, loss, loss_triton

TOLERANCE = 1e-6


def error(computed, expected, inputs, doubles):
    """Return the largest relative error of results and of all gradients, upstream other than 1."""
    upstream = [torch.randn_like(result) for result in computed]
    gradients = torch.autograd.grad(computed, inputs, upstream)
    exact = torch.autograd.grad(expected, doubles, [each.double() for each in upstream])
    pairs = zip((*computed, *gradients), (*expected, *exact), strict=True)
    return max(float(((a - b).norm() / b.norm()).detach()) for a, b in pairs if b.numel())


def leaves(*tensors):
    """Return the tensors as leaves in fp32, and in fp64."""
    return (
        [tensor.clone().requires_grad_() for tensor in tensors],
        [tensor.double().requires_grad_() for tensor in tensors],
    )


def tables(batch, length, half):
    angles = 30 * torch.randn(batch, length, half)
    return angles.cos(), angles.sin()


def split_error(group, gates, dim, half):
    """Two sequences of 67 tokens, whose time comes before their batch in memory."""
    projected = torch.randn(67, 2, 3, group + gates + 2, dim)
    (x,), (exact,) = leaves(projected)
    angles = tables(2, 67, half) if half else None
    computed = rotary_triton.split(x.transpose(0, 1), group, gates, angles)
    expected = rotary.split_heads(exact.transpose(0, 1), group, gates, angles)
    return error(computed, expected, [x], [exact])


def rotate_error():
    (x,), (exact,) = leaves(torch.randn(2, 37, 3, 12))
    angles = tables(2, 37, 5)
    heads = slice(1, 3)  # neither contiguous nor all
    computed = rotary_triton.rotate(x[:, :, heads], *angles)
    expected = rotary.apply_rotary(exact[:, :, heads], *angles)
    return error([computed], [expected], [x], [exact])


def gated_error(is_silu, has_weights):
    inputs = [torch.randn(5, 3, 2 * 1500)] + [torch.rand(5, 3)] * has_weights
    given, exact = leaves(*inputs)
    activation = F.silu if is_silu else gated_mlp.identity
    computed = gated_triton.fused_gated_activation(given[0], is_silu, *(given[1:] or [None]))
    expected = gated_mlp.gated_activation(exact[0], activation, *exact[1:])
    return error([computed], [expected], given, exact)


def loss_error():
    """Logits with a standard deviation of 8, a vocabulary with padding, a token without a label."""
    tokens, vocabulary, padded = 37, 9000, 9088
    given, exact = leaves(2 * torch.randn(tokens, 16), torch.randn(padded, 16))
    labels = torch.randint(vocabulary, (tokens,))
    weights = torch.rand(tokens)
    labels[5] = -100
    weights[5] = 0
    fixed = labels, weights, None, vocabulary, 16
    expected = loss.cross_entropy_sum(*exact, *fixed)
    loss.has_kernels = lambda x: True
    computed = loss.cross_entropy_sum(*given, *fixed)
    loss.has_kernels = lambda x: False
    return error([computed], [expected], given, exact)


CASES = {
    "split, rotated": lambda: split_error(group=3, gates=3, dim=16, half=8),
    "split, one query, partly rotated": lambda: split_error(group=1, gates=0, dim=12, half=4),
    "split alone": lambda: split_error(group=2, gates=0, dim=8, half=0),
    "rotate": rotate_error,
    "silu": lambda: gated_error(is_silu=True, has_weights=False),
    "silu, weights": lambda: gated_error(is_silu=True, has_weights=True),
    "no activation": lambda: gated_error(is_silu=False, has_weights=True),
    "loss": loss_error,
}


def check_mutants():
    """Faults that the comparison must find."""
    rotated = rotary_triton._rotated
    rotary_triton._rotated = lambda x, cos, sin, direction: rotated(x, cos, sin, 1.0)
    assert rotate_error() > 100 * TOLERANCE
    moved = rotary_triton._move_projection
    rotary_triton._move_projection = lambda projected, q, gate, k, v, *rest: moved(
        projected, q, gate, v, k, *rest
    )
    assert split_error(group=3, gates=3, dim=16, half=8) > 100 * TOLERANCE
    gradients = gated_triton._gradients
    gated_triton._gradients = lambda grad, x, weights, is_silu: gradients(grad, x, weights, False)
    assert gated_error(is_silu=True, has_weights=False) > 100 * TOLERANCE
    gradients_of_loss = loss_triton.logits_to_gradients
    loss_triton.logits_to_gradients = lambda logits, labels, *rest: gradients_of_loss(
        logits, labels + 1, *rest
    )
    assert loss_error() > 100 * TOLERANCE


def compile_all(arch):
    """Yield the resources of each kernel, for bf16."""
    from tests.ahead_of_time import resources

    bf16 = dict.fromkeys(
        ("X", "OUT", "PROJECTED", "Q", "GATE", "K", "V", "GRAD_OUT", "GRAD_X", "LOGITS"), "*bf16"
    )
    fp32 = ("COS", "SIN", "WEIGHTS", "GRAD_WEIGHTS", "LARGEST", "SUMS", "LABEL_LOGITS", "SCALE")
    types = bf16 | dict.fromkeys(fp32, "*fp32") | {"LABELS": "*i64", "direction": "fp32"}
    heads = rotary_triton._sizes(128, 64)
    gated = {"SILU": True, "BLOCK": gated_triton._BLOCK}
    rows = {"BLOCK": loss_triton._BLOCK}
    for kernel, constants in [
        (rotary_triton.rotate_kernel, heads),
        (rotary_triton.rotate_kernel, rotary_triton._sizes(96, 20)),
        (rotary_triton.split_kernel, heads | {"GROUP": 4, "GATES": 4, "FORWARD": True}),
        (rotary_triton.split_kernel, heads | {"GROUP": 1, "GATES": 0, "FORWARD": False}),
        (gated_triton.gated_forward_kernel, gated | {"WEIGHTS": None}),
        (gated_triton.gated_backward_kernel, gated),
        (loss_triton.row_statistics_kernel, rows),
        (loss_triton.logits_to_gradients_kernel, rows),
    ]:
        yield {"kernel": kernel.__name__} | resources(kernel, arch, constants, types)


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        for each in compile_all(int(sys.argv[2])):
            print(json.dumps(each), flush=True)
    else:
        torch.manual_seed(0)
        for name, case in CASES.items():
            found = case()
            assert found < TOLERANCE, (name, found)
        check_mutants()
