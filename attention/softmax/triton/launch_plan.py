"""What launches for a batch of tiles need besides tensors: made once and kept with the batch."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from ...gpu import compute_capability
from ...patterns import ClosedFormPattern, Pattern
from ...patterns.block_lists import BlockLists
from ...triton_device import table_on
from ..tile_batch import TileBatch
from ..tiles import LogitOptions
from .launch_config import KernelConfig, kernel_config
from .programs import Places
from .rule_table import HeadRules, RuleTable, pattern_rules, rule_table, smallest_block


@dataclass(frozen=True)
class CallShapes:
    """What kernels depend on in queries, keys and values, apart from where their tokens are."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class LaunchPlan:
    """What a launch of a kernel needs besides tensors."""

    grid: tuple[int, int]
    tables: tuple[Tensor, Tensor]
    """Places and programs, on the device: see :mod:`.rules`."""
    rules: Tensor
    """The rules, on the device."""
    keys: tuple[int, int, int]
    """Query heads of a KV head, and step and size of the keys' blocks."""
    constants: dict[str, Any]
    """Compile-time arguments."""


class LaunchPlans:
    """The plans of all launches for the tiles of a batch under a pattern."""

    def __init__(
        self, pattern: Pattern, logits: LogitOptions, tiles: TileBatch, shapes: CallShapes
    ):
        self.pattern = pattern
        self.logits = logits
        self.tiles = tiles
        self.shapes = shapes
        self.block_lists = pattern if isinstance(pattern, BlockLists) else None
        self.scales = (logits.scale, logits.softcap or 0.0, logits.sigmoid_bias or 0.0)
        self._plans: dict[tuple, LaunchPlan | None] = {}

    def plan(self, kernel: str, add: bool, bulk: bool, far: int = -1) -> LaunchPlan | None:
        """Return the plan of a launch; None if there is nothing to compute.

        Args:
            kernel: ``forward``, ``dq`` or ``dkv``.
            add: whether results are added to earlier ones.
            bulk: whether bulk copies load the tensors.
            far: the far rule that ``dkv`` is for; -1 for the bands or lists.
        """
        key = (kernel, add, bulk, far)
        if key not in self._plans:
            self._plans[key] = self._make(kernel, add, bulk, far)
        return self._plans[key]

    def _make(self, kernel: str, add: bool, bulk: bool, far: int) -> LaunchPlan | None:
        config = self._config(kernel)
        places = self.places
        if kernel != "dkv":
            name, tile, make = "query programs", config.queries, places.query_programs
            programs = self._table((name, tile), lambda: make(tile))
        elif far < 0:
            name, tile, make = "key programs", config.keys, places.key_programs
            programs = self._table((name, tile), lambda: make(tile))
        else:
            rows = places.far_programs(self._rules(config), far, config.queries, config.keys)
            programs = table_on(rows, self.shapes.device)
        if not len(programs):
            return None
        heads = self.shapes.kv_heads if kernel == "dkv" else self.shapes.heads
        group_size = self.shapes.heads // self.shapes.kv_heads
        rules = self._table(
            ("rules", self._head_rules, config.keys), lambda: self._rules(config).rules
        )
        return LaunchPlan(
            grid=(len(programs), heads),
            tables=(self._table("places", lambda: places.table), programs),
            rules=rules,
            keys=(group_size, places.key_step, places.key_size),
            constants=self._constants(config, add, bulk),
        )

    def _table(self, key: Hashable, make: Callable[[], np.ndarray]) -> Tensor:
        """Return a table on the device, the same for all patterns of the batch."""
        key = (key, self.shapes.device)
        if key not in self.tiles.kept:
            self.tiles.kept[key] = table_on(make(), self.shapes.device)
        return self.tiles.kept[key]

    @cached_property
    def places(self) -> Places:
        """Where the tiles are."""
        if Places not in self.tiles.kept:
            self.tiles.kept[Places] = Places.of(self.tiles)
        places: Places = self.tiles.kept[Places]
        if self.block_lists is not None:
            is_at_edge = not (places.first_keys % self.block_lists.block).any()
            if places.key_step > 1 or not is_at_edge:
                raise ValueError(
                    "backend triton supports BlockLists only with consecutive keys that begin at "
                    "the edge of a block; use torch"
                )
        return places

    @cached_property
    def _head_rules(self) -> HeadRules:
        return pattern_rules(self.pattern, self.shapes.kv_heads)

    def _rules(self, config: KernelConfig) -> RuleTable:
        return rule_table(self._head_rules, self.places.key_ranges, config.keys)

    @cached_property
    def key_rules(self) -> RuleTable:
        """The rules for the keys' gradients."""
        return self._rules(self._config("dkv"))

    def _config(self, kernel: str) -> KernelConfig:
        """Return the kernel's configuration, with tiles that fit into the pattern's blocks."""
        head_dim = max(block_dim(self.shapes.head_dim), block_dim(self.shapes.value_dim))
        capability = compute_capability(self.shapes.device)
        has_relative_rules = any(rule.relative for rules in self._head_rules for rule in rules)
        if kernel == "dkv" and has_relative_rules:
            kernel = "dkv relative"
        config = kernel_config(kernel, capability, self.shapes.dtype.itemsize, head_dim)

        block = smallest_block(self.pattern, self.shapes.kv_heads)
        most_keys = config.keys if block is None else block
        if self.places.key_step > 1:
            most_keys = min(most_keys, self.places.key_size)
        depends_on_query_block = self.block_lists is not None or has_relative_rules
        return config.fit(most_keys if depends_on_query_block else config.queries, most_keys)

    def _constants(self, config: KernelConfig, add: bool, bulk: bool) -> dict[str, Any]:
        """Return the compile-time arguments that the kernels share."""
        table = self._rules(config)
        is_listed = self.block_lists is not None
        shapes = self.shapes
        return {
            "D": shapes.head_dim,
            "DV": shapes.value_dim,
            "BLOCK_D": block_dim(shapes.head_dim),
            "BLOCK_DV": block_dim(shapes.value_dim),
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
            "PRECISION": "ieee" if shapes.dtype == torch.float32 else "tf32",
            "num_warps": config.warps,
            "num_stages": config.stages,
        }


def block_dim(dim: int) -> int:
    """Return the head dim of a kernel's tiles, a power of two."""
    return max(16, triton.next_power_of_2(dim))


def launch_plans(
    pattern: Pattern, logits: LogitOptions, tiles: TileBatch, shapes: CallShapes
) -> list[LaunchPlans]:
    """Return the plans of all tiles, kept with them; for block lists those of each document.

    They are the same for all layers, forward and backward.
    """
    if isinstance(pattern, BlockLists):
        return [
            LaunchPlans(
                pattern.in_document(slice(None), *place.document),
                logits,
                TileBatch((place,), tiles.is_first),
                shapes,
            )
            for place in tiles.places
        ]
    key = (pattern, logits, shapes)
    if key not in tiles.kept:
        assert isinstance(pattern, ClosedFormPattern)
        # Rules with no larger numbers than the documents need; similar batches have the same.
        longest = 1 << (tiles.longest_document - 1).bit_length()
        tiles.kept[key] = [LaunchPlans(pattern.within(longest), logits, tiles, shapes)]
    return tiles.kept[key]
