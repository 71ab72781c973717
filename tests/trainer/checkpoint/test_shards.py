"""Boxes of flat ranges, against whole tensors."""

import itertools

import pytest
import torch
from longspan.trainer.checkpoint.shards import flat_range_boxes


def slice_of(whole, split_dim, stride, rank, ranks):
    """A tensor-parallel rank's slice, by its definition."""
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
def test_the_boxes_of_all_ranks_make_the_whole(shape, split_dim, stride, ranks, owners):
    whole, again = (
        torch.arange(float(torch.Size(shape).numel())).view(shape),
        torch.full(shape, -1.0),
    )
    for rank in range(ranks):
        own = slice_of(whole, split_dim, stride, rank, ranks).contiguous()
        edges = [own.numel() * part // owners for part in range(owners + 1)]
        for start, stop in itertools.pairwise(edges):
            placed, boxes = flat_range_boxes(
                own.flatten()[start:stop], start, own.shape, split_dim, stride, rank, ranks
            )
            if split_dim is not None or ranks == 1:
                assert placed == whole.shape
            for offsets, data in boxes:
                place = tuple(
                    slice(at, at + size) for at, size in zip(offsets, data.shape, strict=True)
                )
                assert split_dim is None or (again[place] == -1).all()
                again[place] = data
    assert torch.equal(again, whole)


def test_boxes_are_views_so_that_loading_fills_the_original():
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


def test_more_dims_are_refused():
    with pytest.raises(ValueError, match=r"must be a vector or a matrix, got shape \(2, 2, 2\)"):
        flat_range_boxes(torch.zeros(8), 0, torch.Size((2, 2, 2)), 0, 1, 0, 1)
