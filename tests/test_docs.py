"""The pages of docs/: what they show of files is what these have, and every command on them runs as it stands, in order."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from longspan.trainer.recipe.keys import recipe_keys

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted((REPOSITORY / "docs").glob("*.md"))
BLOCK = re.compile(r"(<!-- [^\n]* -->\n)?^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """(the comment above, language, text) of each block of code."""
    return [
        (comment, language, text) for comment, language, text in BLOCK.findall(page.read_text())
    ]


def with_runs() -> list[Path]:
    return [
        page
        for page in PAGES
        if any(not comment.startswith("<!-- not run") for comment, _, _ in blocks(page))
    ]


def test_the_keys_are_those_of_the_schema():
    page = (REPOSITORY / "docs" / "recipe-keys.md").read_text()
    assert page == recipe_keys(), "longspan recipes --keys > docs/recipe-keys.md"


def test_every_key_says_what_it_means():
    for line in recipe_keys().splitlines():
        if line.startswith("| `") and "mapping" not in line:
            assert not line.endswith("|  |"), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_shown_files_are_there(page):
    text = page.read_text()
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text):
        if target.startswith("http"):
            continue
        assert (page.parent / target).exists(), target
        if anchor:
            headings = re.findall(
                r"^#+ (.*)$", (page.parent / target).read_text() if target else text, re.MULTILINE
            )
            assert anchor in [
                re.sub(r"[^\w -]", "", heading).replace(" ", "-").lower() for heading in headings
            ], anchor
    for name, content in re.findall(
        r"^```yaml\n# (docs/\S+\.yaml)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    ):
        assert (REPOSITORY / name).read_text() == content, name


def test_the_worked_example_is_what_its_page_shows():
    page, patch = (
        (REPOSITORY / "docs" / f"extending.{kind}").read_text() for kind in ("md", "diff")
    )
    added = [
        line[1:]
        for line in patch.splitlines()
        if line.startswith("+") and not line.startswith("+++")
    ]
    files = [line for line in patch.splitlines() if line.startswith("+++")]
    assert len(files) == 3 + 2, "a file for each, and two registries"
    assert len(added) < 140
    for shown in re.findall(
        r"^```python\n# [\w/]+\.py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL
    ):
        assert shown.strip("\n") in "\n".join(added)


@pytest.mark.wide
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("page", with_runs(), ids=lambda page: page.stem)
def test_what_a_page_says_can_be_done(page, tmp_path):
    """In a copy of the repository, which is the package that runs."""
    here = tmp_path / "longspan"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().splitlines():
        if (REPOSITORY / name).exists():
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, here / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, module in (
        ("longspan", "longspan"),
        ("torchrun", "torch.distributed.run"),
        ("python", ""),
    ):
        script = f'#!/bin/sh\nexec "{sys.executable}" -W ignore {f"-m {module}" if module else ""} "$@"\n'
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path),
    }
    for comment, language, text in blocks(page):
        if comment.startswith("<!-- not run") or (
            language == "python" and re.match(r"# [\w/]+\.py\n", text)
        ):
            continue
        command = (
            ["bash", "-euo", "pipefail", "-c", text]
            if language == "sh"
            else [sys.executable, "-c", text]
        )
        done = subprocess.run(
            command, cwd=here, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
