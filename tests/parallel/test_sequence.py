import pytest
import torch
from longspan.attention import rotary_tables
from longspan.parallel import Layout, Sequence


@pytest.mark.parametrize(("length", "ranks", "block"), [(64, 4, 1), (64, 4, 8), (50, 3, 8), (7, 4, 1), (8, 3, 8)])
def test_contiguous_is_a_bijection_with_edges_on_blocks(length, ranks, block):
    layout = Layout.contiguous(length, ranks, block)
    assert layout.length == length
    assert torch.equal(torch.cat([layout.tokens(rank) for rank in range(ranks)]), torch.arange(length))
    assert all(start % block == 0 for rank in layout.segments for start, _ in rank if start < length)
    x = torch.randn(2, length, 3)
    assert torch.equal(layout.unshard([layout.shard(x, rank) for rank in range(ranks)]), x)


def test_unshard_puts_tokens_back_in_order():
    layout = Layout((((0, 2), (6, 8)), ((2, 6),)))
    x = torch.arange(8)[None]
    parts = [layout.shard(x, rank) for rank in range(2)]
    assert parts[0].tolist() == [[0, 1, 6, 7]]
    assert torch.equal(layout.unshard(parts), x)


def test_positions_count_from_each_documents_start():
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [4, 5, 5, 5, 5, 5]], dtype=torch.int32)
    sequence = Sequence(Layout.contiguous(6), 0, documents)
    assert sequence.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
    second = Sequence(Layout.contiguous(6, 2), 1, documents)
    assert second.positions.tolist() == [[0, 1, 0], [2, 3, 4]]
    assert second.documents.tolist() == [[1, 1, 2], [5, 5, 5]]


def test_rotary_tables_are_made_once():
    sequence = Sequence.single(2, 6, torch.device("cpu"))
    cos, sin = sequence.rotary(8, 100.0)
    assert sequence.rotary(8, 100.0)[0] is cos
    assert torch.equal(sin, rotary_tables(torch.arange(6).expand(2, -1), 8, 100.0)[1])


def test_documents_must_fit_the_layout():
    with pytest.raises(ValueError, match=r"documents must be \[batch, 8\], got \(1, 6\)"):
        Sequence(Layout.contiguous(8), 0, torch.zeros(1, 6))
