"""The boxes of flat ranges, against whole tensors."""

import itertools

import pytest
import torch
from longspan.trainer.checkpoint.shards import flat_range_boxes


def slice_of(whole, split_dim, stride, rank, ranks):
    """Return a tensor-parallel rank's slice, by its definition."""
    if split_dim is None:
        return whole
    slabs = whole.chunk(stride, split_dim)
    return torch.cat([slab.chunk(ranks, split_dim)[rank] for slab in slabs], split_dim)


@pytest.mark.parametrize(
    ("shape", "split_dim", "stride"),
    [
        ((24,), None, 1),
        ((24,), 0, 1),
        ((12, 5), None, 1),
        ((12, 5), 0, 1),
        ((12, 5), 0, 2),
        ((5, 12), 1, 1),
        ((8, 1), 0, 2),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("owners", [1, 2, 3, 7])
def test_boxes_of_all_ranks_cover_the_tensor_once(shape, split_dim, stride, ranks, owners):
    whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
    restored = torch.full(shape, -1.0)
    for rank in range(ranks):
        tp_slice = slice_of(whole, split_dim, stride, rank, ranks).contiguous()
        edges = [tp_slice.numel() * owner // owners for owner in range(owners + 1)]
        for start, stop in itertools.pairwise(edges):
            flat_range = tp_slice.flatten()[start:stop]
            global_shape, boxes = flat_range_boxes(
                flat_range, start, tp_slice.shape, split_dim, stride, rank, ranks
            )
            if split_dim is not None or ranks == 1:
                assert global_shape == whole.shape
            for offsets, data in boxes:
                box = tuple(
                    slice(offset, offset + size)
                    for offset, size in zip(offsets, data.shape, strict=True)
                )
                assert split_dim is None or (restored[box] == -1).all()
                restored[box] = data
    assert torch.equal(restored, whole)


def test_boxes_are_views_of_the_flat_range():
    flat = torch.zeros(7)
    _, boxes = flat_range_boxes(flat, 3, torch.Size((4, 4)), 0, 1, 1, 2)
    assert [(offsets, tuple(data.shape)) for offsets, data in boxes] == [
        ((4, 3), (1, 1)),
        ((5, 0), (1, 4)),
        ((6, 0), (1, 2)),
    ]
    for _, data in boxes:
        data += 1
    assert flat.sum() == 7


def test_tensors_of_three_dims_are_refused():
    with pytest.raises(ValueError, match=r"must be a vector or a matrix, got shape \(2, 2, 2\)"):
        flat_range_boxes(torch.zeros(8), 0, torch.Size((2, 2, 2)), 0, 1, 0, 1)
