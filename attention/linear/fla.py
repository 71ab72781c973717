"""Linear attention by flash-linear-attention's kernels, which do every family on CUDA: an adapter that hides what they imply.

All of them take log-decays by e as ``g``, one for each token, and fp32 states ``[sequences, heads, key_dim, value_dim]``; their
scale is ``K^-0.5`` unless they are told. Documents are sequences in a row of a batch of one: the first of each of our rows
begins with its state, others with zeros. A decay for all tokens is spelt out: fla's own argument for it, ``g_gamma``, has no
gradient, and 0.6.0 makes NaN of it where it is below -88 over what a sequence's last chunk lacks of 64 tokens.
"""

from functools import cache, lru_cache
from importlib import import_module
from importlib.metadata import version
from typing import NamedTuple

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

from ..documents import document_spans

_OPERATIONS = {
    ("none", False): "chunk_simple_gla",
    ("scalar", False): "chunk_simple_gla",
    ("vector", False): "chunk_gla",
    ("none", True): "chunk_delta_rule",
    ("scalar", True): "chunk_gated_delta_rule",
    ("vector", True): "chunk_kda",
}
"""By the kind of decay, and whether there is a beta."""
_GROUPED = {"chunk_gated_delta_rule", "chunk_kda"}
"""Those that let several heads share a key; for others the keys are repeated."""
_DEVICES = {"cuda"}
_DTYPES = ({torch.float16}, {torch.bfloat16})
_LEAST = "0.6.0"
"""0.5.2 still counts in 32 bits where there are documents: offsets beyond 2^31 entries wrap around (its issue 1080)."""
_MAX_DELTA_DIM = 256
_MULTIPLE = 16
"""Of the head dims it is given: a matrix product needs as many, and its kernels refuse odd ones, which Triton miscompiles."""


def unsupported_reason(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None
) -> str | None:
    """Why it cannot do this exactly, if so."""
    if {q.dtype, k.dtype, v.dtype} not in _DTYPES:  # it multiplies fp32 as TF32
        return f"takes q, k and v all in bf16 or fp16, not in {q.dtype}, {k.dtype} and {v.dtype}; use torch"
    if beta is not None and q.shape[3] > _MAX_DELTA_DIM:
        return f"does the delta rule (beta) for key dims up to {_MAX_DELTA_DIM}, not {q.shape[3]}; use torch"
    if q.device.type not in _DEVICES:
        return f"needs CUDA, but q is on {q.device}; use torch"
    if missing := _missing():
        return f"needs a package: pip install 'longspan[gpu]' ({missing})"
    if _kind(decay) == "scalar" and (found := _miscompiled_by(q.device)):
        return f"has wrong gradients of one decay per head on Hopper by Triton {found}, must be at least 3.7.1; use torch"
    return None


def run(q, k, v, decay, beta, scale, state, documents) -> tuple[Tensor, Tensor]:
    """See :func:`~longspan.attention.linear.attention.linear_attention`."""
    (batch, length, heads, value_dim), key_dim = v.shape, q.shape[3]
    if not length:
        return v, state.float()
    operation = _OPERATIONS[_kind(decay), beta is not None]
    if operation not in _GROUPED:
        q, k = (x.repeat_interleave(heads // x.shape[2], 2) for x in (q, k))
    more_keys, more_values = (
        (0, -key_dim % _MULTIPLE),
        (0, -value_dim % _MULTIPLE),
    )  # zeros, which change nothing
    tokens = {"q": F.pad(q, more_keys), "k": F.pad(k, more_keys), "v": F.pad(v, more_values)}
    state = F.pad(state.float(), more_values + more_keys)
    if decay is not None:
        tokens["g"] = (
            F.pad(decay.float(), more_keys)
            if decay.ndim == 4
            else decay.float().expand(batch, length, heads)
        )
    if beta is not None:
        tokens["beta"] = beta.float()
    sequences, last = {}, slice(None)
    if documents is not None:
        # What is made in inference mode is of no use to training.
        pieces = _pieces(
            tuple(document_spans(documents)), length, q.device, torch.is_inference_mode_enabled()
        )
        sequences, last = (
            {"cu_seqlens": pieces.edges, "cu_seqlens_cpu": pieces.edges_on_cpu},
            pieces.last,
        )
        tokens = {name: x.flatten(0, 1)[None] for name, x in tokens.items()}
        state = state.new_zeros(len(pieces.edges) - 1, *state.shape[1:]).index_copy(
            0, pieces.first, state
        )
    kernels = getattr(import_module("fla.ops"), operation)
    out, states = kernels(
        **tokens, **sequences, scale=float(scale), initial_state=state, output_final_state=True
    )
    return out.view(batch, length, heads, -1)[..., :value_dim], states[
        last, :, :key_dim, :value_dim
    ]


def _kind(decay: Tensor | None) -> str:
    return "none" if decay is None else "vector" if decay.ndim == 4 else "scalar"


class _Pieces(NamedTuple):
    """The documents of all rows, one row after another."""

    edges: Tensor
    """Where they begin, and the last one's end."""
    edges_on_cpu: Tensor
    first: Tensor
    """Each row's first."""
    last: Tensor


@lru_cache(maxsize=8)  # every layer asks; fla knows again the tensors that it has seen
def _pieces(
    spans: tuple[tuple[int, int, int], ...], length: int, device: torch.device, inference: bool
) -> _Pieces:
    edges = torch.tensor(
        [row * length + start for row, start, _ in spans] + [(spans[-1][0] + 1) * length]
    )
    first = [i for i, (_, start, _) in enumerate(spans) if start == 0]
    last = [i for i, (*_, stop) in enumerate(spans) if stop == length]
    return _Pieces(
        edges.to(device), edges, *(torch.tensor(x, device=device) for x in (first, last))
    )


@cache
def _missing() -> str | None:
    """Why its kernels cannot be had, if so."""
    try:
        found = version("fla-core")
        if Version(found) < Version(_LEAST):
            return f"fla-core is {found}, must be at least {_LEAST}"
        import_module("fla.ops")
    except ImportError as error:
        return str(error)
    return None


@cache
def _miscompiled_by(device: torch.device) -> str | None:
    """Triton's version, if it is one with which fla refuses the backward pass of a scalar decay here (its issue 640)."""
    found = import_module("triton").__version__
    wrong = Version("3.4.0") <= Version(found) < Version("3.7.1")
    return found if wrong and torch.cuda.get_device_capability(device)[0] == 9 else None
