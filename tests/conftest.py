"""What tests share: small recipes and corpora, and real processes."""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

FORKED = Path(__file__).with_name("forked_script.py")
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


@pytest.hookimpl(trylast=True)  # after -m has chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of one part: in every file each N-th test, so that all parts take as long."""
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


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """40 documents, 13 to 215 bytes long."""
    return [
        f"Document {i}: " + " ".join(f"{i * j % 97}" for j in range(3 + 11 * (i % 7)))
        for i in range(40)
    ]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, texts) -> str:
    """Prefix of a small corpus of those texts."""
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
    """File of a recipe with all mixers and kinds of norm; its run goes to ``tmp_path / "run"``."""
    import yaml

    content = yaml.safe_load(
        yaml.safe_dump(TINY).replace("RUN", str(tmp_path / "run")).replace("CORPUS", corpus)
    )
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def longspan():
    """Run ``python -m longspan ARGS`` for real: ``longspan(*args) -> CompletedProcess``."""

    def run(*args: object, **env: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "longspan", *map(str, args)]
        return subprocess.run(
            command,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    return run


class Pipe:
    """A named pipe, all that is written to it; a file would end at a process's limit for files."""

    def __init__(self, path: Path):
        os.mkfifo(path)
        self.path, self._text = path, ""
        reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._writing = os.open(
            path, os.O_WRONLY
        )  # so that it does not end before its writer comes
        os.set_blocking(reading, True)
        self._reader = threading.Thread(target=self._read, args=(reading,))
        self._reader.start()

    def _read(self, reading: int) -> None:
        with open(reading) as stream:
            self._text = stream.read()

    def close(self) -> str:
        """What was written."""
        os.close(self._writing)
        self._reader.join()
        return self._text


@pytest.fixture(scope="session")
def forks():
    """Processes that are forked from one that has imported what a rank needs: that alone takes longer than most of them run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["longspan.launch.cli", "longspan.trainer.run.loop", "longspan.trainer.engines.megatron"]
    )
    return context


@pytest.fixture
def ranks(forks, tmp_path):
    """Run a script in ``count`` real processes with a gloo rendezvous: ``ranks(count, script, *args)``.

    They must exit with ``status``; for None any will do. Gives what each of them wrote to stdout and stderr.
    """

    def run(
        count: int, script: Path, *args: object, status: int | None = 0
    ) -> list[tuple[str, str]]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        shared = {
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        streams = Path(tempfile.mkdtemp(dir=tmp_path))
        processes, pipes = [], []
        for rank in range(count):
            own = [Pipe(streams / f"{rank}.{name}") for name in ("out", "err")]
            given = {
                "script": str(script),
                "arguments": [str(arg) for arg in args],
                "environment": {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                "streams": [str(pipe.path) for pipe in own],
            }
            processes.append(
                forks.Process(target=runpy.run_path, args=(str(FORKED), {"GIVEN": given}))
            )
            processes[-1].start()
            pipes.append(own)
        try:
            for process in processes:
                process.join(400)
        finally:
            for process in processes:
                process.kill()
                process.join()
            written = [tuple(pipe.close() for pipe in own) for own in pipes]
        for rank, (process, (_, error)) in enumerate(zip(processes, written, strict=True)):
            assert status in (None, process.exitcode), (
                f"rank {rank} of {count}: {process.exitcode}\n{error[-3000:]}"
            )
        return written

    return run


@pytest.fixture
def threads():
    """Call ``work(rank, group)`` on ``count`` threads, each a rank of torch's threaded process group; results by rank."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed import multi_threaded_pg as threaded

    def run(count: int, work: Callable) -> list:
        results, errors, store = [None] * count, [], dist.HashStore()

        def rank_thread(rank: int) -> None:
            dist.init_process_group("threaded", rank=rank, world_size=count, store=store)
            try:
                results[rank] = work(rank, dist.group.WORLD)
            except BaseException as error:
                errors.append(error)
                threaded.ProcessLocalGroup.exception_handle(error)  # sets the others free
            finally:
                dist.destroy_process_group()

        torch._C._distributed_c10d._set_thread_isolation_mode(True)
        threaded._install_threaded_pg()
        threaded.ProcessLocalGroup.reset()  # of a failure before
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
