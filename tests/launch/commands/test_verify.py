"""``longspan verify``: exact layers pass, and each kind of error is detected."""

import os
import re

import pytest
import torch
from longspan.attention import MoBA, attend
from longspan.trainer.evaluation.parity import (
    NAN_TOKEN,
    STACK,
    cases,
    documents_of,
    find_leak,
    find_many_leaks,
    may_see,
    probes_of,
    shrink,
)
from longspan.trainer.predict.communication import recipe_layout
from longspan.trainer.recipe.file import load_recipe


def test_the_quickstart_passes(longspan):
    completed = longspan(
        "verify", "quickstart", "parallel.schedules.full=ring", "parallel.schedules.sparse=stripes"
    )
    assert completed.returncode == 0, completed.stderr
    rows = [
        re.split(r"  +", line) for line in completed.stdout.splitlines() if line.endswith("  ok")
    ]
    assert {row[0] for row in rows} == {"linear", "sparse", "full", STACK}
    assert "full          full       ring" in completed.stdout
    assert "sparse        s2         stripes" in completed.stdout


@pytest.mark.wide
def test_a_wrong_layer_ends_with_status_1(longspan, tmp_path):
    """On one rank, the convolution receives one token too few from its neighbor."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('WORLD_SIZE') == '2':\n"
        "    import longspan.parallel.convolution as c\n"
        "    real = c._pad_front\n"
        "    c._pad_front = lambda x, length: real(x[:, 1:], length)\n"
    )
    recipe = tmp_path / "conv.yaml"
    recipe.write_text(
        "base: quickstart\nmodel: {layers: {blocks: {linear: {mixer: conv, num_heads: null}}}}\n"
    )
    completed = longspan(
        "verify",
        recipe,
        PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    )
    assert completed.returncode == 1, completed.stdout + completed.stderr
    assert re.search(r"^linear .* WRONG$", completed.stdout, re.MULTILINE)
    assert re.search(r"^full .* ok$", completed.stdout, re.MULTILINE)
    assert "longspan: linear: with token" in completed.stderr


def test_a_choice_that_looks_ahead_is_found(monkeypatch):
    """All queries of a block choose together, as they once did: single tokens turn few choices."""
    ids = torch.arange(3).repeat_interleave(torch.tensor([32, 16, 464]))[None]
    tokens = torch.randint(NAN_TOKEN, (1, 512), generator=torch.Generator().manual_seed(0))
    embedding = torch.randn(NAN_TOKEN + 1, 3, 2, 16, generator=torch.Generator().manual_seed(1))
    embedding[NAN_TOKEN] = torch.nan

    def logits_of(tokens):
        q, k, v = (3 * embedding.double()[tokens]).unbind(2)
        return attend(q, k, v, MoBA(16, 4), documents=ids).flatten(2).repeat(1, 1, 8)

    def choose_together(self, q, summaries, own, candidates):
        q = q.clone()
        for block in own.unique():
            q[:, own == block] = q[:, own == block].mean(1, keepdim=True)
        return choose(self, q, summaries, own, candidates)

    assert find_many_leaks(tokens, ids, 16, logits_of) == []
    choose = MoBA.choose
    monkeypatch.setattr(MoBA, "choose", choose_together)
    leaks = find_many_leaks(tokens, ids, 16, logits_of)
    assert len(leaks) >= 3
    assert all(re.match(r"with all tokens from \d+ on replaced, position", leak) for leak in leaks)


IDS = torch.arange(3).repeat_interleave(torch.tensor([24, 8, 64]))[None]
TOKENS = torch.arange(96)[None] * 7 % NAN_TOKEN


def documents_sums(tokens, add_ahead=False, add_others=False, multiply=False):
    """Return sums over what a token may see; a stand-in for logits ``[1, time, vocabulary]``."""
    values = torch.where(tokens == NAN_TOKEN, torch.nan, tokens.double())[0]
    visible = (IDS[0] == IDS[0][:, None]).tril()
    if add_ahead:  # the last token of each block of 8
        visible[torch.arange(96), torch.arange(96) // 8 * 8 + 7] = True
    if add_others:
        visible = torch.ones_like(visible).tril()
    weighted = values * visible if multiply else torch.where(visible, values, 0.0)
    return weighted.sum(1)[None, :, None].expand(-1, -1, NAN_TOKEN + 1)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"add_ahead": True}, r"with all tokens from \d+ on replaced, position \d+ changes"),
        ({"add_others": True}, "with all tokens of document 0 replaced, position 24 changes"),
        ({"multiply": True}, r"with NaN in document 0, position 24 changes \(72 in all\)"),
    ],
)
def test_leaks_of_many_tokens_are_found(fault, message):
    assert find_many_leaks(TOKENS, IDS, 8, documents_sums) == []
    leaks = find_many_leaks(TOKENS, IDS, 8, lambda tokens: documents_sums(tokens, **fault))
    assert any(re.match(message, leak) for leak in leaks), leaks


def test_a_model_that_sees_nothing_is_no_proof():
    leaks = find_many_leaks(TOKENS, IDS, 8, lambda tokens: torch.zeros(1, 96, NAN_TOKEN + 1))
    assert len(leaks) == 5 + 2 * 3
    assert all("nothing changes" in leak for leak in leaks)


def test_unexpected_and_missing_influences_are_found():
    recipe = shrink(load_recipe("quickstart"), 2)
    documents = documents_of(recipe)
    recipe_by_case = dict(cases(recipe))
    assert list(recipe_by_case) == ["linear", "sparse", "full", STACK]
    probe = probes_of(recipe, documents)[0]
    may, must = may_see(recipe_by_case["sparse"], documents, probe)
    assert must.sum() > 1
    assert torch.equal(may, must)
    assert find_leak(recipe_by_case["sparse"], documents, {probe: may}) is None
    later = int(may.nonzero()[-1])
    for position, message in (
        (later, "does not change, and must"),
        (documents.shape[1] - 1, "changes, and must not"),
    ):
        changed = may.clone()
        changed[position] = not changed[position]
        assert f"with token {probe} replaced, position {position} {message}" in find_leak(
            recipe_by_case["sparse"], documents, {probe: changed}
        )
    across = torch.zeros(documents.shape[1], dtype=torch.bool)
    across[probe] = across[-1] = True
    assert "must not" in find_leak(recipe_by_case[STACK], documents, {probe: across})


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("cp", [2, 3, 4])
def test_documents_begin_on_segment_edges_and_inside_and_span_segments(cp, layout):
    recipe = shrink(load_recipe("quickstart", [f"parallel.layout={layout}"]), cp)
    assert (
        recipe.model.layers.blocks["sparse"]
        == load_recipe("quickstart").model.layers.blocks["sparse"]
    )
    assert recipe.model.kv_heads == 4
    edges = {segment.start for segment in recipe_layout(recipe).segments_in_order}
    starts = ((documents_of(recipe)[0].diff() != 0).nonzero().flatten() + 1).tolist()
    assert all(start % 32 == 0 for start in starts)
    assert set(starts) & edges
    assert set(starts) - edges
    assert sum(edge > starts[-1] for edge in edges) == len(edges - {0}) - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--cp", "0"],
            "--cp: must be at least 2, got 0: there is nothing to compare with one rank",
        ),
        (
            ["--cp", "3", "parallel.schedule=heads"],
            "heads cannot do model.layers.blocks.sparse: 4 query heads do not",
        ),
        (["parallel.schedule=rings"], "parallel.schedule: schedule must be one of auto"),
    ],
)
def test_invalid_options_are_reported_before_any_process_starts(longspan, arguments, message):
    completed = longspan("verify", "quickstart", *arguments)
    assert completed.returncode == 2
    assert message in completed.stderr
    assert "Traceback" not in completed.stderr
