"""Checkpoints as files. How ranks save and restore them is tested in test_resume.py."""

import errno
import fcntl
import os

import pytest
from longspan.trainer.checkpoint.files import (
    DamagedError,
    FileEntry,
    Manifest,
    checkpoints,
    clean_up,
    commit,
    partial_path,
    prune,
    quarantine,
    sha256,
)
from longspan.trainer.checkpoint.run_folder import RunFolder
from longspan.trainer.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Return a folder with checkpoints of steps 5, 50 and 500."""
    for step in (5, 50, 500):
        partial = partial_path(tmp_path, step)
        partial.mkdir()
        (partial / "data").write_bytes(b"weights" * step)
        files = {"data": FileEntry(7 * step, sha256(partial / "data"))}
        commit(partial, Manifest(step, 10 * step, "two ranks", "now", files))
    return tmp_path


def test_committed_checkpoints_are_whole_and_listed_from_the_newest(folder):
    assert [checkpoint.step for checkpoint in checkpoints(folder)] == [500, 50, 5]
    assert checkpoints(folder / "none") == []
    for checkpoint in checkpoints(folder):
        manifest = checkpoint.manifest()
        assert (manifest.step, manifest.tokens, manifest.ranks) == (
            checkpoint.step,
            10 * checkpoint.step,
            "two ranks",
        )
        assert checkpoint.damage(manifest) is None


def test_uncommitted_checkpoints_are_not_listed_and_are_removed(folder):
    partial_path(folder, 1000).mkdir()
    (partial_path(folder, 1000) / "data").touch()
    (folder / "notes").mkdir()
    assert len(checkpoints(folder)) == 3
    clean_up(folder)
    assert not partial_path(folder, 1000).exists()
    assert (folder / "notes").exists()


def test_damage_checks_only_the_files_of_its_share(folder):
    newest = checkpoints(folder)[0]
    (newest.path / "data").write_bytes(b"Weights" * 500)
    manifest = newest.manifest()
    assert (
        newest.damage(manifest, 0, 2) == "data has changed since it was written (SHA-256 differs)"
    )
    assert newest.damage(manifest, 1, 2) is None


@pytest.mark.parametrize(("keep", "left"), [(0, [500, 50, 5]), (2, [500, 50]), (9, [500, 50, 5])])
def test_prune_keeps_the_newest(folder, keep, left):
    prune(folder, keep)
    assert [checkpoint.step for checkpoint in checkpoints(folder)] == left
    assert sorted(folder.iterdir()) == sorted(checkpoint.path for checkpoint in checkpoints(folder))


def test_quarantined_checkpoints_are_kept_but_not_listed(folder):
    newest = checkpoints(folder)[0]
    (folder / "step-00000500.damaged-1").mkdir()
    assert quarantine(newest).name == "step-00000500.damaged-2"
    assert [checkpoint.step for checkpoint in checkpoints(folder)] == [50, 5]
    clean_up(folder)
    assert (folder / "step-00000500.damaged-2" / "data").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not a manifest"),
        ("[1]", "is not a manifest"),
        ('{"version": "x"}', "is not a manifest"),
        ('{"version": 1}', "is not a manifest"),
        ('{"version": 1, "digest": "0"}', "has changed since it was written"),
        (Manifest(4, 1, "two ranks", "now", {}).to_json(), "says step 4"),
    ],
)
def test_an_invalid_manifest_counts_as_damage(folder, content, message):
    newest = checkpoints(folder)[0]
    (newest.path / "manifest.json").write_text(content)
    with pytest.raises(DamagedError, match=f"manifest.json {message}"):
        newest.manifest()


def test_any_change_of_a_manifest_is_detected(folder):
    newest = checkpoints(folder)[0]
    content = (newest.path / "manifest.json").read_text()
    for old, new in (
        ('"tokens": 5000', '"tokens": 5001'),
        ("two ranks", "tvo ranks"),
        ('"now"', '"nox"'),
    ):
        assert old in content
        (newest.path / "manifest.json").write_text(content.replace(old, new))
        with pytest.raises(DamagedError, match=r"manifest\.json has changed"):
            newest.manifest()


def test_a_newer_format_is_refused(folder):
    newest = checkpoints(folder)[0]
    (newest.path / "manifest.json").write_text(
        Manifest(500, 1, "two ranks", "now", {}, version=2).to_json()
    )
    with pytest.raises(
        UserError, match=r"step-00000500: was written by a newer longspan \(format 2"
    ):
        newest.manifest()


@pytest.mark.parametrize("kind", ["file", "folder", "link to a folder", "broken link"])
def test_leftovers_of_any_kind_are_removed(tmp_path, kind):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    leftover = folder / "step-00000020.partial"
    if kind == "file":
        leftover.touch()
    elif kind == "folder":
        leftover.mkdir()
        (leftover / "__0_0.distcp").touch()
    else:
        target = elsewhere if kind == "link to a folder" else tmp_path / "nowhere"
        leftover.symlink_to(target)
    clean_up(folder)
    assert not list(folder.iterdir())
    assert (elsewhere / "precious").exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_all_the_same(tmp_path, monkeypatch, number):
    def no_flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_flock)
    folder = RunFolder(tmp_path / "run")
    with folder.lock() as is_held:
        assert is_held is False
        assert folder.in_use() is None
        assert folder.user.startswith(f"process {os.getpid()} on ")


def test_a_lock_keeps_others_out(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.lock() as is_held:
        assert is_held is True
        assert folder.in_use() is True
        with pytest.raises(UserError, match="is in use by process"), folder.lock():
            pass
    assert folder.in_use() is False
