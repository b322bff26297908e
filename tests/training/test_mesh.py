"""Meshes by axis sizes, and batches on them; what one device cannot show is in `sharded.py`."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from subspace_jax.training import initialize_distributed, make_mesh, shard_batch

ONE = jax.devices()[:1]


def test_one_axis_takes_what_is_left():
    mesh = make_mesh({"data": -1, "model": 1}, devices=ONE)
    assert dict(mesh.shape) == {"data": 1, "model": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 2
    assert make_mesh({"data": 1}, explicit=True, devices=ONE).axis_types == (AxisType.Explicit,)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"data": 2, "model": 3}, "are 6 devices, and there are 1"),
        ({"data": -1, "model": 3}, "are 3 devices times a whole number, and there are 1"),
        ({"data": -1, "model": -1}, "-1 for at most one"),
        ({"data": 0}, "a positive int for every axis"),
        ({"data": 1.0}, "a positive int for every axis"),
        ({}, "a positive int for every axis"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(axes, words):
    with pytest.raises(ValueError, match=words):
        make_mesh(axes, devices=ONE)


def test_batches_keep_their_numbers():
    mesh = make_mesh({"data": 1, "model": 1}, devices=ONE)
    batch = {"x": np.arange(6).reshape(3, 2), "scale": np.float32(2.0)}
    placed = shard_batch(batch, mesh)
    assert placed["x"].sharding.spec == P("data")
    assert placed["scale"].sharding.spec == P()
    assert jax.tree.map(np.array_equal, placed, batch) == {"x": True, "scale": True}
    assert shard_batch(batch, mesh, ("data", "model"))["x"].sharding.spec == P(("data", "model"))
    with pytest.raises(ValueError, match="the mesh has no 'rows'"):
        shard_batch(batch, mesh, "rows")


def test_one_process_is_not_connected():
    assert not initialize_distributed(num_processes=1)
    # Before anything of JAX runs, so in a process of its own; what is half given is refused.
    code = (
        "from subspace_jax.training import initialize_distributed\n"
        "assert not initialize_distributed()\n"
        "try: initialize_distributed('127.0.0.1:1', 2)\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "missing: process_id" in done.stdout, done.stderr
