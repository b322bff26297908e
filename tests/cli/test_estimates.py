"""What `subspace-jax finetune` says before it trains, beside what came, in a process whose memory is its own."""

import json
import os
import resource
import subprocess
import sys
import types
from pathlib import Path

import pytest

from subspace_jax.assets import is_available
from subspace_jax.cli import _train
from tests.cli.conftest import write_lines

carried = pytest.mark.skipif(not is_available("minilm"), reason="needs `python -m experiments fetch minilm`")


@pytest.mark.carried
@carried
def test_memory_is_within_thirty_percent_of_the_estimate(tmp_path):
    rows = [{"text": f"a film of {i} hours that is {w}", "label": w} for i in range(20) for w in ("good", "bad")]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    command = [sys.executable, "-m", "subspace_jax.cli", "finetune", str(data), "--model", "minilm", "--method", "full"]
    command += ["--steps", "3", "--batch", "32", "--max-length", "128", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    said, came = found["estimates"]["memory_bytes"], found["took"]["memory_bytes"]
    assert 0.7 * came < said < 1.3 * came
    assert set(found["took"]) <= set(found["estimates"])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="other systems count a process by itself")
def test_memory_of_the_starting_process_does_not_count(monkeypatch):
    """Linux's `ru_maxrss` begins with it: in a shell that had held a terabyte every run would have."""
    monkeypatch.setattr(resource, "getrusage", lambda _: types.SimpleNamespace(ru_maxrss=2**30))
    assert 0 < _train.resident_bytes() < 2**40
