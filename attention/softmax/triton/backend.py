"""Softmax attention by our Triton kernels, which read the pattern as a small table of rules.

One launch for the queries of all tiles of a batch, whatever their number, and a few for their keys:
one for the bands, and one for each far rule. What a launch needs besides tensors is made once for a
batch of tiles, and kept with it.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from ...arguments import with_dense_heads
from ...patterns import ClosedFormPattern, Pattern
from ...patterns.block_lists import BlockLists
from ...patterns.token_lists import TokenLists
from ...triton_device import (
    INTERPRETED,
    allocate_workspace,
    compute_capability,
    device_unsupported_reason,
    fits_bulk_copies,
    has_bulk_copies,
    on_device_of_first_argument,
)
from ..backends import Gradients
from ..tile_batch import TileBatch
from ..tiles import LogitOptions, new_lse
from .block_lists import lists_by_key, lists_by_query
from .dkv import delta_kernel, dkv_kernel, reduce_splits_kernel
from .forward_dq import forward_dq_kernel
from .launch_config import MAX_HEAD_DIM, KernelConfig, kernel_config
from .programs import Places, on_device
from .rule_table import (
    HeadRules,
    RuleTable,
    pattern_blocks,
    pattern_rules,
    rule_table,
    rule_table_on,
)
from .rules import K_LEN, K_START

_MIN_BLOCK = 16 if INTERPRETED else 64
"""The smallest block of a pattern: wgmma multiplies tiles of 64; the interpreter accepts less."""


def unsupported_reason(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, logits: LogitOptions
) -> str | None:
    """Return why the kernels cannot compute the call, and what can; None if they can."""
    if reason := device_unsupported_reason(q):
        return reason
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"does not support {q.dtype}; use torch"
    if isinstance(pattern, TokenLists):
        return "has no kernel for keys that each query chooses; use torch"
    head_dim = max(q.shape[-1], v.shape[-1])
    if head_dim > MAX_HEAD_DIM:
        return (
            f"supports head dims up to {MAX_HEAD_DIM}, not {head_dim}; "
            "use torch, or flash for causal and windows"
        )
    smallest_block = min(pattern_blocks(pattern, k.shape[2]), default=_MIN_BLOCK)
    if smallest_block < _MIN_BLOCK:
        return (
            f"needs blocks of at least {_MIN_BLOCK} tokens, but {pattern!r} has {smallest_block}; "
            "use torch"
        )
    return None


@on_device_of_first_argument
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    logits: LogitOptions,
    tiles: TileBatch,
    out: Tensor,
    lse: Tensor,
) -> None:
    """See :func:`~longspan.attention.softmax.backends.forward_`."""
    triton.set_allocator(allocate_workspace)  # of this thread: autograd has its own
    q, k, v = map(with_dense_heads, (q, k, v))
    for call in _calls(q, k, v, pattern, logits, tiles):
        call.launch_forward_dq("forward", out, lse, None, None, not tiles.is_first)


@on_device_of_first_argument
def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    pattern: Pattern,
    logits: LogitOptions,
    tiles: TileBatch,
    gradients: Gradients,
) -> None:
    """See :func:`~longspan.attention.softmax.backends.backward_`."""
    triton.set_allocator(allocate_workspace)
    grad_out, q, k, v, out = map(with_dense_heads, (grad_out, q, k, v, out))
    if lse.stride(1) != 1:  # kernels read a head's queries side by side
        lse = new_lse(q, lse.dtype).copy_(lse)
    delta = _delta(out, grad_out, lse, grad_lse)
    for call in _calls(q, k, v, pattern, logits, tiles):
        call.launch_forward_dq("dq", gradients.q, lse, grad_out, delta, gradients.accumulate)
        call.launch_key_gradients(grad_out, lse, delta, gradients)


def _delta(out: Tensor, grad_out: Tensor, lse: Tensor, grad_lse: Tensor | None) -> Tensor:
    """Return ``sum(out * grad_out) - grad_lse`` of each query, in fp32 and shaped as ``lse``."""
    batch, queries, heads, dim = out.shape
    delta = torch.empty_strided(lse.shape, lse.stride(), dtype=torch.float32, device=lse.device)
    grad_lse_strides = lse.stride() if grad_lse is None else grad_lse.stride()
    if delta.numel():
        delta_kernel[triton.cdiv(queries, 64), batch * heads](
            out, grad_out, grad_lse, delta,
            *out.stride()[:3], *grad_out.stride()[:3], *grad_lse_strides, *delta.stride()[::2],
            heads, queries, DV=dim, BLOCK_DV=triton.next_power_of_2(dim), BM=64,
        )  # fmt: skip
    return delta


def _calls(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, logits: LogitOptions, tiles: TileBatch
) -> Iterator["_Call"]:
    """Yield what is launched together: all tiles, but for block lists, each of its own document."""
    if isinstance(pattern, BlockLists):
        for place in tiles.places:
            of_document = pattern.in_document(slice(None), *place.document)
            yield _Call(q, k, v, of_document, logits, TileBatch((place,), tiles.is_first))
        return
    assert isinstance(pattern, ClosedFormPattern)
    # Rules with no larger numbers than the documents need; similar batches have the same.
    longest = 1 << (tiles.longest_document - 1).bit_length()
    yield _Call(q, k, v, pattern.within(longest), logits, tiles)


@dataclass(frozen=True)
class _LaunchPlan:
    """What a launch of a kernel needs besides its tensors."""

    grid: tuple[int, int]
    programs: Tensor
    places: Tensor
    rules: Tensor
    keys: tuple[int, int, int]
    """Query heads of a KV head, and step and size of the keys' blocks."""
    constants: dict[str, Any]
    """Compile-time arguments."""


class _Call:
    """The launches of the kernels for the tiles of a batch."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: Pattern,
        logits: LogitOptions,
        tiles: TileBatch,
    ):
        self.q = q
        self.k = k
        self.v = v
        self.pattern = pattern
        self.logits = logits
        self.tiles = tiles
        self.block_lists = pattern if isinstance(pattern, BlockLists) else None
        self.scales = (logits.scale, logits.softcap or 0.0, logits.sigmoid_bias or 0.0)

    @property
    def kv_heads(self) -> int:
        return self.k.shape[2]

    def launch_forward_dq(
        self,
        kernel: str,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor | None,
        delta: Tensor | None,
        add: bool,
    ) -> None:
        """Launch the kernel as ``forward``, or as ``dq`` with ``grad_out`` and ``delta``."""
        do = out if grad_out is None else grad_out
        plan = self._plan(kernel, add, do)
        if plan is None:
            return
        lists = lse  # any pointer
        list_strides = (0, 0, 0)
        if self.block_lists is not None:
            lists = lists_by_query(self.block_lists.of_heads(self.kv_heads).to(self.q.device))
            batch_stride = lists.stride(0) if lists.shape[0] > 1 else 0
            list_strides = (batch_stride, lists.stride(1), lists.stride(2))
        forward_dq_kernel[plan.grid](
            self.q, self.k, self.v, out, lse, do, lse if delta is None else delta,
            plan.rules, lists, plan.places, plan.programs, *self.scales,
            *self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3],
            *out.stride()[:3], *do.stride()[:3], *lse.stride()[::2], *list_strides, *plan.keys,
            GRAD=kernel == "dq", **plan.constants,
        )  # fmt: skip

    def launch_key_gradients(
        self, grad_out: Tensor, lse: Tensor, delta: Tensor, gradients: Gradients
    ) -> None:
        """Compute dK and dV.

        One launch computes what the bands show, and one for each far rule adds what they leave.
        """
        table = self._rule_table(self._config("dkv").keys)
        if table.num_bands > 0 or self.block_lists is not None:
            self._launch_dkv(grad_out, lse, delta, gradients.k, gradients.v, gradients.accumulate)
        elif not gradients.accumulate:
            gradients.k.zero_()
            gradients.v.zero_()
        for far in range(0 if self.block_lists is not None else table.num_far):
            self._add_far_rule(grad_out, lse, delta, gradients, far)

    def _add_far_rule(
        self, grad_out: Tensor, lse: Tensor, delta: Tensor, gradients: Gradients, far: int
    ) -> None:
        """Add what far rule ``far`` shows beyond the bands to the gradients."""
        plan = self._plan("dkv", False, grad_out, far)
        if plan is None:
            return
        key_tile = plan.constants["BN"]
        dk_parts, dv_parts = (
            torch.empty(*plan.grid, key_tile, x.shape[3], dtype=torch.float32, device=x.device)
            for x in (gradients.k, gradients.v)
        )
        self._launch_dkv(grad_out, lse, delta, dk_parts, dv_parts, False, far)
        table = self._rule_table(key_tile)
        for parts, out in ((dk_parts, gradients.k), (dv_parts, gradients.v)):
            reduce_splits_kernel[plan.grid](
                parts, out, plan.rules, plan.places, plan.programs, *out.stride()[:3],
                D=out.shape[3], BLOCK_D=_block_d(out), BN=key_tile,
                RULES=table.num_bands + table.num_far, RULE=table.num_bands + far,
                RELATIVE=far >= table.num_fixed,
            )  # fmt: skip

    def _launch_dkv(
        self,
        grad_out: Tensor,
        lse: Tensor,
        delta: Tensor,
        dk: Tensor,
        dv: Tensor,
        add: bool,
        far: int = -1,
    ) -> None:
        """Launch the kernel for the bands or lists (``far`` is -1), or for one far rule."""
        plan = self._plan("dkv", add, grad_out, far)
        if plan is None:
            return
        pointers = lists = lse  # any pointer
        list_strides = (0, 0)
        if self.block_lists is not None:
            by_query = self.block_lists.of_heads(self.kv_heads).to(self.q.device)
            last_key = self._places.table[0, K_START.value] + self._places.table[0, K_LEN.value] - 1
            num_blocks = int(last_key) // self.block_lists.block + 1
            pointers, lists = lists_by_key(by_query, num_blocks)
            batch_stride = self.kv_heads * num_blocks if by_query.shape[0] > 1 else 0
            list_strides = (batch_stride, num_blocks)
        dkv_kernel[plan.grid](
            self.q, self.k, self.v, lse, grad_out, delta, dk, dv,
            plan.rules, pointers, lists, plan.places, plan.programs, *self.scales,
            *self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3],
            *grad_out.stride()[:3], *lse.stride()[::2], *dk.stride()[:3], *dv.stride()[:3],
            *list_strides, *plan.keys, FAR=far, **plan.constants,
        )  # fmt: skip

    def _plan(self, kernel: str, add: bool, do: Tensor, far: int = -1) -> _LaunchPlan | None:
        """Return what a launch needs besides tensors; None if there is nothing to compute."""
        bulk = (
            self.q.dtype != torch.float32
            and has_bulk_copies(compute_capability(self.q.device))
            and fits_bulk_copies(self.q, self.k, self.v, do)
        )
        pattern = self.pattern if self.block_lists is None else self.block_lists.block
        shapes = (self.q.shape[2:], self.v.shape[2:], self.q.dtype, self.q.device)
        key = (kernel, far, add, bulk, pattern, self.logits, shapes)
        if key not in self.tiles.kept:
            self.tiles.kept[key] = self._make_plan(kernel, add, bulk, far)
        return self.tiles.kept[key]

    def _make_plan(self, kernel: str, add: bool, bulk: bool, far: int) -> _LaunchPlan | None:
        config = self._config(kernel)
        places = self._places
        heads = self.kv_heads
        if kernel != "dkv":
            heads = self.q.shape[2]
            name, tile = "query programs", config.queries
            programs = self._kept((name, tile), lambda: places.query_programs(tile))
        elif far < 0:
            name, tile = "key programs", config.keys
            programs = self._kept((name, tile), lambda: places.key_programs(tile))
        else:
            table = self._rule_table(config.keys)
            rows = places.far_programs(table, far, config.queries, config.keys)
            programs = on_device(rows, self.q.device)
        if not len(programs):
            return None
        heads_rules, ranges = self._heads_rules, places.key_ranges
        return _LaunchPlan(
            grid=(len(programs), heads),
            programs=programs,
            places=self._kept("places", lambda: places.table),
            rules=rule_table_on(self.q.device, heads_rules, ranges, config.keys),
            keys=(self.q.shape[2] // self.kv_heads, places.key_step, places.key_size),
            constants=self._constants(config, add, bulk),
        )

    def _kept(self, key: Hashable, make: Callable[[], np.ndarray]) -> Tensor:
        """Return a table on the device, made once for the batch of tiles."""
        key = (key, self.q.device)
        if key not in self.tiles.kept:
            self.tiles.kept[key] = on_device(make(), self.q.device)
        return self.tiles.kept[key]

    @cached_property
    def _places(self) -> Places:
        if "places" not in self.tiles.kept:
            self.tiles.kept["places"] = Places.of(self.tiles)
        places = self.tiles.kept["places"]
        if self.block_lists is not None:
            first_key = places.first_keys[0] if len(places.first_keys) else 0
            if places.key_step > 1 or first_key % self.block_lists.block:
                raise ValueError(
                    "backend triton supports BlockLists only with consecutive keys that begin at "
                    "the edge of a block; use torch"
                )
        return places

    @property
    def _heads_rules(self) -> HeadRules:
        return pattern_rules(self.pattern, self.kv_heads)

    def _config(self, kernel: str) -> KernelConfig:
        """Return the kernel's configuration, with tiles that fit into the pattern's blocks."""
        head_dim = max(_block_d(self.q), _block_d(self.v))
        capability = compute_capability(self.q.device)
        has_relative_rules = any(rule.relative for rules in self._heads_rules for rule in rules)
        if kernel == "dkv" and has_relative_rules:
            kernel = "dkv relative"
        config = kernel_config(kernel, capability, self.q.element_size(), head_dim)

        blocks = pattern_blocks(self.pattern, self.kv_heads)
        if self._places.key_step > 1:
            blocks.append(self._places.key_size)
        most_keys = min(blocks, default=config.keys)
        depends_on_query_block = self.block_lists is not None or has_relative_rules
        return config.fit(most_keys if depends_on_query_block else config.queries, most_keys)

    def _rule_table(self, key_tile: int) -> RuleTable:
        return rule_table(self._heads_rules, self._places.key_ranges, key_tile)

    def _constants(self, config: KernelConfig, add: bool, bulk: bool) -> dict[str, Any]:
        """Return the compile-time arguments that the kernels share."""
        table = self._rule_table(config.keys)
        is_listed = self.block_lists is not None
        is_fp32 = self.q.dtype == torch.float32
        return {
            "D": self.q.shape[3],
            "DV": self.v.shape[3],
            "BLOCK_D": _block_d(self.q),
            "BLOCK_DV": _block_d(self.v),
            "BM": config.queries,
            "BN": config.keys,
            "BANDS": 0 if is_listed else table.num_bands,
            "FIXED": 0 if is_listed else table.num_fixed,
            "FARS": 0 if is_listed else table.num_far,
            "LISTED": is_listed,
            "ADD": add,
            "SOFTCAP": self.logits.softcap is not None,
            "SIGMOID": not self.logits.is_softmax,
            "TMA": bulk,
            "PRECISION": "ieee" if is_fp32 else "tf32",
            "num_warps": config.warps,
            "num_stages": config.stages,
        }


def _block_d(x: Tensor) -> int:
    """Return the head dim of a kernel's tiles, a power of two."""
    return max(16, triton.next_power_of_2(x.shape[3]))
