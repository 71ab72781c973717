"""Parts of whole tensors, as torch's distributed checkpoint (DCP) saves and loads them.

A rank holds boxes of a tensor anywhere in it: its tensor-parallel slice, and of that the flat range
that a distributed optimizer gave it. DCP writes every box once and, when loading, copies from the
saved boxes whatever overlaps those asked for, so a checkpoint knows nothing of the ranks that wrote
it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


class Box(NamedTuple):
    """A rectangular part of a whole tensor."""

    offsets: tuple[int, ...]
    """Where ``data`` begins in the whole, along every dim."""
    data: Tensor


@dataclass(frozen=True)
class Shards:
    """This rank's boxes of a whole tensor."""

    shape: torch.Size
    """Shape of the whole tensor."""
    boxes: list[Box]
    owner: bool = True
    """False if another rank saves the same boxes: here they are only loaded."""

    @classmethod
    def whole(cls, data: Tensor, owner: bool = True) -> "Shards":
        """Return a tensor that this rank has whole."""
        return cls(data.shape, [Box((0,) * data.ndim, data)], owner)

    def snapshot(self) -> "Shards":
        """Return a copy on the CPU of what this rank saves, out of reach of further training."""
        boxes = self.boxes if self.owner else []
        return Shards(
            self.shape,
            [Box(offsets, data.detach().to("cpu", copy=True)) for offsets, data in boxes],
        )

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        """Return what DCP is to save; DCP calls this by its name."""
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
        """Return the data of the box at the index's offsets."""
        assert index.offset is not None, "every box is saved and loaded by its offsets"
        wanted = tuple(index.offset)
        return next(data.detach() for offsets, data in self.boxes if offsets == wanted)


def flat_range_boxes(
    flat: Tensor,
    start: int,
    shape: torch.Size,
    split_dim: int | None,
    stride: int,
    rank: int,
    ranks: int,
) -> tuple[torch.Size, list[Box]]:
    """Return where a flat range of a rank's slice of a tensor lies in the whole.

    Args:
        flat: the elements ``start, start + 1, ...`` of the slice, laid out row by row.
        shape: of the slice, a vector or a matrix.
        split_dim: the dim along which the whole is split over ``ranks``, of which this is ``rank``;
            None if it is not split.
        stride: how many matrices stand one above the other in the whole, each split on its own
            ([gate; up] is 2).

    Returns:
        The whole tensor's shape, and views of ``flat``.

    Raises:
        ValueError: the tensor has more dims.
    """
    if len(shape) > 2:
        raise ValueError(f"a parameter must be a vector or a matrix, got shape {tuple(shape)}")
    whole_shape = [size * ranks if dim == split_dim else size for dim, size in enumerate(shape)]
    is_matrix = len(shape) == 2
    num_columns = shape[1] if is_matrix else 1
    # A slab is this rank's rows of one of the stacked matrices. In the whole, the slabs of all
    # ranks of one matrix come before those of the next.
    slab_rows = shape[0] // (stride if split_dim == 0 else 1)

    boxes = []
    position = 0
    for rectangle in _rectangles(start, start + flat.numel(), num_columns, slab_rows):
        row = rectangle.row
        if split_dim == 0:
            slab = rectangle.row // slab_rows
            row += (slab * (ranks - 1) + rank) * slab_rows
        column = rectangle.column
        if split_dim == 1:
            column += rank * num_columns

        data = flat[position : position + rectangle.rows * rectangle.columns]
        position += rectangle.rows * rectangle.columns
        if is_matrix:
            boxes.append(Box((row, column), data.view(rectangle.rows, rectangle.columns)))
        else:
            boxes.append(Box((row,), data.view(rectangle.rows)))
    return torch.Size(whole_shape), boxes


class _Rectangle(NamedTuple):
    """Consecutive elements of a matrix that form a rectangle, from (row, column) on."""

    row: int
    column: int
    rows: int
    columns: int


def _rectangles(start: int, stop: int, columns: int, slab_rows: int) -> Iterator[_Rectangle]:
    """Yield the elements ``start:stop`` of a matrix as rectangles, each within a slab of rows."""
    while start < stop:
        row, column = divmod(start, columns)
        if column or stop - start < columns:
            # A part of a row: up to its end or the end of the range.
            rectangle = _Rectangle(row, column, 1, min(stop - start, columns - column))
        else:
            # Whole rows, up to the end of the slab or of the range.
            rows = min((stop - start) // columns, slab_rows - row % slab_rows)
            rectangle = _Rectangle(row, 0, rows, columns)
        yield rectangle
        start += rectangle.rows * rectangle.columns


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
    ) -> None:
        self.state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """Return what this rank reads.

        Raises:
            ValueError: a tensor is missing in the checkpoint, or has another shape.
        """
        assert self.metadata is not None, "DCP sets up a planner with the checkpoint's metadata"
        items = []
        for name, shards in self.state_dict.items():
            saved = self.metadata.state_dict_metadata.get(name)
            in_model = f"{name} is {tuple(shards.shape)} in the model"
            if not isinstance(saved, TensorStorageMetadata):
                raise ValueError(f"{in_model}, and nothing in the checkpoint")
            if saved.size != shards.shape:
                raise ValueError(f"{in_model}, and {tuple(saved.size)} in the checkpoint")
            chunks = [_chunk(offsets, data) for offsets, data in shards.boxes]
            items += create_read_items_for_chunk_list(name, saved, chunks)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].box(index)


class WholeTensors:
    """The tensors of a checkpoint, each read whole when it is asked for, by one process.

    Args:
        checkpoint: its folder.
    """

    def __init__(self, checkpoint: Path):
        self._reader = FileSystemReader(checkpoint)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a tensor by its name in the checkpoint."""
        return self._saved(name).size

    def read(self, name: str) -> Tensor:
        """Return a tensor by its name in the checkpoint, on the CPU."""
        saved = self._saved(name)
        whole = torch.empty(saved.size, dtype=saved.properties.dtype)
        planner = LoadPlanner()
        planner.set_up_planner({name: Shards.whole(whole)}, self._metadata)
        self._reader.read_data(planner.create_local_plan(), planner).wait()
        return whole

    def _saved(self, name: str) -> TensorStorageMetadata:
        saved = self._metadata.state_dict_metadata[name]
        assert isinstance(saved, TensorStorageMetadata)
        return saved
