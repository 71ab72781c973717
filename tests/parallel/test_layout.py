import pytest
import torch
from longspan.parallel import Layout

SIZES = [(64, 4, 1), (64, 4, 8), (50, 3, 8), (7, 4, 1), (8, 3, 8)]


@pytest.mark.parametrize("make_layout", [Layout.contiguous, Layout.zigzag])
@pytest.mark.parametrize(("length", "ranks", "block"), SIZES)
def test_a_layout_is_a_bijection_with_edges_on_blocks(make_layout, length, ranks, block):
    layout = make_layout(length, ranks, block)
    assert (layout.length, layout.ranks, sum(layout.lengths)) == (length, ranks, length)
    tokens = torch.cat([layout.tokens(rank) for rank in range(ranks)])
    assert tokens.sort().values.equal(torch.arange(length))
    assert all(start % block == 0 for segments in layout.segments for start, _ in segments)

    x = torch.randn(2, length, 3)
    assert torch.equal(layout.unshard([layout.shard(x, rank) for rank in range(ranks)]), x)


def test_striped_assigns_blocks_round_robin():
    layout = Layout.striped(22, 3, 4)
    assert layout.segments == (((0, 4), (12, 16)), ((4, 8), (16, 20)), ((8, 12), (20, 22)))
    x = torch.randn(2, 22, 3)
    assert torch.equal(layout.unshard([layout.shard(x, rank) for rank in range(3)]), x)


def test_grouped_merges_consecutive_ranks():
    assert Layout.zigzag(16, 4).grouped(2).segments == (((0, 4), (12, 16)), ((4, 12),))
    assert Layout.contiguous(10, 4).grouped(4) == Layout.contiguous(10)
    assert Layout.striped(24, 4, 2).grouped(2).segments[1] == ((4, 8), (12, 16), (20, 24))
    assert Layout((((0, 1),), (), ((1, 3),), ((3, 4),))).grouped(2).segments == (
        ((0, 1),),
        ((1, 4),),
    )


def test_contiguous_is_in_order_and_zigzag_pairs_the_ends():
    assert Layout.contiguous(8, 2).segments == (((0, 4),), ((4, 8),))
    assert Layout.zigzag(8, 2).segments == (((0, 2), (6, 8)), ((2, 4), (4, 6)))
    assert [Layout.zigzag(8, 2).tokens(rank).tolist() for rank in range(2)] == [
        [0, 1, 6, 7],
        [2, 3, 4, 5],
    ]


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
def test_zigzag_gives_every_rank_the_same_causal_work(ranks):
    layout = Layout.zigzag(128 * ranks, ranks)
    work = [int((layout.tokens(rank) + 1).sum()) for rank in range(ranks)]
    assert len(set(work)) == 1


@pytest.mark.parametrize(
    "segments",
    [
        (((0, 4),), ((5, 8),)),
        (((0, 4),), ((3, 8),)),
        (((0, 2), (2, 2)), ((2, 4),)),
        (((2, 4), (0, 2)),),
    ],
)
def test_segments_must_hold_every_token_exactly_once(segments):
    with pytest.raises(ValueError, match="segments"):
        Layout(segments)
