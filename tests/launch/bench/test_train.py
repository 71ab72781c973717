"""``longspan bench memory`` and ``bench train`` at sizes that take seconds."""

import json

import pytest

SMALL = ["--hidden", "32", "--layers", "1", "--intermediate", "64", "--vocabulary", "512"]


@pytest.mark.wide
def test_memory_is_searched_for_every_candidate(longspan, tmp_path):
    done = longspan("bench", "memory", *SMALL, "--budget-mib", "8", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {
        row["candidate"]: row for row in json.loads((tmp_path / "memory.json").read_text())["rows"]
    }
    assert {"longspan", "longspan, full recompute", "PyTorch", "transformers"} <= rows.keys()
    for row in rows.values():
        fitting = [int(length) for length, peak in row["peaks"].items() if peak <= 8 << 20]
        assert row["longest"] == max(fitting, default=0)
    assert rows["longspan, full recompute, mlp_tile"]["longest"] >= rows["transformers"]["longest"]
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.wide
def test_every_trainer_takes_its_turns(longspan, tmp_path):
    turns = ["--length", "256", "--batch", "1", "--steps", "2", "--repeats", "1"]
    done = longspan("bench", "train", *SMALL, *turns, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {
        row["candidate"]: row for row in json.loads((tmp_path / "train.json").read_text())["rows"]
    }
    for name, row in rows.items():
        assert len(row["seconds"]) == 1, (name, row)
    assert 0 < rows["longspan, full"]["data_share"] < 1


@pytest.mark.parametrize("command", ["memory", "train"])
def test_bad_input_is_one_line(longspan, tmp_path, command):
    done = longspan("bench", command, "--heads", "3", "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("longspan: --heads: 3 must divide --hidden")
    assert len(done.stderr.splitlines()) == 1
