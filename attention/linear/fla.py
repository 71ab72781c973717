"""Linear attention by flash-linear-attention's kernels, which do every family on CUDA.

An adapter that makes explicit what they imply. All of them accept log-decays to base e as ``g``,
one for each token, and fp32 states ``[sequences, heads, key_dim, value_dim]``; their scale is
``K^-0.5`` unless one is given. Documents are sequences in a row of a batch of one: the first of
each of our batch rows begins with its state, others with zeros.

A decay that is the same for all tokens is expanded to them: fla's own argument for it, ``g_gamma``,
has no gradient, and 0.6.0 makes NaN of it where it is below -88 over what a sequence's last chunk
lacks of 64 tokens.
"""

from functools import cache, lru_cache
from importlib import import_module
from importlib.metadata import version
from typing import NamedTuple

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

from ..documents import DocumentSpan, document_spans
from ..gpu import compute_capability

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
"""Operations that let several heads share a key; for others the keys are repeated."""
_DEVICES = {"cuda"}
_DTYPES = ({torch.float16}, {torch.bfloat16})
_OLDEST_VERSION = "0.6.0"
"""0.5.2 still counts in 32 bits if there are documents: offsets beyond 2^31 entries wrap around.

Its issue 1080.
"""
_MAX_DELTA_DIM = 256
_DIM_MULTIPLE = 16
"""Head dims are padded to a multiple of it.

A matrix product needs as many, and its kernels refuse odd ones, which Triton miscompiles.
"""


def unsupported_reason(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None
) -> str | None:
    """Return why fla cannot compute the call exactly, and what can, or None if it can."""
    if {q.dtype, k.dtype, v.dtype} not in _DTYPES:  # it multiplies fp32 as TF32
        return (
            f"needs q, k and v all in bf16 or fp16, not in {q.dtype}, {k.dtype} and {v.dtype}; "
            "use torch"
        )
    if beta is not None and q.shape[3] > _MAX_DELTA_DIM:
        return (
            f"supports the delta rule (beta) for key dims up to {_MAX_DELTA_DIM}, "
            f"not {q.shape[3]}; use torch"
        )
    if q.device.type not in _DEVICES:
        return f"needs CUDA, but q is on {q.device}; use torch"
    if missing := _missing():
        return f"needs a package: pip install 'longspan[gpu]' ({missing})"
    triton_version = _miscompiled_by(compute_capability(q.device))
    if _decay_kind(decay) == "scalar" and triton_version:
        return (
            f"has wrong gradients of one decay per head on Hopper by Triton {triton_version}, "
            "must be at least 3.7.1; use torch"
        )
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    state: Tensor,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute what :class:`~longspan.attention.linear.backends.Backend` asks for."""
    batch, length, heads, value_dim = v.shape
    key_dim = q.shape[3]
    if not length:
        return v, state.float()

    operation = _OPERATIONS[_decay_kind(decay), beta is not None]
    if operation not in _GROUPED:
        q, k = (x.repeat_interleave(heads // x.shape[2], 2) for x in (q, k))

    # Dims are padded with zeros, which change nothing.
    key_padding = (0, -key_dim % _DIM_MULTIPLE)
    value_padding = (0, -value_dim % _DIM_MULTIPLE)
    inputs = {"q": F.pad(q, key_padding), "k": F.pad(k, key_padding), "v": F.pad(v, value_padding)}
    initial_state = F.pad(state.float(), value_padding + key_padding)
    if decay is not None:
        if decay.ndim == 4:
            inputs["g"] = F.pad(decay.float(), key_padding)
        else:
            inputs["g"] = decay.float().expand(batch, length, heads)
    if beta is not None:
        inputs["beta"] = beta.float()

    sequences: dict[str, Tensor] = {}
    last_sequences: Tensor | slice = slice(None)
    if documents is not None:
        # What is made in inference mode is of no use to training.
        packed = _pack_documents(
            tuple(document_spans(documents)), length, q.device, torch.is_inference_mode_enabled()
        )
        sequences = {"cu_seqlens": packed.edges, "cu_seqlens_cpu": packed.edges_on_cpu}
        last_sequences = packed.last
        inputs = {name: x.flatten(0, 1)[None] for name, x in inputs.items()}
        num_sequences = len(packed.edges) - 1
        zeros = initial_state.new_zeros(num_sequences, *initial_state.shape[1:])
        initial_state = zeros.index_copy(0, packed.first, initial_state)

    kernels = getattr(import_module("fla.ops"), operation)
    out, states = kernels(
        **inputs,
        **sequences,
        scale=float(scale),
        initial_state=initial_state,
        output_final_state=True,
    )
    out = out.view(batch, length, heads, -1)[..., :value_dim]
    return out, states[last_sequences, :, :key_dim, :value_dim]


def _decay_kind(decay: Tensor | None) -> str:
    if decay is None:
        return "none"
    return "vector" if decay.ndim == 4 else "scalar"


class _PackedDocuments(NamedTuple):
    """The documents of all batch rows, one row after another."""

    edges: Tensor
    """The first token of each, and the end of the last: int64 ``[documents + 1]``."""
    edges_on_cpu: Tensor
    first: Tensor
    """The number of each batch row's first document: int64 ``[batch]``."""
    last: Tensor
    """The number of each batch row's last document: int64 ``[batch]``."""


@lru_cache(maxsize=8)  # every layer asks, and fla recognizes tensors that it has seen
def _pack_documents(
    spans: tuple[DocumentSpan, ...], length: int, device: torch.device, inference: bool
) -> _PackedDocuments:
    starts = [row * length + start for row, start, _ in spans]
    end = (spans[-1][0] + 1) * length
    edges = torch.tensor([*starts, end])
    first = [number for number, (_, start, _) in enumerate(spans) if start == 0]
    last = [number for number, (_, _, stop) in enumerate(spans) if stop == length]
    return _PackedDocuments(
        edges.to(device),
        edges,
        torch.tensor(first, device=device),
        torch.tensor(last, device=device),
    )


@cache
def _missing() -> str | None:
    """Return why fla's kernels are not available, or None if they are."""
    try:
        installed = version("fla-core")
        if Version(installed) < Version(_OLDEST_VERSION):
            return f"fla-core is {installed}, must be at least {_OLDEST_VERSION}"
        import_module("fla.ops")
    except ImportError as error:
        return str(error)
    return None


@cache
def _miscompiled_by(capability: int) -> str | None:
    """Return Triton's version if with it fla refuses the backward of a scalar decay, else None.

    On Hopper, fla's issue 640.
    """
    installed = import_module("triton").__version__
    if not Version("3.4.0") <= Version(installed) < Version("3.7.1"):
        return None
    return installed if capability // 10 == 9 else None
