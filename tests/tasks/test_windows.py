"""What Windows lacks, taken away here: os.fork, fcntl, folders that can be opened. Simulated: never run there."""

import os
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT
from test_train import TINY_RUN

from run import folder as run_folder

WITHOUT = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
del os.fork
sys.modules["fcntl"] = None
open_file = os.open
def open_no_folder(path, *more, **named):
    if not named.get("dir_fd") and os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return open_file(path, *more, **named)
os.open = open_no_folder
"""


def without(script, *arguments):
    code = WITHOUT + textwrap.dedent(script)
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)


def test_a_toy_run_and_its_resumption(tmp_path):
    """Saved, evaluated, gone on with: by train.py's own lines."""
    script = """
        import train
        where, resumed = sys.argv[1:3], ["--resume", "--steps", "3", "--test-stories", "5"]
        raise SystemExit(train.main([*sys.argv[3:], *where]) or train.main([*resumed, *where]))
    """
    out = tmp_path / "runs" / "toy"
    done = without(script, "--out", out, *TINY_RUN, "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert [folder.name for folder in run_folder.checkpoints(out)][-1] == "step-000003"


def test_a_file_that_cannot_be_opened_is_still_an_error(tmp_path, monkeypatch):
    def refuse(path, *more):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "open", refuse)
    run_folder.flush(tmp_path)
    with pytest.raises(PermissionError):
        run_folder.flush(tmp_path / "file")
