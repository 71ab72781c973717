import pytest
import torch
from longspan.attention import S2, Causal


def visible(pattern, i, j, head, kv_heads):
    """S2-Attention by its definition, one pair at a time."""
    if isinstance(pattern, Causal):
        return j <= i
    qi, kj = i // pattern.block, j // pattern.block
    residue = -(head * max(1, pattern.stride // kv_heads)) % pattern.stride
    return j <= i and (qi - kj < pattern.local_blocks or kj % pattern.stride == residue)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 8])
@pytest.mark.parametrize(("block", "local_blocks", "stride"), [(1, 1, 1), (4, 2, 3), (2, 1, 8), (8, 3, 2)])
def test_s2_mask_is_its_definition(kv_heads, block, local_blocks, stride):
    pattern = S2.spread(kv_heads, block=block, local_blocks=local_blocks, stride=stride)
    mask = pattern.mask(torch.arange(37), torch.arange(37), kv_heads)
    for head in range(kv_heads):
        for i in range(37):
            assert mask[head, i].tolist() == [visible(pattern, i, j, head, kv_heads) for j in range(37)]


@pytest.mark.parametrize("pattern", [Causal(), S2(4, 2, 3), S2(2, 1, 8, head_step=3), S2(8, 4, 1)])
def test_need_holds_every_visible_key_once(pattern):
    for head in range(4):
        mask = pattern.mask(torch.arange(64), torch.arange(64), 4)[head]
        for start in range(0, 64, 8):
            blocks = pattern.need(start, start + 8, head)
            positions = torch.cat([b.positions(pattern.block) for b in blocks])
            assert len(positions.unique()) == len(positions)
            seen = mask[start : start + 8].any(0).nonzero().flatten()
            assert set(seen.tolist()) <= set(positions.tolist())
            hidden = sum(not mask[start : start + 8, p].any() for p in positions if p < 64)
            assert hidden <= 8 * (pattern.block > 1)  # no more than the block on the diagonal


def test_a_head_keeps_its_pattern_wherever_it_is():
    pattern, at = S2.spread(8, block=2, local_blocks=1, stride=8), torch.arange(40)
    whole = pattern.mask(at, at, 8)
    assert torch.equal(pattern.from_head(4).mask(at, at, 4), whole[4:])
    assert torch.equal(pattern.from_head(2).from_head(3).mask(at, at, 1), whole[5:6])


def test_density_counts_visible_blocks():
    pattern = S2(block=1, local_blocks=16, stride=16)
    at = torch.arange(1024)
    counted = pattern.mask(at, at, 16).sum() / (16 * 1024 * 1025 / 2)
    assert pattern.density(1024) == pytest.approx(counted.item(), rel=0.02)


def test_covers_tells_whether_all_residues_are_taken():
    assert S2.spread(16, block=64, local_blocks=16, stride=16).covers(16)
    assert not S2.spread(8, block=64, local_blocks=16, stride=16).covers(8)


@pytest.mark.parametrize(("argument", "value"), [("block", 48), ("block", 0), ("local_blocks", 0), ("stride", 0)])
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=f"S2.{argument}.*{value}"):
        S2(**{argument: value})
