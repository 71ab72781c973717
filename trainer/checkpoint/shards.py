"""Parts of whole tensors, as torch's distributed checkpoint (DCP) saves and loads them.

A rank holds boxes of a tensor anywhere in it: its tensor-parallel slice, and of that the flat range that a distributed
optimizer gave it. DCP writes every box once and, when loading, copies from the saved boxes whatever overlaps those asked for,
so a checkpoint knows nothing of the ranks that wrote it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import LoadPlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


class Box(NamedTuple):
    """``data`` stands at ``offsets`` of the whole tensor."""

    offsets: tuple[int, ...]
    data: Tensor


@dataclass(frozen=True)
class Shards:
    """This rank's boxes of a whole tensor.

    ``owner`` is False where another rank saves the same boxes: they are then only loaded.
    """

    shape: torch.Size
    boxes: list[Box]
    owner: bool = True

    @classmethod
    def whole(cls, data: Tensor, owner: bool = True) -> "Shards":
        return cls(data.shape, [Box((0,) * data.ndim, data)], owner)

    def snapshot(self) -> "Shards":
        """A copy on the CPU of what this rank saves, which further training does not touch."""
        boxes = self.boxes if self.owner else []
        return Shards(
            self.shape, [Box(at, data.detach().to("cpu", copy=True)) for at, data in boxes]
        )

    def __create_write_items__(
        self, name: str, _: object
    ) -> list[WriteItem]:  # what DCP asks of what it saves
        return [
            WriteItem(
                index=MetadataIndex(name, torch.Size(offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    _chunk(offsets, data), TensorProperties(dtype=data.dtype), self.shape
                ),
            )
            for offsets, data in self.boxes
        ]

    def box(self, index: MetadataIndex) -> Tensor:
        return next(data.detach() for offsets, data in self.boxes if offsets == tuple(index.offset))


def flat_range_boxes(
    flat: Tensor,
    start: int,
    shape: torch.Size,
    split_dim: int | None,
    stride: int,
    rank: int,
    ranks: int,
) -> tuple[torch.Size, list[Box]]:
    """Where a flat range of a rank's slice of a tensor lies in the whole.

    Args:
        flat: the elements ``start, start + 1, ...`` of the slice, laid out row by row.
        shape: of the slice, a vector or a matrix.
        split_dim: along which the whole is split over ``ranks``, of which this is ``rank``; None where it is not.
        stride: how many matrices stand one above the other in the whole, each split on its own ([gate; up] is 2).

    Returns:
        The whole tensor's shape, and views of ``flat``.

    Raises:
        ValueError: for a tensor of more dims.
    """
    if len(shape) > 2:
        raise ValueError(f"a parameter must be a vector or a matrix, got shape {tuple(shape)}")
    whole = [size * ranks if dim == split_dim else size for dim, size in enumerate(shape)]
    slab = shape[0] // (stride if split_dim == 0 else 1)
    boxes, at = [], 0
    for row, column, rows, columns in _rectangles(
        start, start + flat.numel(), shape[1] if len(shape) > 1 else 1, slab
    ):
        offsets = (row + (row // slab * (ranks - 1) + rank) * slab if split_dim == 0 else row,)
        size = (rows,)
        if len(shape) > 1:
            offsets, size = (*offsets, column + rank * shape[1] * (split_dim == 1)), (rows, columns)
        boxes.append(Box(offsets, flat[at : at + rows * columns].view(size)))
        at += rows * columns
    return torch.Size(whole), boxes


def _rectangles(
    start: int, stop: int, columns: int, slab: int
) -> Iterator[tuple[int, int, int, int]]:
    """(row, column, rows, columns) of the elements ``start:stop`` of a matrix, none across an edge between slabs of rows."""
    while start < stop:
        row, column = divmod(start, columns)
        if column or stop - start < columns:
            part = (row, column, 1, min(stop - start, columns - column))
        else:
            part = (row, 0, min((stop - start) // columns, slab - row % slab), columns)
        yield part
        start += part[2] * part[3]


def _chunk(offsets: tuple[int, ...], data: Tensor) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), data.shape)


class SavePlanner(DefaultSavePlanner):
    """Finds the boxes of :class:`Shards`; what it saves is a flat dict of them."""

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].box(index)


class LoadPlanner(DefaultLoadPlanner):
    """Loads into the boxes of :class:`Shards`, from whatever saved boxes overlap them."""

    def set_up_planner(
        self,
        state_dict: dict[str, Shards],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ):
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        saved, items = self.metadata.state_dict_metadata, []
        for name, shards in self.state_dict.items():
            if name not in saved or saved[name].size != shards.shape:
                found = tuple(saved[name].size) if name in saved else "nothing"
                raise ValueError(
                    f"{name} is {tuple(shards.shape)} in the model, and {found} in the checkpoint"
                )
            chunks = [_chunk(offsets, data) for offsets, data in shards.boxes]
            items += create_read_items_for_chunk_list(name, saved[name], chunks)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].box(index)
