"""One rank of a real run, with faults on the way.

Arguments: RECIPE [FAULT=STEP ...] [section.key=value ...]. Every step's loss, bit by bit, and a
hash of the tokens that all ranks saw go to RUN/seen.txt.
"""

import hashlib
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from longspan.launch.cli import main
from longspan.trainer.run import checkpointer
from torch.distributed.checkpoint import filesystem

RECIPE, *ARGUMENTS = sys.argv[1:]
RANK = int(os.environ["RANK"])
NAMED = [(argument, *argument.partition("=")[::2]) for argument in ARGUMENTS]
FAULTS = {name: int(step) for _, name, step in NAMED if "." not in name and name != "stages"}
if "engine.name=deepspeed" in ARGUMENTS:
    from longspan.trainer.engines.deepspeed import DeepSpeedEngine as Engine
else:
    from longspan.trainer.engines.megatron import MegatronEngine as Engine
OVERRIDES = [argument for argument, name, _ in NAMED if name not in FAULTS]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def limit_files(size: int) -> None:
    """Let no file of this process grow beyond that: what a full disk does, for any user."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def tokens_hash(engine: Engine, batches) -> str:
    """Hash the global batch, put together from all ranks' shards in the order of its samples."""
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(
        gathered, (engine.batch_shard, [(batch.tokens, batch.sequence.layout) for batch in batches])
    )
    seen_by = {(shard.data_rank, shard.context_rank): seen for shard, seen in gathered}
    digest = hashlib.sha256()
    layout = batches[0].sequence.layout
    for i in range(len(batches)):
        for data_rank in range(engine.batch_shard.data_ranks):
            whole = layout.unshard([seen_by[data_rank, rank][i][0] for rank in range(layout.ranks)])
            digest.update(whole.numpy().tobytes())
    return digest.hexdigest()[:16]


class Progress:
    """How far the run is."""

    step = 0


real_step = Engine.step
real_restore = checkpointer.Checkpointer.restore
real_sha256 = checkpointer.sha256
real_prune = checkpointer.prune
real_write_item = filesystem._write_item


def begin_faults(engine: Engine, now: int):
    """Do what FAULTS says of this step; return a hook to remove after it, if there is one."""
    if now in (FAULTS.get("disk-full"), FAULTS.get("kill")):
        # A save must be through before, on a slow machine as well.
        while list(Path(engine.recipe.run_dir, "checkpoints").glob("*.partial")):
            time.sleep(0.01)
    if now == FAULTS.get("disk-full"):
        limit_files(FAULTS.get("bytes", 0))
    if now == FAULTS.get("disk-free"):
        limit_files(resource.RLIM_INFINITY)

    is_last_rank = dist.get_world_size() - 1 == RANK
    if now == FAULTS.get("kill") and is_last_rank:
        # Gradients are ready, the update is not.
        engine._optimizer.step_with_ready_grads = die
    for name, number in (("term", signal.SIGTERM), ("usr1", signal.SIGUSR1)):
        if now == FAULTS.get(name) and is_last_rank:
            os.kill(os.getpid(), number)
    if now == FAULTS.get("stop-file") and RANK == 0:
        Path(engine.recipe.run_dir, "STOP").touch()

    first_nan = FAULTS.get("nan-loss", 0)
    if now in range(first_nan, first_nan + FAULTS.get("times", 1)) and RANK == 1:
        return engine.model.decoder.layers[0].register_forward_hook(
            lambda layer, inputs, out: (out[0] * torch.nan, out[1])
        )
    if now == FAULTS.get("inf-gradient") and RANK == 1:
        parameter = next(engine.model.parameters())
        return parameter.register_hook(lambda gradient: gradient * torch.inf)
    return None


def step(self, batches, lr):
    now = Progress.step = Progress.step + 1
    hook = begin_faults(self, now)
    checks_state = "nan-loss" in FAULTS or "inf-gradient" in FAULTS
    before = fingerprint(self) if checks_state else None
    tokens = tokens_hash(self, batches)

    result = real_step(self, batches, lr)

    if hook:
        hook.remove()
    if checks_state:
        assert (fingerprint(self) == before) == (not result.updated)
    if RANK == 0:
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        limit_files(resource.RLIM_INFINITY)
        with Path(self.recipe.run_dir, "seen.txt").open("a") as file:
            file.write(f"{now} {result.loss.hex()} {tokens}\n")
        limit_files(limit)
    return result


def fingerprint(engine: Engine) -> str:
    """Hash this rank's weights, moments and what the model computes with, bit by bit."""
    digest = hashlib.sha256()
    for name, shards in engine.state().items():
        if not name.startswith("rng."):
            for _, data in shards.boxes:
                digest.update(data.contiguous().numpy().tobytes())
    for parameter in engine.model.parameters():
        # ZeRO-3 spreads parameters over ranks.
        whole = engine._whole(parameter) if hasattr(engine, "_whole") else parameter.detach()
        digest.update(whole.numpy().tobytes())
    return digest.hexdigest()


def restore(self, *arguments):
    manifest = real_restore(self, *arguments)
    Progress.step = manifest.step if manifest else 0
    return manifest


def sha256(path: Path) -> str:
    # Files are written, the manifest is not.
    if path.parent.name == f"step-{FAULTS.get('kill-in-save', 0):08}.partial":
        die()
    return real_sha256(path)


def write_item(transforms, stream, *rest):
    written = real_write_item(transforms, stream, *rest)
    # A file is begun, and not all is in it.
    if Progress.step >= FAULTS.get("kill-in-write", sys.maxsize):
        stream.flush()
        die()
    return written


def prune(folder: Path, keep: int) -> None:
    if (folder / f"step-{FAULTS.get('kill-before-prune', 0):08}").exists():
        die()
    if "no-removal" in FAULTS:
        raise PermissionError("not permitted")
    real_prune(folder, keep)


Engine.step = step
checkpointer.Checkpointer.restore = restore
checkpointer.sha256 = sha256
checkpointer.prune = prune
filesystem._write_item = write_item
main(["train", RECIPE, *OVERRIDES])
