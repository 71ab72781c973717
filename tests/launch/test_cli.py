"""The command line: what it imports, and its answers to invalid input."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
from longspan.launch.cli import COMMANDS, Group, main


def run_command(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in arguments])
    return exit_info.value.code, *capsys.readouterr()


HEAVY = {"torch", "numpy", "pydantic", "yaml", "rich", "matplotlib"}


def modules_imported_by(*command_lines: list[str], status: int) -> set[str]:
    """Return the modules that commands import in one process; each must end with ``status``."""
    code = f"""
import sys
from longspan.launch.cli import main
for arguments in {command_lines}:
    try:
        main(arguments)
    except SystemExit as ended:
        assert ended.code == {status}, (arguments, ended.code)
print("\\n" + " ".join(sys.modules))
"""
    completed = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return set(completed.stdout.splitlines()[-1].split())


def command_names(commands=COMMANDS, *groups: str) -> Iterator[list[str]]:
    for name, command in commands.items():
        yield [*groups, name]
        if isinstance(command, Group):
            yield from command_names(command.commands, *groups, name)


def test_a_bad_recipe_is_refused_without_torch(tiny_recipe):
    assert "torch" not in modules_imported_by(
        ["train", str(tiny_recipe), "training.stpes=1"], status=2
    )


def test_an_unknown_option_is_refused(capsys):
    status, _, err = run_command(
        capsys, "train", "quickstart", "--dry", "--steps=3", "training.steps=3"
    )
    assert status == 2
    assert "unrecognized arguments" in err


def test_help_imports_nothing_heavy():
    help_of_each_command = [[*names, "--help"] for names in command_names()]
    heavy = HEAVY & modules_imported_by(["--help"], ["--version"], *help_of_each_command, status=0)
    assert not heavy, heavy


def test_the_general_help_imports_no_command():
    imported = modules_imported_by(["--help"], status=0)
    assert not {name for name in imported if name.startswith("longspan.launch.commands.")}


def test_recipes_are_listed_one_line_each(capsys):
    status, out, _ = run_command(capsys, "recipes")
    assert status == 0
    assert any(line.startswith("quickstart") and "lightning" in line for line in out.splitlines())


def test_dry_run_prints_the_resolved_recipe_and_sizes(capsys, tiny_recipe, tmp_path):
    status, out, _ = run_command(
        capsys,
        "train",
        tiny_recipe,
        "training.steps=7",
        "parallel.tp=2",
        "--dry-run",
        "launch.processes=4",
    )
    assert status == 0
    assert "steps: 7" in out
    assert "eps: 1.0e-08" in out, "defaults are shown too"
    assert "tokens per step  384" in out
    assert "processes        4 = dp 2 x cp 1 x pp 1 x tp 2" in out
    assert "parameters       168,800" in out
    assert not (tmp_path / "run").exists()


def test_each_problem_of_a_recipe_is_one_line(capsys, tiny_recipe, tmp_path):
    status, out, err = run_command(
        capsys, "train", tiny_recipe, "training.stpes=3", "training.steps=x"
    )
    assert (status, out) == (2, "")
    assert [line.split(": ")[:3] for line in sorted(err.splitlines())] == [
        ["longspan", "tiny.yaml", "training.steps"],
        ["longspan", "tiny.yaml", "training.stpes"],
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "no-such-recipe"], "recipe no-such-recipe: no such file or shipped recipe"),
        (
            ["train", "{recipe}", "data.tokenizer=missing.json"],
            "data.tokenizer: missing.json is neither the word bytes",
        ),
        (
            ["train", "{recipe}", "data.sources={missing: 1.0}"],
            "missing.bin: no such file; build it with",
        ),
        (["train", "{recipe}", "data.validation=missing"], "missing.bin: no such file"),
        (
            ["train", "{recipe}", "model.vocab_size=100"],
            "recorded vocabulary of 257 is larger than model.vocab_size 100",
        ),
        (
            ["data", "build", "missing.txt", "--out", "{tmp}/x"],
            "missing.txt: no such file or folder",
        ),
        (
            ["data", "build", "{recipe}", "--tokenizer", "{recipe}", "--out", "{tmp}/x"],
            "not a tokenizer.json",
        ),
        (
            ["train", "{recipe}", "evaluation.interval=5"],
            "evaluation.interval: there is no held-out data; set data.validation",
        ),
        (
            ["train", "{recipe}", "run_dir={recipe}/x"],
            "/x cannot be made or written; choose another run_dir",
        ),
        (["generate", "{tmp}"], "not the folder of a run"),
        (["plot", "{tmp}"], "no such file; the run has logged nothing yet"),
    ],
)
def test_errors_name_the_key_or_file(capsys, tiny_recipe, tmp_path, arguments, message):
    filled = [
        argument.replace("{recipe}", str(tiny_recipe)).replace("{tmp}", str(tmp_path))
        for argument in arguments
    ]
    status, _, err = run_command(capsys, *filled)
    assert status == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_data_build(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    status, out, _ = run_command(
        capsys, "data", "build", tmp_path / "a.txt", "--out", tmp_path / "deep" / "corpus"
    )
    assert status == 0
    assert "1 documents, 10 tokens, 9 bytes of text" in out
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {
        "corpus.bin",
        "corpus.idx",
        "corpus.json",
    }
