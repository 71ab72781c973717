"""Real runs that are killed, stopped, damaged and resumed, against an undisturbed one."""

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
TWO_RANKS = ["parallel.cp=2", *OPTIONS]


def wide(value):
    return pytest.param(value, marks=pytest.mark.wide)


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def run_ranks(ranks, tiny_recipe):
    """``run_ranks(count, *faults_and_overrides)``: start the run and return the ranks' outputs."""

    def start(count, *arguments, status=0):
        return ranks(
            count, WORKER, tiny_recipe, *arguments, f"launch.processes={count}", status=status
        )

    return start


@pytest.fixture(scope="session")
def shared_files(tmp_path_factory):
    """Return a store for results that the first test computes and others reuse."""
    return {"folder": tmp_path_factory.mktemp("made")}


@pytest.fixture
def expected(shared_files, run_ranks, run):
    """Return the steps of an undisturbed run: step -> (loss in hex, hash of tokens)."""
    if "expected" not in shared_files:
        run_ranks(2, *TWO_RANKS)
        shared_files["expected"] = recorded_steps(run)
        shutil.rmtree(run)
    return shared_files["expected"]


@pytest.fixture
def stopped(shared_files, run_ranks, run, expected):
    """Return the folder of such a run stopped after step 10, with checkpoints of steps 8 and 10."""
    kept = shared_files["folder"] / "stopped"
    if not kept.exists():
        run_ranks(2, "stop-file=10", *TWO_RANKS, status=75)
        run.rename(kept)
    return shutil.copytree(kept, run)


def recorded_steps(run):
    """Return the last record of every step; those after a checkpoint may be repeated."""
    return {
        int(step): (loss, tokens)
        for step, loss, tokens in map(str.split, (run / "seen.txt").read_text().splitlines())
    }


def whole_checkpoints(longspan, run):
    listed = longspan("status", run).stdout
    return [int(step) for step in re.findall(r"^(\d+) .* whole$", listed, re.MULTILINE)]


@pytest.mark.parametrize(
    "fault",
    ["kill=7", wide("kill-in-write=8"), wide("kill-in-save=8"), wide("kill-before-prune=8")],
)
def test_a_killed_run_resumes_bit_by_bit(run_ranks, run, longspan, expected, fault):
    run_ranks(2, fault, *TWO_RANKS, status=None)
    assert len(recorded_steps(run)) < 14
    leftovers = list((run / "checkpoints").glob("*.partial"))
    assert bool(leftovers) == (fault in ("kill-in-save=8", "kill-in-write=8"))
    whole = whole_checkpoints(longspan, run)
    assert whole == ([8, 4] if fault == "kill-before-prune=8" else [4])
    written = run_ranks(2, *TWO_RANKS)
    assert f"resuming from step {whole[0]}" in written[0][0]
    assert recorded_steps(run) == expected
    assert whole_checkpoints(longspan, run) == [14, 12]
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
WIDE_DAMAGE = [
    "truncated",
    "deleted",
    "empty manifest",
    "metadata",
    "changed manifest",
    "no manifest",
]


@pytest.mark.parametrize("kind", ["one bit", *map(wide, WIDE_DAMAGE)])
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(
    run_ranks, longspan, stopped, expected, kind
):
    name, damage, message = DAMAGE[kind]
    newest = stopped / "checkpoints" / "step-00000010"
    damage(newest / name)
    listed = longspan("status", stopped)
    assert re.search(rf"^10 .*{re.escape(name)}:? {message}", listed.stdout, re.MULTILINE), (
        listed.stdout
    )
    assert whole_checkpoints(longspan, stopped) == [8]
    first, second = run_ranks(2, *TWO_RANKS)
    assert re.search(rf"warning: {newest}: {re.escape(name)}:? {message}", first[0]), first[0]
    assert "set aside as step-00000010.damaged-1, resuming from step 8" in first[0]
    assert "warning" not in second[0]
    assert recorded_steps(stopped) == expected


@pytest.mark.wide
def test_without_a_whole_checkpoint_the_run_stops_and_keeps_its_files(run_ranks, stopped):
    for checkpoint in (stopped / "checkpoints").iterdir():
        flip_a_bit(checkpoint / "__0_0.distcp")
    before = sorted(path.name for path in (stopped / "checkpoints").iterdir())
    first, _ = run_ranks(2, *TWO_RANKS, status=2)
    assert (
        "checkpoints: holds no whole checkpoint; remove the folder to train from step 0" in first[1]
    )
    assert "step-00000008: __0_0.distcp has changed" in first[1]
    assert sorted(path.name for path in (stopped / "checkpoints").iterdir()) == before


def test_other_arrangements_resume_with_the_same_tokens_and_losses(run_ranks, run, expected):
    """Four ranks, then two, one, and two in other arrangements, each resuming the previous run."""
    arrangements = [
        (4, "parallel.cp=2"),
        (2, "parallel.pp=2"),
        (1,),
        (2, "parallel.tp=2"),
        (2, "parallel.cp=2"),
    ]
    for index, (count, *overrides) in enumerate(arrangements):
        if index < 4:
            run_ranks(count, f"stop-file={2 * index + 2}", *overrides, *OPTIONS, status=75)
        else:
            run_ranks(count, *overrides, *OPTIONS)
    ours = recorded_steps(run)
    assert [tokens for _, tokens in ours.values()] == [tokens for _, tokens in expected.values()]
    for step, (loss, _) in expected.items():
        assert float.fromhex(ours[step][0]) == pytest.approx(float.fromhex(loss), rel=1e-5), step


@pytest.mark.wide
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tied_embeddings_in_16_bits_resume_bit_by_bit(run_ranks, run, dtype):
    options = ["parallel.pp=2", f"training.dtype={dtype}", "training.steps=6"]
    run_ranks(2, *options)
    undisturbed = recorded_steps(run)
    shutil.rmtree(run)
    run_ranks(2, "stop-file=3", *options, status=75)
    run_ranks(2, *options)
    assert recorded_steps(run) == undisturbed


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
def test_mixers_and_experts_resume_bit_by_bit_and_on_other_ranks(
    run_ranks, run, stack, arrangement, others
):
    options = [*stack, "training.steps=6"]
    run_ranks(2, *arrangement, *options)
    undisturbed = recorded_steps(run)
    shutil.rmtree(run)
    run_ranks(2, *arrangement, "stop-file=3", *options, status=75)
    stopped = shutil.copytree(run, run.with_name("stopped"))
    run_ranks(2, *arrangement, *options)
    assert recorded_steps(run) == undisturbed
    assert ("train/balance_loss" in (run / "metrics.jsonl").read_text()) == (stack is EXPERTS)
    shutil.rmtree(run)
    stopped.rename(run)
    run_ranks(2, *others, *options)
    for step, (loss, tokens) in undisturbed.items():
        assert recorded_steps(run)[step][1] == tokens
        assert float.fromhex(recorded_steps(run)[step][0]) == pytest.approx(
            float.fromhex(loss), rel=1e-5
        ), step


def zero(stage, *offloaded):
    zero = {f"offload_{what}": {"device": "cpu"} for what in offloaded}
    return [
        *TWO_RANKS,
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
def test_zero_resumes_bit_by_bit_and_under_megatron(run_ranks, run, expected, engine):
    run_ranks(2, *engine)
    undisturbed = recorded_steps(run)
    shutil.rmtree(run)
    run_ranks(2, "stop-file=6", *engine, status=75)
    stopped = shutil.copytree(run, run.with_name("stopped"))
    run_ranks(2, *engine)
    assert recorded_steps(run) == undisturbed
    shutil.rmtree(run)
    stopped.rename(run)
    run_ranks(2, *TWO_RANKS)  # by Megatron
    for other in (undisturbed, recorded_steps(run)):
        for step, (loss, tokens) in expected.items():
            assert other[step][1] == tokens
            assert float.fromhex(other[step][0]) == pytest.approx(float.fromhex(loss), rel=1e-5), (
                step
            )


@pytest.mark.wide
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("fault", ["nan-loss=6", "inf-gradient=6"])
def test_zero_skips_nonfinite_updates(run_ranks, run, stage, fault):
    """The worker compares all weights and moments before and after."""
    first, _ = run_ranks(2, fault, *zero(stage), "training.on_nonfinite=skip")
    assert first[0].count("skipped, without an update") == 1


def test_a_megatron_run_resumes_under_zero(run_ranks, stopped, expected):
    run_ranks(2, *zero(2))
    for step, (loss, tokens) in expected.items():
        assert recorded_steps(stopped)[step][1] == tokens
        assert float.fromhex(recorded_steps(stopped)[step][0]) == pytest.approx(
            float.fromhex(loss), rel=1e-5
        ), step


@pytest.mark.parametrize("request_to_stop", [wide("term=6"), wide("usr1=6")])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    run_ranks, run, longspan, expected, request_to_stop
):
    first, _ = run_ranks(2, request_to_stop, *TWO_RANKS, status=75)
    assert "stopped after step 6 of 14, as asked; the same command resumes from there" in first[0]
    assert whole_checkpoints(longspan, run) == [6, 4]
    run_ranks(2, *TWO_RANKS)
    assert recorded_steps(run) == expected


def test_training_continues_on_a_full_disk(run_ranks, run, longspan, expected):
    first, _ = run_ranks(2, "disk-full=7", "disk-free=10", *TWO_RANKS, "metrics.log_interval=1")
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
    assert whole_checkpoints(longspan, run) == [14, 12]
    assert not list((run / "checkpoints").glob("*.partial"))
    assert recorded_steps(run) == expected


@pytest.mark.wide
def test_checkpoints_that_cannot_be_removed_give_an_alert(run_ranks, run, longspan):
    first, _ = run_ranks(2, "no-removal=1", *TWO_RANKS)
    assert first[0].count("ALERT: old checkpoints cannot be removed: not permitted") >= 2
    assert whole_checkpoints(longspan, run) == [14, 12, 8, 4]


@pytest.mark.wide
def test_a_full_disk_at_a_stop_is_an_error_and_keeps_the_last_checkpoint(run_ranks, run, longspan):
    first, _ = run_ranks(2, "disk-full=5", "stop-file=6", *TWO_RANKS, status=2)
    assert "checkpoints: step 6 is not saved: rank " in first[1]
    assert whole_checkpoints(longspan, run) == [4]


@pytest.mark.wide
def test_a_nonfinite_step_is_reported_on_a_full_disk_too(run_ranks, run, longspan):
    first, _ = run_ranks(2, "disk-full=6", "nan-loss=6", *TWO_RANKS, status=3)
    assert re.search("step 6: loss nan .* the batch could not be written", first[1])
    assert "checkpoints: step 5 is not saved: rank " in first[1]
    assert whole_checkpoints(longspan, run) == [4]


@pytest.mark.parametrize("fault", ["nan-loss=6", wide("inf-gradient=6")])
def test_a_nonfinite_step_stops_the_run_before_the_update(
    run_ranks, run, longspan, expected, fault
):
    from safetensors.torch import load_file

    first, second = run_ranks(2, fault, *TWO_RANKS, status=3)
    assert re.search(
        "step 6: loss .* and gradient norm (nan|inf); no update was made; the batch is in", first[1]
    )
    assert "longspan" not in second[1]
    assert whole_checkpoints(longspan, run) == [5, 4]
    dumped = [
        load_file(run / "nonfinite" / "step-00000006" / f"rank-{rank}.safetensors")
        for rank in range(2)
    ]
    assert {tuple(batches["0.tokens"].shape) for batches in dumped} == {(1, 48)}
    run_ranks(2, *TWO_RANKS)  # without the fault
    assert recorded_steps(run) == expected


@pytest.mark.wide
def test_nonfinite_steps_can_be_skipped_up_to_a_limit(run_ranks, run):
    skip = [*TWO_RANKS, "training.on_nonfinite=skip", "training.max_skipped_steps=2"]
    first, _ = run_ranks(2, "nan-loss=6", "times=2", *skip)
    assert first[0].count("skipped, without an update") == 2
    losses = {step: float.fromhex(loss) for step, (loss, _) in recorded_steps(run).items()}
    assert [step for step, loss in losses.items() if loss != loss] == [6, 7]
    shutil.rmtree(run)
    first, _ = run_ranks(2, "nan-loss=6", "times=3", *skip, status=3)
    assert "step 8: loss nan" in first[1]
    assert "3 steps in a row, training.max_skipped_steps is 2" in first[1]


def test_a_finished_run_continues_with_more_steps(run_ranks, run, tiny_recipe):
    steady = ["lr_scheduler.name=wsd", "lr_scheduler.decay_ratio=0.0", "training.steps=4"]
    run_ranks(1, *steady)
    first = run_ranks(1, *steady)[0]
    assert "all 4 steps are done; raise training.steps" in first[0]
    assert len(recorded_steps(run)) == 4
    run_ranks(1, *steady[:2], "training.steps=6")
    assert list(recorded_steps(run)) == [1, 2, 3, 4, 5, 6]


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
def test_changed_keys_are_refused_by_name(longspan, tiny_recipe, stopped, overrides, messages):
    before = {
        path: path.stat().st_mtime_ns
        for path in stopped.rglob("*")
        if path.is_file() and path.name != "lock"
    }
    completed = longspan("train", tiny_recipe, "launch.processes=2", *TWO_RANKS, *overrides)
    assert completed.returncode == 2
    assert len(completed.stderr.splitlines()) == len(messages), completed.stderr
    for message in messages:
        assert message.format(stopped) in completed.stderr
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_future_stage_may_be_added(stopped, tiny_recipe):
    folder = RunFolder(stopped)

    def with_stage(step):
        return load_recipe(
            str(tiny_recipe),
            [
                "launch.processes=2",
                *TWO_RANKS,
                f"stages=[{{from_step: {step}, optimizer: {{lr: 1e-4}}}}]",
            ],
        )

    folder.require_usable(with_stage(10))
    with pytest.raises(UserError, match=r"^stages: is \[.*, but the run in .* has \[\]"):
        folder.require_usable(with_stage(9))


def test_the_microbatch_size_of_balanced_experts_must_not_change(tiny_recipe):
    def recipe(*overrides):
        return load_recipe(str(tiny_recipe), [*EXPERTS, *overrides])

    folder = RunFolder(recipe().run_dir)
    folder.path.mkdir()
    folder.recipe_file.write_text(to_yaml(recipe()))
    with pytest.raises(
        UserError, match=r"^training.micro_batch_size: is 2, but the run in .* has 1; set it back"
    ):
        folder.require_usable(recipe("training.micro_batch_size=2"))


def test_a_changed_corpus_is_refused(run_ranks, stopped, corpus):
    began_with = json.loads((stopped / "data.json").read_text())
    assert list(began_with) == [corpus]
    (stopped / "data.json").write_text(json.dumps({corpus: "another-" + began_with[corpus]}))
    first, _ = run_ranks(2, *TWO_RANKS, status=2)
    assert f"data: {corpus}: is not what the run in {stopped} began with" in first[1]


@pytest.mark.wide
def test_a_checkpoint_of_a_newer_format_is_refused(longspan, tiny_recipe, stopped):
    from longspan.trainer.checkpoint.files import Manifest

    file = stopped / "checkpoints" / "step-00000010" / "manifest.json"
    file.write_text(Manifest(10, 1, "other ranks", "later", {}, version=99).to_json())
    completed = longspan("train", tiny_recipe, "launch.processes=2", *TWO_RANKS)
    assert completed.returncode == 2
    assert (
        "step-00000010: was written by a newer longspan (format 99, "
        "this one reads up to 1); upgrade" in completed.stderr
    )
    assert "Traceback" not in completed.stderr
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
def test_stages_and_packings_resume_bit_by_bit_and_on_other_ranks(run_ranks, run, options):
    options = [*OPTIONS, "training.steps=10", *options]
    pair = options if "parallel.cp=1" in options else [*options, "parallel.cp=2"]
    first = run_ranks(2, *pair)[0]
    assert (
        "step 6: a stage of 2 sequences of 192 tokens a step, rope_theta 50000" in first[0]
    ) == (STAGES in options)
    whole = recorded_steps(run)
    shutil.rmtree(run)
    run_ranks(2, "stop-file=7", *pair, status=75)
    run_ranks(2, *pair)
    assert recorded_steps(run) == whole
    shutil.rmtree(run)
    run_ranks(1, *[option for option in options if not option.startswith("parallel")])
    for step, (loss, tokens) in recorded_steps(run).items():
        assert whole[step][1] == tokens
        assert float.fromhex(whole[step][0]) == pytest.approx(float.fromhex(loss), rel=1e-5), step
