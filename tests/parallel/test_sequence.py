import pytest
import torch
from longspan.attention import rotary_tables
from longspan.parallel import Layout, Sequence


def test_positions_count_from_each_documents_start():
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [4, 5, 5, 5, 5, 5]], dtype=torch.int32)
    sequence = Sequence(Layout.contiguous(6), 0, documents)
    assert sequence.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
    second = Sequence(Layout.contiguous(6, 2), 1, documents)
    assert second.positions.tolist() == [[0, 1, 0], [2, 3, 4]]
    first = Sequence(Layout.zigzag(6, 1), 0, documents)
    assert torch.equal(first.positions, sequence.positions)
    outer = Sequence(Layout((((0, 1), (4, 6)), ((1, 4),))), 0, documents)
    assert outer.positions.tolist() == [[0, 1, 0], [0, 3, 4]]


def test_rotary_tables_are_cached():
    sequence = Sequence.single(2, 6, torch.device("cpu"))
    cos, sin = sequence.rotary(8, 100.0)
    assert sequence.rotary(8, 100.0)[0] is cos
    assert torch.equal(sin, rotary_tables(torch.arange(6).expand(2, -1), 8, 100.0)[1])


def test_documents_must_fit_the_layout():
    with pytest.raises(ValueError, match=r"documents must be \[batch, 8\], got \(1, 6\)"):
        Sequence(Layout.contiguous(8), 0, torch.zeros(1, 6))
