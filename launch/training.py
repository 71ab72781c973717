"""The work of ``longspan train``: checks in the parent process, then the ranks, then the report.

A recipe for several processes starts itself as ranks (:mod:`longspan.launch.ranks`): the same
command with torchrun's variables. Under torchrun this process is one of the ranks from the
beginning.
"""

import contextlib
import os
import sys

from ..trainer.checkpoint.files import checkpoints
from ..trainer.checkpoint.run_folder import RunFolder
from ..trainer.data.prepare import CorpusData, PreparedData, prepare_data
from ..trainer.errors import STOPPED, UserError
from ..trainer.huggingface.initial import require_initial
from ..trainer.recipe.file import load_recipe, to_yaml
from ..trainer.recipe.schema import Recipe
from ..trainer.run.metrics import require_loggers
from ..trainer.versions import TRAINING, require_supported
from .process import host_memory, process_group, under_torchrun
from .ranks import run_ranks


def train(name: str, overrides: list[str], dry_run: bool) -> int:
    """Train a recipe, as one of its ranks, as its only process, or by starting its ranks.

    Args:
        name: path of a recipe, or the name of a shipped one.
        overrides: ``section.key=value`` each.
        dry_run: only print the resolved recipe and its sizes.

    Returns:
        The exit status.

    Raises:
        UserError: if anything can be seen to be wrong before the model is built.
    """
    world_size = [f"launch.processes={os.environ['WORLD_SIZE']}"] if under_torchrun() else []
    recipe = load_recipe(name, [*overrides, *world_size])
    uses_deepspeed = recipe.engine.name == "deepspeed"
    require_supported(*TRAINING, *(["deepspeed"] if uses_deepspeed else []))
    if dry_run:
        _print_dry_run(recipe)
        return 0

    require_loggers(recipe)
    _require_host_memory(recipe)
    if under_torchrun():
        return _train_rank(recipe)

    folder = RunFolder(recipe.run_dir)
    folder.require_usable(recipe)
    # A request to stop from before this run. Under torchrun it stays: the ranks may be restarted
    # ones of a run.
    folder.remove_stop_file()
    if folder.tokenizer.differs_from(recipe):
        print(
            f"longspan: data.tokenizer: {recipe.data.tokenizer} is not what the run in "
            f"{folder.path} began with; its own copy is used",
            file=sys.stderr,
        )
    _prepare(_with_run_tokenizer(recipe, folder), folder)
    if recipe.launch.processes > 1:
        return _start_ranks(recipe, name, overrides)
    return _train_rank(recipe)


def _require_host_memory(recipe: Recipe) -> None:
    """Raise UserError if this machine's memory cannot hold what its ranks offload to it."""
    engine = recipe.engine
    offloads_engine_state = engine.offloads_optimizer or engine.offloads_weights
    if not (offloads_engine_state or recipe.memory.offload_inputs):
        return

    from ..trainer.data.tokenizer import recipe_vocab_size
    from ..trainer.predict.estimate import host_bytes

    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", recipe.launch.processes))
    needed = num_ranks * host_bytes(recipe, recipe_vocab_size(recipe))
    available = host_memory()
    if needed > available:
        raise UserError(
            f"{engine.offload_key}: what the {num_ranks} processes here offload takes "
            f"{needed / 2**30:,.1f} GiB, "
            f"but this machine has {available / 2**30:,.1f} GiB; use more machines, or offload less"
        )


def _prepare(recipe: Recipe, folder: RunFolder) -> PreparedData:
    """Prepare the data, and refuse what can be seen to be wrong before any model is built."""
    folder.require_usable(recipe)
    if not checkpoints(folder.checkpoints):
        require_initial(recipe)
    data = prepare_data(recipe)
    folder.require_same_data(data.fingerprints)
    return data


def _with_run_tokenizer(recipe: Recipe, folder: RunFolder) -> Recipe:
    """Return the recipe with the tokenizer that the run keeps, if there is a run."""
    return folder.tokenizer.read_by(recipe) if folder.tokenizer.exists() else recipe


def _start_ranks(recipe: Recipe, name: str, overrides: list[str]) -> int:
    import torch

    num_ranks = recipe.launch.processes
    gpus = torch.cuda.device_count()
    if 0 < gpus < num_ranks:
        raise UserError(
            f"launch.processes: {num_ranks}, but this machine has {gpus} GPUs; "
            f"use {gpus}, or hide them to use the CPU"
        )
    command = [sys.executable, "-u", "-m", "longspan", "train", name, *overrides]
    return run_ranks(command, num_ranks, _threads(recipe, num_ranks))


def _train_rank(recipe: Recipe) -> int:
    """Train as one rank; the first one also reports. Returns the exit status."""
    threads = _threads(recipe, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    timeout_s = recipe.launch.collective_timeout_s
    with process_group(threads, timeout_s=timeout_s), contextlib.ExitStack() as stack:
        import torch.distributed as dist

        from ..trainer.ranks import RankGroup
        from ..trainer.run.loop import train as train_loop

        is_first = dist.get_rank() == 0
        rank_group = RankGroup(timeout_s)
        folder = RunFolder(recipe.run_dir)
        recipe = _with_run_tokenizer(recipe, folder)
        with rank_group.raise_on_all():
            data = _prepare(recipe, folder) if is_first else prepare_data(recipe)
            if is_first:
                has_lock = stack.enter_context(folder.lock())
                if not has_lock:
                    print(
                        f"warning: run_dir: {folder.path} is on a file system without locks; "
                        "make sure that no other run uses it",
                        flush=True,
                    )
        finished = train_loop(recipe, data, rank_group)

    if not finished:
        # To torchrun any status but 0 is a failure, after which it would restart the ranks.
        return 0 if "TORCHELASTIC_RUN_ID" in os.environ else STOPPED
    if is_first:
        # The folder as it is now: the one above has read the recipe of the start before.
        _report(recipe, data, RunFolder(recipe.run_dir))
    return 0


def _threads(recipe: Recipe, num_processes: int) -> int:
    """Return the CPU threads of each of this machine's processes."""
    return recipe.launch.threads or max(1, (os.cpu_count() or 1) // num_processes)


def _print_dry_run(recipe: Recipe) -> None:
    from ..trainer.data.tokenizer import recipe_vocab_size
    from ..trainer.huggingface.model_to_export import ModelToExport
    from ..trainer.huggingface.registry import describe_target
    from ..trainer.predict.flops import parameter_count, training_flops

    parallel = recipe.parallel
    vocab_size = recipe_vocab_size(recipe)
    print(to_yaml(recipe))
    print(f"parameters       {parameter_count(recipe.model, vocab_size):,}")
    print(f"tokens per step  {recipe.tokens_per_step:,}")

    flops = training_flops(recipe.model, recipe.training.seq_length, vocab_size)
    total = sum(flops.values())
    shares = ", ".join(f"{name} {part / total:.0%}" for name, part in flops.items())
    print(f"MFLOP a token    {total / 1e6:,.1f} forward and backward: {shares}")

    print(
        f"processes        {recipe.launch.processes} = dp {recipe.data_parallel} "
        f"x cp {parallel.cp} x pp {parallel.pp} x tp {parallel.tp}"
    )
    for line in _backend_lines(recipe):
        print(line)
    print(f"longspan export  {describe_target(ModelToExport.of_recipe(recipe))}")
    if notice := _extension_notice(recipe):
        print(notice)


_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Of NVIDIA, of Windows' subsystem for Linux, and of AMD."""


def _backend_lines(recipe: Recipe) -> list[str]:
    """Return what to say of the mixers' backends on this machine.

    torch, which takes seconds to import, is only asked where there may be a GPU.
    """
    if any(map(os.path.exists, _GPU_DRIVERS)):
        import torch

        if torch.cuda.is_available():
            from ..attention.gpu import compute_capability
            from ..trainer.predict.backends import backend_lines

            return backend_lines(recipe, compute_capability(torch.device("cuda", 0)))
    return ["backends: torch, as there is no GPU here; longspan plan --device shows a GPU's"]


def _extension_notice(recipe: Recipe) -> str | None:
    """Return what becomes of the learning rate of the recipe's run if its steps are changed now."""
    from ..trainer.run.extend import extended_run

    folder = RunFolder(recipe.run_dir)
    with contextlib.suppress(UserError):  # a folder that training itself would refuse
        return extended_run(folder, recipe, folder.newest_step()).notice
    return None


def _report(recipe: Recipe, data: PreparedData, folder: RunFolder) -> None:
    """Print what the run reached, with a baseline and a sample if the recipe asks for them."""
    evaluations = [record for record in folder.read_metrics() if "eval/loss" in record]
    if evaluations:
        bits = evaluations[-1].get("eval/bits_per_byte")
        loss = evaluations[-1]["eval/loss"]
        print(f"held-out: {f'{bits:.3f} bits per byte' if bits else f'loss {loss:.4f}'}")

    if recipe.evaluation.ngram_baseline:
        assert isinstance(data, CorpusData), "a recipe with this baseline has a corpus"
        print(f"an order-2 byte model on the same: {_ngram_bits_per_byte(data):.3f} bits per byte")
    if recipe.evaluation.sample_prompt:
        print(f"a sample:\n{_sample(recipe.evaluation.sample_prompt, folder)}")

    command = "eval mqar" if recipe.data.mqar else "generate"
    print(f"{folder.loss_plot} shows the curve; continue with: longspan {command} {folder.path}")


def _ngram_bits_per_byte(data: CorpusData) -> float:
    """Return the held-out loss of an order-2 count-based model of bytes."""
    from ..trainer.data.corpus import Corpus
    from ..trainer.data.tokenizer import ByteTokenizer
    from ..trainer.evaluation.ngram import order2_bits_per_token

    vocab_size = ByteTokenizer.vocab_size
    corpora = data.text
    # The recipe's checks let only one held-out corpus through, the same for the whole run.
    assert corpora is not None
    assert corpora.validation is not None
    held_out = Corpus(corpora.validation, vocab_size)
    sources = [Corpus(source.prefix, vocab_size) for source in corpora.sources]
    return order2_bits_per_token(sources, held_out) / (held_out.bytes_per_token or 1)


def _sample(prompt: str, folder: RunFolder) -> str:
    from ..trainer.engines.inference import generate, load_for_inference

    with process_group(os.cpu_count() or 1, alone=True):
        engine = load_for_inference(folder)
        return generate(folder, engine, prompt, tokens=300, temperature=0.8, seed=0)
