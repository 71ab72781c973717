"""What is around a call must not change it: autocast, torch.compile, the kind of its numbers."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from longspan.attention import (
    S2,
    BlockLists,
    Causal,
    Dilated,
    MoBA,
    PerHead,
    Sinks,
    Stripes,
    Window,
    apply_rotary,
    attend,
    linear_attention,
    rotary_tables,
    short_convolution,
)
from longspan.attention.linear.feature_maps import MAPS, hedgehog

LISTS = BlockLists.where(8, lambda i, j, h: (i + j) % 2 == 0, 64)
DOCUMENTS = torch.tensor([[0] * 20 + [1] * 44])


def make(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, 64, 2, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3)
    ]


def decay(x):
    return -x[..., 0].float().sigmoid()


def rotated(q, k, v):
    tables = rotary_tables(torch.arange(64)[None], 16, 1e4)
    return apply_rotary(q, *tables) + k + v


OPERATIONS = {
    "attend": lambda q, k, v: attend(q, k, v, S2(8, 2, 3)),
    "softcap": lambda q, k, v: attend(q, k, v, S2(8, 2, 3), softcap=3.0),
    "sigmoid": lambda q, k, v: attend(q, k, v, S2(8, 2, 3), sigmoid_bias=-1.0),
    "reference": lambda q, k, v: attend(q, k, v, S2(8, 2, 3), backend="reference"),
    "chosen blocks": lambda q, k, v: attend(q, k, v, MoBA(8, 2)),
    "linear": lambda q, k, v: linear_attention(q, k, v, decay=decay(v), documents=DOCUMENTS),
    "delta": lambda q, k, v: linear_attention(q, 0.2 * k, v, beta=v[..., 0].sigmoid()),
    "recurrence": lambda q, k, v: linear_attention(q, k, v, backend="reference"),
    "convolution": lambda q, k, v: short_convolution(
        q.flatten(2), k[0, :32, 0, :4], v[0, :16, :, 0].flatten(), documents=DOCUMENTS
    ),
    "hedgehog": lambda q, k, v: hedgehog(q, k[0, :16].transpose(0, 1)) + v.sum(),
    "rotary": rotated,
} | {
    name: lambda q, k, v, feature_map=feature_map: feature_map(q).sum(-1) + k[..., 0] + v[..., 0]
    for name, feature_map in MAPS.items()
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_autocast_changes_nothing(name, dtype):
    """Neither around both passes nor around one of them."""
    inputs = make(dtype)

    def run(forward, backward):
        with torch.autocast("cpu", torch.bfloat16, enabled=forward):
            out = OPERATIONS[name](*inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=backward):
            gradients = torch.autograd.grad(out, inputs, torch.ones_like(out), allow_unused=True)
        return out, *(x for x in gradients if x is not None)

    plain = run(False, False)
    for passes in ((True, True), (True, False), (False, True)):
        for found, expected in zip(run(*passes), plain, strict=True):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)


COMPILED = {
    repr(pattern): lambda q, k, v, pattern=pattern: attend(q, k, v, pattern, documents=DOCUMENTS)
    for pattern in (
        Causal(),
        S2(8, 2, 3),
        Sinks(3) | Window(5),
        Dilated(8, 3, 9),
        Stripes(4, 5, 2),
        PerHead([S2(8, 2, 3), Window(5)]),
    )
} | {
    "lists": lambda q, k, v: attend(q, k, v, LISTS),
    **{name: OPERATIONS[name] for name in ("chosen blocks", "linear", "delta", "convolution")},
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_functions_run(name):
    """The operation is a break in the graph; what is around it is compiled."""
    inputs = make()

    def function(q, k, v):
        return COMPILED[name](q * 2, k, v) * 3

    def run(call):
        out = call(*inputs)
        return out, *torch.autograd.grad(out.sum(), inputs, allow_unused=True)

    torch.compiler.reset()
    compiled = torch.compile(function, backend="eager")
    for _ in range(2):
        for found, expected in zip(run(compiled), run(function), strict=True):
            assert torch.equal(found, expected)


def test_calls_do_not_import_the_compiler():
    code = (
        "import sys, torch; from longspan.attention import attend, Causal, linear_attention\n"
        "x = torch.ones(1, 4, 1, 8, requires_grad=True)\n"
        "(attend(x, x, x, Causal()) + linear_attention(x, x, x)).sum().backward()\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


NUMBERS = {
    "scale": lambda value, x: attend(x, x, x, Causal(), scale=value),
    "softcap": lambda value, x: attend(x, x, x, Causal(), softcap=value),
    "sigmoid_bias": lambda value, x: attend(x, x, x, Causal(), sigmoid_bias=value),
    "linear scale": lambda value, x: linear_attention(x, x, x, scale=value),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_every_kind(name):
    x = make()[0].detach()
    expected = NUMBERS[name](2.0, x)
    for value in (2, np.float32(2), np.int64(2), torch.tensor(2.0), torch.tensor([2])):
        assert torch.equal(NUMBERS[name](value, x), expected), value


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor(2.0, requires_grad=True), "must be a number, .* none flows to it"),
        (torch.tensor([2.0, 3.0]), "must be a finite number, got tensor"),
        (torch.nan, "must be a finite number, got nan"),
        (torch.inf, "must be a finite number, got inf"),
        ("2", "must be a finite number, got '2'"),
        (True, "must be a finite number, got True"),
    ],
    ids=["gradient", "two", "nan", "inf", "text", "bool"],
)
def test_what_is_no_number_is_refused(name, value, message):
    x = make()[0].detach()
    with pytest.raises(ValueError, match=f"{name.split()[-1]} {message}"):
        NUMBERS[name](value, x)
