"""``longspan bench memory`` and ``bench train``, at sizes that run in seconds."""

import json

import pytest

SMALL_MODEL = ["--hidden", "32", "--layers", "1", "--intermediate", "64", "--vocabulary", "512"]


@pytest.mark.wide
def test_the_longest_sequence_is_found_for_every_candidate(longspan, tmp_path):
    completed = longspan("bench", "memory", *SMALL_MODEL, "--budget-mib", "8", "--out", tmp_path)
    assert completed.returncode == 0, completed.stderr
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
def test_every_trainer_is_measured(longspan, tmp_path):
    sizes = ["--length", "256", "--batch", "1", "--steps", "2", "--repeats", "1"]
    completed = longspan("bench", "train", *SMALL_MODEL, *sizes, "--out", tmp_path)
    assert completed.returncode == 0, completed.stderr
    rows = {
        row["candidate"]: row for row in json.loads((tmp_path / "train.json").read_text())["rows"]
    }
    for name, row in rows.items():
        assert len(row["seconds"]) == 1, (name, row)
    assert 0 < rows["longspan, full"]["data_share"] < 1


@pytest.mark.parametrize("command", ["memory", "train"])
def test_invalid_options_give_one_line_and_status_2(longspan, tmp_path, command):
    completed = longspan("bench", command, "--heads", "3", "--out", tmp_path)
    assert completed.returncode == 2
    assert completed.stderr.startswith("longspan: --heads: 3 must divide --hidden")
    assert len(completed.stderr.splitlines()) == 1
