"""``longspan train``, with real processes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from longspan.launch.training import train
from longspan.trainer.errors import UserError
from longspan.trainer.predict.flops import training_flops
from longspan.trainer.recipe.file import load_recipe


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_evaluate_plot_and_generate(longspan, tiny_recipe, corpus, tmp_path):
    run = tmp_path / "run"
    overrides = [
        "launch.processes=2",
        "parallel.cp=2",
        f"data.validation={corpus}",
        "training.steps=10",
        "evaluation.interval=5",
    ]
    overrides += ["evaluation.ngram_baseline=true", "evaluation.sample_prompt=Document"]
    completed = longspan("train", tiny_recipe, *overrides)
    assert completed.returncode == 0, completed.stderr
    assert "step 10/10" in completed.stdout
    assert "held-out: " in completed.stdout
    assert "an order-2 byte model on the same: " in completed.stdout
    assert "a sample:\nDocument" in completed.stdout
    assert "Traceback" not in completed.stderr

    records = read_metrics(run)
    assert records[0]["step"] == 1
    assert set(records[0]) == {"step", "flops/linear", "flops/sparse", "flops/full", "flops/output"}
    assert records[0]["flops/full"] > records[0]["flops/sparse"] > 0
    training, evaluations = (
        [r for r in records if key in r] for key in ("train/loss", "eval/loss")
    )
    assert [r["step"] for r in training] == [1, 5, 10]
    assert [r["step"] for r in evaluations] == [5, 10]
    assert training[-1]["train/loss"] < training[0]["train/loss"]
    assert evaluations[-1]["eval/bits_per_byte"] == pytest.approx(
        evaluations[-1]["eval/loss"] / 0.693, rel=0.05
    )
    expected = {
        "train/grad_norm",
        "train/lr",
        "train/tokens",
        "perf/step_time_s",
        "perf/tokens_per_sec_per_device",
    }
    assert expected <= training[-1].keys()
    assert 0 < training[-1]["data/padding_ratio"] < 0.5
    assert (run / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "torch 2." in (run / "versions.txt").read_text()

    (run / "plots" / "loss.png").unlink()
    assert longspan("plot", run).stdout.strip() == str(run / "plots" / "loss.png")
    assert (run / "plots" / "loss.png").exists()

    greedy = ["--prompt", "Document 1", "--tokens", "5", "--temperature", "0"]
    generated = longspan("generate", run, *greedy)
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout.startswith("Document 1")
    assert generated.stdout == longspan("generate", run, *greedy).stdout

    second_run = longspan("train", tiny_recipe, *overrides)
    assert second_run.returncode == 0, second_run.stderr
    assert "all 10 steps are done; raise training.steps" in second_run.stdout
    assert "held-out: " in second_run.stdout
    assert read_metrics(run) == records


@pytest.mark.wide
def test_tflops_follow_the_length_of_each_step(longspan, tiny_recipe, tmp_path):
    options = [
        "training.seq_length=192",
        "data.packing=buckets",
        "data.buckets={shortest: 24, cycle_steps: 12}",
    ]
    completed = longspan(
        "train", tiny_recipe, *options, "training.steps=12", "metrics.log_interval=1"
    )
    assert completed.returncode == 0, completed.stderr
    model = load_recipe(str(tiny_recipe)).model
    possible = {
        length: sum(training_flops(model, length, 257).values()) for length in (24, 48, 96, 192)
    }
    lengths_seen = set()
    for record in read_metrics(tmp_path / "run"):
        if "train/loss" in record:
            flops = (
                record["perf/tflops_per_device"] * 1e12 / record["perf/tokens_per_sec_per_device"]
            )
            (length,) = [
                length
                for length, expected in possible.items()
                if flops == pytest.approx(expected, rel=1e-6)
            ]
            lengths_seen.add(length)
    assert len(lengths_seen) > 1


@pytest.mark.parametrize(
    ("overrides", "key", "gib"),
    [
        (
            [
                "engine={name: deepspeed, zero_stage: 2, config: "
                "{zero_optimization: {offload_optimizer: {device: cpu}}}}",
                "model.hidden_size=65536",
            ],
            "engine.config.zero_optimization",
            16 * (4 * (4 * 65536**2 + 3 * 65536 * 96) + 2 * 384 * 65536) / 2**30,
        ),
        (
            ["memory.recompute=full", "memory.offload_inputs=true", f"training.seq_length={2**34}"],
            "memory.offload_inputs",
            2 * 2 * 2**34 * 64 * 4 / 2**30,
        ),
    ],
    ids=["Adam", "inputs"],
)
def test_offloading_more_than_the_memory_is_refused(tiny_recipe, tmp_path, overrides, key, gib):
    with pytest.raises(UserError) as error_info:
        train(str(tiny_recipe), [*overrides, "launch.processes=2"], dry_run=False)
    match = re.fullmatch(
        rf"{key}: what the 2 processes here offload takes ([0-9,.]+) GiB, .* has [0-9.]+ GiB; .*",
        str(error_info.value),
    )
    # The formulas of the parametrization leave out gates and other small tensors.
    assert float(match[1].replace(",", "")) == pytest.approx(gib, rel=0.1)
    assert not (tmp_path / "run").exists()


def test_the_resolved_recipe_gives_the_same_losses(longspan, tiny_recipe, tmp_path):
    completed = longspan("train", tiny_recipe, "training.steps=2")
    assert completed.returncode == 0, completed.stderr
    first = tmp_path / "run"
    assert longspan("train", first / "recipe.yaml", f"run_dir={tmp_path / 'again'}").returncode == 0
    losses = [
        [record["train/loss"] for record in read_metrics(folder) if "train/loss" in record]
        for folder in (first, tmp_path / "again")
    ]
    assert losses[0] == losses[1], "same recipe, same sizes, same bits"


def test_a_token_outside_the_vocabulary_ends_all_ranks_and_is_located(
    longspan, tiny_recipe, corpus, tmp_path
):
    for suffix in ("idx", "json"):
        (tmp_path / f"bad.{suffix}").write_bytes(Path(f"{corpus}.{suffix}").read_bytes())
    content = bytearray(Path(f"{corpus}.bin").read_bytes())
    content[2000:2002] = (999).to_bytes(2, "little")
    (tmp_path / "bad.bin").write_bytes(content)
    completed = longspan(
        "train",
        tiny_recipe,
        "launch.processes=2",
        "training.steps=500",
        "checkpoint.interval=1",
        f"data.sources={{{tmp_path / 'bad'}: 1.0}}",
    )
    assert completed.returncode == 2, completed.stderr
    place = "token id 999 at byte offset 2000 (token 1000)"
    assert f"{tmp_path / 'bad'}.bin: {place} is outside the vocabulary of 257" in completed.stderr
    assert "Traceback" not in completed.stderr


@pytest.mark.wide
def test_an_unreadable_run_folder_ends_all_torchrun_ranks_cleanly(tiny_recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "longspan",
    ]
    completed = subprocess.run(
        [*command, "train", tiny_recipe], capture_output=True, text=True, timeout=300, check=False
    )
    assert completed.returncode != 0
    assert (
        f"longspan: rank 0: run_dir: {tmp_path / 'run'} holds a run whose recipe cannot be used"
        in completed.stderr
    )
    assert "[rank1]: Traceback" not in completed.stderr


def test_damaged_weights_are_reported(longspan, tiny_recipe, tmp_path):
    assert longspan("train", tiny_recipe, "training.steps=1").returncode == 0
    weights = tmp_path / "run" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    completed = longspan("generate", tmp_path / "run")
    assert completed.returncode == 2
    assert f"{weights}: is damaged" in completed.stderr


def wandb_records(file: Path):
    """Yield the records of a .wandb file, which has LevelDB's log format after 7 bytes of its own.

    The log consists of blocks of 32 KiB. A chunk has a header of 7 bytes: checksum (4), length (2)
    and type (1): whether it is a whole record, or the first, a middle or the last chunk of one.
    """
    from wandb.proto import wandb_internal_pb2

    block_size = 32768
    header_size = 7
    whole = 1
    last = 4

    content = file.read_bytes()
    offset = 7
    record = b""
    while offset < len(content):
        left_in_block = block_size - offset % block_size
        if left_in_block < header_size:  # padding
            offset += left_in_block
            continue
        length = int.from_bytes(content[offset + 4 : offset + 6], "little")
        chunk_type = content[offset + 6]
        offset += header_size
        record += content[offset : offset + length]
        offset += length
        if chunk_type in (whole, last):
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def test_metrics_are_written_to_tensorboard(longspan, tiny_recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    completed = longspan("train", tiny_recipe, "metrics.tensorboard=true", "training.steps=10")
    assert completed.returncode == 0, completed.stderr
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    records = read_metrics(tmp_path / "run")
    for name in ("train/loss", "perf/tflops_per_device"):
        logged = {record["step"]: record[name] for record in records if name in record}
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(
            logged, rel=1e-6
        )


@pytest.mark.wide
def test_metrics_are_written_to_wandb_offline(longspan, tiny_recipe, tmp_path):
    completed = longspan(
        "train",
        tiny_recipe,
        "metrics.wandb=true",
        "training.steps=10",
        HOME=str(tmp_path),
        WANDB_MODE="",
        WANDB_API_KEY="",
    )
    assert completed.returncode == 0, completed.stderr
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    logged = [
        {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for record in wandb_records(file)
        if record.WhichOneof("record_type") == "history"
    ]
    losses = [
        [entry["train/loss"] for entry in entries if "train/loss" in entry]
        for entries in (logged, read_metrics(tmp_path / "run"))
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


def test_saved_weights_are_whole_and_have_global_names(longspan, tiny_recipe, tmp_path):
    completed = longspan(
        "train", tiny_recipe, "training.steps=2", "launch.processes=2", "parallel.pp=2"
    )
    assert completed.returncode == 0, completed.stderr
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "run" / "weights.safetensors")
    layers = {int(name.split(".")[2]) for name in weights if name.startswith("decoder.layers.")}
    assert layers == {0, 1, 2, 3}
    assert weights["embedding.word_embeddings.weight"].shape == torch.Size([384, 64])
