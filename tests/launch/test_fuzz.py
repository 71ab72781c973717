"""Recipes, command lines and run folders at random: a message, or a result, but no traceback.

What is refused raises ``UserError``, which the command line prints as one line a problem, with
status 2. Everything here runs in this process.
"""

import contextlib
import copy
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from longspan.launch.cli import COMMANDS, Group, main
from longspan.launch.training import train
from longspan.trainer.checkpoint.files import clean_up
from longspan.trainer.checkpoint.run_folder import RunFolder
from longspan.trainer.errors import UserError
from longspan.trainer.huggingface.saved_run import SavedRun
from longspan.trainer.recipe.check import check_recipe
from longspan.trainer.recipe.file import load_recipe, to_yaml
from longspan.trainer.recipe.schema import Recipe
from longspan.trainer.run.extend import extended_run

from ..conftest import TINY

FINISHED_RUN = Path(__file__).parents[1] / "golden" / "run_before"


def numbers_of_examples(few: int, many: int) -> Any:
    """Parametrize a test with the number of its examples, many of them in the wide tests."""
    return pytest.mark.parametrize(
        "examples", [few, pytest.param(many, marks=pytest.mark.wide)], ids=["few", "many"]
    )


def examine(examples: int) -> settings:
    return settings(
        max_examples=examples,
        derandomize=examples < 1000,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def only_user_errors():
    """Let nothing but errors with a message pass, of which every line says something."""
    with contextlib.suppress(UserError):
        try:
            yield
        except UserError as error:
            lines = str(error).splitlines()
            assert lines
            assert all(line.strip() for line in lines)
            raise


# Recipes


def key_paths(schema: dict, node: dict, path: tuple = ()) -> list[tuple[str, ...]]:
    """Return the paths of all keys in a schema, one block and one engine of each kind included."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    paths = []
    for kind in [*node.get("anyOf", []), *node.get("oneOf", [])]:
        paths += key_paths(schema, kind, path)
    if "additionalProperties" in node and isinstance(node["additionalProperties"], dict):
        paths += key_paths(schema, node["additionalProperties"], (*path, "full"))
    if "items" in node:
        paths += key_paths(schema, node["items"], (*path, "0"))
    for name, value in node.get("properties", {}).items():
        paths += [(*path, name), *key_paths(schema, value, (*path, name))]
    return paths


SCHEMA = Recipe.model_json_schema()
KEYS = sorted(set(key_paths(SCHEMA, SCHEMA)))
WORDS = [
    *("full", "s2", "window", "linear", "moba", "mamba2", "kda", "gla", "pattern", "streaming"),
    *("moe", "dense", "megatron", "deepspeed", "ring", "stripes", "heads", "heads 2 x ring"),
    *("zigzag", "contiguous", "cosine", "wsd", "buckets", "best_fit", "hold", "rewarm", "auto"),
    *("python-stdlib", "bytes", "selective", "S2(8, 2, 4) | Sinks(3)", "PerHead([Causal()] * 9)"),
    *("Window(1", "Sinks(-1)", "Causal(" * 200, "$HOME/x", "$NOT_SET_9", "~x", "a\0b", "\ud800"),
]
NUMBERS = [0, 1, 2, 3, 4, 5, 7, 8, 12, 16, 64, 96, 97, 128, 192, 1024, 4096, -1, 2**31, 2**70]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from([0.0, 0.5, 1.0, -1.5, 1e-3, 1e300, float("inf"), float("nan")]),
    st.sampled_from(WORDS),
    st.text(max_size=8),
)
KEY_NAMES = st.sampled_from(sorted({key[-1] for key in KEYS})) | st.text(max_size=4)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(KEY_NAMES | st.sampled_from([1, None, True]), inner, max_size=3)
    ),
    max_leaves=6,
)
TOO_LARGE = {  # what a model or a sequence of these sizes costs is no matter of messages
    "num_hidden_layers": 64,
    "seq_length": 4096,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "num_heads": 1024,
    "processes": 64,
    "cp": 64,
    "pairs": 64,
}


def changed(content: Any, key: tuple[str, ...], value: Any) -> Any:
    """Return the content with another value at a path; sections on the way are made."""
    if not key:
        return value
    if isinstance(content, list):
        content = dict(enumerate(content)) | {int(key[0]): None} if key[0].isdigit() else {}
        return [
            changed(item, key[1:], value) if number == int(key[0]) else item
            for number, item in content.items()
        ]
    content = dict(content) if isinstance(content, dict) else {}
    if key[0] in TOO_LARGE and isinstance(value, int):
        value = min(value, TOO_LARGE[key[0]])
    return {**content, key[0]: changed(content.get(key[0]), key[1:], value)}


@st.composite
def recipes(draw: Callable) -> dict:
    content = copy.deepcopy(TINY)
    for _ in range(draw(st.integers(1, 4))):
        content = changed(content, draw(st.sampled_from(KEYS)), draw(VALUES))
    return content


@numbers_of_examples(100, 4000)
def test_recipes(examples, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "fuzzed.yaml"

    @examine(examples)
    @given(content=recipes())
    def check(content):
        with only_user_errors():
            recipe = check_recipe(content, "fuzzed.yaml")
            file.write_text(to_yaml(recipe))
            assert load_recipe(str(file)) == recipe
            train(str(file), [], dry_run=True)

    check()
    assert list(tmp_path.iterdir()) in ([], [file])  # nothing else was written


TEXT = yaml.safe_dump(TINY)


@st.composite
def damaged_yaml(draw: Callable) -> bytes:
    """Text with some parts replaced by what YAML reads in its own ways."""
    text = TEXT
    odd = ["{", "}", "[", "]", ":", "- ", "&a ", "*a", "!!int ", "!!python/object:os.system ", "\t"]
    odd += [
        "%",
        "|",
        ">",
        "? ",
        "\0",
        "\ufeff",
        "'",
        '"',
        '"\\ud800"',
        "<<: ",
        "~",
        "\n",
        "[" * 2000,
    ]
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        stop = min(len(text), start + draw(st.integers(0, 12)))
        text = text[:start] + draw(st.sampled_from(odd) | st.text(max_size=3)) + text[stop:]
    return text.encode(errors="replace") + draw(st.sampled_from([b"", b"\xff", b"\0", b"\xfe\xff"]))


@numbers_of_examples(60, 2000)
def test_yaml(examples, tmp_path):
    file = tmp_path / "damaged.yaml"

    @examine(examples)
    @given(content=damaged_yaml() | st.binary(max_size=40))
    @example(content=b"training: {steps: !!int }")
    def check(content):
        file.write_bytes(content)
        with only_user_errors():
            load_recipe(str(file))

    check()


@numbers_of_examples(60, 2000)
def test_overrides(examples, tiny_recipe):
    keys = st.sampled_from([".".join(key) for key in KEYS]) | st.text(max_size=6)
    values = VALUES.map(lambda value: yaml.safe_dump(value, default_flow_style=True).strip())
    overrides = st.builds("{}={}".format, keys, values | st.text(max_size=6)) | st.text(max_size=6)

    @examine(examples)
    @given(given_overrides=st.lists(overrides, min_size=1, max_size=3))
    @example(given_overrides=["\x1e"])
    @example(given_overrides=["a\n=1"])
    @example(given_overrides=["\udcff=1"])
    def check(given_overrides):
        with only_user_errors():
            load_recipe(str(tiny_recipe), given_overrides)

    check()


# Command lines


def command_names(commands: dict = COMMANDS) -> list[list[str]]:
    names = []
    for name, command in commands.items():
        if isinstance(command, Group):
            names += [[name, *inner] for inner in command_names(command.commands)]
        else:
            names.append([name])
    return names


STARTS_AT_ONCE = {"doctor", "bench", "recipes"}
"""Commands that need nothing to begin their work, which takes long."""
OPTIONS = [
    *("--out", "-o", "--lengths", "--examples", "--seed", "--data", "--documents", "--tokenizer"),
    *("--tokens", "--temperature", "--cp", "--gpus", "--device", "--heads", "--length", "--nodes"),
    *("--time", "--notice", "--key", "--dry-run", "--dtype", "--prompt", "--pairs", "--depths"),
]
ARGUMENTS = [
    *("no-such-run", "no-such-run@7", "no-such.yaml", "", ".", "..", "/dev/null", "a\tb", "é", "-"),
    *(
        "0",
        "-1",
        "7",
        "x",
        "1e3",
        "1,2",
        ",",
        "3.5",
        "2-00:00:00",
        "h100",
        "$NOT_SET_9/a",
        "~nobody-9",
    ),
    *("Sinks(3)", "Window(0)", "Stripes(64, 1099511627776)", "S2(64, 2, 3) |", "training.steps=x"),
    *("run_dir=no/such/run", "x" * 300, "--", "float32", "$", "[", "model.hidden_size=1"),
]


def run_command(arguments: list[str]) -> int:
    """Run a command line; return its status. What it printed must be no traceback."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main(arguments)
    assert "Traceback" not in out.getvalue() + err.getvalue()
    status = ended.value.code or 0
    assert status in (0, 2), (arguments, status)
    assert status == 0 or err.getvalue().strip()
    return status


@numbers_of_examples(60, 2000)
def test_command_lines(examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    names = [name for name in command_names() if name[0] not in STARTS_AT_ONCE]
    words = st.sampled_from([*OPTIONS, *ARGUMENTS]) | st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5
    )

    @examine(examples)
    @given(name=st.sampled_from(names), rest=st.lists(words, max_size=5))
    def check(name, rest):
        run_command([*name, *rest])

    check()


# Run folders

JUNK = [b"", b"{", b"[]", b"null", b"7", b'{"step": 1}', b"\xff\xfe\x00", b"a: b\n", b"[" * 5000]
FILES = sorted(
    str(path.relative_to(FINISHED_RUN)) for path in FINISHED_RUN.rglob("*") if path.is_file()
)
NAMES = [
    *FILES,
    *("checkpoints", "plots", "plots/loss.png", "extensions.json", "data.json", "versions.txt"),
    *("lock", "STOP", "metrics.jsonl", "checkpoints/step-00000003", "checkpoints/step-00000009"),
    *("checkpoints/step-00000003.partial", "checkpoints/step-x", "weights.safetensors", "wandb_id"),
]


def damage(path: Path, kind: str, junk: bytes) -> None:
    """Do something to a file or folder, which need not be there."""
    if kind in ("remove", "folder", "link", "file") and (path.exists() or path.is_symlink()):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if not path.parent.is_dir() or kind == "remove":
        return
    if kind == "folder":
        (path / "inner").mkdir(parents=True)
    elif kind == "link":
        path.symlink_to(path.with_name("nowhere"))
    elif kind == "file":
        path.write_bytes(junk)
    elif path.is_file():
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(
            {
                "truncate": content[:middle],
                "append": content + junk,
                "insert": content[:middle] + junk + content[middle:],
            }[kind]
        )


DAMAGES = st.tuples(
    st.sampled_from(NAMES),
    st.sampled_from(["remove", "folder", "link", "file", "truncate", "append", "insert"]),
    st.sampled_from(JUNK),
)


@numbers_of_examples(40, 1500)
def test_run_folders(examples, tmp_path, monkeypatch):
    run = tmp_path / "run"
    recipe = load_recipe(str(FINISHED_RUN / "recipe.yaml"), [f"run_dir={run}"])
    longer = load_recipe(str(FINISHED_RUN / "recipe.yaml"), [f"run_dir={run}", "training.steps=9"])
    monkeypatch.setattr("longspan.trainer.run.plot.plot_loss", lambda folder: folder.read_metrics())

    @examine(examples)
    @given(damages=st.lists(DAMAGES, min_size=1, max_size=3))
    def check(damages):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(FINISHED_RUN, run)
        for name, kind, junk in damages:
            damage(run / name, kind, junk)

        run_command(["status", str(run)])
        run_command(["plot", str(run)])
        for command in (["generate"], ["eval", "loss"], ["eval", "mqar"]):
            assert run_command([*command, str(run), "--seed", "x"]) == 2
        with only_user_errors():
            saved = SavedRun(str(run))
            saved.weights(list(saved.shapes)[:1])
        folder = RunFolder(run)
        with only_user_errors():
            folder.weights_step()
            folder.require_weights()
            folder.weights_recipe()
        for started in (recipe, longer):
            with only_user_errors():
                folder = RunFolder(run)
                folder.require_usable(started)
                folder.require_same_data({"texts": "other"})
                folder.remove_stop_file()
                with folder.lock():
                    clean_up(folder.checkpoints)
                    extended = extended_run(folder, started, steps_done=3)
                    folder.begin(started, 3, {}, extended.extensions)
                    folder.read_metrics()

    check()
