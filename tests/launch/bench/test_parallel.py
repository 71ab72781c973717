"""``longspan bench parallel``: it checks the operations it measures, and reports their errors."""

import json

import pytest


@pytest.mark.wide
def test_every_operation_is_checked_and_measured(longspan, tmp_path):
    sizes = ["--length", "512", "--head-dim", "8", "--repeats", "2"]
    completed = longspan("bench", "parallel", *sizes, "--out", tmp_path)
    assert completed.returncode == 0, completed.stderr
    report = json.loads((tmp_path / "parallel.json").read_text())
    rows = {(row["operation"], row["schedule"]): row for row in report["rows"]}
    assert {name for name, _ in rows} == {
        "full",
        "S2(64, 16, 16)",
        "Window(1024)",
        "full (256 tokens) / unfused",
        "lightning",
        "gated_deltanet",
    }
    assert {schedule for name, schedule in rows if name == "full"} == {
        "ring",
        "gather",
        "stripes",
        "heads",
    }
    for row in rows.values():
        assert len(row["alone"]) == len(row["together"]) == 2
        assert all(
            0 < spent < total for spent, total in zip(row["messages"], row["together"], strict=True)
        )
        assert row["error"] < 1e-4
    assert (tmp_path / "parallel.png").read_bytes().startswith(b"\x89PNG")
    assert len(completed.stdout.splitlines()) == 4 + len(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "1"], "--ranks: must be at least 2, got 1"),
        (["--heads", "3"], "--kv-heads: 2 does not divide --heads 3"),
        (
            ["--length", "1000"],
            "--length: 1000 is not a multiple of 128 x 2 ranks, whole blocks for each",
        ),
    ],
)
def test_invalid_options_give_one_line_and_status_2(longspan, tmp_path, arguments, message):
    completed = longspan("bench", "parallel", *arguments, "--out", tmp_path)
    assert completed.returncode == 2
    assert completed.stderr == f"longspan: {message}\n"
