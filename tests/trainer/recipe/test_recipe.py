import json
import re
import subprocess
import sys

import pytest
import yaml
from longspan.trainer.errors import UserError
from longspan.trainer.recipe.file import SHIPPED, load_recipe, shipped_recipes, to_yaml
from longspan.trainer.recipe.learning_rate import learning_rate
from longspan.trainer.recipe.stages import Stages


def problems(recipe, *overrides) -> list[str]:
    with pytest.raises(UserError) as error_info:
        load_recipe(str(recipe), list(overrides))
    return str(error_info.value).splitlines()


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_described(path):
    assert load_recipe(str(path)).description


def test_a_resolved_recipe_loads_unchanged(tiny_recipe, tmp_path):
    recipe = load_recipe(str(tiny_recipe))
    reloaded = tmp_path / "again.yaml"
    reloaded.write_text(to_yaml(recipe))
    assert load_recipe(str(reloaded)) == recipe


def test_all_problems_are_reported_at_once(tiny_recipe):
    lines = problems(
        tiny_recipe,
        "training.stpes=3",
        "model.hidden_size=wide",
        "model.layers.blocks.full.rotary_fraction=1.5",
        "parallel.tp=3",
        "launch.processes=3",
    )
    expected = {
        "training.stpes": "unknown key (did you mean steps?)",
        "model.hidden_size": "should be a valid integer, got 'wide'",
        "model.layers.blocks.full.rotary_fraction": "less than or equal to 1, got 1.5",
        "parallel.tp": "3 does not divide model.num_attention_heads 4",
    }
    for key, reason in expected.items():
        assert any(line.startswith(f"tiny.yaml: {key}: ") and reason in line for line in lines), key
    assert {line.split(": ")[1] for line in lines} == expected.keys()


def test_combinations_are_checked_beside_unknown_keys(tiny_recipe):
    lines = problems(tiny_recipe, "training.stpes=3", "parallel.pp=3", "launch.processes=3")
    assert any("training.stpes: unknown key" in line for line in lines)
    assert any("parallel.pp: 3 does not divide model.num_hidden_layers 4" in line for line in lines)


def test_an_invalid_required_key_hides_no_other_problem(tiny_recipe):
    lines = problems(
        tiny_recipe,
        "training.steps=x",
        "model.num_attention_heads=x",
        "parallel.pp=3",
        "launch.processes=3",
    )
    keys = [line.split(": ")[1] for line in lines]
    assert sorted(keys) == ["model.num_attention_heads", "parallel.pp", "training.steps"]
    pattern = "model.layers.blocks.full={mixer: pattern}"
    assert [
        line.split(": ")[1]
        for line in problems(tiny_recipe, pattern, "parallel.pp=3", "launch.processes=3")
    ] == [
        "model.layers.blocks.full.pattern",
        "parallel.pp",
    ]


def test_strings_that_look_like_numbers_survive_a_round_trip(tiny_recipe, tmp_path):
    for run_dir in ("'1e3'", "'no'", "'12'", "'null'", "'2026-01-01'"):
        recipe = load_recipe(str(tiny_recipe), [f"run_dir={run_dir}"])
        (tmp_path / "again.yaml").write_text(to_yaml(recipe))
        assert load_recipe(str(tmp_path / "again.yaml")).run_dir == run_dir.strip("'")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run_dir=''", "run_dir: string should have at least 1 character"),
        ("optimizer.lr=.inf", "optimizer.lr: should be a finite number"),
        ("optimizer.betas=[1.0, 1.0]", "optimizer.betas.0: should be less than 1"),
        ("training.seed=10000000000000000000000", "training.seed: should be less than 2147483648"),
        ("training.steps=!!int x", "training.steps: '!!int x' is not YAML"),
        (
            "model.layers.pattern=[linear, spares]",
            "model.layers.pattern: names an unknown block 'spares'",
        ),
        ("model.layers.blocks.more={mixer: full}", "blocks.more: is not in model.layers.pattern"),
        (
            "model.layers.blocks.linear.mixer=lihgtning",
            "unknown mixer 'lihgtning' (did you mean lightning?)",
        ),
        ("model.layers.blocks.linear={}", "needs a mixer, as in {mixer: full}"),
        (
            "model.layers.blocks.sparse.block=12",
            "sparse.block: must be a power of two, got 12; 8 and 16 are the nearest",
        ),
        (
            "model.layers.blocks.sparse.dense_heads=3",
            "blocks.sparse.dense_heads: 3 is more than the 2 KV heads",
        ),
        (
            "model.layers.blocks.sparse.near=[6, 4]",
            "blocks.sparse.near: has stride 4, which does not divide the far stride 2",
        ),
        (
            "model.layers.blocks.full={mixer: window, window: 0}",
            "blocks.full.window: should be greater than 0, got 0",
        ),
        (
            "model.layers.blocks.full={mixer: window, windw: 9}",
            "blocks.full.windw: unknown key (did you mean window?)",
        ),
        (
            "model.layers.blocks.full={mixer: window, window: 9, softcap: 0}",
            "blocks.full.softcap: should be greater than 0",
        ),
        ("model.layers.blocks.full={mixer: streaming}", "blocks.full.window: is required"),
        (
            "model.layers.blocks.full={mixer: pattern, pattern: S2(8}",
            "blocks.full.pattern: 'S2(8' is not a pattern",
        ),
        (
            "model.layers.blocks.full={mixer: pattern, pattern: 'S2(9, 1, 2)'}",
            "blocks.full.pattern: S2.block must be a power of two",
        ),
        (
            "model.layers.blocks.full={mixer: pattern, pattern: S3(8)}",
            "full.pattern: unknown pattern 'S3'; known: Causal",
        ),
        (
            "model.layers.blocks.full={mixer: pattern, pattern: 'PerHead([Causal()]) | Sinks(2)'}",
            "blocks.full.pattern: PerHead lists 1 patterns, but the model has 2 KV heads; "
            "list one for each, from head 0",
        ),
        (
            "model.layers.blocks.full="
            "{mixer: pattern, pattern: 'PerHead([Causal(), Causal(), Window(9)])'}",
            "blocks.full.pattern: PerHead lists 3 patterns, but the model has 2 KV heads; "
            "list one for each, from head 0",
        ),
        ("model.layers.blocks.full.rotary_fraction=0.3", "rotary_fraction: rotates 4.8 of 16 dims"),
        (
            "model.layers.blocks.linear.num_heads=3",
            "blocks.linear.num_heads: 3 does not divide the width, 64",
        ),
        (
            "model.layers.blocks.full={mixer: mamba2, num_key_heads: 3}",
            "full.num_key_heads: 3 does not divide the 4 heads",
        ),
        (
            "model.layers.blocks.full={mixer: retention, key_head_dim: 9}",
            "full.key_head_dim: 9 is odd, but is rotated in pairs",
        ),
        (
            "model.layers.blocks.full={mixer: gated_deltanet, num_heads: 32}",
            "full.key_head_dim: defaults to 3/4 of a head's part of the width 64, "
            "1.5 with 32 heads; set it",
        ),
        (
            "parallel.tp=2 model.layers.blocks.full={mixer: gated_deltanet, num_key_heads: 1}",
            "parallel.tp: 2 does not divide model.layers.blocks.full.num_key_heads 1",
        ),
        (
            "parallel.tp=2 model.layers.blocks.full={mixer: gla, decay_rank: 5}",
            "parallel.tp: 2 does not divide model.layers.blocks.full.decay_rank 5",
        ),
        (
            "parallel.tp=2 model.layers.blocks.full={mixer: kda, value_head_dim: 5}",
            "parallel.tp: 2 does not divide model.layers.blocks.full.value_head_dim 5",
        ),
        (
            "parallel.schedule=rings",
            "parallel.schedule: schedule must be one of auto, stripes, ring, gather, heads, grid",
        ),
        (
            "parallel.schedules.ful=ring",
            "parallel.schedules.ful: is not a block (did you mean full?); known: full, linear",
        ),
        (
            "parallel.schedules.linear=ring",
            "parallel.schedules.linear: is for softmax attention, "
            "but the block is lightning; remove it",
        ),
        (
            "launch.processes=3 parallel={cp: 3, schedule: heads}",
            "schedule: heads cannot do model.layers.blocks.sparse: "
            "4 query heads do not split over 3 ranks; ring supports any number of heads",
        ),
        (
            "launch.processes=2 parallel={cp: 2, schedules: {full: grid}}",
            "parallel.schedules.full: grid cannot do model.layers.blocks.full: "
            "parallel.cp 2 cannot form a grid; use ring",
        ),
        (
            "launch.processes=2 parallel={cp: 2, schedules: {full: heads 3 x ring}}",
            "schedules.full: heads 3 x ring cannot do model.layers.blocks.full: "
            "2 ranks do not split into groups of 3",
        ),
        (
            "model.layers.blocks.full={mixer: retention, value_head_dim: 1}",
            "full.value_head_dim: 1 leaves only the sign of each value after the mixer's norm",
        ),
        (
            "model.layers.blocks.full={mixer: mamba2, num_key_heads: 4, value_head_dim: 1}",
            "full.value_head_dim: 1 leaves only the sign",
        ),
        (
            "model.layers.blocks.full={mixer: lightning, num_heads: 1, value_head_dim: 1}",
            "full.value_head_dim: 1 leaves only the sign",
        ),
        (
            "model.layers.blocks.full={mixer: deltanet, key_head_dim: 1}",
            "full.key_head_dim: 1 leaves only the sign of keys",
        ),
        (
            "model.head_dim=1 model.layers.blocks.full="
            "{mixer: full, qk_norm: true, rotary_fraction: 0.0}",
            "full.qk_norm: of heads of one dim leaves only its sign",
        ),
        ("model.num_attention_heads=5", "does not divide num_attention_heads 5"),
        ("model.num_attention_heads=6", "6 does not divide hidden_size 64"),
        (
            "model.num_attention_heads=6 model.layers.blocks.full={mixer: kda}",
            "6 does not divide hidden_size 64; set head_dim",
        ),
        (
            "model.num_attention_heads=x model.layers.blocks.full={mixer: kda}",
            "num_attention_heads: should be a valid integer",
        ),
        (
            "training.seq_length=100",
            "training.seq_length: 100 is not a multiple of the patterns' largest block, 8",
        ),
        (
            "training.global_batch_size=3 launch.processes=2",
            "training.global_batch_size: 3 is not a multiple",
        ),
        (
            "parallel.tp=2",
            "launch.processes: 1 is not a multiple of parallel.tp * cp * pp = 2; use 2",
        ),
        (
            "parallel.cp=5",
            "training.seq_length: 96 does not split into 10 equal parts for parallel.cp 5 (zigzag)",
        ),
        (
            "parallel.layout=striped",
            "parallel.layout: should be 'zigzag' or 'contiguous', got 'striped'",
        ),
        (
            "parallel.tp=4 launch.processes=4",
            "parallel.tp: 4 does not divide model.num_key_value_heads 2",
        ),
        (
            "evaluation.ngram_baseline=true data.tokenizer=t.json",
            "evaluation.ngram_baseline: counts bytes",
        ),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("model=null", "model: is required"),
        ("training.steps=yes", "training.steps: should be a valid integer, got 'yes'"),
        ("training.steps=1e3", "training.steps: should be a valid integer, got 1000.0"),
    ],
)
def test_each_problem_names_its_key(tiny_recipe, override, message):
    _, _, second = override.partition(" ")
    overrides = override.split(" ", 1) if "=" in second else [override]
    assert any(message in line for line in problems(tiny_recipe, *overrides))


@pytest.mark.parametrize("override", ["training.steps", "=3", "training.steps.x=3", "run_dir={"])
def test_invalid_overrides_are_refused(tiny_recipe, override):
    assert override.split("=")[0].split(".")[0] in problems(tiny_recipe, override)[0]


def test_yaml_scalars_are_not_misread(tiny_recipe):
    recipe = load_recipe(
        str(tiny_recipe),
        ["optimizer.lr=1e-3", "run_dir=no", "metrics.wandb=true", "description=12:30"],
    )
    assert (recipe.optimizer.lr, recipe.run_dir, recipe.metrics.wandb, recipe.description) == (
        1e-3,
        "no",
        True,
        "12:30",
    )


def test_duplicate_keys_are_refused_with_their_line(tiny_recipe):
    text = tiny_recipe.read_text()
    tiny_recipe.write_text(text + "training: {}\n")
    assert problems(tiny_recipe) == [
        f"{tiny_recipe}:{text.count(chr(10)) + 1}:1: duplicate key 'training'"
    ]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("!!int", "this is no !!int; leave !!int out"),
        ("!!int abc", "this is no !!int; leave !!int out"),
        ("!!float", "this is no !!float; leave !!float out"),
        ("!!bool x", "this is no !!bool; leave !!bool out"),
        ("!!timestamp 2001-99-99", "this is no !!timestamp; leave !!timestamp out"),
        ("!!map [a]", "expected a mapping"),
        ("!!set x", "expected a mapping"),
    ],
)
def test_values_that_do_not_fit_their_tags_are_located(tiny_recipe, value, problem):
    tiny_recipe.write_text(f"training:\n  steps: {value}\n")
    assert problems(tiny_recipe) == [f"{tiny_recipe}:2:10: {problem}"]


def test_broken_yaml_and_lists_are_refused(tiny_recipe):
    tiny_recipe.write_text("a: [1\nb: 2\n")
    assert f"{tiny_recipe}:2:" in problems(tiny_recipe)[0]
    tiny_recipe.write_text("- 1\n")
    assert "a recipe is a mapping of sections, this is list" in problems(tiny_recipe)[0]


def test_an_unknown_recipe_gives_a_suggestion():
    (line,) = problems("quikstart")
    assert "did you mean quickstart?" in line


def test_base_is_inherited_key_by_key(tiny_recipe, tmp_path):
    child = tmp_path / "child.yaml"
    child.write_text(
        yaml.safe_dump(
            {
                "base": tiny_recipe.name,
                "training": {"steps": 7},
                "model": {"layers": {"blocks": {"sparse": None}, "pattern": ["linear", "full"]}},
            }
        )
    )
    recipe = load_recipe(str(child))
    base = load_recipe(str(tiny_recipe))
    assert recipe.training.steps == 7
    assert recipe.training.seq_length == base.training.seq_length
    assert list(recipe.model.layers.blocks) == ["full", "linear"]
    grandchild = tmp_path / "grandchild.yaml"
    grandchild.write_text("base: child.yaml\noptimizer: {lr: 0.5}\n")
    assert load_recipe(str(grandchild)).optimizer.lr == 0.5
    assert load_recipe(str(grandchild)).training.steps == 7


def test_sources_of_a_base_are_replaced(tmp_path):
    (tmp_path / "child.yaml").write_text("base: quickstart\ndata: {sources: {mine: 1.0}}\n")
    assert load_recipe(str(tmp_path / "child.yaml")).data.sources == {"mine": 1.0}


def test_a_shipped_recipe_can_be_a_base(tmp_path):
    child = tmp_path / "child.yaml"
    child.write_text("base: quickstart\nrun_dir: elsewhere\n")
    assert load_recipe(str(child)).model == load_recipe(str(SHIPPED / "quickstart.yaml")).model


def test_a_base_must_not_be_its_own_ancestor(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    assert "its own ancestor" in problems(tmp_path / "a.yaml")[0]


@pytest.mark.parametrize(
    ("block", "gaps"),
    [
        ("{mixer: full}", False),
        ("{mixer: window, window: 9}", False),
        ("{mixer: streaming, window: 9}", False),
        ("{mixer: s2, block: 8, stride: 2}", False),
        ("{mixer: s2, block: 8, stride: 4}", True),
        ("{mixer: s2, block: 8, stride: 4, dense_heads: 1}", False),
        ("{mixer: pattern, pattern: 'PerHead([Stripes(8, 2), Window(9)])'}", True),
        ("{mixer: pattern, pattern: 'Stripes(8, 2) | Window(9)'}", False),
    ],
)
def test_gaps_between_stripes_give_a_warning(tiny_recipe, block, gaps):
    from longspan.trainer.run.report import recipe_warnings

    warnings = list(
        recipe_warnings(load_recipe(str(tiny_recipe), [f"model.layers.blocks.full={block}"]))
    )
    assert [
        "model.layers.blocks.full: the stripes of 2 KV heads leave gaps" in line
        for line in warnings
    ] == [True] * gaps


def test_documents_are_aligned_to_the_patterns_in_use(tiny_recipe):
    expression = "PerHead([Stripes(32, 2), Dilated(16, 2, 2)]) | Sinks(4)"
    pattern = f"model.layers.blocks.full={{mixer: pattern, pattern: '{expression}'}}"
    model = load_recipe(str(tiny_recipe), [pattern]).model
    assert model.document_alignment == 32
    assert model.model_copy(update={"num_hidden_layers": 3}).document_alignment == 8


def test_loading_a_recipe_imports_no_torch(tiny_recipe):
    code = (
        "import sys; from longspan.trainer.recipe.file import load_recipe;"
        f"load_recipe({str(tiny_recipe)!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


STAGES = """stages=[
    {from_step: 6, training: {seq_length: 192, global_batch_size: 2}, model: {rope_theta: 50000.0}},
    {from_step: 12, optimizer: {lr: 5e-4}, lr_scheduler: {name: wsd, warmup_steps: 2}}]"""


def test_stages_accumulate_their_changes(tiny_recipe):
    recipe = load_recipe(str(tiny_recipe), [STAGES])
    assert recipe.stage_starts == [0, 6, 12]
    stages = map(recipe.at_step, (0, 5, 6, 11, 12, 19))
    shapes = [
        (stage.training.seq_length, stage.model.rope_theta, stage.optimizer.lr) for stage in stages
    ]
    assert shapes == [*[(96, 1e4, 1e-3)] * 2, *[(192, 5e4, 1e-3)] * 2, *[(192, 5e4, 5e-4)] * 2]
    by_step = [Stages(recipe).at(step) for step in range(20)]
    rates = [stage.learning_rate(step) for step, stage in enumerate(by_step)]
    plain = load_recipe(str(tiny_recipe), [])
    # The schedule of the run ends where a stage sets its own.
    assert rates[:12] == [learning_rate(step, 12, 1e-3, plain.lr_scheduler) for step in range(12)]
    assert rates[12:] == [
        learning_rate(step, 8, 5e-4, recipe.stages[1].lr_scheduler) for step in range(8)
    ]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[{from_step: 30}]", "stages.0.from_step: 30 is not between 0 and training.steps 20"),
        (
            "[{from_step: 9}, {from_step: 9}]",
            "stages.1.from_step: 9 is not between 9 and training.steps 20",
        ),
        (
            "[{from_step: 9, training: {seq_length: 100}}]",
            "stages.0.training.seq_length: 100 is not a multiple of",
        ),
        (
            "[{from_step: 9, data: {mqar: {pairs: [4], vocab_size: 64}}}]",
            "stages.0.data: must have the tokenizer and",
        ),
        (
            "[{from_step: 9, training: {steps: 3}}]",
            "stages.0.training.steps: unknown key; known here: seq_length, global_batch_size",
        ),
    ],
)
def test_invalid_stages_are_refused_by_key(tiny_recipe, stages, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_recipe(str(tiny_recipe), [f"stages={stages}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [],
            "data.buckets.shortest: 256 times a power of two is not training.seq_length 96; use 96",
        ),
        (
            ["training.seq_length=192", "data.buckets.shortest=12"],
            "data.buckets.shortest: 12 is not a multiple of 8",
        ),
    ],
)
def test_invalid_buckets_are_refused(tiny_recipe, overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_recipe(str(tiny_recipe), ["data.packing=buckets", *overrides])


def test_a_single_expert_per_token_needs_its_weight(tiny_recipe):
    def load(**keys):
        moe = {"num_experts": 4, "intermediate_size": 48, "num_experts_per_tok": 1, **keys}
        block = {"mixer": "full", "mlp": "moe"}
        overrides = {"model.moe": moe, "model.layers.blocks.full": block}
        return load_recipe(
            str(tiny_recipe), [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
        )

    with pytest.raises(UserError) as caught:
        load()
    assert str(caught.value) == (
        "tiny.yaml: model.moe.num_experts_per_tok: 1 with norm_topk_prob makes the weight of a "
        "token's one expert always 1, from which the router learns nothing; "
        "set model.moe.norm_topk_prob to false, or use 2 or more"
    )
    load(norm_topk_prob=False)
