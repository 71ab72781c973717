"""Golden files: what longspan says is what it said. ``make golden`` writes them anew."""

import difflib
import os

import pytest

from .golden import FILES, GOLDEN, PYTHON, applies

SLOW = ("drawn.txt",)
WRITE = os.environ.get("GOLDEN") == "write"


def compare(name: str, text: str) -> None:
    """Fail with a diff where the file is not ``text``, or write it where that is asked for."""
    file = FILES / name
    if WRITE:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return
    before = file.read_text() if file.exists() else ""
    if before != text:
        lines = (before.splitlines(), text.splitlines(), f"{name} (golden)", f"{name} (now)")
        diff = "\n".join(list(difflib.unified_diff(*lines, lineterm="", n=2))[:200])
        pytest.fail(
            f"{diff}\n{name} has changed; where it should, make golden writes it anew",
            pytrace=False,
        )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.wide] * (name in SLOW)) for name in GOLDEN]
)
def test_it_says_what_it_said(name):
    if not applies(name):
        pytest.skip(f"argparse of Python {PYTHON} laid this out")
    compare(name, GOLDEN[name]())


def test_no_file_is_left_of_what_is_gone():
    found = {str(path.relative_to(FILES)) for path in FILES.rglob("*") if path.is_file()}
    assert {name for name in found if not name.startswith("numbers/")} == set(GOLDEN)
