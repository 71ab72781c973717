import math

import numpy as np
import pytest
import torch
from longspan.attention import S2, Causal, Dilated, Sinks, Window
from longspan.launch.cli import main
from longspan.launch.pattern_picture import FUTURE, VISIBLE, visible_shares


def run_show_pattern(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_info:
        main(["show-pattern", *map(str, arguments)])
    return exit_info.value.code, *capsys.readouterr()


def panels(path) -> list[np.ndarray]:
    """Return the pixels of every panel, row by row: 1 visible, 0 hidden, -1 in the future."""
    from matplotlib.colors import to_rgb
    from matplotlib.pyplot import imread

    picture = imread(path)[..., :3]
    visible, future = (
        np.abs(picture - to_rgb(color)).max(-1) < 0.004 for color in (VISIBLE, FUTURE)
    )
    states = visible.astype(int) - future
    rows = [states[top:bottom] for top, bottom in _true_ranges(states.any(1))]
    return [row[:, left:right] for row in rows for left, right in _true_ranges(row.any(0))]


def _true_ranges(values: np.ndarray) -> np.ndarray:
    """Return the ``(start, stop)`` of each stretch of consecutive true values."""
    return np.flatnonzero(np.diff(values, prepend=False, append=False)).reshape(-1, 2)


def test_the_picture_shows_the_mask(capsys, tmp_path):
    out = tmp_path / "deep" / "mask.png"
    status, printed, _ = run_show_pattern(
        capsys, "S2(4, 2, 4) | Sinks(1)", "-o", out, "--heads", 2, "--length", 32
    )
    assert status == 0
    pattern = (S2(4, 2, 4) | Sinks(1)).spread(2)
    density = pattern.density(32, 2)
    assert printed.splitlines() == [
        f"{pattern!r}: density {density:.4f} at 32 tokens, ideal speed-up {1 / density:.2f}x, "
        "positions not all covered by the union of 2 heads"
    ]
    positions = torch.arange(32)
    causal = positions[:, None] >= positions
    expected = torch.where(causal, pattern.mask(positions, positions, 2).int(), -1).numpy()
    drawn = panels(out)
    assert len(drawn) == 2
    for pixels, mask in zip(drawn, expected, strict=True):
        # The pixel in the middle of each cell.
        rows, columns = ([int((i + 0.5) / 32 * size) for i in range(32)] for size in pixels.shape)
        assert (pixels[np.ix_(rows, columns)] == mask).all()


@pytest.mark.parametrize("pattern", [Window(300), S2(64, 4, 8), Causal()])
@pytest.mark.parametrize("length", [500, 1000, 1024])
def test_cells_show_the_share_of_visible_pairs(pattern, length):
    positions = torch.arange(length)
    mask = pattern.mask(positions, positions, 1)[0]
    causal = positions[:, None] >= positions
    shares = visible_shares(pattern, 1, length)[0]
    cells = len(shares)
    assert cells == min(length, 512)
    cell_of = positions * cells // length
    for row, column in [
        (0, 0),
        (cells - 1, 0),
        (cells - 1, cells - 1),
        (cells // 2, cells // 3),
        (cells // 2, cells // 2 - 1),
    ]:
        cell = (cell_of[:, None] == row) & (cell_of == column) & causal
        assert shares[row, column] == pytest.approx((mask & cell).sum().item() / cell.sum().item())
    assert math.isnan(shares[0, -1])


def test_long_sequences_are_sampled_without_bias():
    shares = visible_shares(Dilated(1, 2, 10**6), 1, 100_000)[0]
    assert np.tril(shares, -1).sum() / np.tril(np.ones_like(shares), -1).sum() == pytest.approx(
        0.5, abs=0.01
    )


def test_a_recipe_has_a_row_of_panels_for_each_softmax_block(capsys, tmp_path, tiny_recipe):
    out = tmp_path / "recipe.png"
    status, printed, _ = run_show_pattern(capsys, tiny_recipe, "-o", out)
    assert status == 0
    sparse, full = printed.splitlines()
    assert sparse.startswith("sparse: S2(")
    assert "at 96 tokens" in sparse
    assert sparse.endswith("positions covered by the union of 2 heads")
    assert full.startswith("full: Causal(): density 1.0000 at 96 tokens, ideal speed-up 1.00x")
    drawn = panels(out)
    assert len(drawn) == 2 * 2
    for pixels in drawn[2:]:
        assert (np.tril(pixels, -2) == np.tril(np.ones_like(pixels), -2)).all(), "full sees all"
    assert not np.array_equal(drawn[0], drawn[1]), "heads differ"


def test_only_the_first_eight_heads_are_drawn(capsys, tmp_path, monkeypatch):
    from matplotlib.figure import SubFigure

    titles = []
    monkeypatch.setattr(SubFigure, "suptitle", lambda self, title, **options: titles.append(title))
    out = tmp_path / "many.png"
    status, printed, _ = run_show_pattern(
        capsys, "S2(1, 1, 12)", "-o", out, "--heads", 12, "--length", 16
    )
    assert status == 0
    assert "positions covered by the union of 12 heads" in printed
    assert len(panels(out)) == 8
    assert "8 of its 12 KV heads" in titles[0]


def test_the_default_length_shows_the_structure(capsys, tmp_path):
    for pattern, length in {
        "S2(16, 4, 8)": 512,
        "Window(100)": 512,
        "Window(9000)": "8,192",
    }.items():
        _, printed, _ = run_show_pattern(capsys, pattern, "-o", tmp_path / "a.png", "--heads", 1)
        assert f"at {length} tokens" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["S3(64)"], "unknown pattern 'S3'"),
        (["S2(63, 2, 2)"], "S2.block must be a power of two"),
        (["S2(64, 2, 2"], "is not a pattern"),
        (["PerHead([Causal()])"], "PerHead has patterns for 1 KV heads"),
        (
            ["quickstrat"],
            "recipe quickstrat: no such file or shipped recipe (did you mean quickstart?)",
        ),
        (["quickstart", "--heads", "2"], "--heads: only for a pattern"),
        (["Causal()", "--heads", "0"], "--heads: must be at least 1, got 0"),
        (["Causal()", "--length", "0"], "--length: must be at least 1, got 0"),
        (["Causal()", "-o", "{tmp}/a.docx"], "a.docx: cannot be written"),
        (["Causal()", "-o", "{tmp}"], "cannot be written"),
    ],
)
def test_invalid_options_give_one_line_and_status_2(capsys, tmp_path, arguments, message):
    out = [] if "-o" in arguments else ["-o", tmp_path / "a.png"]
    status, _, err = run_show_pattern(
        capsys, *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments), *out
    )
    assert status == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_recipe_without_softmax_blocks_is_refused(capsys, tmp_path, tiny_recipe):
    import yaml

    content = yaml.safe_load(tiny_recipe.read_text())
    layers = content["model"]["layers"]
    layers["blocks"] = {"linear": layers["blocks"]["linear"]}
    layers["pattern"] = ["linear"]
    tiny_recipe.write_text(yaml.safe_dump(content))
    status, _, err = run_show_pattern(capsys, tiny_recipe, "-o", tmp_path / "a.png")
    assert status == 2
    assert "has no block of softmax attention" in err


def test_moba_blocks_are_left_out(capsys, tmp_path):
    import yaml

    blocks = {"a": {"mixer": "moba"}, "full": {"mixer": "full"}}
    recipe = {
        "base": "quickstart",
        "model": {"layers": {"blocks": blocks, "pattern": ["a", "full"]}},
    }
    recipe["model"]["layers"]["blocks"] |= {"linear": None, "sparse": None}
    path = tmp_path / "moba.yaml"
    path.write_text(yaml.safe_dump(recipe))
    status, printed, error = run_show_pattern(
        capsys, path, "-o", tmp_path / "a.png", "--length", 64
    )
    assert (status, error) == (0, "")
    assert printed.startswith("full: Causal()")
    assert len(printed.splitlines()) == 1
