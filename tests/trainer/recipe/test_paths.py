"""``~`` and variables in every path of a recipe and of the command line."""

import os
import re

import pytest
from longspan.launch.cli import COMMANDS, Command, Group
from longspan.trainer.errors import UserError
from longspan.trainer.paths import escape_path, expand_path
from longspan.trainer.recipe.file import find_recipe, load_recipe, to_yaml

PATHS = {
    "run_dir": "{}",
    "data.sources": "{{{}: 1.0}}",
    "data.validation": "{}",
    "data.tokenizer": "{}",
    "initial": "{}",
    "initial.path": "{}",
    "stages": "[{{from_step: 5, data: {{sources: {{{}: 1.0}}}}}}]",
}
"""Every key of a recipe that is a path, or has one inside."""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/m$e")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOWHERE", raising=False)


@pytest.mark.parametrize(
    ("path", "expanded"),
    [
        ("a/b", "a/b"),
        ("~", "/home/me"),
        ("~/a", "/home/me/a"),
        ("~root/a", "/root/a"),
        ("a/~", "a/~"),
        ("./~", "./~"),
        ("$SCRATCH/a", "/scratch/m$e/a"),
        ("${SCRATCH}a", "/scratch/m$ea"),
        ("$HOME/$SCRATCH", "/home/me//scratch/m$e"),
        ("$$HOME/a$$", "$HOME/a$"),
        ("a$", "a$"),
        ("a$.b", "a$.b"),
    ],
)
def test_a_path_is_expanded_once(path, expanded):
    assert expand_path(path) == expanded
    assert expand_path(escape_path(expanded)) == expanded


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("$NOWHERE/a", "the environment variable NOWHERE is not set"),
        ("a/${NOWHERE}", "the environment variable NOWHERE is not set"),
        ("$EMPTY/a", "the environment variable EMPTY is empty"),
        ("${NOWHERE:-b}", "only $NAME and ${NAME} are replaced"),
        ("~nobody-of-that-name/a", "nobody-of-that-name is no user"),
        ("a\0b", "has characters that no path can have"),
        ("a\ud800", "has characters that no path can have"),
    ],
)
def test_what_cannot_be_expanded_is_named(path, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        expand_path(path)


@pytest.mark.parametrize("key", PATHS)
def test_every_path_of_a_recipe_is_expanded(tiny_recipe, tmp_path, key):
    recipe = load_recipe(str(tiny_recipe), [f"{key}={PATHS[key].format('$SCRATCH/a')}"])
    assert "/scratch/m$e/a" in str(recipe)
    # The resolved recipe, in the run folder, is read as what it is.
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(recipe))
    assert load_recipe(str(resolved)) == recipe


@pytest.mark.parametrize("key", PATHS)
def test_an_undefined_variable_is_refused_with_its_key(tiny_recipe, key):
    with pytest.raises(UserError) as caught:
        load_recipe(str(tiny_recipe), [f"{key}={PATHS[key].format('$NOWHERE/a')}"])
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"tiny.yaml: {key}")
    assert "the environment variable NOWHERE is not set; set it" in line


def test_one_source_under_two_names_is_refused(tiny_recipe):
    with pytest.raises(UserError, match=r"data\.sources: names /home/me/a 2 times"):
        load_recipe(str(tiny_recipe), ["data.sources={~/a: 1.0, $HOME/a: 2.0}"])


def test_bases_and_recipes_are_found_by_such_paths(tiny_recipe, monkeypatch):
    monkeypatch.setenv("SCRATCH", str(tiny_recipe.parent))
    assert find_recipe("$SCRATCH/tiny.yaml") == tiny_recipe
    child = tiny_recipe.with_name("child.yaml")
    child.write_text("base: $SCRATCH/tiny.yaml\n")
    assert load_recipe(str(child)) == load_recipe(str(tiny_recipe))
    with pytest.raises(UserError, match="NOWHERE is not set"):
        find_recipe("$NOWHERE/tiny.yaml")


def parsers(commands=COMMANDS):
    """Yield the parser of every command, by its name."""
    import argparse

    for name, command in commands.items():
        if isinstance(command, Group):
            yield from ((f"{name} {inner}", parser) for inner, parser in parsers(command.commands))
        else:
            assert isinstance(command, Command)
            parser = argparse.ArgumentParser()
            command.fill(parser)
            yield name, parser


NO_PATHS = {"recipe", "recipes", "pattern", "setup"}
"""Arguments that may also be a shipped name or an expression, whose paths are expanded later; and a
line for a shell.
"""


def test_every_path_of_the_command_line_is_expanded():
    found = set()
    for name, parser in parsers():
        for action in parser._actions:
            words = f"{action.metavar} {action.dest} {action.help}".lower()
            is_path = re.search(r"folder|file|run\b|prefix|png|out\b|source|path|dir\b", words)
            if action.nargs == 0 or action.dest in NO_PATHS or not is_path:
                continue
            if action.type in (int, float) or action.dest == "overrides":
                continue
            assert action.type, f"{name}: {action.dest} is no user_path"
            assert action.type("$SCRATCH/a") == "/scratch/m$e/a"
            found.add(action.dest)
    assert {"run_dir", "out", "sources", "tokenizer", "folder", "data", "work"} <= found


def test_an_undefined_variable_on_the_command_line_is_refused(capsys):
    from longspan.launch.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["status", "$NOWHERE/run"])
    assert ended.value.code == 2
    assert "argument RUN: '$NOWHERE/run': the environment variable NOWHERE is not set" in (
        capsys.readouterr().err
    )
    assert not os.path.exists("$NOWHERE")
