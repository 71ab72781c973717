"""The pages of docs/: links and files they show exist, and their commands run in order."""

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
    """Return (the comment above, language, text) of each block of code."""
    return BLOCK.findall(page.read_text())


def pages_with_commands() -> list[Path]:
    """Return the pages with a block that is not marked as not run."""
    return [
        page
        for page in PAGES
        if any(not comment.startswith("<!-- not run") for comment, _, _ in blocks(page))
    ]


def test_the_page_of_keys_is_up_to_date():
    page = (REPOSITORY / "docs" / "recipe-keys.md").read_text()
    assert page == recipe_keys(), "longspan recipes --keys > docs/recipe-keys.md"


def test_every_key_has_a_description():
    for line in recipe_keys().splitlines():
        if line.startswith("| `") and "mapping" not in line:
            assert not line.endswith("|  |"), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_shown_files_exist(page):
    text = page.read_text()
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text):
        if target.startswith("http"):
            continue
        assert (page.parent / target).exists(), target
        if anchor:
            target_text = (page.parent / target).read_text() if target else text
            headings = re.findall(r"^#+ (.*)$", target_text, re.MULTILINE)
            anchors = [
                re.sub(r"[^\w -]", "", heading).replace(" ", "-").lower() for heading in headings
            ]
            assert anchor in anchors, anchor

    for name, content in re.findall(
        r"^```yaml\n# (docs/\S+\.yaml)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    ):
        assert (REPOSITORY / name).read_text() == content, name


def test_the_worked_example_matches_its_page():
    page = (REPOSITORY / "docs" / "extending.md").read_text()
    patch = (REPOSITORY / "docs" / "extending.diff").read_text()
    added = [
        line[1:]
        for line in patch.splitlines()
        if line.startswith("+") and not line.startswith("+++")
    ]
    files = [line for line in patch.splitlines() if line.startswith("+++")]
    assert len(files) == 3 + 2, "a file for each, and two registries"
    assert len(added) <= 145
    for shown in re.findall(
        r"^```python\n# [\w/]+\.py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL
    ):
        assert shown.strip("\n") in "\n".join(added)


@pytest.mark.wide
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("page", pages_with_commands(), ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page, tmp_path):
    """They run in a copy of the repository, which is also the package that is imported."""
    repository_copy = tmp_path / "longspan"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().splitlines():
        if (REPOSITORY / name).exists():
            (repository_copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, repository_copy / name)

    # Commands on the PATH that run the copy.
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, module in (
        ("longspan", "longspan"),
        ("torchrun", "torch.distributed.run"),
        ("python", ""),
    ):
        run_module = f"-m {module}" if module else ""
        script = f'#!/bin/sh\nexec "{sys.executable}" -W ignore {run_module} "$@"\n'
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path),
    }

    for comment, language, text in blocks(page):
        shows_a_file = language == "python" and re.match(r"# [\w/]+\.py\n", text)
        if comment.startswith("<!-- not run") or shows_a_file:
            continue
        if language == "sh":
            command = ["bash", "-euo", "pipefail", "-c", text]
        else:
            command = [sys.executable, "-c", text]
        completed = subprocess.run(
            command,
            cwd=repository_copy,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert completed.returncode == 0, (
            f"{text}\n{completed.stdout[-2000:]}\n{completed.stderr[-3000:]}"
        )
