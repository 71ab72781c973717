"""The balance of work between ranks, against counted masks and at the papers' sizes."""

import pytest
import torch
from longspan.attention import S2, Causal, PerHead, Window
from longspan.parallel import Layout, Schedule
from longspan.parallel.schedules.balance import balance
from longspan.parallel.schedules.choose import choose_schedule

LENGTH = 52
HEADS = 8
KV_HEADS = 4
UNEVEN = PerHead([Causal(), Window(2), Window(2), Window(2)])


@pytest.mark.parametrize("pattern", [Causal(), S2(4, 2, 3), UNEVEN])
@pytest.mark.parametrize("head_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("make_layout", [Layout.contiguous, Layout.zigzag])
def test_balance_equals_the_work_counted_in_masks(pattern, head_ranks, make_layout):
    ranks = 8
    layout = make_layout(LENGTH, ranks, 4)
    positions = torch.arange(LENGTH)
    mask = pattern.mask(positions, positions, KV_HEADS)
    visible_keys = mask.sum(-1).repeat_interleave(HEADS // KV_HEADS, 0)  # [heads, queries]
    heads_per_rank = HEADS // head_ranks

    work = []
    for rank in range(ranks):
        group_start = rank // head_ranks * head_ranks
        group = range(group_start, group_start + head_ranks)
        tokens = torch.cat([layout.tokens(member) for member in group])
        first_head = rank % head_ranks * heads_per_rank
        heads = slice(first_head, first_head + heads_per_rank)
        work.append(float(visible_keys[heads, tokens].sum()))

    assert balance(Schedule("ring", head_ranks), layout, pattern, HEADS, KV_HEADS) == pytest.approx(
        max(work) * ranks / sum(work)
    )


@pytest.mark.parametrize("ranks", [3, 8, 1000, 4096])
def test_zigzag_is_balanced_and_contiguous_is_not(ranks):
    length = 1 << 18
    for pattern in (Causal(), S2(64, 32, 16).spread(8)):
        assert balance(Schedule("stripes"), Layout.zigzag(length, ranks), pattern, 32, 8) <= 1.02
        assert balance(Schedule("stripes"), Layout.contiguous(length, ranks), pattern, 32, 8) > 1.4


def test_auto_avoids_the_least_traffic_if_it_overloads_a_rank():
    # One of the four KV heads sees every key: a rank that computes it alone would do nearly all
    # the work.
    dims = (8, 8)
    layout = Layout.zigzag(4096, 4)
    assert choose_schedule("auto", layout, Causal(), 16, 4, dims) == Schedule("ring", 4)
    assert choose_schedule("auto", layout, UNEVEN, 16, 4, dims).heads == 1
    assert choose_schedule("heads", layout, UNEVEN, 16, 4, dims) == Schedule("ring", 4)
