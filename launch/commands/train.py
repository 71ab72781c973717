"""``longspan train``: checks in the parent, then the ranks, then the report."""

import contextlib
import os
import sys

from ...trainer.checkpoint.files import checkpoints
from ...trainer.checkpoint.run_folder import RunFolder
from ...trainer.data.prepare import PreparedData, prepare_data
from ...trainer.errors import STOPPED, UserError
from ...trainer.huggingface.initial import require_initial
from ...trainer.recipe.file import load_recipe, to_yaml
from ...trainer.recipe.schema import Recipe
from ...trainer.run.metrics import require_loggers
from ..process import host_memory, process_group, under_torchrun
from ..ranks import run_ranks


def train(name: str, overrides: list[str], dry_run: bool) -> int:
    """Train a recipe; the exit status. Under torchrun this process is one rank, else it starts the ranks itself."""
    world = [f"launch.processes={os.environ['WORLD_SIZE']}"] if under_torchrun() else []
    recipe = load_recipe(name, [*overrides, *world])
    if dry_run:
        _print_dry_run(recipe)
        return 0
    require_loggers(recipe)
    _require_host_memory(recipe)
    if under_torchrun():
        return _work(recipe)
    folder = RunFolder(recipe.run_dir)
    folder.require_usable(recipe)
    folder.stop_file.unlink(
        missing_ok=True
    )  # of before this run; torchrun's ranks may be in the midst of one
    _prepare(recipe, folder)
    return _start_ranks(recipe, name, overrides) if recipe.launch.processes > 1 else _work(recipe)


def _require_host_memory(recipe: Recipe) -> None:
    """Of this machine, for what its ranks move there."""
    engine = recipe.engine
    engine_offloads = engine.offloads_optimizer or engine.offloads_weights
    if not engine_offloads and not recipe.memory.offload_inputs:
        return
    from ...trainer.data.tokenizer import recipe_vocab_size
    from ...trainer.predict.estimate import host_bytes

    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", recipe.launch.processes))
    needed, there = ranks * host_bytes(recipe, recipe_vocab_size(recipe)), host_memory()
    if needed > there:
        raise UserError(
            f"{engine.offload_key}: what the {ranks} processes here offload takes {needed / 2**30:,.1f} GiB, but this machine has "
            f"{there / 2**30:,.1f} GiB; use more machines, or offload less"
        )


def _prepare(recipe: Recipe, folder: RunFolder) -> PreparedData:
    """Refuse what can be seen to be wrong before any model is built."""
    folder.require_usable(recipe)
    if not checkpoints(folder.checkpoints):
        require_initial(recipe)
    data = prepare_data(recipe)
    folder.require_same_data(data.fingerprints)
    return data


def _work(recipe: Recipe) -> int:
    """Run as one rank; the first also reports."""
    with (
        process_group(_threads(recipe, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))),
        contextlib.ExitStack() as stack,
    ):
        import torch.distributed as dist

        from ...trainer.ranks import RankGroup
        from ...trainer.run.loop import train as train_loop

        first, ranks, folder = dist.get_rank() == 0, RankGroup(), RunFolder(recipe.run_dir)
        with ranks.raise_on_all():
            data = _prepare(recipe, folder) if first else prepare_data(recipe)
            if first:
                stack.enter_context(folder.lock())
        finished = train_loop(recipe, data, ranks)
    if (
        not finished
    ):  # torchrun takes any status but 0 for a failure, and would start the ranks again
        return 0 if "TORCHELASTIC_RUN_ID" in os.environ else STOPPED
    if first:
        _report(recipe, data, folder)
    return 0


def _start_ranks(recipe: Recipe, name: str, overrides: list[str]) -> int:
    import torch

    count, gpus = recipe.launch.processes, torch.cuda.device_count()
    if 0 < gpus < count:
        raise UserError(
            f"launch.processes: {count}, but this machine has {gpus} GPUs; use {gpus}, or hide them to use the CPU"
        )
    return run_ranks(
        [sys.executable, "-u", "-m", "longspan", "train", name, *overrides],
        count,
        _threads(recipe, count),
    )


def _threads(recipe: Recipe, processes: int) -> int:
    """CPU threads of one of this machine's ``processes``."""
    return recipe.launch.threads or max(1, (os.cpu_count() or 1) // processes)


def _print_dry_run(recipe: Recipe) -> None:
    from ...trainer.data.tokenizer import recipe_vocab_size
    from ...trainer.huggingface.native import Source
    from ...trainer.huggingface.target import describe_target
    from ...trainer.predict.flops import parameter_count, training_flops

    parallel, processes, vocab_size = (
        recipe.parallel,
        recipe.launch.processes,
        recipe_vocab_size(recipe),
    )
    print(to_yaml(recipe))
    print(f"parameters       {parameter_count(recipe.model, vocab_size):,}")
    print(f"tokens per step  {recipe.tokens_per_step:,}")
    flops = training_flops(recipe.model, recipe.training.seq_length, vocab_size)
    shares = ", ".join(f"{name} {part / sum(flops.values()):.0%}" for name, part in flops.items())
    print(f"MFLOP a token    {sum(flops.values()) / 1e6:,.1f} forward and backward: {shares}")
    print(
        f"processes        {processes} = dp {recipe.data_parallel} x cp {parallel.cp} x pp {parallel.pp} x tp {parallel.tp}"
    )
    print(
        f"longspan export  {describe_target(Source(recipe.model, vocab_size, recipe.training.seq_length))}"
    )


def _report(recipe: Recipe, data: PreparedData, folder: RunFolder) -> None:
    """What the run reached, beside a baseline and with a sample where the recipe asks for them."""
    records = [record for record in folder.read_metrics() if "eval/loss" in record]
    if records:
        loss, bits = records[-1]["eval/loss"], records[-1].get("eval/bits_per_byte")
        print(f"held-out: {f'{bits:.3f} bits per byte' if bits else f'loss {loss:.4f}'}")
    if recipe.evaluation.ngram_baseline:  # the data are corpora then, with one that is held out
        from ...trainer.data.corpus import Corpus
        from ...trainer.data.tokenizer import ByteTokenizer
        from ...trainer.evaluation.ngram import order2_bits_per_token

        vocab_size = ByteTokenizer.vocab_size
        held_out = Corpus(data.validation, vocab_size)
        bits = order2_bits_per_token(
            [Corpus(prefix, vocab_size) for prefix in data.sources], held_out
        )
        print(
            f"an order-2 byte model on the same: {bits / (held_out.bytes_per_token or 1):.3f} bits per byte"
        )
    if recipe.evaluation.sample_prompt:
        from ...trainer.engines.inference import generate, load_for_inference

        with process_group(os.cpu_count() or 1, alone=True):
            engine = load_for_inference(folder)
            print(
                f"a sample:\n{generate(folder, engine, recipe.evaluation.sample_prompt, 300, 0.8, 0)}"
            )
    command = "eval mqar" if recipe.data.mqar else "generate"
    print(f"{folder.loss_plot} shows the curve; go on with: longspan {command} {folder.path}")
