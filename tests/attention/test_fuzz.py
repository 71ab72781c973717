"""Random calls: strides, NaN places, kinds of numbers and options, against backend reference."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from longspan.attention import Window, attend, linear_attention

from .patterns.test_patterns import patterns
from .softmax.test_attend import LAYOUTS

TOLERANCE = 1e-9


def number_kinds(value):
    """Return what a caller may give as a number."""
    return st.sampled_from([value, np.float64(value), torch.tensor(value, dtype=torch.float64)])


@st.composite
def document_ids(draw, length):
    """Draw None, or ids of a batch of two."""
    if draw(st.booleans()):
        return None
    dtype = draw(st.sampled_from([torch.int32, torch.int64, torch.uint8]))
    rows = [sorted(draw(st.lists(st.integers(0, 3), min_size=length, max_size=length)))] * 2
    ids = torch.tensor(rows, dtype=dtype)
    return draw(st.sampled_from([ids, ids.repeat_interleave(2, 1)[:, ::2]]))


def tensors(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def with_nan(x, token):
    """Return ``x`` with NaN at a token of the first row."""
    if token is None:
        return x
    x = x.clone()
    x[0, token] = torch.nan
    return x


def others(documents, token, length):
    """Return which tokens have nothing to do with the spoiled one: bool ``[2, time]``."""
    result = torch.ones(2, length, dtype=torch.bool)
    if token is not None:
        result[0] = False if documents is None else documents[0] != documents[0, token]
    return result


def compare(run, tensors, kept):
    """Compare outputs and gradients of two backends for the tokens that are ``kept``."""
    ours, exact = (run(backend) for backend in ("torch", "reference"))
    for a, b in zip(ours, exact, strict=True):
        a, b = a[kept], b[kept]
        assert not a.isnan().any()
        assert (a - b).norm() <= TOLERANCE * b.norm().clamp(1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_attend(data):
    length = data.draw(st.integers(1, 70), "length")
    group = data.draw(st.sampled_from([1, 2]), "group")
    shapes = [
        (2, length, 4 * group, 8),
        (2, length, 4, 8),
        (2, length, 4, 8),
        (2, length, 4 * group, 8),
    ]
    layouts = data.draw(st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=4, max_size=4))
    documents = data.draw(document_ids(length), "documents")
    token = data.draw(st.none() | st.integers(0, length - 1), "token with NaN")
    spoiled = data.draw(st.sampled_from([0, 1, 2, 3]), "tensor with NaN")
    pattern = data.draw(patterns() | st.just(Window(7)), "pattern")
    options = data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "scale": number_kinds(0.25),
                "softcap": number_kinds(3.0),
                "sigmoid_bias": number_kinds(-1.0),
            },
        ),
        "options",
    )
    views = tensors(length, *shapes)
    views[spoiled] = with_nan(views[spoiled], token)
    views = [LAYOUTS[name](x) for name, x in zip(layouts, views, strict=True)]
    is_spoiled_elsewhere = token is not None and not views[spoiled][1].isfinite().all()
    if is_spoiled_elsewhere or (token is not None and "same" in layouts[spoiled]):
        return  # the layout repeats the spoiled token

    def run(backend):
        *leaves, upstream = views
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = attend(*leaves, pattern, documents=documents, backend=backend, **options)
        return out, *torch.autograd.grad(out, leaves, upstream)

    compare(run, views, others(documents, token, length))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_linear_attention(data):
    length = data.draw(st.integers(2, 140), "length")
    decay_shape = data.draw(st.sampled_from([None, (3,), (2, length, 3), (2, length, 3, 4)]))
    has_beta = data.draw(st.booleans(), "beta")
    documents = data.draw(document_ids(length), "documents")
    token = data.draw(st.none() | st.integers(0, length - 1), "token with NaN")
    scale = data.draw(number_kinds(0.5), "scale")

    names = ["q", "k", "v", "upstream"]
    shapes = [(2, length, 3, 4), (2, length, 3, 4), (2, length, 3, 4), (2, length, 3, 4)]
    given_tensors = dict(zip(names, tensors(length, *shapes), strict=True))
    given_tensors["k"] = torch.nn.functional.normalize(given_tensors["k"], dim=-1)
    spoiled = data.draw(st.sampled_from(names), "tensor with NaN")
    given_tensors[spoiled] = with_nan(given_tensors[spoiled], token)
    layouts = data.draw(
        st.lists(
            st.sampled_from(["packed", "heads first", "dims first", "every other"]),
            min_size=4,
            max_size=4,
        )
    )
    views = {
        name: LAYOUTS[layout](x)
        for layout, (name, x) in zip(layouts, given_tensors.items(), strict=True)
    }
    options = {}
    if decay_shape is not None:
        options["decay"] = -0.3 * tensors(1, decay_shape)[0].abs()
    if has_beta:
        options["beta"] = tensors(2, (2, length, 3))[0].sigmoid()

    def run(backend):
        *leaves, upstream = views.values()
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = linear_attention(
            *leaves, documents=documents, scale=scale, backend=backend, **options
        )
        return out, *torch.autograd.grad(out, leaves, upstream)

    compare(run, views, others(documents, token, length))
