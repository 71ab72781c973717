import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from longspan.attention import (
    S2,
    BlockLists,
    Causal,
    Dilated,
    PerHead,
    Sinks,
    Streaming,
    Stripes,
    Window,
)

PATTERNS = [
    Causal(),
    Window(1),
    Window(9),
    Sinks(3),
    Stripes(4, 3),
    Dilated(2, 3, 4),
    S2(4, 2, 3),
    S2(2, 1, 8, head_step=3, offset=2),
    S2(8, 4, 1),
    S2(4, 1, 4, dense_heads=2),
    S2(2, 2, 8, near=(7, 2)),
    Streaming(3, 9),
    S2(4, 2, 5) | Sinks(6) | Window(10),
    Stripes(4, 3) | Stripes(2, 4, 1),
    Stripes(2, 3) | Stripes(2, 4, 1),
    Dilated(4, 2, 3) | Window(5) | Dilated(2, 5, 9),
    PerHead([Window(5), Causal(), S2(4, 1, 3) | Sinks(1), Dilated(1, 2, 9)]),
]


def definition(pattern, i, j, head):
    """Return whether query i sees key j, straight from the docstrings."""
    match pattern:
        case _ if j > i:
            return False
        case Causal():
            return True
        case Window():
            return i - j < pattern.tokens
        case Sinks():
            return j < pattern.tokens
        case Dilated():
            block_distance = i // pattern.block - j // pattern.block
            return (
                block_distance % pattern.dilation == 0
                and block_distance // pattern.dilation < pattern.count
            )
        case Stripes():
            head_step = 1 if pattern.head_step is None else pattern.head_step
            phase = j // pattern.block + head * head_step + pattern.offset
            return phase % pattern.stride == 0
        case S2():
            if head < pattern.dense_heads:
                return True
            block_distance = i // pattern.block - j // pattern.block
            head_step = 1 if pattern.head_step is None else pattern.head_step
            sparse_head = head - pattern.dense_heads
            phase = j // pattern.block + sparse_head * head_step + pattern.offset
            near = (
                pattern.near and block_distance < pattern.near[0] and phase % pattern.near[1] == 0
            )
            return (
                block_distance < pattern.local_blocks or phase % pattern.stride == 0 or bool(near)
            )
        case PerHead():
            return definition(pattern.patterns[head], i, j, head)
        case _:
            return any(definition(part, i, j, head) for part in pattern.parts)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_masks_match_the_definition(pattern):
    mask = pattern.mask(torch.arange(37), torch.arange(37), 4)
    for head in range(4):
        for i in range(37):
            assert mask[head, i].tolist() == [definition(pattern, i, j, head) for j in range(37)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("start", [0, 5, 24])
@pytest.mark.parametrize("queries", [1, 8, 13])
def test_need_holds_every_visible_key_once(pattern, start, queries):
    mask = pattern.mask(torch.arange(64), torch.arange(64), 4)
    for head in range(4):
        blocks = pattern.need(start, start + queries, head)
        needed = torch.from_numpy(
            np.concatenate([np.zeros(0, int), *(b.positions() for b in blocks)])
        )
        assert len(needed.unique()) == len(needed)
        assert all((torch.from_numpy(b.positions()).diff() > 0).all() for b in blocks)
        is_visible = mask[head, start : start + queries].any(0)
        assert set(is_visible.nonzero().flatten().tolist()) <= set(needed.tolist())
        num_hidden = sum(not is_visible[p] for p in needed if p < 64)
        assert num_hidden <= 8 + pattern.alignment  # no more than the blocks at the edges


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("length", [1, 7, 64, 75])
def test_density_counts_the_visible_pairs(pattern, length):
    positions = torch.arange(length)
    counted = pattern.mask(positions, positions, 4).sum() / (4 * length * (length + 1) / 2)
    assert pattern.density(length, 4) == pytest.approx(counted.item())


def test_density_gives_the_papers_speed_ups():
    assert 1 / S2(64, 16, 16).density(32768) == pytest.approx(8.3, rel=0.02)
    assert 1 / S2(64, 16, 64).density(2**20) == pytest.approx(57.0, rel=0.02)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_repr_is_the_expression(pattern):
    from longspan.attention.patterns.expression import parse_pattern

    assert parse_pattern(repr(pattern)) == pattern
    assert "\n" not in repr(pattern)


def test_from_head_slices_the_heads():
    positions = torch.arange(40)
    for pattern in PATTERNS[:-1]:
        whole = pattern.mask(positions, positions, 8)
        assert torch.equal(pattern.from_head(4).mask(positions, positions, 4), whole[4:])
        assert torch.equal(
            pattern.from_head(2).from_head(3).mask(positions, positions, 1), whole[5:6]
        )
    assert torch.equal(
        PATTERNS[-1].from_head(2).mask(positions, positions, 2),
        PATTERNS[-1].mask(positions, positions, 4)[2:],
    )


def test_covers_is_true_if_some_head_sees_every_position():
    assert S2(64, 16, 16).spread(16).covers(16)
    assert not S2(64, 16, 16).spread(8).covers(8)
    assert S2(64, 16, 16, dense_heads=1).spread(8).covers(8)
    assert S2(64, 16, 4, near=(20, 2)).spread(4).covers(4)
    assert not S2(64, 16, 4, near=(20, 2)).spread(2).covers(2)
    assert Causal().covers(1)
    assert not Streaming(4, 1024).covers(8)
    assert not Dilated(64, 2, 4).covers(8)
    assert (Stripes(64, 2) | Stripes(32, 4, 1) | Stripes(32, 4, 2)).covers(1)
    assert PerHead([Window(8), Causal()]).covers(2)


def test_spread_offsets_the_heads_as_dkernel_does():
    assert [S2(64, 16, 16).spread(4).residue(h) for h in range(4)] == [0, 12, 8, 4]
    assert [S2(64, 16, 8).spread(32).residue(h) for h in range(9)] == [0, 7, 6, 5, 4, 3, 2, 1, 0]
    assert S2(64, 16, 16, offset=1).spread(4).residue(0) == 15
    with_head_step = S2(64, 16, 16, head_step=3)
    assert with_head_step.spread(4) == with_head_step


def test_redundant_rules_are_dropped():
    assert len((Causal() | Window(4) | S2(4, 2, 3)).rules(0)) == 1
    assert len((Window(64) | S2(8, 2, 3)).rules(0)) == 2  # the band is inside the window
    assert len((S2(8, 2, 4) | Stripes(8, 2)).rules(0)) == 2
    assert len((Sinks(4) | Sinks(9)).rules(0)) == 1


class TestBlockLists:
    def test_from_a_function_and_from_an_array(self):
        def is_visible(i, j, head):
            return (j + head) % 3 == 0

        positions = torch.arange(40)
        pattern = BlockLists.where(4, is_visible, 40, num_kv_heads=2)
        causal = positions[:, None] >= positions
        visible_keys = torch.stack([(positions // 4 + h) % 3 == 0 for h in range(2)])
        expected = causal & visible_keys[:, None]  # [heads, queries, keys]
        assert torch.equal(pattern.mask(positions, positions, 2), expected)
        table = torch.stack([((torch.arange(10) + h) % 3 == 0).expand(10, 10) for h in range(2)])
        assert torch.equal(
            BlockLists.where(4, table.numpy(), 40).mask(positions, positions, 2), expected
        )
        assert torch.equal(pattern.from_head(1).mask(positions, positions, 1), expected[1:])

    def test_density_need_and_covers(self):
        positions = torch.arange(38)
        pattern = BlockLists.where(4, lambda i, j, h: (i * 7 + j * 3) % 5 < 2, 38)
        counted = pattern.mask(positions, positions, 1).sum() / (38 * 39 / 2)
        assert pattern.density(38) == pytest.approx(counted.item())
        blocks = pattern.need(8, 16, 0)
        is_visible = pattern.mask(positions, positions, 1)[0, 8:16].any(0)
        assert set(is_visible.nonzero().flatten().tolist()) <= {
            int(p) for b in blocks for p in b.positions()
        }
        assert BlockLists.where(4, lambda i, j, h: j >= 0, 40).covers(1)
        assert not pattern.covers(1)

    def test_order_and_repetition_do_not_matter(self):
        lists = torch.tensor([[[0, -1, -1], [1, 0, 1], [2, -1, 0]]])
        assert torch.equal(
            BlockLists(4, lists).lists, torch.tensor([[[0, -1, -1], [0, 1, -1], [0, 2, -1]]])
        )

    def test_a_union_with_lists_is_refused(self):
        with pytest.raises(ValueError, match="BlockLists has no closed form"):
            BlockLists(4, torch.zeros(1, 1, 1).int()) | Causal()


@st.composite
def patterns(draw, heads=4):
    block = st.sampled_from([1, 2, 4, 8])
    number = st.integers(1, 9)
    simple = st.one_of(
        st.just(Causal()),
        st.builds(Window, st.integers(1, 40)),
        st.builds(Sinks, number),
        st.builds(Dilated, block, number, number),
        st.builds(Stripes, block, number, st.integers(0, 9)),
        st.builds(
            S2, block, number, number, st.integers(0, 2), st.integers(0, 9), st.integers(0, 4)
        ),
        st.builds(
            lambda b, local, n, s, f: S2(b, local, s * f, near=(local + n, s)),
            block,
            number,
            number,
            number,
            number,
        ),
    )
    union = st.lists(simple, min_size=1, max_size=3).map(
        lambda parts: parts[0] if len(parts) == 1 else _union(parts)
    )
    return draw(st.one_of(union, st.lists(union, min_size=heads, max_size=heads).map(PerHead)))


def _union(parts):
    first, *rest = parts
    for part in rest:
        first = first | part
    return first


@settings(max_examples=60, deadline=None)
@given(patterns(), st.integers(1, 70))
def test_random_patterns(pattern, length):
    test_masks_match_the_definition(pattern)
    positions = torch.arange(length)
    assert pattern.density(length, 4) == pytest.approx(
        (pattern.mask(positions, positions, 4).sum() / (2 * length * (length + 1))).item()
    )
    test_need_holds_every_visible_key_once(pattern, length // 2, 1 + length // 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: S2(48, 16, 16), "S2.block must be a power of two, got 48; 32 and 64"),
        (lambda: S2(0, 16, 16), "S2.block must be a whole number of at least 1, got 0"),
        (lambda: S2(64, 0, 16), "S2.local_blocks"),
        (lambda: S2(64, 16, 0), "S2.stride"),
        (lambda: S2(64, 16, 16, near=(8, 4)), "S2.near must reach beyond the 16 local blocks"),
        (lambda: S2(64, 16, 16, near=(32, 3)), "does not divide the far stride 16"),
        (lambda: Window(0), "Window.tokens"),
        (lambda: Window(1.5), "Window.tokens"),
        (lambda: Sinks(-1), "Sinks.tokens"),
        (lambda: Dilated(64, 0, 1), "Dilated.dilation"),
        (lambda: Stripes(3, 2), "Stripes.block"),
        (lambda: PerHead([Causal()]).rules(1), "patterns for 1 KV heads, but is asked for head 1"),
        (lambda: PerHead([1]), "PerHead.patterns"),
        (lambda: PerHead([]), "PerHead.patterns"),
        (
            lambda: (PerHead([Causal()]) | Sinks(2)).check(2, 9),
            "patterns for 1 KV heads, but is asked for head 1",
        ),
        (lambda: BlockLists(3, torch.zeros(1, 1, 1).int()), "BlockLists.block"),
        (lambda: BlockLists(4, torch.zeros(1, 1)), "BlockLists.lists must be integers"),
    ],
)
def test_errors_name_the_invalid_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
