import os
import signal
import subprocess
import sys
import textwrap

import pytest

from subspace_jax.io import replacing


def test_replaces_whole(tmp_path):
    (tmp_path / "x").write_text("old")
    with replacing(tmp_path / "x") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "x").read_text() == "old"
        assert temporary.parent == tmp_path
    assert (tmp_path / "x").read_text() == "new"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("where", ["body", "os.replace", "os.fsync"])
def test_failure_leaves_what_was_there(tmp_path, monkeypatch, where):
    (tmp_path / "x").write_text("old")

    def fail(*_):
        raise OSError("disk full")

    def write():
        with replacing(tmp_path / "x") as temporary:
            temporary.write_text("new")
            if where == "body":
                fail()

    if where != "body":
        monkeypatch.setattr(where, fail)
    with pytest.raises(OSError, match="disk full"):
        write()
    assert (tmp_path / "x").read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_kill_between_write_and_rename(tmp_path):
    (tmp_path / "x").write_text("old")
    script = """
        import os, signal, sys
        import numpy as np
        from subspace_jax.io import write_safetensors
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        write_safetensors(sys.argv[1], {"a": np.ones(3, np.float32)}, {})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "x")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "x").read_text() == "old"
