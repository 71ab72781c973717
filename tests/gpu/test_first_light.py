"""``first_light.sh``: parts that fail or hang do not stop the others, and all are told."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "first_light.sh"
PYTHON = """#!/bin/sh
case "$*" in
    *doctor*) echo no doctor is here; exit 3 ;;
    *"bench attention"*) sleep 60 ;;
    *) echo "$@" ;;
esac
"""
"""Stands for Python: one part fails, and one takes all the time that is left."""


@pytest.mark.wide
@pytest.mark.skipif(not shutil.which("timeout"), reason="needs timeout of coreutils")
def test_parts_fail_alone_and_the_time_is_kept(tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "PYTHON": str(python),
        "FIRST_LIGHT": "cpu",
        "FIRST_LIGHT_SECONDS": "7",
    }
    done = subprocess.run(
        [SCRIPT, tmp_path / "out"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stdout.endswith("results.md; 6 of 9 parts did not succeed\n")

    results = (tmp_path / "out" / "results.md").read_text()
    verdicts = dict(re.findall(r"^\| (\w+) \| (.+) \| \d+ s \|$", results, re.M))
    hung = verdicts.pop("attention")
    assert re.fullmatch(r"not finished in [5-7] s", hung)
    assert verdicts == {
        "doctor": "FAILED, exit status 3",
        **dict.fromkeys(("numerics", "quickstart", "experts"), "ok"),
        **dict.fromkeys(("linear", "memory", "plan", "rehearsal"), "skipped: no time is left"),
    }
    assert "no doctor is here" in results
