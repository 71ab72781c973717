import json
from types import SimpleNamespace

import pytest
import torch
from longspan.launch.bench import linear as bench_linear
from longspan.launch.bench import linear_candidates, measure
from longspan.launch.bench.linear_candidates import BLOCKS, AttentionWidth
from longspan.launch.cli import main

SMALL_SIZES = ("--lengths", "70,130", "--heads", "2", "--head-dim", "8", "--repeats", "1")
DENSE = "dense (sdpa)"


def run_bench(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", "linear", *map(str, arguments)])
    return exit_info.value.code, *capsys.readouterr()


@pytest.fixture(autouse=True)
def one_thread():
    """Run on one thread: with several, small tensors are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(measure, "device", lambda: "cpu")


@pytest.fixture
def fixed_peak_memory(monkeypatch):
    """Return a constant peak memory, without starting a process."""
    monkeypatch.setattr(bench_linear, "cpu_peak", lambda settings, row: 3 << 20)


def rows_of(folder) -> dict[tuple[str, int], dict]:
    rows = json.loads((folder / "linear.json").read_text())["rows"]
    return {(row["candidate"], row["length"]): row for row in rows}


def line_of(out: str, row: dict) -> str:
    return next(
        line
        for line in out.splitlines()
        if line.startswith(f"{row['length']:>9,}  {row['candidate']} ")
    )


def test_every_mixer_is_checked_and_measured(
    capsys, tmp_path, monkeypatch, on_cpu, fixed_peak_memory
):
    from matplotlib.pyplot import imread

    monkeypatch.setattr(bench_linear, "BASE_TOKENS", 70)
    status, out, _ = run_bench(
        capsys, *SMALL_SIZES, "--dense-up-to", "70", "--out", tmp_path / "deep"
    )
    assert status == 0
    report = json.loads((tmp_path / "deep" / "linear.json").read_text())
    rows = rows_of(tmp_path / "deep")
    assert set(report) == {"machine", "versions", "settings", "rows"}
    assert set(report["versions"]) == {"python", "torch", "triton", "flash-linear-attention"}
    assert report["settings"] == {
        "mixers": list(BLOCKS),
        "lengths": [70, 130],
        "dense_up_to": 70,
        "backends": ["torch"],
        "heads": 2,
        "head_dim": 8,
        "dtype": "float32",
        "repeats": 1,
    }
    assert list(rows) == [(name, length) for length in (70, 130) for name in (DENSE, *BLOCKS)]
    skipped = rows.pop((DENSE, 130))
    dense = rows[DENSE, 70]
    assert skipped["status"] == "skipped: longer than --dense-up-to 70"
    assert line_of(out, skipped).endswith(skipped["status"])
    assert not any(
        skipped[key]
        for key in ("seconds", "median", "peak_bytes", "ratio", "tokens_per_second", "constancy")
    )
    step = "forward+backward"
    for (name, length), row in rows.items():
        assert row["status"] == "measured"
        assert [len(row["seconds"][step]) for step in ("forward", step)] == [1, 1]
        assert row["tokens_per_second"][step] == length / row["median"][step]
        first = rows[name, 70]["tokens_per_second"][step]
        assert row["constancy"] == row["tokens_per_second"][step] / first
        assert f" {row['constancy']:.2f} " in line_of(out, row)
        assert " 3.0 " in line_of(out, row)
        if length == 70:
            assert row["ratio"][step] == dense["median"][step] / row["median"][step]
            assert f" {row['ratio'][step]:.2f}x " in line_of(out, row)
        else:
            assert row["ratio"] is None, "dense attention was not measured"
    # q, k, v, o of 8 dims and their gradients: 70 tokens of two heads, in fp32.
    tensors_bytes = 2 * 70 * 2 * 4 * 4 * 8
    peak_multiple = (3 << 20) / tensors_bytes
    assert rows["linear", 70]["peak_multiple"] == rows[DENSE, 70]["peak_multiple"] == peak_multiple

    picture = imread(tmp_path / "deep" / "linear.png")[..., :3]
    half = picture.shape[1] // 2
    for panel in (picture[:, :half], picture[:, half:]):
        assert len({tuple(pixel) for pixel in panel.reshape(-1, 3)}) > 20


@pytest.mark.parametrize(
    ("mixer", "shapes"),
    [
        ("linear", {"q": (4, 32), "k": (4, 32), "v": (4, 32)}),
        ("retention", {"q": (4, 32), "k": (4, 32), "v": (4, 64)}),
        ("simple_gla", {"q": (4, 32), "k": (4, 32), "v": (4, 32), "decay": (4,)}),
        ("gla", {"q": (4, 16), "k": (4, 16), "v": (4, 32), "decay": (4, 16)}),
        ("based", {"q": (4, 153), "k": (4, 153), "v": (4, 32)}),
        ("hedgehog", {"q": (4, 64), "k": (4, 64), "v": (4, 32)}),
        ("mamba2", {"q": (1, 128), "k": (1, 128), "v": (4, 64), "decay": (4,)}),
        ("gated_deltanet", {"q": (4, 24), "k": (4, 24), "v": (4, 48), "decay": (4,), "beta": (4,)}),
        ("kda", {"q": (4, 32), "k": (4, 32), "v": (4, 32), "decay": (4, 32), "beta": (4,)}),
    ],
)
def test_tensors_have_the_shapes_of_the_mixer(on_cpu, monkeypatch, mixer, shapes):
    calls = []

    def attend(q, k, v, *, scale, backend, **gates):
        calls.append({"q": q, "k": k, "v": v, **gates})
        return v + sum(x.sum() for x in (q, k, *gates.values()))

    monkeypatch.setattr(linear_candidates, "linear_attention", attend)
    call_mixer = linear_candidates.linear_call(AttentionWidth(4, 32, "bfloat16"), mixer, "torch", 5)
    _, *grads = call_mixer()
    assert [tuple(grad.shape) for grad in grads] == [(1, 5, *shape) for shape in shapes.values()]
    (call,) = calls
    expected = {name: (1, 5, *shape) for name, shape in shapes.items()}
    if mixer == "retention":
        expected["decay"] = (4,)  # a constant, not a parameter
    if mixer in ("linear", "based", "hedgehog"):  # a column of ones sums the weights
        *leading_sizes, value_dim = expected["v"]
        expected["v"] = (*leading_sizes, value_dim + 1)
    assert {name: tuple(x.shape) for name, x in call.items()} == expected
    assert {x.dtype for name, x in call.items() if name != "decay"} == {torch.bfloat16}
    if "decay" in call:
        assert call["decay"].dtype == torch.float32
        assert call["decay"].max() <= 0


def test_peak_memory_is_measured_in_a_separate_process(on_cpu):
    settings = bench_linear.LinearSettings(["linear"], [8192], 1, ["torch"], 2, 16, "float32", 1)
    peak = bench_linear.cpu_peak(
        settings, bench_linear.LinearTiming("linear", "linear", "torch", 8192)
    )
    results_bytes = 4 * 8192 * 2 * 16 * 4  # the output and three gradients
    assert 0.9 * results_bytes < peak < 8192**2, "far from holding every pair"


def _wrong_gradient(out, q):
    return out + 1e-2 * (q - q.detach()).sum(-1, keepdim=True)


def _wrong_output(out, q):
    last = torch.tensor([out.shape[1] - 1])
    return out * torch.ones(out.shape[1], 1, 1).index_fill(0, last, float("nan"))


def _too_large(out, q):
    raise torch.OutOfMemoryError("tried to allocate more than there is\nand more of that")


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (_wrong_gradient, "wrong: gradient of q at 70 tokens has a relative error of"),
        (_wrong_output, "wrong: output at 70 tokens has a relative error of nan"),
        (_too_large, "cannot run: OutOfMemoryError: tried to allocate more than there is"),
    ],
)
def test_wrong_or_failing_candidates_are_listed_without_numbers(
    capsys, tmp_path, monkeypatch, on_cpu, fixed_peak_memory, change, status
):
    right = linear_candidates.linear_attention

    def attend(q, k, v, *, backend, **options):
        out = right(q, k, v, backend=backend, **options)
        return change(out, q) if "beta" in options and backend != "reference" else out

    monkeypatch.setattr(linear_candidates, "linear_attention", attend)
    mixers = ("--mixer", "deltanet", "--mixer", "gla")
    exit_status, out, _ = run_bench(
        capsys, *mixers, *SMALL_SIZES, "--lengths", "70", "--out", tmp_path
    )
    assert exit_status == 0
    rows = rows_of(tmp_path)
    bad = rows["deltanet", 70]
    good = rows["gla", 70]
    assert bad["status"].startswith(status)
    assert line_of(out, bad).endswith(bad["status"])
    assert not any(
        bad[key]
        for key in ("seconds", "median", "peak_bytes", "ratio", "tokens_per_second", "constancy")
    )
    assert good["status"] == "measured"


def test_on_a_gpu_every_backend_is_a_candidate_and_may_be_unsupported(monkeypatch):
    monkeypatch.setattr(measure, "device", lambda: "cuda")
    options = {
        "lengths": "70",
        "dense_up_to": 70,
        "heads": 2,
        "head_dim": 8,
        "repeats": 1,
        "backend": "auto",
        "dtype": "auto",
    }
    settings = bench_linear._settings(SimpleNamespace(mixer=["kda"], **options))
    rows = list(bench_linear._candidates(settings, 70))
    assert [row.candidate for row in rows] == [DENSE, "kda (torch)", "kda (triton)", "kda (fla)"]
    assert settings.dtype == "bfloat16"
    monkeypatch.setattr(measure, "device", lambda: "cpu")
    monkeypatch.setattr(bench_linear, "cpu_peak", lambda settings, row: None)
    bench_linear._measure(settings, rows, {}, lambda count: None)
    dense, ours, *others = rows
    assert (dense.status, ours.status) == ("measured", "measured")
    assert all(row.status.startswith("cannot run: ") and row.seconds is None for row in others)
    assert "backend triton" in others[0].status


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--mixer", "full"],
            "--mixer: 'full' is not a linear mixer; known: linear, lightning, retention, ",
        ),
        (["--lengths", "8k"], "--lengths: must be whole numbers, such as 4096,65536, got '8k'"),
        (["--lengths", "64,0"], "--lengths: must be at least 1, got 0"),
        (["--repeats", "0"], "--repeats: must be at least 1, got 0"),
        (["--dense-up-to", "0"], "--dense-up-to: must be at least 1, got 0"),
        (["--backend", "cuda"], "--backend: backend must be auto, torch"),
        (
            ["--mixer", "gla", "--head-dim", "5"],
            "--heads, --head-dim: do not fit gla: key_head_dim defaults to 1/2 of a head's part",
        ),
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
