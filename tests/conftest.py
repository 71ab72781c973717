"""Fixtures that tests share: a small recipe and corpus, and real processes or threads as ranks."""

import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import pytest

# Processes that run tests beside one another share the cores; torch reads this when imported.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    num_workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_workers)))

FORKED_SCRIPT = Path(__file__).with_name("forked_script.py")
TINY = {
    "run_dir": "RUN",
    "model": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "layers": {
            "blocks": {
                "linear": {"mixer": "lightning", "num_heads": 8},
                "sparse": {
                    "mixer": "s2",
                    "block": 8,
                    "local_blocks": 2,
                    "stride": 2,
                    "qk_norm": True,
                    "norm": "sandwich",
                },
                "full": {
                    "mixer": "full",
                    "output_gate": True,
                    "rotary_fraction": 0.5,
                    "norm": "post",
                    "mlp_residual": [1.5, 0.5],
                },
            },
            "pattern": ["linear", "sparse", "linear", "full"],
        },
    },
    "data": {"sources": {"CORPUS": 1.0}},
    "training": {"steps": 20, "seq_length": 96, "global_batch_size": 4, "dtype": "float32"},
    "optimizer": {"lr": 1e-3},
    "metrics": {"log_interval": 5},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    help_text = "run the I-th of N parts of the collected tests; the N parts together run them all"
    parser.addoption("--part", metavar="I/N", default="1/1", help=help_text)


@pytest.hookimpl(trylast=True)  # after the selection by -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one part of the tests: every N-th test of each file, so that parts take equally long."""
    number, parts = (int(x) for x in config.getoption("--part").split("/"))
    if not 1 <= number <= parts:
        raise pytest.UsageError(
            f"--part {number}/{parts} must be between 1/{parts} and {parts}/{parts}"
        )
    tests_of_file: dict[Path, list[pytest.Item]] = {}
    for item in items:
        tests_of_file.setdefault(item.path, []).append(item)
    kept = {id(item) for tests in tests_of_file.values() for item in tests[number - 1 :: parts]}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


def pytest_collection_finish() -> None:
    """Leave the modules and tests out of garbage collections: each would take a second."""
    gc.freeze()


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Return 40 documents, 13 to 215 bytes long."""
    return [
        f"Document {i}: " + " ".join(f"{i * j % 97}" for j in range(3 + 11 * (i % 7)))
        for i in range(40)
    ]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, texts) -> str:
    """Return the prefix of a small corpus of the documents of ``texts``."""
    from longspan.trainer.data.build import build_corpus
    from longspan.trainer.data.tokenizer import ByteTokenizer

    folder = tmp_path_factory.mktemp("corpus")
    for i, text in enumerate(texts):
        folder.joinpath(f"{i:02}.txt").write_text(text)
    prefix = str(folder / "built" / "small")
    build_corpus([folder], ByteTokenizer(), prefix)
    return prefix


@pytest.fixture
def tiny_recipe(corpus, tmp_path) -> Path:
    """Return the file of a small recipe with three mixers and three kinds of norm.

    Its run folder is ``tmp_path / "run"``.
    """
    import yaml

    text = yaml.safe_dump(TINY).replace("RUN", str(tmp_path / "run")).replace("CORPUS", corpus)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(text)))
    return path


class Pipe:
    """A named pipe whose output a thread collects.

    Tests limit the file size of a process, which would also truncate a log file.
    """

    def __init__(self, path: Path):
        os.mkfifo(path)
        self.path = path
        self._text = ""
        read_end = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        # Held open so that the reader does not see the end of the pipe before a writer opens it.
        self._write_end = os.open(path, os.O_WRONLY)
        os.set_blocking(read_end, True)
        self._reader = threading.Thread(target=self._read, args=(read_end,))
        self._reader.start()

    def _read(self, read_end: int) -> None:
        with open(read_end) as stream:
            self._text = stream.read()

    def close(self) -> str:
        """Return everything that was written."""
        os.close(self._write_end)
        self._reader.join()
        return self._text


class Fork(NamedTuple):
    """A process started by :func:`start_fork`."""

    process: BaseProcess
    out: Pipe
    err: Pipe

    def end(self) -> tuple[str, str]:
        """Kill the process if it runs; return what it wrote to stdout and stderr."""
        self.process.kill()
        self.process.join()
        return self.out.close(), self.err.close()


def start_fork(
    forks,
    program: Path | str,
    arguments: tuple,
    environment: dict[str, str],
    streams: Path,
) -> Fork:
    """Start a script, or a module by its name, in a fork of a process with longspan's imports.

    Args:
        forks: the fixture.
        streams: path that the names of its two pipes begin with.
    """
    out = Pipe(streams.with_suffix(".out"))
    err = Pipe(streams.with_suffix(".err"))
    job = {
        "program": str(program),
        "is_module": isinstance(program, str),
        "arguments": [str(argument) for argument in arguments],
        "environment": environment,
        "folder": os.getcwd(),
        "streams": [str(out.path), str(err.path)],
    }
    process = forks.Process(target=runpy.run_path, args=(str(FORKED_SCRIPT), {"JOB": job}))
    process.start()
    return Fork(process, out, err)


@pytest.fixture(scope="session")
def forks():
    """Return a context whose processes are forked from one that has already imported longspan.

    The imports alone take longer than most ranks run.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "longspan.launch.training",
            "longspan.trainer.run.loop",
            "longspan.trainer.engines.megatron",
            "torch._dynamo",  # for torch's optimizers
            "matplotlib.pyplot",
        ]
    )
    return context


@pytest.fixture
def longspan(forks, tmp_path):
    """Run the command line: ``longspan(*args, **environment)``, a CompletedProcess.

    It has the imports already, but not with an environment of its own, which may change them.
    """

    def run(*args: object, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "longspan", *map(str, args)]
        if environment:
            return subprocess.run(
                command,
                env={**os.environ, **environment},
                capture_output=True,
                text=True,
                timeout=400,
                check=False,
            )
        streams = Path(tempfile.mkdtemp(dir=tmp_path)) / "longspan"
        fork = start_fork(forks, "longspan", args, dict(os.environ), streams)
        try:
            fork.process.join(400)
        finally:
            out, err = fork.end()
        return subprocess.CompletedProcess(command, fork.process.exitcode, out, err)

    return run


@pytest.fixture
def ranks(forks, tmp_path):
    """Run real processes with a gloo rendezvous: ``ranks(count, program, *args)``.

    ``program`` is a script, or the name of a module. All processes must exit with ``status``,
    unless it is None. It returns what each rank wrote to stdout and stderr.
    """

    def run(
        count: int, program: Path | str, *args: object, status: int | None = 0
    ) -> list[tuple[str, str]]:
        with socket.socket() as server:
            server.bind(("localhost", 0))
            port = server.getsockname()[1]
        common_environment = {
            **os.environ,
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        streams = Path(tempfile.mkdtemp(dir=tmp_path))
        started = []
        for number in range(count):
            environment = {
                **common_environment,
                "RANK": str(number),
                "LOCAL_RANK": str(number),
            }
            started.append(start_fork(forks, program, args, environment, streams / str(number)))
        try:
            for rank in started:
                rank.process.join(400)
        finally:
            outputs = [rank.end() for rank in started]

        for number, (rank, (_, errors)) in enumerate(zip(started, outputs, strict=True)):
            exit_status = rank.process.exitcode
            assert status in (None, exit_status), (
                f"rank {number} of {count}: {exit_status}\n{errors[-3000:]}"
            )
        return outputs

    return run


@pytest.fixture
def threads():
    """Run a function on threads, each a rank of torch's threaded process group.

    ``threads(count, work)`` calls ``work(rank, group)`` and returns the results by rank.
    """
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed import multi_threaded_pg as threaded

    def run(count: int, work: Callable) -> list:
        results = [None] * count
        errors = []
        store = dist.HashStore()

        def rank_thread(rank: int) -> None:
            dist.init_process_group("threaded", rank=rank, world_size=count, store=store)
            try:
                results[rank] = work(rank, dist.group.WORLD)
            except BaseException as error:
                errors.append(error)
                threaded.ProcessLocalGroup.exception_handle(error)  # releases the other ranks
            finally:
                dist.destroy_process_group()

        torch._C._distributed_c10d._set_thread_isolation_mode(True)
        threaded._install_threaded_pg()
        threaded.ProcessLocalGroup.reset()  # after a failure of an earlier test
        try:
            workers = [threading.Thread(target=rank_thread, args=(rank,)) for rank in range(count)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        finally:
            threaded._uninstall_threaded_pg()
            torch._C._distributed_c10d._set_thread_isolation_mode(False)
        if errors:
            raise errors[0]
        return results

    return run
