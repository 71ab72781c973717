"""Real runs that are killed, stopped, damaged and resumed, against one that was left alone."""

import json
import re
import shutil
from pathlib import Path

import pytest
from longspan.trainer.checkpoint.run_folder import RunFolder
from longspan.trainer.errors import UserError
from longspan.trainer.recipe.file import load_recipe, to_yaml

from ..stacks import EXPERTS, LINEAR, LINEAR_MORE

WORKER = Path(__file__).parent / "run_worker.py"
OPTIONS = ["checkpoint.interval=4", "checkpoint.keep_latest_k=2", "training.steps=14"]
PAIR = ["parallel.cp=2", *OPTIONS]


def wide(value):
    return pytest.param(value, marks=pytest.mark.wide)


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def go(ranks, tiny_recipe):
    """``go(count, *faults and overrides)``: one start of the run; what the ranks wrote."""

    def start(count, *arguments, status=0):
        return ranks(
            count, WORKER, tiny_recipe, *arguments, f"launch.processes={count}", status=status
        )

    return start


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """What the first test that needs it makes, and the others use."""
    return {"folder": tmp_path_factory.mktemp("made")}


@pytest.fixture
def expected(made, go, run):
    """What an undisturbed run on two ranks sees: step -> (loss in hex, hash of its tokens)."""
    if "expected" not in made:
        go(2, *PAIR)
        made["expected"] = seen(run)
        shutil.rmtree(run)
    return made["expected"]


@pytest.fixture
def stopped(made, go, run, expected):
    """Such a run that was stopped after step 10, with checkpoints of steps 8 and 10."""
    kept = made["folder"] / "stopped"
    if not kept.exists():
        go(2, "stop-file=10", *PAIR, status=75)
        run.rename(kept)
    return shutil.copytree(kept, run)


def seen(run):
    """The last account of every step: those after the checkpoint are taken again."""
    return {
        int(step): (loss, tokens)
        for step, loss, tokens in map(str.split, (run / "seen.txt").read_text().splitlines())
    }


def whole_steps(longspan, run):
    listed = longspan("status", run).stdout
    return [int(step) for step in re.findall(r"^(\d+) .* whole$", listed, re.MULTILINE)]


@pytest.mark.parametrize(
    "fault", ["kill=7", "kill-in-write=8", wide("kill-in-save=8"), wide("kill-before-prune=8")]
)
def test_a_killed_run_goes_on_bit_by_bit(go, run, longspan, expected, fault):
    go(2, fault, *PAIR, status=None)
    assert len(seen(run)) < 14
    leftovers = list((run / "checkpoints").glob("*.partial"))
    assert bool(leftovers) == (fault in ("kill-in-save=8", "kill-in-write=8"))
    whole = whole_steps(longspan, run)
    assert whole == ([8, 4] if fault == "kill-before-prune=8" else [4])
    written = go(2, *PAIR)
    assert f"resuming from step {whole[0]}" in written[0][0]
    assert seen(run) == expected
    assert whole_steps(longspan, run) == [14, 12]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-00000012",
        "step-00000014",
    ]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "train/loss" in record]
    assert steps == [1, 5, 10, 14], "a step that is taken again is logged once"


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def change_a_word(path):
    content = path.read_text()
    assert "cp 2" in content
    path.write_text(content.replace("cp 2", "cp 3"))


DAMAGE = {
    "truncated": (
        "__1_0.distcp",
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        "has 4?[0-9,]+ bytes instead of",
    ),
    "deleted": ("__0_0.distcp", Path.unlink, "No such file"),
    "one bit": (
        "__0_0.distcp",
        flip_a_bit,
        r"has changed since it was written \(SHA-256 differs\)",
    ),
    "metadata": (".metadata", flip_a_bit, r"has changed since it was written \(SHA-256 differs\)"),
    "changed manifest": ("manifest.json", change_a_word, "has changed"),
    "empty manifest": ("manifest.json", lambda path: path.write_text(""), "is not a manifest"),
    "no manifest": ("manifest.json", Path.unlink, "No such file"),
}
WIDE_DAMAGE = ["deleted", "empty manifest", "metadata", "changed manifest", "no manifest"]


@pytest.mark.parametrize("kind", ["truncated", "one bit", *map(wide, WIDE_DAMAGE)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    go, longspan, stopped, expected, kind
):
    name, damage, message = DAMAGE[kind]
    newest = stopped / "checkpoints" / "step-00000010"
    damage(newest / name)
    listed = longspan("status", stopped)
    assert re.search(rf"^10 .*{re.escape(name)}:? {message}", listed.stdout, re.MULTILINE), (
        listed.stdout
    )
    assert whole_steps(longspan, stopped) == [8]
    first, second = go(2, *PAIR)
    assert re.search(rf"warning: {newest}: {re.escape(name)}:? {message}", first[0]), first[0]
    assert "set aside as step-00000010.damaged-1, resuming from step 8" in first[0]
    assert "warning" not in second[0]
    assert seen(stopped) == expected


@pytest.mark.wide
def test_without_a_whole_checkpoint_nothing_is_lost(go, stopped):
    for checkpoint in (stopped / "checkpoints").iterdir():
        flip_a_bit(checkpoint / "__0_0.distcp")
    before = sorted(path.name for path in (stopped / "checkpoints").iterdir())
    first, _ = go(2, *PAIR, status=2)
    assert (
        "checkpoints: holds no whole checkpoint; remove the folder to train from step 0" in first[1]
    )
    assert "step-00000008: __0_0.distcp has changed" in first[1]
    assert sorted(path.name for path in (stopped / "checkpoints").iterdir()) == before


def test_other_ranks_go_on_with_the_same_tokens_and_losses(go, run, expected):
    """Four ranks, then two, then one, then two of other kinds, each resuming the one before."""
    arrangements = [
        (4, "parallel.cp=2"),
        (2, "parallel.pp=2"),
        (1,),
        (2, "parallel.tp=2"),
        (2, "parallel.cp=2"),
    ]
    for part, (count, *overrides) in enumerate(arrangements):
        stop, status = ([f"stop-file={2 * part + 2}"], 75) if part < 4 else ([], 0)
        go(count, *stop, *overrides, *OPTIONS, status=status)
    ours = seen(run)
    assert [tokens for _, tokens in ours.values()] == [tokens for _, tokens in expected.values()]
    for step, (loss, _) in expected.items():
        assert float.fromhex(ours[step][0]) == pytest.approx(float.fromhex(loss), rel=1e-5), step


@pytest.mark.wide
def test_tied_embeddings_and_bf16_go_on_bit_by_bit(go, run):
    options = ["parallel.pp=2", "training.dtype=bfloat16", "training.steps=6"]
    go(2, *options)
    alone = seen(run)
    shutil.rmtree(run)
    go(2, "stop-file=3", *options, status=75)
    go(2, *options)
    assert seen(run) == alone


@pytest.mark.wide
@pytest.mark.parametrize(
    ("stack", "arrangement", "others"),
    [
        (LINEAR, ["parallel.tp=2"], ["parallel.cp=2"]),
        (LINEAR_MORE, ["parallel.tp=2"], ["parallel.cp=2"]),
        (EXPERTS, ["parallel.cp=2", "parallel.ep=2"], ["parallel.pp=2"]),
    ],
    ids=["linear", "more linear", "experts"],
)
def test_mixers_and_experts_go_on_bit_by_bit_and_on_other_ranks(
    go, run, stack, arrangement, others
):
    options = [*stack, "training.steps=6"]
    go(2, *arrangement, *options)
    alone = seen(run)
    shutil.rmtree(run)
    go(2, *arrangement, "stop-file=3", *options, status=75)
    stopped = shutil.copytree(run, run.with_name("stopped"))
    go(2, *arrangement, *options)
    assert seen(run) == alone
    assert ("train/balance_loss" in (run / "metrics.jsonl").read_text()) == (stack is EXPERTS)
    shutil.rmtree(run)
    stopped.rename(run)
    go(2, *others, *options)
    for step, (loss, tokens) in alone.items():
        assert seen(run)[step][1] == tokens
        assert float.fromhex(seen(run)[step][0]) == pytest.approx(float.fromhex(loss), rel=1e-5), (
            step
        )


def zero(stage, *offloaded):
    zero = {f"offload_{what}": {"device": "cpu"} for what in offloaded}
    return [
        *PAIR,
        "engine.name=deepspeed",
        f"engine.zero_stage={stage}",
        f"engine.config.zero_optimization={json.dumps(zero)}",
    ]


@pytest.mark.parametrize(
    "engine",
    [*map(zero, range(4)), zero(2, "optimizer"), zero(3, "optimizer", "param")],
    ids=[*map(str, range(4)), "2, offload", "3, offload"],
)
@pytest.mark.wide
def test_zero_goes_on_bit_by_bit_and_moves_between_engines(go, run, expected, engine):
    go(2, *engine)
    alone = seen(run)
    shutil.rmtree(run)
    go(2, "stop-file=6", *engine, status=75)
    stopped = shutil.copytree(run, run.with_name("stopped"))
    go(2, *engine)
    assert seen(run) == alone
    shutil.rmtree(run)
    stopped.rename(run)
    go(2, *PAIR)  # by Megatron
    for other in (alone, seen(run)):
        for step, (loss, tokens) in expected.items():
            assert other[step][1] == tokens
            assert float.fromhex(other[step][0]) == pytest.approx(float.fromhex(loss), rel=1e-5), (
                step
            )


@pytest.mark.wide
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("fault", ["nan-loss=6", "inf-gradient=6"])
def test_zero_makes_no_update_that_is_not_finite(go, run, stage, fault):
    """The worker compares all weights and moments before and after."""
    first, _ = go(2, fault, *zero(stage), "training.on_nonfinite=skip")
    assert first[0].count("skipped, without an update") == 1


def test_a_run_of_megatron_goes_on_under_zero(go, stopped, expected):
    go(2, *zero(2))
    for step, (loss, tokens) in expected.items():
        assert seen(stopped)[step][1] == tokens
        assert float.fromhex(seen(stopped)[step][0]) == pytest.approx(
            float.fromhex(loss), rel=1e-5
        ), step


@pytest.mark.parametrize("request_to_stop", ["term=6", wide("usr1=6")])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    go, run, longspan, expected, request_to_stop
):
    first, _ = go(2, request_to_stop, *PAIR, status=75)
    assert "stopped after step 6 of 14, as asked; the same command resumes from there" in first[0]
    assert whole_steps(longspan, run) == [6, 4]
    go(2, *PAIR)
    assert seen(run) == expected


def test_a_full_disk_stops_no_training(go, run, longspan, expected):
    first, _ = go(2, "disk-full=7", "disk-free=10", *PAIR, "metrics.log_interval=1")
    assert (
        first[0].count(
            f"ALERT: {run / 'metrics.jsonl'} cannot be written: File too large; training continues"
        )
        == 1
    )
    records = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line
    ]
    assert [record["step"] for record in records if "train/loss" in record] == [
        1,
        2,
        3,
        4,
        5,
        6,
        10,
        11,
        12,
        13,
        14,
    ]
    alert = "ALERT: the checkpoint of step 8 could not be written: rank "
    assert alert in first[0]
    assert re.search(r"\(the disk has [0-9,]+ MiB left\); step 4 is the last", first[0])
    assert whole_steps(longspan, run) == [14, 12]
    assert not list((run / "checkpoints").glob("*.partial"))
    assert seen(run) == expected


@pytest.mark.wide
def test_old_checkpoints_that_cannot_be_removed_are_told(go, run, longspan):
    first, _ = go(2, "no-removal=1", *PAIR)
    assert first[0].count("ALERT: old checkpoints cannot be removed: not permitted") >= 2
    assert whole_steps(longspan, run) == [14, 12, 8, 4]


@pytest.mark.wide
def test_a_full_disk_at_a_stop_is_an_error_and_leaves_the_last_checkpoint(go, run, longspan):
    first, _ = go(2, "disk-full=5", "stop-file=6", *PAIR, status=2)
    assert "checkpoints: step 6 is not saved: rank " in first[1]
    assert whole_steps(longspan, run) == [4]


@pytest.mark.wide
def test_a_step_that_is_not_finite_is_told_on_a_full_disk_too(go, run, longspan):
    first, _ = go(2, "disk-full=6", "nan-loss=6", *PAIR, status=3)
    assert re.search("step 6: loss nan .* the batch could not be written", first[1])
    assert "checkpoints: step 5 is not saved: rank " in first[1]
    assert whole_steps(longspan, run) == [4]


@pytest.mark.parametrize("fault", ["nan-loss=6", wide("inf-gradient=6")])
def test_a_step_that_is_not_finite_stops_the_run_before_the_update(
    go, run, longspan, expected, fault
):
    from safetensors.torch import load_file

    first, second = go(2, fault, *PAIR, status=3)
    assert re.search(
        "step 6: loss .* and gradient norm (nan|inf); no update was made; the batch is in", first[1]
    )
    assert "longspan" not in second[1]
    assert whole_steps(longspan, run) == [5, 4]
    dumped = [
        load_file(run / "nonfinite" / "step-00000006" / f"rank-{rank}.safetensors")
        for rank in range(2)
    ]
    assert {tuple(batches["0.tokens"].shape) for batches in dumped} == {(1, 48)}
    go(2, *PAIR)  # without the fault
    assert seen(run) == expected


@pytest.mark.wide
def test_steps_that_are_not_finite_can_be_skipped_up_to_a_limit(go, run):
    skip = [*PAIR, "training.on_nonfinite=skip", "training.max_skipped_steps=2"]
    first, _ = go(2, "nan-loss=6", "times=2", *skip)
    assert first[0].count("skipped, without an update") == 2
    losses = {step: float.fromhex(loss) for step, (loss, _) in seen(run).items()}
    assert [step for step, loss in losses.items() if loss != loss] == [6, 7]
    shutil.rmtree(run)
    first, _ = go(2, "nan-loss=6", "times=3", *skip, status=3)
    assert "step 8: loss nan" in first[1]
    assert "3 steps in a row, training.max_skipped_steps is 2" in first[1]


def test_a_finished_run_says_so_and_more_steps_continue_it(go, run, tiny_recipe):
    steady = ["lr_scheduler.name=wsd", "lr_scheduler.decay_ratio=0.0", "training.steps=4"]
    go(1, *steady)
    first = go(1, *steady)[0]
    assert "all 4 steps are done; raise training.steps" in first[0]
    assert len(seen(run)) == 4
    go(1, *steady[:2], "training.steps=6")
    assert list(seen(run)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (
            ["optimizer.lr=1e-4", "training.seed=1", "model.layers.blocks.sparse.stride=1"],
            [
                "optimizer.lr: is 0.0001, but the run in {} has 0.001; "
                "set it back, or choose another run_dir",
                "training.seed: is 1, but",
                "model.layers.blocks.sparse.stride: is 1, but",
            ],
        ),
        (["training.steps=9"], ["training.steps: 9, but the run in {} has done 10; raise it"]),
    ],
)
def test_another_recipe_is_refused_with_its_keys(
    longspan, tiny_recipe, stopped, overrides, messages
):
    before = {
        path: path.stat().st_mtime_ns
        for path in stopped.rglob("*")
        if path.is_file() and path.name != "lock"
    }
    done = longspan("train", tiny_recipe, "launch.processes=2", *PAIR, *overrides)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == len(messages), done.stderr
    for message in messages:
        assert message.format(stopped) in done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_stage_may_be_added_that_is_still_to_come(stopped, tiny_recipe):
    folder = RunFolder(stopped)

    def with_stage(step):
        return load_recipe(
            str(tiny_recipe),
            [
                "launch.processes=2",
                *PAIR,
                f"stages=[{{from_step: {step}, optimizer: {{lr: 1e-4}}}}]",
            ],
        )

    folder.require_usable(with_stage(10))
    with pytest.raises(UserError, match=r"^stages: is \[.*, but the run in .* has \[\]"):
        folder.require_usable(with_stage(9))


def test_a_microbatch_stays_where_experts_are_balanced_over_it(tiny_recipe):
    def recipe(*overrides):
        return load_recipe(str(tiny_recipe), [*EXPERTS, *overrides])

    folder = RunFolder(recipe().run_dir)
    folder.path.mkdir()
    folder.recipe_file.write_text(to_yaml(recipe()))
    with pytest.raises(
        UserError, match=r"^training.micro_batch_size: is 2, but the run in .* has 1; set it back"
    ):
        folder.require_usable(recipe("training.micro_batch_size=2"))


def test_another_corpus_under_the_same_name_is_refused(go, stopped, corpus):
    began_with = json.loads((stopped / "data.json").read_text())
    assert list(began_with) == [corpus]
    (stopped / "data.json").write_text(json.dumps({corpus: "another-" + began_with[corpus]}))
    first, _ = go(2, *PAIR, status=2)
    assert f"data: {corpus}: is not what the run in {stopped} began with" in first[1]


def test_a_checkpoint_of_a_newer_format_is_refused(longspan, tiny_recipe, stopped):
    from longspan.trainer.checkpoint.files import Manifest

    file = stopped / "checkpoints" / "step-00000010" / "manifest.json"
    file.write_text(Manifest(10, 1, "other ranks", "later", {}, version=99).to_json())
    done = longspan("train", tiny_recipe, "launch.processes=2", *PAIR)
    assert done.returncode == 2
    assert (
        "step-00000010: was written by a newer longspan (format 99, "
        "this one reads up to 1); upgrade" in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert file.exists()


STAGES = (
    "stages=[{from_step: 5, training: {seq_length: 192, global_batch_size: 2}, "
    "model: {rope_theta: 50000.0}}]"
)
BUCKETS = [
    "training.seq_length=192",
    "data.packing=buckets",
    "data.buckets.shortest=24",
    "data.buckets.cycle_steps=12",
]


@pytest.mark.parametrize(
    "options",
    [
        [STAGES],
        wide(BUCKETS),
        wide([STAGES, "data.packing=best_fit"]),
        wide([STAGES, "parallel.cp=1"]),
    ],
)
def test_stages_and_packings_go_on_bit_by_bit_and_are_the_same_on_other_ranks(go, run, options):
    options = [*OPTIONS, "training.steps=10", *options]
    pair = options if "parallel.cp=1" in options else [*options, "parallel.cp=2"]
    first = go(2, *pair)[0]
    assert (
        "step 6: a stage of 2 sequences of 192 tokens a step, rope_theta 50000" in first[0]
    ) == (STAGES in options)
    whole = seen(run)
    shutil.rmtree(run)
    go(2, "stop-file=7", *pair, status=75)
    go(2, *pair)
    assert seen(run) == whole
    shutil.rmtree(run)
    go(1, *[option for option in options if not option.startswith("parallel")])
    for step, (loss, tokens) in seen(run).items():
        assert whole[step][1] == tokens
        assert float.fromhex(whole[step][0]) == pytest.approx(float.fromhex(loss), rel=1e-5), step
