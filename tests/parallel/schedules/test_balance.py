"""How evenly schedules spread the work: against counted masks, and at the sizes of the papers."""

import pytest
import torch
from longspan.attention import S2, Causal, PerHead, Window
from longspan.parallel import Layout, Schedule
from longspan.parallel.schedules.balance import balance
from longspan.parallel.schedules.choose import choose_schedule

LENGTH, HEADS, KV_HEADS = 52, 8, 4
UNEVEN = PerHead([Causal(), Window(2), Window(2), Window(2)])


@pytest.mark.parametrize("pattern", [Causal(), S2(4, 2, 3), UNEVEN])
@pytest.mark.parametrize("row", [1, 2, 4, 8])
@pytest.mark.parametrize("make", [Layout.contiguous, Layout.zigzag])
def test_it_is_what_the_masks_show(pattern, row, make):
    layout, ranks = make(LENGTH, 8, 4), 8
    positions = torch.arange(LENGTH)
    seen = (
        pattern.mask(positions, positions, KV_HEADS).sum(-1).repeat_interleave(HEADS // KV_HEADS, 0)
    )
    work = []
    for rank in range(ranks):
        first = rank // row * row
        tokens = torch.cat([layout.tokens(one) for one in range(first, first + row)])
        share = HEADS // row
        work.append(float(seen[rank % row * share : (rank % row + 1) * share, tokens].sum()))
    assert balance(Schedule("ring", row), layout, pattern, HEADS, KV_HEADS) == pytest.approx(
        max(work) * ranks / sum(work)
    )


@pytest.mark.parametrize("ranks", [3, 8, 1000, 4096])
def test_zigzag_is_even(ranks):
    length = 1 << 18
    for pattern in (Causal(), S2(64, 32, 16).spread(8)):
        assert balance(Schedule("stripes"), Layout.zigzag(length, ranks), pattern, 32, 8) <= 1.02
        assert balance(Schedule("stripes"), Layout.contiguous(length, ranks), pattern, 32, 8) > 1.4


def test_what_moves_least_is_not_taken_where_it_slows_a_rank():
    # Of four heads one sees everything: the rank that took it alone would do nearly all the work.
    dims, layout = (8, 8), Layout.zigzag(4096, 4)
    assert choose_schedule("auto", layout, Causal(), 16, 4, dims) == Schedule("ring", 4)
    assert choose_schedule("auto", layout, UNEVEN, 16, 4, dims).heads == 1
    assert choose_schedule("heads", layout, UNEVEN, 16, 4, dims) == Schedule("ring", 4)
