import json

import pytest
import torch
from longspan.attention.patterns.expression import parse_pattern
from longspan.launch.bench import attention as bench
from longspan.launch.bench import measure
from longspan.launch.cli import main

HEAD_SIZES = ("--heads", "2", "--kv-heads", "2", "--head-dim", "16")
SMALL_SIZES = ("--lengths", "256", *HEAD_SIZES, "--repeats", "1")


def run_bench(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", "attention", *map(str, arguments)])
    return exit_info.value.code, *capsys.readouterr()


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(measure, "device", lambda: "cpu")


@pytest.fixture
def no_peak_memory(monkeypatch):
    """Skip the measurement of peak memory, which starts processes."""
    monkeypatch.setattr(bench, "cpu_peak", lambda settings, row: None)


def test_the_report_and_the_table_agree(capsys, tmp_path, monkeypatch, on_cpu):
    monkeypatch.setattr(bench, "cpu_peak", lambda settings, row: 3 << 20)
    status, out, _ = run_bench(
        capsys, "--pattern", "S2(8, 2, 4)", *SMALL_SIZES, "--out", tmp_path / "deep"
    )
    assert status == 0
    report = json.loads((tmp_path / "deep" / "attention.json").read_text())
    assert set(report) == {"machine", "versions", "settings", "rows"}
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert report["versions"]["torch"] == torch.__version__
    assert report["settings"] == {
        "patterns": ["S2(8, 2, 4)"],
        "lengths": [256],
        "backend": "torch",
        "heads": 2,
        "kv_heads": 2,
        "head_dim": 16,
        "dtype": "float32",
        "repeats": 1,
    }
    dense, ours = report["rows"]
    assert (dense["candidate"], dense["density"], ours["candidate"]) == (
        "dense (sdpa)",
        1.0,
        "S2(8, 2, 4)",
    )
    density = parse_pattern("S2(8, 2, 4)").spread(2).density(256, 2)
    assert (ours["density"], ours["ideal"]) == (density, 1 / density)
    for row in (dense, ours):
        assert row["status"] == "measured"
        assert [len(row["seconds"][step]) for step in ("forward", "forward+backward")] == [1, 1]
        assert row["seconds"]["forward"] == [row["median"]["forward"]]
        assert row["ratio"]["forward"] == dense["median"]["forward"] / row["median"]["forward"]
        assert row["share"]["forward"] == pytest.approx(row["ratio"]["forward"] * row["density"])
        assert row["peak_multiple"] == (3 << 20) / (8 * 256 * 2 * 16 * 4)
    for row in (dense, ours):
        line = next(line for line in out.splitlines() if f"256  {row['candidate']} " in line)
        assert f"{row['ideal']:.2f}x" in line
        assert f"{row['ratio']['forward']:.2f}x ({row['share']['forward']:.0%})" in line
        assert " 3.0 " in line


def test_peak_memory_is_measured_in_a_separate_process(on_cpu):
    settings = bench.AttentionSettings(["Window(64)"], [4096], "torch", 2, 2, 16, "float32", 1)
    peak = bench.cpu_peak(settings, bench.AttentionTiming("", "ours", "Window(64)", 4096, 1.0))
    results_bytes = 4 * 4096 * 2 * 16 * 4  # the output and three gradients
    assert 0.9 * results_bytes < peak < 4096**2, "far from holding every pair"


def test_the_picture_has_two_panels_with_bars(capsys, tmp_path, on_cpu, no_peak_memory):
    from matplotlib.pyplot import imread

    lengths = ("--lengths", "64,256")
    patterns = ("--pattern", "S2(8, 2, 4)", "--pattern", "Window(32)")
    status, _, _ = run_bench(capsys, *patterns, *SMALL_SIZES, *lengths, "--out", tmp_path)
    assert status == 0
    assert len(json.loads((tmp_path / "attention.json").read_text())["rows"]) == 2 * 3
    picture = imread(tmp_path / "attention.png")[..., :3]
    half = picture.shape[1] // 2
    for panel in (picture[:, :half], picture[:, half:]):
        assert len({tuple(pixel) for pixel in panel.reshape(-1, 3)}) > 20
    blue = (abs(picture[:, half:] - [0x1F / 255, 0x77 / 255, 0xB4 / 255]).max(-1) < 0.02).any(0)
    assert blue.sum() > 50, "bars"


class _WrongLateGradient(torch.autograd.Function):
    """Double the gradient of the last keys only, which is small beside that of the early ones."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.cat([grad[:, :-8], 2 * grad[:, -8:]], 1)


def _wrong_gradient(settings, pattern, length):
    right = bench.IMPLEMENTATIONS["right"].make(settings, pattern, length)
    return lambda q, k, v: right(q, _WrongLateGradient.apply(k), v)


def _wrong_output(settings, pattern, length):
    right = bench.IMPLEMENTATIONS["right"].make(settings, pattern, length)
    factors = torch.ones(length, 1, 1).index_fill(0, torch.tensor([length - 1]), float("nan"))
    return lambda q, k, v: right(q, k, v) * factors


def _too_large(settings, pattern, length):
    raise torch.OutOfMemoryError("tried to allocate more than there is\nand more of that")


@pytest.mark.parametrize(
    ("make", "status"),
    [
        (_wrong_gradient, "wrong: gradient of k at 256 tokens has a relative error of"),
        (_wrong_output, "wrong: output at 256 tokens has a relative error of nan"),
        (_too_large, "cannot run: OutOfMemoryError: tried to allocate more than there is"),
    ],
)
@pytest.mark.parametrize("kind", ["ours", "sdpa"])
def test_wrong_or_failing_candidates_are_listed_without_numbers(
    capsys, tmp_path, monkeypatch, on_cpu, no_peak_memory, make, status, kind
):
    monkeypatch.setitem(bench.IMPLEMENTATIONS, "right", bench.IMPLEMENTATIONS["ours"])
    monkeypatch.setitem(
        bench.IMPLEMENTATIONS,
        kind,
        bench.Implementation(make, bench.IMPLEMENTATIONS[kind].dense, heads_first=False),
    )
    exit_status, out, _ = run_bench(
        capsys, "--pattern", "Window(64)", *SMALL_SIZES, "--out", tmp_path
    )
    assert exit_status == 0
    report = json.loads((tmp_path / "attention.json").read_text())
    rows = {row["kind"]: row for row in report["rows"]}
    bad = rows.pop(kind)
    (good,) = rows.values()
    assert bad["status"].startswith(status)
    assert "\n" not in bad["status"]
    assert not any(bad[key] for key in ("seconds", "median", "peak_bytes", "ratio", "share"))
    assert good["status"] == "measured"
    assert (good["ratio"] is None) == (kind == "sdpa"), "no ratio with what was not measured"
    line = next(line for line in out.splitlines() if f"256  {bad['candidate']} " in line)
    assert line.split(bad["candidate"])[1].strip() == bad["status"]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", bench.ON_CPU)
def test_candidates_support_grouped_heads(on_cpu, kind, kv_heads):
    settings = bench.AttentionSettings(
        ["S2(8, 2, 4)"], [100], "torch", 4, kv_heads, 8, "float32", 1
    )
    row = next(row for row in bench._candidates(settings, 100) if row.kind == kind)
    assert bench._find_fault(settings, row) is None


@pytest.mark.parametrize(
    "text",
    [
        "S2(8, 2, 4)",
        "Window(9)",
        "S2(8, 2, 4) | Sinks(3) | Dilated(4, 2, 9)",
        "PerHead([Causal(), Window(9)])",
    ],
)
def test_flex_masks_equal_the_pattern(text):
    pattern = parse_pattern(text).spread(2)
    positions = torch.arange(64)
    mask = bench.flex_mask(pattern, 4, 2, "cpu")
    over_keys = torch.vmap(mask, (None, None, None, 0))
    over_all = torch.vmap(torch.vmap(over_keys, (None, None, 0, None)), (None, 0, None, None))
    assert torch.equal(
        over_all(torch.tensor(0), torch.arange(4), positions, positions),
        pattern.mask(positions, positions, 2).repeat_interleave(2, 0),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pattern", "S3(64)"], "unknown pattern 'S3'"),
        (["--pattern", "PerHead([Causal()])"], "PerHead has patterns for 1 KV heads"),
        (["--lengths", "8k"], "--lengths: must be whole numbers, such as 8192,32768, got '8k'"),
        (["--lengths", "64,0"], "--lengths: must be at least 1, got 0"),
        (["--repeats", "0"], "--repeats: must be at least 1, got 0"),
        (["--kv-heads", "3"], "--kv-heads: 3 does not divide --heads 4"),
        (["--backend", "cuda"], "backend must be auto, torch"),
        (["--out", "{tmp}/file/deep"], "/file/deep cannot be made"),
    ],
)
def test_invalid_options_give_one_line_and_status_2(capsys, tmp_path, arguments, message):
    (tmp_path / "file").touch()
    status, _, err = run_bench(
        capsys, *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments)
    )
    assert status == 2
    assert message in err
    assert len(err.splitlines()) == 1
