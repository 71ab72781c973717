"""``longspan verify``: exact layers pass, and each kind of error is detected."""

import os
import re

import pytest
import torch
from longspan.trainer.evaluation.parity import (
    STACK,
    cases,
    documents_of,
    find_leak,
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
