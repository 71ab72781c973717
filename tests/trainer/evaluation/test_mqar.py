"""The recall task MQAR.

Its examples, errors in recipes, runs that are stopped and resumed, the measured accuracy, and the
table of results.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import yaml
from longspan.launch.bench.mqar_report import BEGIN, END, MQARReport
from longspan.launch.cli import main
from longspan.trainer.checkpoint.run_folder import RunFolder
from longspan.trainer.data.mqar import MQARData, MQARSamples, make_examples
from longspan.trainer.data.samples import seeded_generator
from longspan.trainer.errors import UserError
from longspan.trainer.evaluation.mqar_settings import (
    RecallSetting,
    choose_settings,
    default_settings,
)
from longspan.trainer.predict import flops as size
from longspan.trainer.recipe.file import load_recipe, shipped_recipes, to_yaml
from longspan.trainer.recipe.schema import MQARConfig

TASK = MQARConfig(pairs=[2, 4, 8], vocab_size=64)
STEPS = 300  # the tiny run then takes some seconds, so that it can be killed in the middle
TINY = {
    "base": "mqar/base",
    "description": "a tiny run",
    "model": {"hidden_size": 16, "intermediate_size": 16},
    "data": {"mqar": {"pairs": [2, 4], "vocab_size": 64, "held_out": 10}},
    "training": {"steps": STEPS, "seq_length": 16, "micro_batch_size": 4, "global_batch_size": 4},
    "metrics": {"log_interval": 1},
}
SMOKE = ["training.steps=600", "optimizer.lr=3e-3"]
SMOKE_LIMITS = {
    "deltanet": (0.9, 1.0),
    "full": (0.95, 1.0),
    "window": (0.0, 0.1),
}
"""Bounds of the accuracy at 8 pairs in 64 tokens by recipe of mqar/, the slowest recipe first."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return the file of a tiny recipe, whose run folder is beside it."""
    folder = tmp_path_factory.mktemp("mqar")
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "run_dir": str(folder / "run")}))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def trained(tiny):
    """Return the folder of that recipe's run, trained without interruption."""
    command = [sys.executable, "-m", "longspan", "train", tiny]
    completed = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    assert "held-out: loss" in completed.stdout
    assert "continue with: longspan eval mqar" in completed.stdout
    return tiny.parent / "run"


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in arguments])
    return exit_info.value.code, *capsys.readouterr()


def problems(*overrides) -> list[str]:
    with pytest.raises(UserError) as error_info:
        load_recipe("mqar/base", list(overrides))
    return str(error_info.value).splitlines()


@pytest.mark.parametrize("fillers", [False, True])
def test_answers_follow_from_the_sequence(fillers):
    task = TASK.model_copy(update={"random_fillers": fillers})
    samples = MQARSamples(task, 40, (1, 7))
    seen = set()
    for n in range(150):
        sample = samples.sample(n)
        asked = np.flatnonzero(sample.weights)
        pairs = len(asked)
        seen.add(pairs)
        keys = sample.tokens[0 : 2 * pairs : 2]
        values = sample.tokens[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert keys.min() >= 1
        assert keys.max() < 32 <= values.min()
        assert values.max() < 64
        memory = dict(zip(keys, values, strict=True))
        assert sorted(sample.tokens[asked]) == sorted(keys)
        assert [memory[key] for key in sample.tokens[asked]] == sample.labels[asked].tolist()
        assert (asked >= 2 * pairs).all()
        assert (asked % 2 == 0).all()
        others = np.setdiff1d(np.arange(2 * pairs, 40), asked)
        assert sample.tokens[others].any() == fillers
        assert (sample.labels[sample.weights == 0] == 0).all()
        assert (set(sample.documents), sample.padding) == ({0}, 0)
        assert (sample.tokens.dtype, sample.labels.dtype, sample.weights.dtype) == (
            np.int64,
            np.int64,
            np.float32,
        )
    assert seen == {2, 4, 8}


def assert_frequencies(counts, chances):
    """Check that all counts lie within five standard deviations of their expectations."""
    total = counts.sum()
    deviations = np.abs(counts - total * chances)
    assert (deviations < 5 * np.sqrt(total * chances * (1 - chances)) + 1).all()


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_query_positions_follow_the_power_law(power):
    task = TASK.model_copy(update={"power_a": power})
    places = (make_examples(task, 40_000, 32, 4, seeded_generator(9)).query_positions - 8) // 2
    chances = power * np.arange(1, 13) ** (power - 1)
    chances /= chances.sum()
    assert_frequencies(np.bincount(places[:, 0], minlength=12), chances)
    # The chances of the second place, in a row for each first place.
    given_first = chances / (1 - chances[:, None]) * (1 - np.eye(12))
    assert_frequencies(np.bincount(places[:, 1], minlength=12), chances @ given_first)
    pairs = np.bincount(places[:, 0] * 12 + places[:, 1], minlength=144)
    assert_frequencies(pairs, (chances[:, None] * given_first).reshape(-1))


def test_keys_values_and_numbers_of_pairs_are_uniform():
    examples = make_examples(TASK, 20_000, 16, 4, seeded_generator(3))
    assert_frequencies(
        np.bincount(examples.tokens[:, [0, 2, 4, 6]].reshape(-1), minlength=64)[1:32],
        np.full(31, 1 / 31),
    )
    assert_frequencies(
        np.bincount(examples.answers.reshape(-1), minlength=64)[32:], np.full(32, 1 / 32)
    )
    samples = MQARSamples(TASK, 32, (1, 0))
    assert_frequencies(
        np.bincount([int(samples.sample(n).weights.sum()) for n in range(3000)])[[2, 4, 8]],
        np.full(3, 1 / 3),
    )


def test_samples_depend_only_on_seed_split_and_number():
    def tokens(seed, numbers, held_out=False):
        recipe = load_recipe("mqar/base", [f"training.seed={seed}"])
        training_data, held_out_data = MQARData(recipe.data.mqar).samples(recipe, 256)
        samples = (held_out_data if held_out else training_data).samples
        return [samples.sample(n).tokens.tobytes() for n in numbers]

    once = tokens(0, range(300))
    assert len(set(once)) == 300
    assert once[::-1] == tokens(0, reversed(range(300)))
    assert once[170:180] == tokens(0, range(170, 180))

    others = [
        tokens(0, range(300), held_out=True),
        tokens(1, range(300)),
        tokens(1, range(300), held_out=True),
    ]
    assert all(not set(once) & set(other) for other in others)
    assert len(set().union(*others)) == 900


def test_ranks_share_the_examples_of_a_step_and_their_tokens():
    import torch
    from longspan.trainer.data.batches import Batches, BatchShard

    def step(share, *overrides):
        recipe = load_recipe("mqar/base", ["training.micro_batch_size=8", *overrides])
        data = MQARData(recipe.data.mqar)
        return list(Batches(recipe, data, 256, share, torch.device("cpu")).step(3))

    alone = step(BatchShard(0, 1, 0))
    ranks = [step(BatchShard(rank, 2, 0), "launch.processes=2") for rank in range(2)]
    assert [len(batches) for batches in (alone, *ranks)] == [4, 2, 2]
    for i, whole in enumerate(alone):
        assert torch.equal(ranks[i % 2][i // 2].tokens, whole.tokens)
    parts = [
        step(BatchShard(0, 1, rank), "parallel.cp=2", "launch.processes=2")[0] for rank in range(2)
    ]
    for name in ("tokens", "labels", "weights"):
        unsharded = parts[0].sequence.layout.unshard([getattr(part, name) for part in parts])
        assert torch.equal(unsharded, getattr(alone[0], name))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.mqar=null"], "data.sources: is required, or data.mqar in its place"),
        (
            ["data.sources={python-stdlib: 1.0}"],
            "data.mqar: is set together with data.sources; set one of the two to null",
        ),
        (
            ["data.mqar.vocab_size=33"],
            "data.mqar.vocab_size: 33 has 15 keys for 16 pairs; use at least 34",
        ),
        (
            ["data.mqar.pairs=[4, 20]"],
            "data.mqar.pairs: 20 pairs and their questions take 80 tokens, "
            "training.seq_length is 64",
        ),
        (
            ["training.seq_length=65"],
            "training.seq_length: 65 is odd, but data.mqar fills places of two tokens; use 66",
        ),
        (
            ["model.vocab_size=600"],
            "model.vocab_size: 600 is not that of data.mqar, 256; remove it",
        ),
        (["data.tokenizer=t.json"], "data.tokenizer: has no effect on data.mqar"),
        (["data.validation=held-out"], "data.validation: has no effect on data.mqar"),
        (
            ["evaluation.ngram_baseline=true"],
            "evaluation.ngram_baseline: counts bytes: needs data.sources",
        ),
        (
            ["evaluation.sample_prompt=x"],
            "evaluation.sample_prompt: needs text to continue, and data.mqar has none",
        ),
        (["data.mqar.pairs=[]"], "data.mqar.pairs: list should have at least 1 item"),
        (["data.mqar.pairs=null"], "data.mqar.pairs: is required"),
        (["data.mqar.power_a=0"], "data.mqar.power_a: should be greater than 0"),
        (
            ["data.mqar.pars=[4]"],
            "data.mqar.pars: unknown key (did you mean pairs?); "
            "known here: pairs, vocab_size, power_a",
        ),
    ],
)
def test_each_problem_of_a_recipe_is_one_line(overrides, message):
    (line,) = problems(*overrides)
    assert line.startswith(f"base.yaml: {message}")


def test_examples_that_fit_exactly_are_accepted():
    recipe = load_recipe(
        "mqar/base", ["data.mqar={pairs: [16], vocab_size: 34}", "model.vocab_size=34"]
    )
    samples = MQARSamples(recipe.data.mqar, 64, (1, 0))
    assert sorted(samples.sample(5).tokens[:32:2]) == list(range(1, 17))
    assert (samples.sample(5).weights[32:] == [1, 0] * 16).all()


@pytest.mark.parametrize(
    "path",
    [path for path in shipped_recipes() if path.parent.stem == "mqar"],
    ids=lambda path: path.stem,
)
def test_shipped_recipes_differ_only_in_their_mixers(path):
    recipe = load_recipe(str(path))
    base = load_recipe("mqar/base")
    same = {"run_dir": "", "description": "", "model": base.model}
    assert recipe.model_copy(update=same) == base.model_copy(update=same)
    layers = {"layers": base.model.layers, "num_hidden_layers": base.model.num_hidden_layers}
    assert recipe.model.model_copy(update=layers) == base.model
    assert recipe.model.layers.pattern[:2] == base.model.layers.pattern


def test_default_and_chosen_settings():
    recipe = load_recipe("mqar/base")
    trained = [RecallSetting(64, 4), RecallSetting(64, 8), RecallSetting(64, 16)]
    assert default_settings(recipe) == [*trained, RecallSetting(128, 32), RecallSetting(256, 64)]
    assert default_settings(load_recipe("mqar/base", ["data.mqar.vocab_size=66"])) == [
        *trained,
        RecallSetting(128, 32),
    ]
    assert choose_settings(recipe, [128, 64], [32, 8]) == [
        RecallSetting(64, 8),
        RecallSetting(128, 8),
        RecallSetting(128, 32),
    ]
    assert choose_settings(recipe, [128], None) == [
        RecallSetting(128, pairs) for pairs in (4, 8, 16)
    ]
    assert choose_settings(recipe, None, [2]) == [RecallSetting(64, 2)]
    for lengths, pairs, message in (
        (
            [63],
            None,
            "--lengths: 63 is not possible: an example needs an even number of tokens, not 63",
        ),
        ([8], [4], "--lengths: 8 is not possible: 4 pairs and their questions take 16 tokens"),
        (None, [4, 17], "--pairs: 17 is not possible: 17 pairs and their questions take 68 tokens"),
        ([4096], [128], "--lengths: 4096 is not possible: data.mqar.vocab_size 256 has 127 keys"),
    ):
        with pytest.raises(UserError, match=message):
            choose_settings(recipe, lengths, pairs)


@pytest.fixture
def untrained(tmp_path):
    """Return a folder with a run of the task and one on text, both without a checkpoint."""
    for name, recipe in (("mqar", load_recipe("mqar/base")), ("text", load_recipe("quickstart"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(to_yaml(recipe))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["generate", "{tmp}/mqar"],
            "data.mqar: its tokens are not text; use `longspan eval mqar RUN`",
        ),
        (
            ["eval", "mqar", "{tmp}/text"],
            "was not trained on the recall task; its recipe has no data.mqar",
        ),
        (["eval", "mqar", "{tmp}/mqar"], "has no weights.safetensors; the run has not finished"),
        (
            ["eval", "mqar", "{tmp}/mqar", "--lengths", "64,x"],
            "--lengths: must be whole numbers, such as 64,128, got '64,x'",
        ),
        (["eval", "mqar", "{tmp}/mqar", "--pairs", "0"], "--pairs: must be at least 1, got 0"),
        (
            ["eval", "mqar", "{tmp}/mqar", "--lengths", "14"],
            "--lengths: 14 is not possible: 4 pairs",
        ),
        (
            ["eval", "mqar", "{tmp}/mqar", "--examples", "0"],
            "--examples: must be at least 1, got 0",
        ),
        (["eval", "mqar", "{tmp}/mqar", "--seed", "-1"], "--seed: must not be negative, got -1"),
        (
            ["bench", "mqar", "quickstart"],
            "is not a recipe of the recall task; it has no data.mqar",
        ),
        (["bench", "mqar", "mqar/full", "{tmp}/mqar/full.yaml"], "RECIPE: two are called full"),
        (
            ["bench", "mqar", "--lrs", "fast"],
            "--lrs: must be numbers, such as 1e-2,3e-3, got 'fast'",
        ),
        (["bench", "mqar", "--lrs", "0"], "optimizer.lr: should be greater than 0, got 0.0"),
        (["bench", "mqar", "--seeds", "-1"], "--seeds: must be at least 0, got -1"),
        (["bench", "mqar", "--jobs", "0"], "--jobs: must be at least 1, got 0"),
        (
            ["bench", "mqar", "--out", "{tmp}/page"],
            "page.md: has no place for the table; put these two lines there",
        ),
        (["bench", "mqar", "--out", "{tmp}/page.md/x"], "page.md cannot be made"),
    ],
)
def test_invalid_options_give_one_line_and_status_2(capsys, untrained, arguments, message):
    (untrained / "page.md").write_text("# By hand\n")
    (untrained / "mqar" / "full.yaml").write_text("base: mqar/full\n")
    work = ["--work", str(untrained / "work")] if arguments[0] == "bench" else []
    status, _, err = run(
        capsys, *(argument.replace("{tmp}", str(untrained)) for argument in arguments), *work
    )
    assert status == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (untrained / "work").exists()


def test_a_run_folder_refuses_another_task(tmp_path):
    recipe = load_recipe("mqar/base", [f"run_dir={tmp_path}"])
    folder = RunFolder(tmp_path)
    data = MQARData(recipe.data.mqar)
    folder.begin(recipe, 0, data.fingerprints)
    folder.require_usable(recipe)
    folder.require_same_data(data.fingerprints)
    other = load_recipe("mqar/base", [f"run_dir={tmp_path}", "data.mqar.power_a=0.5"])
    with pytest.raises(
        UserError, match=r"data.mqar.power_a: is 0.5, but the run in .* has 0.01; set it back"
    ):
        folder.require_usable(other)
    with pytest.raises(UserError, match=r"data: mqar: is not what the run in .* began with"):
        folder.require_same_data(MQARData(other.data.mqar).fingerprints)


def losses(folder) -> dict[int, float]:
    return {
        r["step"]: r["train/loss"] for r in RunFolder(folder).read_metrics() if "train/loss" in r
    }


def test_eval_writes_the_numbers_it_prints(longspan, trained):
    arguments = ["--lengths", "16,32", "--pairs", "2,4,8", "--examples", "50"]
    completed = longspan("eval", "mqar", trained, *arguments)
    assert completed.returncode == 0, completed.stderr
    assert (trained / "eval" / "mqar.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((trained / "eval" / "mqar.json").read_text())
    assert {key: report[key] for key in ("step", "examples", "seed", "vocab_size", "chance")} == {
        "step": STEPS,
        "examples": 50,
        "seed": 0,
        "vocab_size": 64,
        "chance": 1 / 32,
    }
    rows = [(row["length"], row["pairs"], row["trained"]) for row in report["settings"]]
    assert rows == [(16, 2, True), (16, 4, True), (32, 2, False), (32, 4, False), (32, 8, False)]
    for row in report["settings"]:
        assert 0 <= row["accuracy"] < 0.5
        assert (row["accuracy"] * 50 * row["pairs"]) % 1 == pytest.approx(0, abs=1e-6)
        assert (
            f"{row['length']:>6,}  {row['pairs']:>5}  {row['accuracy']:>8.4f}" in completed.stdout
        )
    assert "chance: 0.0312, one of 32 values; 50 examples of each" in completed.stdout
    records = RunFolder(trained).read_metrics()
    assert any("eval/loss" in record for record in records)
    assert not any("eval/bits_per_byte" in record for record in records)


def test_accuracy_counts_the_answers():
    """The model remembers three of the four pairs."""
    import torch
    from longspan.trainer.evaluation.mqar import accuracy

    class Reader:
        device = torch.device("cpu")

        def token_losses(self, tokens, labels):
            likeliest = torch.zeros_like(tokens)
            for row, sequence in enumerate(tokens.tolist()):
                memory = dict(zip(sequence[0:6:2], sequence[1:6:2], strict=True))
                for position, token in enumerate(sequence):
                    likeliest[row, position] = memory.get(token, 0)
            return None, likeliest == labels

    advanced = []
    assert accuracy(Reader(), TASK, RecallSetting(20, 4), 70, 0, advanced.append) == 0.75
    assert sum(advanced) == 70


@pytest.mark.wide
def test_a_killed_bench_continues_bit_by_bit(capsys, monkeypatch, tiny, trained, tmp_path):
    work = tmp_path / "work"
    out = tmp_path / "docs" / "mqar"
    command = [
        "bench",
        "mqar",
        tiny,
        "--lrs",
        "3e-3",
        "--seeds",
        "0",
        "--examples",
        "20",
        "--work",
        work,
        "--out",
        out,
    ]
    folder = work / "tiny" / f"lr-0.003-seed-0-steps-{STEPS}"
    process = subprocess.Popen(
        [sys.executable, "-m", "longspan", *map(str, command)], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists():
        assert process.poll() is None, (folder / "log.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()

    status, _, err = run(capsys, *command)
    assert status == 0, err
    log = (folder / "log.txt").read_text()
    assert "stopped after step" in log, "its run has saved and stopped"
    assert "resuming from step" in log
    assert losses(folder) == losses(trained)
    assert not (folder / "checkpoints").exists()
    assert not (folder / "weights.safetensors").exists()

    report = json.loads(out.with_suffix(".json").read_text())
    (result,) = report["results"]
    (row,) = report["rows"]
    assert (result["recipe"], result["lr"], result["seed"], result["steps"]) == (
        "tiny",
        0.003,
        0,
        STEPS,
    )
    assert result["versions"]["torch"].startswith("2.")
    assert result["settings"] == json.loads((folder / "eval" / "mqar.json").read_text())["settings"]
    assert (row["recipe"], row["lr"], row["state_bytes"]) == (
        "tiny",
        0.003,
        size.state_bytes(load_recipe(str(tiny)).model, 16),
    )
    page = out.with_suffix(".md").read_text()
    assert page.startswith(BEGIN)
    assert page.rstrip().endswith(END)
    assert "| tiny | 0.003 | " in page
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    out.with_suffix(".md").write_text(f"# By hand\n\n{page}\nThe end.\n")
    monkeypatch.setattr("longspan.launch.bench.mqar._longspan", None)  # no run is left to start
    status, again, err = run(capsys, *command)
    assert status == 0, err
    assert "1 runs" in again
    assert "of which 1 are done" in again
    assert out.with_suffix(".md").read_text() == f"# By hand\n\n{page}\nThe end.\n"
    status, _, err = run(capsys, *command, "--examples", "30")
    assert status == 2
    assert "--examples: 30, but" in err


def test_a_failed_run_ends_the_bench_and_a_diverged_one_does_not(
    capsys, monkeypatch, tiny, tmp_path
):
    from longspan.launch.bench import mqar as bench_mqar

    def fake_run(run, lifeline, *arguments):
        run.folder.begin(run.recipe, 0, {})
        run.folder.metrics.write_text('{"step": 1, "perf/step_time_s": 0.5}\n')
        (run.folder.path / "log.txt").write_text("a line\nlongspan: no room\n")
        return status

    monkeypatch.setattr(bench_mqar, "_longspan", fake_run)
    command = [
        "bench",
        "mqar",
        tiny,
        "--lrs",
        "1,3",
        "--seeds",
        "0,1",
        "--steps",
        "3",
        "--work",
        tmp_path,
        "--out",
        tmp_path / "x",
    ]
    status = 2
    exit_status, _, err = run(capsys, *command)
    assert exit_status == 2
    assert re.search(
        r"lr-(.)-seed-(.)-steps-3/log.txt: "
        r"tiny lr \1 seed \2 ended with status 2: longspan: no room",
        err,
    )
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "x.json").exists()
    status = 75
    exit_status, output, _ = run(capsys, *command)
    assert (exit_status, "stopped as asked; the same command continues" in output) == (75, True)
    status = 3
    exit_status, output, _ = run(capsys, *command)
    assert exit_status == 0
    assert "tiny lr 3 seed 1: diverged" in output
    assert "| tiny (4 runs diverged) | 1 | 0.000 (0.000-0.000) |" in (tmp_path / "x.md").read_text()


def test_the_table_shows_the_best_learning_rate_of_the_hardest_setting(monkeypatch, tmp_path):
    monkeypatch.setattr(size, "state_bytes", lambda model, length: 100 * length)
    recipes = {"good": load_recipe("mqar/full"), "bad": load_recipe("mqar/window")}
    accuracies = {  # of two seeds, each at 64/4, 64/8, 64/16, 128/32 and 256/64
        ("bad", 0.1): [(0.2, 0.0, 0.1, 0.0, 0.0)] * 2,
        ("bad", 0.01): [(0.9, 0.9, 0.0, 0.9, 0.9)] * 2,
        ("good", 0.1): [(1.0, 1.0, 0.5, 1.0, 1.0)] * 2,
        ("good", 0.01): [(1.0, 1.0, 0.4, 0.5, 0.2), (1.0, 1.0, 0.8, 0.7, 0.4)],
    }
    settings = default_settings(recipes["good"])
    results = [
        {
            "recipe": name,
            "lr": lr,
            "seed": seed,
            "steps": 9,
            "examples": 7,
            "diverged": False,
            "versions": {"torch": "2.0"},
            "settings": [
                {"length": s.length, "pairs": s.pairs, "accuracy": a}
                for s, a in zip(settings, row, strict=True)
            ],
        }
        for (name, lr), seeds in accuracies.items()
        for seed, row in enumerate(seeds)
    ]
    table = MQARReport(tmp_path / "deep" / "out").write(recipes, results)
    assert "| recipe | lr | 64/4 | 64/8 | 64/16 | 128/32* | 256/64* | state bytes |" in table
    good = next(line for line in table.splitlines() if line.startswith("| good"))
    assert good.startswith("| good | 0.01 | 1.000 (1.000-1.000) |")
    assert "| 0.600 (0.400-0.800) | 0.600 (0.500-0.700) | 0.300 (0.200-0.400) | 6,400 |" in good
    assert table.index("| good | 0.01") < table.index("| bad | 0.1")
    assert (
        "over seeds 0, 1 at the best of the learning rates 0.01, 0.1, after 9 steps; 7 examples"
        in table.replace("\n", " ")
    )
    assert "Chance is 0.0078" in table


@pytest.mark.wide
def test_attention_learns_recall_and_a_short_window_does_not(longspan, tmp_path):
    """Attention learns to answer within a minute; a window that cannot see the pairs does not."""

    def trained_accuracy(name):
        run = tmp_path / name
        for command in (
            ["train", f"mqar/{name}", f"run_dir={run}", *SMOKE],
            ["eval", "mqar", run, "--lengths", "64", "--pairs", "8"],
        ):
            completed = longspan(*command, OMP_NUM_THREADS="1")
            assert completed.returncode == 0, completed.stderr
        (row,) = json.loads((run / "eval" / "mqar.json").read_text())["settings"]
        return row["accuracy"]

    with ThreadPoolExecutor(2) as cores:
        accuracy = dict(zip(SMOKE_LIMITS, cores.map(trained_accuracy, SMOKE_LIMITS), strict=True))
    assert all(least <= accuracy[name] <= most for name, (least, most) in SMOKE_LIMITS.items()), (
        accuracy
    )
