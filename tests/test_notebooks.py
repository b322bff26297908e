"""Every notebook runs with small settings, and its stored form is that of the program beside it."""

import json
import os
import subprocess
import sys

import pytest

from docs.write_notebooks import FOLDER, cells, stored

NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


def test_there_are_five():
    assert len(NAMES) == 5
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_notebook_is_that_of_its_program(name):
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text())
    assert stored(notebook) == cells((FOLDER / f"{name}.py").read_text()), f"python -m docs.write_notebooks {name}"
    printed = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in printed), "a picture"
    assert not [output for output in printed if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert f"subspace_jax/blob/main/notebooks/{name}.ipynb" in cells((FOLDER / f"{name}.py").read_text())[0][1], "badge"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "a_pod_in_one_page"])
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    matplotlib.use("Agg")
    monkeypatch.setenv("NOTEBOOK_QUICK", "1")
    monkeypatch.chdir(tmp_path)
    exec(compile((FOLDER / f"{name}.py").read_text(), name, "exec"), {"__name__": name})
    assert matplotlib.pyplot.get_fignums(), "a picture"
    matplotlib.pyplot.close("all")
    assert not list(tmp_path.iterdir()), "a notebook leaves nothing behind"


def test_the_pod_runs(tmp_path):
    """In a process of its own: it wants eight devices, which is decided when JAX starts."""
    pytest.importorskip("matplotlib")
    small = {"NOTEBOOK_QUICK": "1", "MPLBACKEND": "Agg", "PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run(
        [sys.executable, str(FOLDER / "a_pod_in_one_page.py")],
        env=os.environ | small,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "largest array sent" in done.stdout
