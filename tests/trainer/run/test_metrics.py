"""Where numbers go: every step once, and whatever is wrong with a place stops no run."""

import contextlib
import errno
import json
import os
import resource
import sys
import types

import pytest
from longspan.trainer.checkpoint.run_folder import RunFolder
from longspan.trainer.errors import UserError
from longspan.trainer.recipe.file import load_recipe
from longspan.trainer.run import plot
from longspan.trainer.run.metrics import MetricsLog, TensorBoard


@pytest.fixture
def start(tiny_recipe, tmp_path):
    """``start(steps_done, *overrides)``: the folder and the log of a start of a run."""

    def begin(steps_done, *overrides):
        recipe = load_recipe(str(tiny_recipe), list(overrides))
        folder = RunFolder(recipe.run_dir)
        folder.path.mkdir(exist_ok=True)
        folder.begin(recipe, steps_done, {})
        return folder, MetricsLog(folder, recipe, steps_done)

    return begin


def steps_of(folder):
    return [record["step"] for record in folder.read_metrics()]


def tensorboard_steps(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder.path / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def test_steps_that_are_taken_again_are_in_tensorboard_once(start, monkeypatch):
    clock = iter(range(10**9, 10**9 + 100))
    monkeypatch.setattr("longspan.trainer.run.metrics.time.time", lambda: next(clock))
    for steps_done, last in ((0, 12), (8, 10), (8, 14)):  # killed after 12, and after 10 again
        folder, log = start(steps_done, "metrics.tensorboard=true")
        for step in range(steps_done + 1, last + 1):
            log.log(step, {"train/loss": float(step)})
    assert tensorboard_steps(folder) == [(step, float(step)) for step in range(1, 15)]
    assert steps_of(folder) == list(range(1, 15))


@pytest.fixture
def full_disk():
    """Return a context in which no file of this process grows beyond a size."""

    @contextlib.contextmanager
    def limit(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


def test_a_full_disk_is_an_alert_for_each_place_and_what_comes_later_is_kept(
    start, full_disk, capsys
):
    folder, log = start(0, "metrics.tensorboard=true")
    log.log(1, {"train/loss": 1.0})
    with full_disk(1):
        log.log(2, {"train/loss": 2.0})
        log.log(3, {"train/loss": 3.0})
    log.log(4, {"train/loss": 4.0})
    written = capsys.readouterr()
    assert written.out.splitlines() == [
        f"ALERT: {folder.path}/{name} cannot be written: File too large; training continues"
        for name in ("metrics.jsonl", "tensorboard/")
    ]
    assert written.err == ""
    assert steps_of(folder) == [1, 4]
    assert tensorboard_steps(folder) == [(1, 1.0), (4, 4.0)]


def test_half_of_an_event_is_taken_back(tmp_path, full_disk):
    events = TensorBoard(tmp_path / "tensorboard", first_step=1)
    events.write(1, {"train/loss": 1.0})
    (file,) = (tmp_path / "tensorboard").iterdir()
    size = file.stat().st_size
    with full_disk(size + 10), pytest.raises(OSError, match=r"No space left|File too large"):
        events.write(2, {"train/loss": 2.0})
    assert file.stat().st_size == size


def test_a_file_in_the_place_of_the_folder_is_an_alert(start, capsys):
    folder, log = start(0, "metrics.tensorboard=true")
    (folder.path / "tensorboard").touch()
    log.log(1, {"train/loss": 1.0})
    assert "ALERT: " in capsys.readouterr().out
    assert steps_of(folder) == [1]


class FakeRun:
    """A run at W&B: drops what is not after its last step, as the server does."""

    def __init__(self, history):
        self.history = history
        self.step = history[-1][0] + 1 if history else 0

    def log(self, metrics, step):
        assert not self.history or step >= self.history[-1][0], "W&B would drop it"
        self.history.append((step, metrics))

    def finish(self, exit_code):
        pass


@pytest.fixture
def fake_wandb(monkeypatch):
    """W&B with a server that keeps what came to it; ``initialized`` has the arguments of starts."""
    module = types.SimpleNamespace(history={}, initialized=[], Settings=dict, error=None)

    def init(**options):
        module.initialized.append(options)
        if module.error:
            raise module.error
        return FakeRun(module.history.setdefault(options["id"], []))

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_MODE", "online")
    return module


@pytest.mark.parametrize("lost", [0, 1, 6, 12])
def test_steps_that_are_taken_again_are_at_wandb_once(start, fake_wandb, lost):
    """Whether or not the last records before the crash had come to the server."""
    _, log = start(0, "metrics.wandb=true")
    for step in range(1, 13):
        log.log(step, {"train/loss": float(step)})
    ((identity, history),) = fake_wandb.history.items()
    del history[len(history) - lost :]
    folder, log = start(8, "metrics.wandb=true")
    for step in range(9, 15):
        log.log(step, {"train/loss": float(step)})
    assert {options["id"] for options in fake_wandb.initialized} == {identity}
    assert history == [(step, {"train/loss": float(step)}) for step in range(1, 15)]
    assert steps_of(folder) == list(range(1, 15))


def test_files_of_an_offline_start_are_replaced_unless_they_were_synced(start, fake_wandb):
    folder, log = start(0, "metrics.wandb=true")
    log.log(1, {"train/loss": 1.0})
    identity = (folder.path / "wandb_id").read_text()
    offline = folder.path / "wandb" / f"offline-run-1-{identity}"
    synced = folder.path / "wandb" / f"offline-run-0-{identity}"
    for files in (offline, synced):
        files.mkdir(parents=True)
    (synced / f"run-{identity}.wandb.synced").touch()
    _, log = start(1, "metrics.wandb=true")
    log.log(2, {"train/loss": 2.0})
    assert not offline.exists()
    assert synced.exists()


def test_wandb_that_cannot_start_is_an_alert_and_tried_once(start, fake_wandb, capsys):
    fake_wandb.error = RuntimeError("no server\nat all")
    folder, log = start(0, "metrics.wandb=true")
    with log:
        log.log(1, {"train/loss": 1.0})
        log.log(2, {"train/loss": 2.0})
    assert capsys.readouterr().out.splitlines() == [
        "ALERT: W&B cannot be written: no server at all; training continues"
    ]
    assert len(fake_wandb.initialized) == 1
    assert steps_of(folder) == [1, 2]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "",
        "null",
        "[1, 2]",
        "7",
        '"step"',
        '{"train/loss": 1.0}',
        '{"step": "3", "train/loss": 1.0}',
        '{"step": null}',
        '{"step": 3.5}',
        '{"step": true}',
        '{"step": -1}',
        '{"step": 3, "train/loss": "low"}',
        '{"step": 3, "note": {}}',
        "[" * 100_000,
        "\udcff\udcfe",
    ],
)
def test_lines_that_are_no_records_are_passed_over(start, line):
    folder, log = start(0)
    log.log(1, {"train/loss": 1.0})
    with folder.metrics.open("ab") as file:
        file.write(line.encode(errors="surrogateescape") + b"\n")
    log.log(2, {"train/loss": float("nan")})
    assert steps_of(folder) == [1, 2]
    folder.begin(folder.recipe, 2, {})  # of the next start
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [1, 2]


def test_a_picture_that_cannot_be_written_is_named(start, monkeypatch):
    folder, log = start(0)
    log.log(1, {"train/loss": 1.0})

    def no_space(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(plot, "replace_file", no_space)
    with pytest.raises(UserError, match=r"loss\.png: cannot be written: No space left"):
        plot.plot_loss(folder)
