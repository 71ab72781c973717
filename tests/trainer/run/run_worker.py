"""One rank of a real run, with what goes wrong on the way: RECIPE [FAULT=STEP ...] [section.key=value ...]

Every step's loss, bit by bit, and a hash of the tokens that all ranks saw go to RUN/seen.txt.
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
GIVEN = [(argument, *argument.partition("=")[::2]) for argument in ARGUMENTS]
FAULTS = {name: int(step) for _, name, step in GIVEN if "." not in name and name != "stages"}
if "engine.name=deepspeed" in ARGUMENTS:
    from longspan.trainer.engines.deepspeed import DeepSpeedEngine as Engine
else:
    from longspan.trainer.engines.megatron import MegatronEngine as Engine
OVERRIDES = [argument for argument, name, _ in GIVEN if name not in FAULTS]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def limit_files(size: int) -> None:
    """No file of this process may grow beyond that: what a full disk does, for any user."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def tokens_hash(engine: Engine, batches) -> str:
    """Of the global batch, put together from all ranks' parts in the order of its samples."""
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(
        everyones, (engine.batch_shard, [(b.tokens, b.sequence.layout) for b in batches])
    )
    parts = {(share.data_rank, share.context_rank): seen for share, seen in everyones}
    digest, layout = hashlib.sha256(), batches[0].sequence.layout
    for i in range(len(batches)):
        for data_rank in range(engine.batch_shard.data_ranks):
            whole = layout.unshard([parts[data_rank, rank][i][0] for rank in range(layout.ranks)])
            digest.update(whole.numpy().tobytes())
    return digest.hexdigest()[:16]


class Run:
    """Where the run is."""

    step = 0


real_step, real_restore = Engine.step, checkpointer.Checkpointer.restore
real_sha256, real_prune, real_write_item = (
    checkpointer.sha256,
    checkpointer.prune,
    filesystem._write_item,
)


def step(self, batches, lr):
    at, hook = Run.step + 1, None
    Run.step = at
    if at in (
        FAULTS.get("disk-full"),
        FAULTS.get("kill"),
    ):  # a save before it is through, on a slow machine as well
        while list(Path(self.recipe.run_dir, "checkpoints").glob("*.partial")):
            time.sleep(0.01)
    if at == FAULTS.get("disk-full"):
        limit_files(FAULTS.get("bytes", 0))
    if at == FAULTS.get("disk-free"):
        limit_files(resource.RLIM_INFINITY)
    if (
        at == FAULTS.get("kill") and dist.get_world_size() - 1 == RANK
    ):  # gradients are ready, the update is not
        self._optimizer.step_with_ready_grads = die
    for name, number in (("term", signal.SIGTERM), ("usr1", signal.SIGUSR1)):
        if at == FAULTS.get(name) and dist.get_world_size() - 1 == RANK:
            os.kill(os.getpid(), number)
    if at == FAULTS.get("stop-file") and RANK == 0:
        Path(self.recipe.run_dir, "STOP").touch()
    if (
        at in range(FAULTS.get("nan-loss", 0), FAULTS.get("nan-loss", 0) + FAULTS.get("times", 1))
        and RANK == 1
    ):
        hook = self.model.decoder.layers[0].register_forward_hook(
            lambda layer, inputs, out: (out[0] * torch.nan, out[1])
        )
    if at == FAULTS.get("inf-gradient") and RANK == 1:
        hook = next(self.model.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    before = fingerprint(self) if "nan-loss" in FAULTS or "inf-gradient" in FAULTS else None
    tokens = tokens_hash(self, batches)
    result = real_step(self, batches, lr)
    if hook:
        hook.remove()
    if before is not None:
        assert (fingerprint(self) == before) == (not result.updated)
    if RANK == 0:
        before, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        limit_files(resource.RLIM_INFINITY)
        with Path(self.recipe.run_dir, "seen.txt").open("a") as file:
            file.write(f"{at} {result.loss.hex()} {tokens}\n")
        limit_files(before)
    return result


def fingerprint(engine: Engine) -> str:
    """Of this rank's weights, moments and what the model computes with, bit by bit."""
    digest = hashlib.sha256()
    for name, shards in engine.state().items():
        if not name.startswith("rng."):
            for _, data in shards.boxes:
                digest.update(data.contiguous().numpy().tobytes())
    for parameter in engine.model.parameters():
        whole = (
            engine._whole(parameter) if hasattr(engine, "_whole") else parameter.detach()
        )  # of ZeRO-3
        digest.update(whole.numpy().tobytes())
    return digest.hexdigest()


def restored(self, *arguments):
    manifest = real_restore(self, *arguments)
    Run.step = manifest.step if manifest else 0
    return manifest


def sha256(path: Path) -> str:
    if (
        path.parent.name == f"step-{FAULTS.get('kill-in-save', 0):08}.partial"
    ):  # files are written, the manifest is not
        die()
    return real_sha256(path)


def write_item(transforms, stream, *rest):
    written = real_write_item(transforms, stream, *rest)
    if Run.step >= FAULTS.get("kill-in-write", sys.maxsize):  # a file is begun, and not all in it
        stream.flush()
        die()
    return written


def prune(folder: Path, keep: int) -> None:
    if (folder / f"step-{FAULTS.get('kill-before-clean-up', 0):08}").exists():
        die()
    if "no-removal" in FAULTS:
        raise PermissionError("not permitted")
    real_prune(folder, keep)


Engine.step, checkpointer.Checkpointer.restore = step, restored
checkpointer.sha256, checkpointer.prune, filesystem._write_item = sha256, prune, write_item
main(["train", RECIPE, *OVERRIDES])
