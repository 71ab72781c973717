"""Linear attention in stages: any decays, with the delta rule or without.

Tokens *write* to the state and *read* from it; with the delta rule, keys also *recall* what the
state holds for them. With chunks of ``C`` tokens, ``G`` the running sum of the log-decays in a
chunk, per key dim or for all, and ``b`` the betas (1 without the delta rule)::

    D_ij    = exp(G_i - G_j) where j <= i, else 0
    P       = scale (Q (b K)^T) * D                     scores: queries with keys that write
    N       = (K (b K)^T) * D below the diagonal        recalls: keys with keys that write
    T       = (I + N)^-1
    U       = T (V - exp(G) K S)                        what is written; V without the delta rule
    O       = P U + scale exp(G) Q S
    S'      = exp(G_C) S + (exp(G_C - G) b K)^T U

(arXiv 2312.06635 sec. 4, 2406.06484 sec. 3, 2412.06464 sec. 3.3, 2510.26692 sec. 3; here ``b`` is
on the keys' side, so that ``U`` has a gradient that is used as it is, and nothing is divided by
``b``.) Backward, with ``dS'`` the gradient of the state after a chunk::

    dV  = T^T (P^T dO + exp(G_C - G) b K dS')
    dS  = exp(G_C) dS' + (scale exp(G) Q)^T dO - (exp(G) K)^T dV
    dP  = dO U^T        dN = -dV U^T
    dQ  = scale exp(G) dO S^T   + dQ of P       of keys that recall: dK = -exp(G) dV S^T + dK of N
    of keys that write, b K:    dW = exp(G_C - G) U dS'^T + dW of P and N
    db  = K . dW
    dG  = Q . dQ + K . dK - b K . dW    and at the chunk's end + S' . dS'

Each line or two is a stage, a kernel: scores and factors of decays (:mod:`.scores`), states and
what is written (:mod:`.states`), outputs (:mod:`.outputs`); and in backward, after the first two
have been computed again, gradients of the states and values (:mod:`.states`), of the scores and of
all other inputs (:mod:`.gradients`). For backward the inputs are kept, and nothing else.

No exponent is above 0. One decay for all key dims: they are differences of sums of two parts, see
:func:`~.tiles.load_decay_sums`. A decay for each key dim cannot be a factor of a finished product:
queries and keys are multiplied by it before, in blocks of 1, 2, 4 ... tokens. A later token and an
earlier one meet at the edge between two blocks, each decayed by what lies between it and the edge.

Everything is deterministic: no atomics.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...arguments import with_dense_heads
from ...gpu import compute_capability
from ...operation import without_autocast
from ...triton_device import INTERPRETED
from .gradients import input_gradients_kernel, score_gradients_kernel
from .launch_config import KernelConfig, StagesConfig, padded_dim, stages_config
from .outputs import outputs_kernel
from .pieces import Pieces, pieces_of
from .scores import scores_kernel
from .states import state_gradients_kernel, states_kernel


class StagedLinearAttention(torch.autograd.Function):
    """The output and the last state.

    From ``q, k, v, decay, beta, state, scale, documents``; ``beta`` may be None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        beta: Tensor | None,
        state: Tensor,
        scale: float,
        documents: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = map(with_dense_heads, (q, k, v))
        decay = decay.float().contiguous()
        beta = None if beta is None else beta.float().contiguous()
        state = state.float().contiguous()
        config = _config(q, decay)
        chunks = pieces_of(documents, (v.shape[0], v.shape[1]), config.chunk, v.device)

        stages = _Stages(q, k, v, decay, beta, scale, chunks, config)
        with torch.cuda.device_of(v):
            scores = stages.scores()
            states = stages.states(scores, state)
            out = stages.outputs(scores, states)
        ctx.scale = scale
        ctx.chunks = chunks
        ctx.save_for_backward(q, k, v, decay, beta, state)
        return out, states.last

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, decay, beta, state = ctx.saved_tensors
        stages = _Stages(q, k, v, decay, beta, ctx.scale, ctx.chunks, _config(q, decay))
        with torch.cuda.device_of(v):
            scores = stages.scores()
            states = stages.states(scores, state)
            d_states = stages.state_gradients(scores, grad_out.contiguous(), grad_state)
            gradients = stages.input_gradients(states, d_states, ctx.needs_input_grad[3])
        return *gradients, d_states.first, None, None


class _Scores(NamedTuple):
    """What the first stage makes of each chunk: see ``scores_kernel``."""

    scores: Tensor
    inverse: Tensor | None
    queries: Tensor
    """Queries that read; ``q`` itself if there is a factor."""
    recalling: Tensor
    """Keys that recall; ``k`` itself if there is a factor."""
    writing: Tensor | None
    """Keys that write; None if they are ``k`` with a factor."""
    read_factor: Tensor | None
    write_factor: Tensor | None
    carry: Tensor


class _States(NamedTuple):
    """What the scan of states makes: see ``states_kernel``."""

    states: Tensor
    written: Tensor
    last: Tensor


class _StateGradients(NamedTuple):
    """What the scan of gradients makes: see ``state_gradients_kernel``."""

    d_states: Tensor
    d_out: Tensor
    """The upstream gradient."""
    dv: Tensor
    first: Tensor


@dataclass(frozen=True)
class _Stages:
    """The kernels' launches over the same tokens."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    beta: Tensor | None
    scale: float
    chunks: Pieces
    config: StagesConfig

    @property
    def _by_key(self) -> bool:
        return self.decay.ndim == 4

    @property
    def _group(self) -> int:
        """Return the number of value heads that share a key head."""
        return self.v.shape[2] // self.q.shape[2]

    def _constants(self) -> dict[str, Any]:
        """Return the constants that all kernels have."""
        is_fp32 = self.q.dtype == torch.float32
        return {"CHUNK": self.config.chunk, "PRECISION": "ieee" if is_fp32 else "tf32"}

    def _decay_constants(self) -> dict[str, Any]:
        """Return the constants of the kernels that read decays."""
        return self._constants() | {
            "LEVELS": self.config.chunk.bit_length() - 1,
            "BY_KEY": self._by_key,
            "PER_TOKEN": self.decay.ndim > 1,
        }

    def _scan_dims(self, kernel: KernelConfig) -> dict[str, int]:
        """Return the dims of heads, and those of tiles with all keys and a block of values."""
        key_dim = self.k.shape[3]
        value_dim = self.v.shape[3]
        return {
            "D": key_dim,
            "DV": value_dim,
            "BLOCK": padded_dim(key_dim),
            "BLOCK_V": min(kernel.block, padded_dim(value_dim)),
        }

    def _tile_dims(self, kernel: KernelConfig) -> dict[str, int]:
        """Return the dims of heads, and those of tiles with blocks of keys and of values."""
        key_dim = self.k.shape[3]
        value_dim = self.v.shape[3]
        return {
            "D": key_dim,
            "DV": value_dim,
            "BLOCK": min(kernel.block, padded_dim(key_dim)),
            "BLOCK_V": min(self.config.value_block, padded_dim(value_dim)),
        }

    def scores(self) -> _Scores:
        """Launch the first stage."""
        q, k = self.q, self.k
        batch, length, heads, _ = self.v.shape
        num_chunks = len(self.chunks.table)
        key_dim = q.shape[3]
        scores = q.new_empty(batch, length, heads, self.config.chunk)
        inverse = None if self.beta is None else torch.empty_like(scores)
        queries, recalling, writing, read_factor, write_factor = None, None, None, None, None
        if self._by_key:
            queries = q.new_empty(batch, length, heads, key_dim)
            writing = torch.empty_like(queries)
            recalling = None if self.beta is None else torch.empty_like(queries)
            carry = self.decay.new_empty(num_chunks, heads, key_dim)
        else:
            read_factor = self.decay.new_empty(batch, length, heads)
            write_factor = torch.empty_like(read_factor)
            carry = self.decay.new_empty(num_chunks, heads)
        scores_kernel[num_chunks, heads](
            q, k, self.decay, self.beta, self.chunks.table, scores, inverse, queries, recalling,
            writing, read_factor, write_factor, carry, self.scale,
            *q.stride()[:3], *k.stride()[:3], self._group, length,
            D=key_dim, BLOCK=min(self.config.scores.block, padded_dim(key_dim)),
            **self._decay_constants(),
            **self.config.scores.options(),
        )  # fmt: skip
        return _Scores(
            scores,
            inverse,
            q if queries is None else queries,
            k if recalling is None else recalling,
            writing,
            read_factor,
            write_factor,
            carry,
        )

    def states(self, scores: _Scores, first: Tensor) -> _States:
        """Launch the scan of states."""
        v = self.v
        length, heads = v.shape[1:3]
        dims = self._scan_dims(self.config.states)
        states = v.new_empty(self.chunks.slots, heads, dims["D"], dims["DV"], dtype=_wide_dtype(v))
        written = v if scores.inverse is None else v.new_empty(v.shape)
        last = torch.empty_like(first)
        blocks = triton.cdiv(dims["DV"], dims["BLOCK_V"])
        states_kernel[len(self.chunks.documents) * blocks, heads](
            scores.recalling, scores.writing, v, scores.inverse, scores.read_factor,
            scores.write_factor, scores.carry, self.chunks.table, self.chunks.documents,
            first, states, written, last,
            *scores.recalling.stride()[:3], *v.stride()[:3],
            heads // scores.recalling.shape[2], length,
            **dims, **self._constants(), **self.config.states.options(),
        )  # fmt: skip
        return _States(states, written, last)

    def outputs(self, scores: _Scores, states: _States) -> Tensor:
        """Launch the last stage of forward."""
        v = self.v
        length, heads = v.shape[1:3]
        dims = self._tile_dims(self.config.outputs)
        out = v.new_empty(v.shape)
        blocks = triton.cdiv(dims["DV"], dims["BLOCK_V"])
        outputs_kernel[len(self.chunks.table) * blocks, heads](
            scores.queries, states.written, scores.scores, scores.read_factor, self.chunks.table,
            states.states, out, self.scale,
            *scores.queries.stride()[:3], *states.written.stride()[:3],
            heads // scores.queries.shape[2], length,
            **dims, **self._constants(), **self.config.outputs.options(),
        )  # fmt: skip
        return out

    def state_gradients(self, scores: _Scores, d_out: Tensor, d_last: Tensor) -> _StateGradients:
        """Launch the scan of the states' gradients."""
        v = self.v
        length, heads = v.shape[1:3]
        dims = self._scan_dims(self.config.state_gradients)
        d_states = v.new_empty(
            self.chunks.slots, heads, dims["D"], dims["DV"], dtype=_wide_dtype(v)
        )
        dv = v.new_empty(v.shape)
        first = d_last.new_empty(d_last.shape)
        blocks = triton.cdiv(dims["DV"], dims["BLOCK_V"])
        state_gradients_kernel[len(self.chunks.documents) * blocks, heads](
            scores.queries, scores.recalling, scores.writing, scores.scores, scores.inverse,
            scores.read_factor, scores.write_factor, scores.carry, self.chunks.table,
            self.chunks.documents, d_out, d_last.contiguous(), d_states, first, dv, self.scale,
            *scores.queries.stride()[:3], *scores.recalling.stride()[:3],
            heads // scores.queries.shape[2], length,
            **dims, **self._constants(), **self.config.state_gradients.options(),
        )  # fmt: skip
        return _StateGradients(d_states, d_out, dv, first)

    def input_gradients(
        self, states: _States, d_states: _StateGradients, needs_decay: bool
    ) -> tuple[Tensor | None, ...]:
        """Launch the last two stages of backward: the gradients of ``q, k, v, decay, beta``."""
        q, k, v = self.q, self.k, self.v
        batch, length, heads, _ = v.shape
        num_chunks = len(self.chunks.table)
        dims = self._tile_dims(self.config.input_gradients)
        d_scores = v.new_empty(batch, length, heads, self.config.chunk)
        d_recalls = None if self.beta is None else torch.empty_like(d_scores)
        score_gradients_kernel[num_chunks, heads](
            states.written, d_states.d_out, d_states.dv, self.chunks.table, d_scores, d_recalls,
            *states.written.stride()[:3], length,
            DV=dims["DV"], BLOCK_V=dims["BLOCK_V"],
            **self._constants(), **self.config.score_gradients.options(),
        )  # fmt: skip

        blocks = triton.cdiv(dims["D"], dims["BLOCK"])
        dq, dk = (
            q.new_empty(
                batch, length, heads, dims["D"],
                dtype=torch.float32 if self._group > 1 else q.dtype,
            )
            for _ in range(2)
        )  # fmt: skip
        d_decay, d_beta = None, None
        if needs_decay:
            shape = (
                (batch, length, heads, dims["D"])
                if self._by_key
                else (blocks, batch, length, heads)
            )
            d_decay = self.decay.new_empty(shape)
        if self.beta is not None:
            d_beta = self.beta.new_empty(blocks, batch, length, heads)
        input_gradients_kernel[num_chunks * blocks, heads](
            q, k, self.decay, self.beta, states.written, d_states.d_out, d_states.dv,
            states.states, d_states.d_states, d_scores, d_recalls, self.chunks.table,
            dq, dk, d_decay, d_beta, self.scale,
            *q.stride()[:3], *k.stride()[:3], *states.written.stride()[:3],
            self._group, batch, length,
            **dims, **self._decay_constants(), **self.config.input_gradients.options(),
        )  # fmt: skip

        if self._group > 1:
            dq, dk = (x.unflatten(2, (q.shape[2], -1)).sum(3).to(q.dtype) for x in (dq, dk))
        if d_decay is not None and not self._by_key:
            d_decay = d_decay.sum(0)
            if self.decay.ndim == 1:
                d_decay = d_decay.sum((0, 1))
        if d_beta is not None:
            d_beta = d_beta.sum(0)
        return dq, dk, d_states.dv, d_decay, d_beta


def _wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of states in products: sums as long as theirs exceed the range of fp16."""
    return torch.bfloat16 if x.dtype == torch.float16 else x.dtype


def _config(q: Tensor, decay: Tensor) -> StagesConfig:
    """Return the launch config; the interpreter, which has no bf16, uses that of bf16 for fp32."""
    bytes_per_number = 2 if INTERPRETED else q.element_size()
    return stages_config(
        compute_capability(q.device), bytes_per_number, q.shape[3], by_key=decay.ndim == 4
    )
