"""``longspan COMMAND``. Heavy imports wait until a command needs them: ``--help`` answers at once."""

import argparse
import os
import sys

from .. import __version__
from .process import quiet_libraries


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit.

    0 done, 2 bad input (one line per problem on stderr), 3 loss not finite, 75 stopped on request, 1 anything else.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no positionals after an option: an override may stand anywhere.
    if options.command in ("train", "verify", "plan", "slurm") and all(
        "=" in argument and not argument.startswith("-") for argument in rest
    ):
        options.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    from ..trainer.errors import SilentRankError, UserError

    quiet_libraries()
    try:
        status = options.run(options)
    except SilentRankError as error:
        status = error.exit_status
    except UserError as error:
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        print(
            "".join(f"longspan: {rank}{line}\n" for line in str(error).splitlines()),
            file=sys.stderr,
            end="",
            flush=True,
        )
        status = error.exit_status
    except KeyboardInterrupt:
        status = 130
    sys.exit(status or 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="longspan", description="Pretrain language models on very long sequences."
    )
    parser.add_argument("--version", action="version", version=f"longspan {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train", help="train a recipe", description="Train a recipe: a file or a shipped name."
    )
    train.add_argument("recipe", help="path of a YAML recipe, or the name of a shipped one")
    train.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="as in training.steps=100"
    )
    train.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and its sizes, and stop"
    )
    train.set_defaults(run=_train)

    recipes = commands.add_parser(
        "recipes", help="list the recipes that are shipped, or all keys of a recipe"
    )
    recipes.add_argument(
        "--keys",
        action="store_true",
        help="print every key with its values, default and meaning (Markdown)",
    )
    recipes.set_defaults(run=_recipes)

    data = commands.add_parser("data", help="prepare data").add_subparsers(
        dest="data_command", required=True, metavar="COMMAND"
    )
    build = data.add_parser(
        "build",
        help="tokenize text to a .bin/.idx corpus",
        description="Tokenize text files, .jsonl and .parquet files, and folders of them to Megatron's .bin/.idx.",
    )
    build.add_argument("sources", nargs="+", metavar="SOURCE")
    build.add_argument(
        "--key",
        default="text",
        help="of the text in a .jsonl line, or its .parquet column (default text)",
    )
    build.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: all cores)",
    )
    build.add_argument(
        "--tokenizer", default="bytes", help="bytes (default), or the path of a tokenizer.json"
    )
    build.add_argument(
        "--out",
        required=True,
        metavar="PREFIX",
        help="writes PREFIX.bin, PREFIX.idx and PREFIX.json",
    )
    build.set_defaults(run=_data_build)

    generate = commands.add_parser("generate", help="sample text from a trained run")
    generate.add_argument("run_dir", metavar="RUN")
    generate.add_argument("--prompt", default="import ")
    generate.add_argument(
        "--tokens", type=int, default=256, help="tokens to add at most (default 256)"
    )
    generate.add_argument(
        "--temperature", type=float, default=0.8, help="0 for the likeliest token (default 0.8)"
    )
    generate.add_argument("--seed", type=int, default=0)
    generate.set_defaults(run=_generate)

    export = commands.add_parser(
        "export",
        help="write a run's model for transformers",
        description="Write a run's model as a folder that transformers loads: as an architecture that it has where the layers "
        "are exactly one, else with code that goes with it. Its logits are compared with the run's first.",
    )
    export.add_argument(
        "run_dir",
        metavar="RUN[@STEP]",
        help="a run's folder; without a step, its newest checkpoint",
    )
    export.add_argument("out", metavar="OUT", help="a new folder")
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the weights (default: that of training)",
    )
    export.set_defaults(run=_export)

    check = commands.add_parser(
        "check-export", help="compare an exported model's logits with its run's"
    )
    check.add_argument("folder", metavar="OUT")
    check.add_argument("run_dir", metavar="RUN[@STEP]")
    check.set_defaults(run=_check_export)

    verify = commands.add_parser(
        "verify",
        help="check a recipe's layers over ranks against one rank",
        description="On the CPU, with the recipe's layers and patterns in a small model: replace tokens, see which positions "
        "change, and compare loss and gradients over context-parallel ranks with those of one.",
    )
    verify.add_argument("recipe", help="path of a YAML recipe, or the name of a shipped one")
    verify.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="as in parallel.schedule=ring"
    )
    verify.add_argument(
        "--cp", type=int, metavar="N", help="ranks (default: those of the recipe, at least 2)"
    )
    verify.add_argument("--seen", help=argparse.SUPPRESS)  # of a rank: where to write what it saw
    verify.set_defaults(run=_verify)

    plan = commands.add_parser(
        "plan",
        help="predict memory, messages and time on GPUs",
        description="Predict what a recipe takes on a number of GPUs: memory, arithmetic, messages and time. Needs no GPU.",
    )
    plan.add_argument("recipe", help="path of a YAML recipe, or the name of a shipped one")
    plan.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="as in parallel.cp=8"
    )
    plan.add_argument(
        "--gpus", type=int, metavar="N", help="(default: launch.processes of the recipe)"
    )
    plan.add_argument("--device", default="h100", help="a100, h100 (default), h200 or b200")
    plan.add_argument(
        "-o",
        "--out",
        default="plan.png",
        metavar="PNG",
        help="bytes against ranks (default %(default)s)",
    )
    plan.set_defaults(run=_plan)

    slurm = commands.add_parser(
        "slurm",
        help="write, check and submit a batch script",
        description="Write a batch script for SLURM that trains a recipe on several nodes: it stops the run before its time is "
        "up, saves, and puts itself back into the queue. Its degrees are checked first.",
    )
    slurm.add_argument("recipe", help="path of a YAML recipe, or the name of a shipped one")
    slurm.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="as in parallel.cp=8"
    )
    slurm.add_argument("--nodes", type=int, required=True, metavar="N")
    slurm.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="N", help="(default 8; 0 for CPUs)"
    )
    slurm.add_argument(
        "--processes-per-node", type=int, metavar="N", help="(default: one for each GPU)"
    )
    slurm.add_argument(
        "--cpus-per-task", type=int, metavar="N", help="cores of a node that the job has"
    )
    slurm.add_argument("--time", required=True, metavar="T", help="minutes, HH:MM:SS or D-HH:MM:SS")
    slurm.add_argument(
        "--notice",
        type=int,
        default=300,
        metavar="S",
        help="seconds before its end to save in (default 300)",
    )
    for name in ("account", "partition", "qos", "job-name"):
        slurm.add_argument(f"--{name}", metavar="NAME")
    slurm.add_argument(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="of shell, as 'source .venv/bin/activate'; repeatable",
    )
    slurm.add_argument(
        "--restarts",
        type=int,
        default=3,
        metavar="N",
        help="within the job where a rank dies (default 3)",
    )
    slurm.add_argument(
        "--requeues", type=int, default=100, metavar="N", help="of the job at most (default 100)"
    )
    slurm.add_argument(
        "--out", metavar="FILE", help="(default: slurm/train.sbatch in the run's folder)"
    )
    slurm.add_argument("--submit", action="store_true")
    slurm.set_defaults(run=_slurm)

    evaluate = commands.add_parser("eval", help="measure what a trained run can do").add_subparsers(
        dest="eval_command", required=True, metavar="COMMAND"
    )
    mqar = evaluate.add_parser(
        "mqar",
        help="recall (MQAR) at trained and longer lengths",
        description="Accuracy of a run with data.mqar in the recall task, at trained and longer lengths.",
    )
    mqar.add_argument("run_dir", metavar="RUN")
    mqar.add_argument(
        "--lengths",
        metavar="T,T",
        help="tokens (default: the trained ones, and twice and four times the hardest)",
    )
    mqar.add_argument(
        "--pairs",
        metavar="N,N",
        help="with every length where they fit (default: as for --lengths)",
    )
    mqar.add_argument("--examples", type=int, default=500, help="of each (default 500)")
    mqar.add_argument("--seed", type=int, default=0, help="of the examples (default 0)")
    mqar.set_defaults(run=_eval_mqar)
    loss = evaluate.add_parser(
        "loss",
        help="held-out loss by the place in the context",
        description="Held-out loss by the place in the context, over documents that are long enough for all of it.",
    )
    needle = evaluate.add_parser(
        "needle",
        help="a number that is hidden in a text",
        description="Whether a run finds a number that is hidden in held-out text, by the text's length and its depth there.",
    )
    tasks = evaluate.add_parser(
        "tasks",
        help="tasks of RULER's kind",
        description="Tasks of RULER's kind: several numbers in held-out text, one among a crowd of them, one that is passed on "
        "from name to name, the most frequent word.",
    )
    for command, run, count in (
        (loss, _eval_loss, None),
        (needle, _eval_needle, 20),
        (tasks, _eval_tasks, 50),
    ):
        command.add_argument("run_dir", metavar="RUN")
        command.add_argument(
            "--lengths",
            metavar="T,T",
            help="tokens (default: as trained, twice and four times as many, where there is text)",
        )
        command.add_argument(
            "--data", metavar="PREFIX", help="of a corpus (default: the run's held-out text)"
        )
        if count:
            command.add_argument(
                "--examples", type=int, default=count, help=f"of each (default {count})"
            )
            command.add_argument("--seed", type=int, default=0, help="of the examples (default 0)")
        command.set_defaults(run=run)
    loss.add_argument(
        "--documents", type=int, default=64, help="of each length at most (default 64)"
    )
    needle.add_argument(
        "--depths", type=int, default=5, help="from the beginning to the end (default 5)"
    )
    tasks.add_argument(
        "--tasks", metavar="NAME,NAME", help="several, crowd, chain, frequent (default: all)"
    )

    doctor = commands.add_parser(
        "doctor", help="show what this machine has for training, and what it lacks"
    )
    doctor.add_argument(
        "--folder", default="runs", metavar="DIR", help="where runs are kept (default runs)"
    )
    doctor.add_argument(
        "--between-ranks", action="store_true", help=argparse.SUPPRESS
    )  # as one of them
    doctor.set_defaults(run=_doctor)

    status = commands.add_parser(
        "status", help="show how far a run is, and which of its checkpoints are whole"
    )
    status.add_argument("run_dir", metavar="RUN")
    status.set_defaults(run=_status)

    plot = commands.add_parser("plot", help="draw a run's loss curve")
    plot.add_argument("run_dir", metavar="RUN")
    plot.set_defaults(run=_plot)

    show = commands.add_parser(
        "show-pattern",
        help="draw what each KV head sees",
        description="Draw an attention pattern, or those of a recipe, and print its density and ideal speed-up.",
    )
    show.add_argument(
        "pattern", metavar="EXPR|RECIPE", help="as 'S2(64, 16, 16) | Sinks(4)', or a recipe"
    )
    show.add_argument("-o", "--out", required=True, metavar="PNG", help="file to draw to")
    show.add_argument(
        "--heads", type=int, metavar="N", help="KV heads (default 4; a recipe has its own)"
    )
    show.add_argument(
        "--length",
        type=int,
        metavar="T",
        help="tokens (default: enough to show the structure, or the recipe's)",
    )
    show.set_defaults(run=_show_pattern)

    bench = commands.add_parser("bench", help="measure speed, memory and recall").add_subparsers(
        dest="bench_command", required=True, metavar="COMMAND"
    )
    attention = bench.add_parser(
        "attention",
        help="softmax attention against dense kernels",
        description="Check, then measure softmax attention under patterns against dense kernels, in turns.",
    )
    attention.add_argument(
        "--pattern",
        action="append",
        metavar="EXPR",
        help="may be repeated (default 'S2(64, 16, 16)' and 'Window(1024)')",
    )
    attention.add_argument(
        "--lengths", default="8192,32768", metavar="T,T", help="tokens (default %(default)s)"
    )
    attention.add_argument(
        "--backend",
        default="torch",
        help="of ours: torch (default), triton, flash, reference or auto",
    )
    attention.add_argument("--heads", type=int, default=4, help="(default 4)")
    attention.add_argument("--kv-heads", type=int, default=4, help="(default 4)")
    attention.add_argument("--head-dim", type=int, default=64, help="(default 64)")
    attention.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: bfloat16 on CUDA, float32 on CPU",
    )
    attention.add_argument("--repeats", type=int, default=5, help="(default 5)")
    attention.add_argument(
        "--out",
        default="bench",
        metavar="FOLDER",
        help="gets attention.json and .png (default bench)",
    )
    attention.set_defaults(run=_bench_attention)

    linear = bench.add_parser(
        "linear",
        help="linear attention against its length",
        description="Check, then measure every linear mixer's operation against the length, and dense attention, in turns.",
    )
    linear.add_argument(
        "--mixer",
        action="append",
        metavar="NAME",
        help="may be repeated (default: all that are linear)",
    )
    linear.add_argument(
        "--lengths", default="4096,16384,65536", metavar="T,T", help="tokens (default %(default)s)"
    )
    linear.add_argument(
        "--dense-up-to",
        type=int,
        default=32768,
        metavar="T",
        help="skip dense attention of more tokens (default %(default)s)",
    )
    linear.add_argument(
        "--backend",
        default="auto",
        help="torch, triton, fla, reference or auto: on CUDA the first three, else torch (default)",
    )
    linear.add_argument("--heads", type=int, default=4, help="(default 4)")
    linear.add_argument("--head-dim", type=int, default=64, help="(default 64)")
    linear.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: bfloat16 on CUDA, float32 on CPU",
    )
    linear.add_argument("--repeats", type=int, default=5, help="(default 5)")
    linear.add_argument(
        "--out", default="bench", metavar="FOLDER", help="gets linear.json and .png (default bench)"
    )
    linear.set_defaults(run=_bench_linear)

    spread = bench.add_parser(
        "parallel",
        help="attention over ranks against one rank",
        description="Measure the operations over context-parallel ranks, processes of one thread on this CPU, against one of "
        "them, in turns.",
    )
    spread.add_argument("--ranks", type=int, default=2, help="(default 2)")
    spread.add_argument("--length", type=int, default=16384, help="tokens (default %(default)s)")
    spread.add_argument("--heads", type=int, default=4, help="(default 4)")
    spread.add_argument("--kv-heads", type=int, default=2, help="(default 2)")
    spread.add_argument("--head-dim", type=int, default=64, help="(default 64)")
    spread.add_argument("--repeats", type=int, default=3, help="(default 3)")
    spread.add_argument(
        "--out",
        default="bench",
        metavar="FOLDER",
        help="gets parallel.json and .png (default bench)",
    )
    spread.set_defaults(run=_bench_parallel)

    memory = bench.add_parser(
        "memory",
        help="memory of a training step, and the longest sequence",
        description="Measure what a training step of a Llama needs beside its weights on this CPU, with each of the memory "
        "options and beside plain PyTorch and transformers.",
    )
    train = bench.add_parser(
        "train",
        help="the training loop against a plain one",
        description="Measure the steps of a Llama's training by longspan, by a plain PyTorch loop and by transformers' Trainer "
        "on this CPU, in turns.",
    )
    for command, hidden, vocabulary in ((memory, 256, 32768), (train, 256, 8192)):
        command.add_argument("--hidden", type=int, default=hidden, help="(default %(default)s)")
        command.add_argument("--layers", type=int, default=4, help="(default 4)")
        command.add_argument("--heads", type=int, default=4, help="(default 4)")
        command.add_argument("--kv-heads", type=int, default=2, help="(default 2)")
        command.add_argument(
            "--intermediate", type=int, default=768, help="of the MLPs (default %(default)s)"
        )
        command.add_argument(
            "--vocabulary", type=int, default=vocabulary, help="(default %(default)s)"
        )
        files = "memory.json and .png" if command is memory else "train.json"
        command.add_argument(
            "--out", default="bench", metavar="FOLDER", help=f"gets {files} (default bench)"
        )
    memory.add_argument(
        "--budget-mib", type=int, default=1024, help="that a step may take (default 1024)"
    )
    memory.set_defaults(run=_bench_memory)
    train.add_argument(
        "--length", type=int, default=2048, help="tokens of a sequence (default 2048)"
    )
    train.add_argument("--batch", type=int, default=2, help="sequences of a step (default 2)")
    train.add_argument("--steps", type=int, default=10, help="timed in a turn (default 10)")
    train.add_argument("--repeats", type=int, default=3, help="turns (default 3)")
    train.set_defaults(run=_bench_train)

    recall = bench.add_parser(
        "mqar",
        help="recall (MQAR) of the mixers",
        description="Train recipes of the recall task with several learning rates and seeds, and tabulate what they reach. "
        "Killed at any time, the same command goes on.",
    )
    recall.add_argument(
        "recipes",
        nargs="*",
        metavar="RECIPE",
        help="files or shipped names (default: all of mqar/)",
    )
    recall.add_argument(
        "--lrs", default="1e-2,3e-3", metavar="LR,LR", help="learning rates (default %(default)s)"
    )
    recall.add_argument("--seeds", default="0,1,2", metavar="N,N", help="(default %(default)s)")
    recall.add_argument(
        "--jobs", type=int, default=2, help="runs at a time, of one thread each (default 2)"
    )
    recall.add_argument("--steps", type=int, help="instead of those of the recipes")
    recall.add_argument(
        "--examples", type=int, default=500, help="of each length and number of pairs (default 500)"
    )
    recall.add_argument(
        "--work", default="runs/mqar", metavar="FOLDER", help="of the runs (default %(default)s)"
    )
    recall.add_argument(
        "--out",
        default="docs/mqar",
        metavar="PREFIX",
        help="writes PREFIX.json, .md, .png (default %(default)s)",
    )
    recall.set_defaults(run=_bench_mqar)
    return parser


def _train(options: argparse.Namespace) -> int:
    from .commands.train import train

    return train(options.recipe, options.overrides, options.dry_run)


def _recipes(options: argparse.Namespace) -> None:
    if options.keys:
        from ..trainer.recipe.keys import recipe_keys

        print(recipe_keys(), end="")
        return
    from ..trainer.recipe.file import SHIPPED, load_recipe, shipped_recipes

    names = {
        str(path.relative_to(SHIPPED).with_suffix("")): load_recipe(str(path))
        for path in shipped_recipes()
    }
    width = max(map(len, names))
    for name, recipe in names.items():
        print(f"{name:<{width}}  {recipe.description}")


def _data_build(options: argparse.Namespace) -> None:
    from pathlib import Path

    from ..trainer.data.build import build_corpus
    from ..trainer.data.tokenizer import load_tokenizer

    tokenizer, sources = (
        load_tokenizer(options.tokenizer, "--tokenizer"),
        [Path(source) for source in options.sources],
    )
    workers = max(1, options.workers)
    record = build_corpus(sources, tokenizer, options.out, workers=workers, key=options.key)
    print(
        f"{options.out}: {record.documents:,} documents, {record.tokens:,} tokens, {record.bytes:,} bytes of text"
    )


def _generate(options: argparse.Namespace) -> None:
    from ..trainer.checkpoint.run_folder import RunFolder
    from ..trainer.data.tokenizer import recipe_tokenizer
    from .process import process_group

    folder = RunFolder(options.run_dir)
    recipe_tokenizer(
        folder.recipe
    )  # a wrong folder, or one without text, is told before torch is imported
    from ..trainer.engines.inference import generate, load_for_inference

    with process_group(os.cpu_count() or 1):
        engine = load_for_inference(folder)
        print(
            generate(
                folder, engine, options.prompt, options.tokens, options.temperature, options.seed
            )
        )


def _export(options: argparse.Namespace) -> None:
    from .commands.export import export

    export(options.run_dir, options.out, options.dtype, os.cpu_count() or 1)


def _check_export(options: argparse.Namespace) -> None:
    from .commands.export import check

    check(options.folder, options.run_dir, os.cpu_count() or 1)


def _doctor(options: argparse.Namespace) -> int:
    from .commands.doctor import between_ranks, doctor

    return between_ranks() if options.between_ranks else doctor(options.folder)


def _slurm(options: argparse.Namespace) -> None:
    from .commands.slurm import slurm

    slurm(options)


def _verify(options: argparse.Namespace) -> int:
    from .commands.verify import verify

    return verify(options)


def _plan(options: argparse.Namespace) -> None:
    from .commands.plan import plan

    plan(options)


def _eval_mqar(options: argparse.Namespace) -> None:
    from .commands.evaluate import eval_mqar

    eval_mqar(options)


def _eval_loss(options: argparse.Namespace) -> None:
    from .commands.evaluate import eval_loss

    eval_loss(options)


def _eval_needle(options: argparse.Namespace) -> None:
    from .commands.evaluate import eval_needle

    eval_needle(options)


def _eval_tasks(options: argparse.Namespace) -> None:
    from .commands.evaluate import eval_tasks

    eval_tasks(options)


def _status(options: argparse.Namespace) -> None:
    from ..trainer.checkpoint.run_folder import RunFolder
    from .commands.status import status

    status(RunFolder(options.run_dir))


def _plot(options: argparse.Namespace) -> None:
    from ..trainer.checkpoint.run_folder import RunFolder
    from ..trainer.run.plot import plot_loss

    print(plot_loss(RunFolder(options.run_dir)))


def _show_pattern(options: argparse.Namespace) -> None:
    from .commands.show_pattern import show_pattern

    show_pattern(options.pattern, options.out, options.heads, options.length)


def _bench_attention(options: argparse.Namespace) -> None:
    from .bench.attention import bench_attention

    bench_attention(options)


def _bench_linear(options: argparse.Namespace) -> None:
    from .bench.linear import bench_linear

    bench_linear(options)


def _bench_parallel(options: argparse.Namespace) -> int:
    from .bench.parallel import bench_parallel

    return bench_parallel(options)


def _bench_memory(options: argparse.Namespace) -> None:
    from .bench.memory import bench_memory

    bench_memory(options)


def _bench_train(options: argparse.Namespace) -> None:
    from .bench.train import bench_train

    bench_train(options)


def _bench_mqar(options: argparse.Namespace) -> int:
    from .bench.mqar import bench_mqar

    return bench_mqar(options)
