"""Golden numbers: the same bits on the kind of machine that made them, close on others."""

import contextlib
import difflib
import shutil
from pathlib import Path

import pytest
import torch

from . import golden, numbers
from .test_golden import WRITE

RANK = Path(__file__).with_name("rank.py")


def compare(name: str, lines: list[str], close: bool = False) -> None:
    """Fail with a diff where the numbers are others, or write them where that is asked for.

    Args:
        close: whether only to a tolerance, as on another machine; such are never written.
    """
    file = golden.FILES / "numbers" / f"{name}.txt"
    text = "\n".join([numbers.machine(), *lines]) + "\n"
    if close:
        text = text.replace(numbers.machine(), "made in another way", 1)
    elif WRITE:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return
    before = file.read_text()
    if not numbers.same(before, text):
        pair = (before.splitlines(), text.splitlines(), f"{name} (golden)", f"{name} (now)")
        diff = "\n".join(list(difflib.unified_diff(*pair, lineterm="", n=0))[:80])
        told = f"numbers of {name} have changed; where they should, make golden writes them anew"
        pytest.fail(f"{diff}\n{told}", pytrace=False)


@pytest.fixture
def folder(tmp_path):
    """A folder to run in, with the recipes and their corpus."""
    for recipe in golden.HERE.glob("*.yaml"):
        shutil.copy(recipe, tmp_path)
    with contextlib.chdir(tmp_path):
        golden.build_corpus(tmp_path)
    return tmp_path


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "name",
    [*numbers.OPTIONS, *(pytest.param(name, marks=pytest.mark.wide) for name in numbers.WIDE)],
)
def test_a_run_and_its_resume_learn_the_same(ranks, folder, name):
    recipe, count, overrides = {**numbers.OPTIONS, **numbers.WIDE}[name]
    overrides = [*overrides, f"launch.processes={count}"]
    command = ["train", recipe, *overrides]
    ranks(count, RANK, folder, *command, "run_dir=run")
    lines = [*numbers.metrics(folder / "run")]
    shutil.copytree(folder / "run", folder / "again")
    shutil.rmtree(folder / "again/checkpoints/step-00000006")
    ranks(count, RANK, folder, *command, "run_dir=again")
    resumed = [*numbers.metrics(folder / "again")]
    state = [*numbers.checkpoint(folder / "run/checkpoints/step-00000006")]
    if name in ("tiny", "experts"):
        ranks(1, RANK, folder, "export", "run", "model")
        state += [f"exported {line}" for line in numbers.exported(folder / "model")]
    assert resumed == lines
    again = [*numbers.checkpoint(folder / "again/checkpoints/step-00000006")]
    assert again == state[: len(again)]
    compare(name, [*lines, *state])


def test_a_run_of_an_older_longspan_goes_on(ranks, folder):
    """Its folder, as it was after step 3, to the same bits."""
    shutil.copytree(golden.RUN_BEFORE, folder / "run")
    said = ranks(1, RANK, folder, "train", "before.yaml")
    assert "resuming from step 3" in said[0][0]
    state = numbers.checkpoint(folder / "run/checkpoints/step-00000006")
    compare("run_before", [*numbers.metrics(folder / "run"), *state])


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.cp=2"],
        pytest.param(["engine.name=deepspeed", "engine.zero_stage=2"], marks=pytest.mark.wide),
    ],
    ids=" ".join,
)
def test_a_run_of_an_older_longspan_goes_on_in_another_way(ranks, folder, overrides):
    """On other ranks, to a tolerance."""
    if WRITE:
        pytest.skip("is compared with what one rank has written")
    shutil.copytree(golden.RUN_BEFORE, folder / "run")
    ranks(2, RANK, folder, "train", "before.yaml", "launch.processes=2", *overrides)
    own = [*numbers.metrics(folder / "run")]
    before = (golden.FILES / "numbers" / "run_before.txt").read_text().splitlines()[1:]
    assert len(own) == len([line for line in before if line.startswith("step ")])
    assert numbers.same("\n".join(["old", *before[: len(own)]]), "\n".join(["new", *own]))


@pytest.mark.usefixtures("one_thread")
def test_operations_give_the_same():
    lines = [*numbers.attended(golden.PATTERNS), *numbers.linear_families()]
    compare("operations", lines)


@pytest.mark.usefixtures("one_thread")
def test_operations_over_ranks_give_the_same(threads):
    layouts = {name: golden.LAYOUTS[name] for name in ("zigzag 4", "uneven")}
    patterns = {name: golden.PATTERNS[name] for name in ("causal", "s2", "window")}
    compare("over_ranks", [*numbers.over_ranks(threads, layouts, golden.SCHEDULES, patterns)])
