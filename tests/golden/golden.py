"""What longspan says and does, as text that is kept: each golden file is one function's text.

``make golden`` writes the files anew; a person reads the diff. Nothing here depends on the machine:
losses and hashes, which do, are in :mod:`.numbers`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from longspan import attention, parallel
from longspan.launch.cli import main

# All that is asked of the inside of longspan: these lines follow when something moves.
from longspan.launch.commands import plan as plan_command
from longspan.launch.process import process_group
from longspan.parallel.schedules.choose import choose_schedule
from longspan.parallel.schedules.choose import make_plan as plan_attention
from longspan.parallel.schedules.names import schedules_named
from longspan.parallel.schedules.plan import batch_rows
from longspan.trainer.data.tokenizer import recipe_vocab_size
from longspan.trainer.huggingface.model_to_export import ModelToExport
from longspan.trainer.huggingface.registry import choose_target
from longspan.trainer.model.cpu import megatron_on_cpu
from longspan.trainer.model.model import build_model
from longspan.trainer.model.weights import global_parameters, is_split
from longspan.trainer.recipe.file import SHIPPED, load_recipe, shipped_recipes
from longspan.trainer.recipe.stages import Stages

from . import faulty

HERE = Path(__file__).parent
FILES = HERE / "files"
RUN_BEFORE = HERE / "run_before"
"""The folder of a run that an older longspan wrote: after step 3 of 6."""
PYTHON = "3.11"
"""Whose argparse wrote help and usage errors; other versions lay them out in another way."""

GOLDEN: dict[str, Callable[[], str]] = {}
"""The text of each file, by its name in ``files/``."""


def golden(name: str) -> Callable:
    """Registers a function that gives the text of the file ``name``."""

    def register(function: Callable[[], str]) -> Callable[[], str]:
        GOLDEN[name] = function
        return function

    return register


def applies(name: str) -> bool:
    """Whether this Python says what the file has."""
    return not name.startswith("argparse/") or platform.python_version().startswith(f"{PYTHON}.")


# The command line.


def run(*arguments: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of a command, without a process of its own."""
    out, err = io.StringIO(), io.StringIO()
    plain = {"COLUMNS": "100", "LINES": "40", "NO_COLOR": "1"}
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    with (
        mock.patch.dict(os.environ, kept | plain, clear=True),
        mock.patch("os.cpu_count", return_value=8),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        threads = torch.get_num_threads()
        try:
            main(list(arguments))
        except SystemExit as ended:
            status = ended.code
        finally:
            torch.set_num_threads(threads)
    return status, out.getvalue(), err.getvalue()


def said(command: str) -> str:
    """A command and all that it answers, as in a terminal."""
    status, out, err = run(*shlex.split(command))
    text = anywhere(out + err)
    text = re.sub(r"instance of \w+", "instance of ...", text)  # pydantic's, of a class
    text = re.sub(r"\(others: ([^)]*)\)", _in_order, text)
    lines = [f"$ longspan {command}", *(line.rstrip() for line in text.splitlines())]
    return "\n".join([*lines, *([f"[status {status}]"] if status else [])]) + "\n"


def _in_order(match: re.Match) -> str:
    """Other schedules by name: equal ones come in any order, by Python's hashes."""
    return f"(others: {'; '.join(sorted(match[1].split('; ')))})"


def anywhere(text: str) -> str:
    """Without the paths of this machine."""
    for path, name in ((os.getcwd(), "HERE"), (str(SHIPPED), "RECIPES")):
        text = text.replace(os.path.realpath(path), name).replace(path, name)
    return text


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A new folder to be in, with what :mod:`.faulty` asks for: recipes, a corpus, a run."""
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name)
        for recipe in HERE.glob("*.yaml"):
            shutil.copy(recipe, folder)
        build_corpus(folder)
        shutil.copytree(RUN_BEFORE, folder / "run")
        _damage(folder)
        for file, text in faulty.FILES.items():
            folder.joinpath(file).parent.mkdir(parents=True, exist_ok=True)
            folder.joinpath(file).write_bytes(text if isinstance(text, bytes) else text.encode())
        yield folder


def _damage(folder: Path) -> None:
    """Runs and corpora that are not whole, and runs of which there is no more than a recipe."""

    def altered(name: str, file: str, content: bytes | Callable[[bytes], bytes]) -> None:
        if not (folder / name).exists():
            shutil.copytree(folder / "run", folder / name)
        path = folder / name / file
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)

    def manifest(**changes: object) -> Callable[[bytes], bytes]:
        """One that is whole, and says something else."""

        def rewritten(before: bytes) -> bytes:
            content = {**json.loads(before), **changes}
            content.pop("digest")
            text = json.dumps(content, sort_keys=True)
            digest = hashlib.sha256(text.encode()).hexdigest()
            return json.dumps({**content, "digest": digest}).encode()

        return rewritten

    at = "checkpoints/step-00000003"
    altered("run-cut", f"{at}/__0_0.distcp", lambda data: data[:-1])
    altered("run-flipped", f"{at}/__0_0.distcp", lambda data: bytes([data[0] ^ 1]) + data[1:])
    altered("run-manifest", f"{at}/manifest.json", b"{}")
    altered("run-step", f"{at}/manifest.json", manifest(step=4))
    altered("run-newer", f"{at}/manifest.json", manifest(version=99))
    altered("run-gone", f"{at}/__0_0.distcp", b"")
    (folder / "run-gone" / at / "__0_0.distcp").unlink()
    altered("run-all-damaged", f"{at}/manifest.json", lambda data: data.replace(b": 3,", b": 2,"))
    altered("run-data", "data.json", b"[")
    altered("run-other-data", "data.json", b'{"corpus": "other"}')
    altered("run-recipe", "recipe.yaml", lambda data: data + b"stray: 3\n")
    altered("run-empty", "metrics.jsonl", b"")
    shutil.rmtree(folder / "run-empty/checkpoints")
    for name, recipe in (("recall-run", "recall.yaml"), ("moba-run", "tiny.yaml")):
        (folder / name).mkdir()
        text = (folder / recipe).read_text().replace("mixer: conv", "mixer: moba, block: 8")
        (folder / name / "recipe.yaml").write_text(text)

    endings = (".bin", ".idx", ".json")
    corpus = {ending: folder.joinpath(f"corpus{ending}").read_bytes() for ending in endings}
    for prefix, changes in {
        "cut": {".bin": corpus[".bin"][:-2]},
        "cut-index": {".idx": corpus[".idx"][:-8]},
        "no-index": {".idx": b"not an index"},
        "zeros": {".idx": corpus[".idx"][:9] + bytes(40)},
        "others": {".json": corpus[".json"].replace(b': "bytes"', b': "other"')},
        "no-record": {".json": b"["},
        "end": {".bin": b""},
    }.items():
        for ending in endings:
            content = changes.get(ending, corpus[ending])
            folder.joinpath(f"{prefix}{ending}").write_bytes(content)


def texts() -> list[str]:
    """40 documents, 13 to 215 bytes long."""
    return [
        f"Document {i}: " + " ".join(f"{i * j % 97}" for j in range(3 + 11 * (i % 7)))
        for i in range(40)
    ]


def build_corpus(folder: Path) -> None:
    """Those texts as the corpus ``corpus`` in ``folder``, which is the current one."""
    sources = folder / "texts"
    sources.mkdir()
    for i, text in enumerate(texts()):
        sources.joinpath(f"{i:02}.txt").write_text(text)
    status, _, err = run("data", "build", "texts", "--workers", "1", "--out", "corpus")
    assert not status, err


def _commands() -> Iterator[str]:
    yield ""
    for words in faulty.COMMANDS.split("\n"):
        if words.strip():
            yield words.strip()


@golden("argparse/help.txt")
def _help() -> str:
    return "\n".join(said(f"{command} --help".strip()) for command in _commands())


@golden("argparse/usage.txt")
def _usage() -> str:
    with workplace():
        return "\n".join(said(command) for command in faulty.USAGE)


@golden("recipes.txt")
def _recipes() -> str:
    return said("recipes")


@golden("recipe-keys.md")
def _recipe_keys() -> str:
    return said("recipes --keys")


# Recipes.


def _names() -> list[str]:
    return [str(path.relative_to(SHIPPED).with_suffix("")) for path in shipped_recipes()]


def _more_gpus(name: str) -> list[str]:
    """Other numbers of GPUs than the recipe's to plan for."""
    processes = load_recipe(name).launch.processes
    return [f"--gpus {4 * processes} --device h200"]


def _recipe(name: str) -> str:
    """All that a recipe comes to without running it."""
    parts = [said(f"train {name} --dry-run"), *_plans_of(name), _parameters(name)]
    return "\n".join([*parts, _export(name)])


def undrawn() -> contextlib.AbstractContextManager:
    """``plan`` without its picture, which takes longer than all the rest."""
    return mock.patch.object(plan_command, "_draw", return_value=None)


def without_backends() -> contextlib.AbstractContextManager:
    """``plan`` without the backends, which depend on packages of the machine."""
    return mock.patch.object(plan_command, "_print_backends", return_value=None)


def _plans_of(name: str) -> Iterator[str]:
    with undrawn(), without_backends():
        for options in ("", *_more_gpus(name)):
            yield said(f"plan {name} {options}".strip())


def _parameters(name: str) -> str:
    """Names, shapes and what tensor-parallel ranks split, of a model that no memory holds."""
    from megatron.core import parallel_state
    from torch._subclasses import FakeTensorMode

    period = len(load_recipe(name).model.layers.pattern)
    alone = ["parallel={}", "launch.processes=1"]
    note = ""
    if name == "minimax-01":  # 5000 parameters, of experts
        alone.append(f"model.num_hidden_layers={period}")
        note = f" of {period} layers"
    recipe = load_recipe(name, alone)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        stack.enter_context(process_group(1))
        parallel_state.initialize_model_parallel()
        stack.callback(parallel_state.destroy_model_parallel)
        stack.enter_context(megatron_on_cpu())
        stack.enter_context(FakeTensorMode())
        model = build_model(recipe, recipe_vocab_size(recipe), torch.float32)
        found = {
            name: f"{list(each.shape)}" + (f" split {each.partition_dim}" if is_split(each) else "")
            for name, each in global_parameters(model)
        }
    return f"== parameters{note}\n{folded(found)}"


def _export(name: str) -> str:
    """The config that export would write, and the tensors' names and shapes."""
    target, reasons = choose_target(ModelToExport.of_recipe(load_recipe(name)))
    no_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    built = target.build(no_ids, torch.float32)
    config = built.config.to_diff_dict()
    config.pop("transformers_version", None)
    state = {key: f"{list(tensor.shape)}" for key, tensor in built.state_dict().items()}
    lines = [f"== export as {target.model_type}", *reasons, _json(config)]
    return "\n".join([*lines, "== exported tensors", folded(state)])


def _json(config: dict) -> str:
    """With floats of five digits, since machines differ in the last; equal layers are told once."""

    def rounded(value):
        if isinstance(value, float):
            return float(f"{value:.5g}")
        if isinstance(value, list | tuple):
            return [rounded(each) for each in value]
        return {k: rounded(v) for k, v in value.items()} if isinstance(value, dict) else value

    config = rounded(config)
    if isinstance(layers := config.get("layers"), list):
        alike: dict[str, list[int]] = {}
        for number, layer in enumerate(layers):
            alike.setdefault(json.dumps(layer, sort_keys=True), []).append(number)
        config["layers"] = {ranges(numbers): json.loads(layer) for layer, numbers in alike.items()}
    text = json.dumps(config, indent=1, sort_keys=True, default=str)
    return re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)


def ranges(numbers: list[int]) -> str:
    """``0-3, 5``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def folded(tensors: dict[str, str]) -> str:
    """Lines of names and shapes, where experts and layers that are alike are told once."""
    experts: dict[tuple[str, str, str], list[int]] = {}
    for name, shape in tensors.items():
        match = re.search(r"experts\.(\d+)\.", name)
        if match:
            key = (name[: match.start(1)], name[match.end(1) :], shape)
            experts.setdefault(key, []).append(int(match[1]))
        else:
            experts[name, "", shape] = []
    layers: dict[int, list[str]] = {}
    others = []
    for (before, after, shape), numbers in experts.items():
        name = f"{before}{{{ranges(numbers)}}}{after}" if numbers else before
        match = re.search(r"layers\.(\d+)\.", name)
        if match:
            line = f"  {name[: match.start(1)]}*{name[match.end(1) :]} {shape}"
            layers.setdefault(int(match[1]), []).append(line)
        else:
            others.append(f"{name} {shape}")
    alike: dict[tuple[str, ...], list[int]] = {}
    for number, lines in layers.items():
        alike.setdefault(tuple(sorted(lines)), []).append(number)
    for lines, numbers in alike.items():
        others += [f"layers {ranges(numbers)}", *lines]
    return "\n".join(others) + "\n"


for _name in _names():
    GOLDEN[f"recipes/{_name}.txt"] = functools.partial(_recipe, _name)


@golden("drawn.txt")
def _drawn() -> str:
    """The points of the picture that ``plan`` draws."""
    from matplotlib.axes import Axes

    with workplace():
        found, real = [], Axes.plot

        def plot(axes, *points, **style):
            found.append(
                ", ".join(
                    [style["label"], *(f"{x:g} {y:.6g}" for x, y in zip(*points, strict=True))]
                )
            )
            return real(axes, *points, **style)

        with mock.patch.object(Axes, "plot", plot), without_backends():
            text = said("plan quickstart")
        return "\n".join([text, *found, "", *map(said, faulty.DRAWN)])


# What is wrong.


def _load_said(overrides: str | tuple[str, ...], file: str = "tiny.yaml") -> str:
    given = [overrides] if isinstance(overrides, str) else overrides
    return said(shlex.join(["train", file, "--dry-run", *given]))


@golden("faulty/recipes.txt")
def _faulty_recipes() -> str:
    with workplace():
        return "\n".join(map(_load_said, faulty.OVERRIDES))


@golden("faulty/files.txt")
def _faulty_files() -> str:
    with workplace():
        return "\n".join(
            _load_said((), file) for file in faulty.FILES if file.startswith("faulty/")
        )


@golden("faulty/commands.txt")
def _faulty_commands() -> str:
    with workplace():
        return "\n".join(map(said, faulty.FAULTY_COMMANDS))


@golden("faulty/calls.txt")
def _faulty_calls() -> str:
    """Calls of the public operations with arguments that do not fit."""
    names = faulty.names_of_calls()
    lines = []
    for call in faulty.CALLS:
        try:
            eval(call, names)
            answer = "no error"
        except (ValueError, TypeError, RuntimeError) as error:
            answer = f"{type(error).__name__}: {error}"
        lines.append(f"> {call}\n{answer}\n")
    return "\n".join(lines)


# What is right.


@golden("commands.txt")
def _commands_said() -> str:
    with workplace() as folder, undrawn(), without_backends():
        answers = [*map(said, faulty.GOOD_COMMANDS)]
        for script in sorted(folder.rglob("*.sbatch")):
            answers.append(f"== {script.relative_to(folder)}\n{anywhere(script.read_text())}")
        return "\n".join(answers)


@golden("exports.txt")
def _exports() -> str:
    """What becomes of many stacks in transformers, and why no more."""
    lines = []
    with workplace():
        for name, (blocks, others) in faulty.STACKS.items():
            for change in faulty.CHANGES:
                changed = {
                    key: {**block, **change}
                    for key, block in blocks.items()
                    if block["mixer"] in ("full", "window") or set(change) <= faulty.OF_ALL
                }
                layers = {"blocks": {**blocks, **changed}, "pattern": [*blocks]}
                given = [f"model.layers={json.dumps(layers)}", *others]
                if "moe" in change.values():
                    given.append(faulty.MOE)
                status, out, err = run("train", "tiny.yaml", "--dry-run", *given)
                answer = err if status else out
                told = answer.splitlines()[-1].removeprefix("longspan export").strip()
                lines.append(f"{name} {json.dumps(change)}: {told}")
    return "\n".join(lines) + "\n"


@golden("learning-rates.txt")
def _learning_rates() -> str:
    """Learning rates and the stage of every step."""
    lines = []
    with workplace():
        for overrides in faulty.SCHEDULES:
            recipe = load_recipe("tiny.yaml", overrides)
            lines.append(f"{' '.join(overrides)}")
            stages = Stages(recipe)
            for step in range(recipe.training.steps):
                stage = stages.at(step)
                now = stage.recipe
                lines.append(
                    f"  {step}: lr {stage.learning_rate(step):.10g}, "
                    f"data from {stage.data_start}, seed {now.training.seed}, "
                    f"{now.training.seq_length} tokens, theta {now.model.rope_theta:g}"
                )
    return "\n".join(lines) + "\n"


# Patterns and plans.

S2, Causal, Window = attention.S2, attention.Causal, attention.Window
PATTERNS = {
    "causal": Causal(),
    "window": Window(7),
    "streaming": attention.Streaming(3, 5),
    "stripes": attention.Stripes(4, 3),
    "stripes apart": attention.Stripes(4, 6, offset=1, head_step=2),
    "dilated": attention.Dilated(4, 2, 3) | attention.Sinks(2),
    "s2": S2(4, 2, 3),
    "s2 spread": S2(4, 2, 8).spread(4),
    "s2 near": S2(4, 2, 8, near=(5, 2)),
    "s2 dense": S2(4, 1, 3, dense_heads=1),
    "each its own": attention.PerHead([Window(9), Causal(), S2(8, 1, 2), Window(3)]),
}


@golden("patterns.txt")
def _patterns() -> str:
    """What patterns show, and need, as numbers and hashes."""
    lines = []
    for name, pattern in PATTERNS.items():
        lines.append(f"{name}: {pattern!r}, alignment {pattern.alignment}")
        for heads in (1, 2, 4):
            lines.append(f"  {heads} heads: covers {pattern.covers(heads)}")
            for length in (1, 24, 61, 256):
                at = torch.arange(length)
                mask = pattern.mask(at, at, heads).numpy()
                needs = [
                    pattern.need(a, min(length, a + 16), h)
                    for h in range(heads)
                    for a in range(0, length, 16)
                ]
                lines.append(
                    f"    {length}: mask {digest(mask.tobytes())}, {int(mask.sum())} pairs, "
                    f"density {pattern.density(length, heads):.10g}, "
                    f"needs {digest(*map(_values, needs))}"
                )
        moved = pattern.from_head(1)
        lines.append(f"  from head 1: {moved!r}")
    lists = attention.BlockLists.where(4, lambda i, j, head: (i - j < 2) | (j % 3 == head), 64, 2)
    mask = lists.mask(torch.arange(64), torch.arange(64), 2).numpy()
    lines.append(
        f"lists: mask {digest(mask.tobytes())}, {int(mask.sum())} pairs, "
        f"{lists.density(64, 2):.10g}"
    )
    return "\n".join(lines) + "\n"


def digest(*what: object) -> str:
    """16 hexadecimal digits of bytes, or of what values print as."""
    found = hashlib.sha256()
    for each in what:
        found.update(each if isinstance(each, bytes) else repr(each).encode())
    return found.hexdigest()[:16]


def _values(what: object) -> object:
    """Nested lists of the numbers in dataclasses, arrays and slices: not their names."""
    if dataclasses.is_dataclass(what):
        shown = [field.name for field in dataclasses.fields(what) if field.name[0] != "_"]
        return [_values(getattr(what, name)) for name in shown]
    if isinstance(what, np.ndarray):
        return what.tolist()
    if isinstance(what, slice):
        return [what.start, what.stop, what.step]
    if isinstance(what, list | tuple | range):
        return [_values(each) for each in what]
    if isinstance(what, np.integer):
        return int(what)
    return what


LENGTH = 96
LAYOUTS = {
    "zigzag 2": parallel.Layout.zigzag(LENGTH, 2, 4),
    "zigzag 4": parallel.Layout.zigzag(LENGTH, 4, 4),
    "contiguous 3": parallel.Layout.contiguous(LENGTH, 3, 4),
    "striped 4": parallel.Layout.striped(LENGTH, 4, 4),
    "uneven": parallel.Layout((((0, 40), (60, 72)), ((40, 60),), (), ((72, 96),))),
    "zigzag 8": parallel.Layout.zigzag(LENGTH, 8, 4),
}
SCHEDULES = (
    "auto",
    "ring",
    "gather",
    "stripes",
    "heads",
    "grid",
    "heads 2 x ring",
    "heads 2 x stripes",
)
DOCUMENTS = {"one": [(0,), (0,)], "packed": [(0, 20, 24, 72), (0, 48)]}
PLANNED = (
    "causal",
    "window",
    "streaming",
    "stripes",
    "dilated",
    "s2",
    "s2 near",
    "s2 dense",
    "lists",
)


@golden("plans.txt")
def _plans() -> str:
    """Of each plan its key and a hash of all of it, and by rank what moves, the buffer and tiles.

    The key hashes what its inputs print as, with the names of classes. That of the rows of a batch
    is no public one: here it is what it was when the keys were kept.
    """
    lines = []
    for layout_name, layout in LAYOUTS.items():
        for name in PLANNED:
            pattern = PATTERNS.get(name)
            for schedule in SCHEDULES:
                lines += _plans_by_documents(layout_name, layout, name, pattern, schedule)
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def printed_as(kind: type, name: str) -> Iterator[None]:
    """Values of this dataclass print under that name."""
    before, kind.__qualname__ = kind.__qualname__, name
    try:
        yield
    finally:
        kind.__qualname__ = before


def _plans_by_documents(layout_name, layout, name, pattern, schedule) -> Iterator[str]:
    heads, kv_heads = 4, 2
    try:
        reasons = [
            one.unsupported_reason(layout.ranks, pattern, heads, kv_heads)
            for one in schedules_named(schedule, layout.ranks)
        ]
    except ValueError as error:
        reasons = [str(error)]
    if all(reasons):
        yield f"{layout_name}, {name}, {schedule}: no: {next(iter(reasons), '')}"
        return
    chosen = choose_schedule(schedule, layout, pattern, heads, kv_heads, (8, 8))
    if schedule in ("auto", "grid"):
        yield f"{layout_name}, {name}, {schedule}: {chosen}"
        return
    for documents_name, starts in DOCUMENTS.items():
        ids = torch.zeros(len(starts), LENGTH, dtype=torch.int32)
        for row, at in enumerate(starts):
            for start in at[1:]:
                ids[row, start:] += 1
        rows = batch_rows(ids, len(starts), LENGTH)
        with printed_as(type(rows[0]), "Rows"):
            plans = [
                plan_attention(layout, pattern, heads, kv_heads, rows, chosen, rank)
                for rank in range(layout.ranks)
            ]
        (key,) = {plan.key for plan in plans}
        each = []
        for plan in plans:
            (sent, received), (back_sent, back_received) = plan.traffic(8, 8)
            tiles = sum(len(stage.jobs) for stage in plan.stages)
            each.append(
                f"{sent}/{received} {back_sent}/{back_received} {plan.buffer(8, 8)} {tiles}"
            )
        content = digest(*[_values(plan.stages) for plan in plans])
        what = f"{layout_name}, {name}, {schedule}, {documents_name}"
        yield f"{what}: {key} {content} | {' | '.join(each)}"
