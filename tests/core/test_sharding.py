"""Eight host devices in a process of their own, with Auto and with Explicit mesh axes."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from ..eight_devices import eight_devices

ROOT = pathlib.Path(__file__).parents[2]


def python(*arguments, **variables):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def outcomes(axes):
    out = python("-m", "tests.core.sharded_program", axes, **eight_devices())
    return json.loads(out.splitlines()[-1])


CASES = [
    *("data_parallel", "tensor_parallel", "tensor_parallel_the_other_way", "input_axis_with_a_replicated_batch"),
    *("both_axes", "gathered_before_use", "heads", "scanned_stack", "tied_embedding", "magnitudes"),
    *("adapt_and_merge_where_the_weight_lives", "roles_and_capture", "shard_map_output_axis", "shard_map_input_axis"),
    *("shard_map_stack_axis", "shard_map_refuses_what_cannot_be_split", "without_a_mesh_in_context"),
    "outer_product_of_two_that_one_axis_splits",
]


@pytest.mark.parametrize("axes", ["auto", "explicit"])
def test_numbers_layouts_and_collectives(axes):
    found = outcomes(axes)
    assert sorted(found) == sorted(CASES)
    failed = {name: outcome for name, outcome in found.items() if outcome != "ok"}
    assert not failed, "\n\n".join(f"{name}: {text}" for name, text in failed.items())


DOUBLE = """
import jax, jax.numpy as jnp, numpy as np, subspace_jax as sj
from jax import lax
rng = np.random.default_rng(0)
w, x, s = rng.standard_normal((6, 4)), rng.standard_normal((5, 6)), rng.standard_normal((3, 4, 4))
def fn(p, x):
    x = jnp.tanh(x @ p["w"])
    x = lax.fori_loop(0, 2, lambda i, x: jnp.sin(x) * 1.5, x)
    return lax.scan(lambda c, v: ((c[0] + 1, jnp.tanh(c[1] @ v)), None), (0, x), p["s"])[0][1]
roles = sj.roles(fn, {"w": w, "s": s}, x)
adapted = sj.adapt({"w": w, "s": s}, {"*": sj.lora(2, dtype=jnp.float64)}, key=jax.random.key(0), roles=roles)
trainable, frozen = sj.partition(adapted)
trainable = jax.tree.map(lambda v: jnp.asarray(rng.standard_normal(v.shape)), trainable)
full = {k: base + np.asarray(trainable[k].a) @ np.asarray(trainable[k].b) for k, base in (("w", w), ("s", s))}
y = np.sin(np.sin(np.tanh(x @ full["w"])) * 1.5) * 1.5
for one in full["s"]:
    y = np.tanh(y @ one)
out = jax.jit(lambda t: sj.with_adapters(fn)(sj.combine(t, frozen), x))(trainable)
assert out.dtype == jnp.float64
np.testing.assert_allclose(out, y, rtol=1e-12)
plain = sj.merge(sj.combine(trainable, frozen))
assert plain["w"].dtype == jnp.float64
np.testing.assert_allclose(plain["w"], full["w"], rtol=1e-13)
np.testing.assert_allclose(sj.merge(sj.combine(trainable, frozen), keep_float32=True)["s"], full["s"], rtol=1e-13)
gradient = jax.grad(lambda t: sj.with_adapters(fn)(sj.combine(t, frozen), x).sum())(trainable)
step = 1e-6
a, b = (np.asarray(v) for v in (trainable["w"].a, trainable["w"].b))
up, down = (fn({**full, "w": w + (a + d) @ b}, x).sum() for d in (step, -step))
np.testing.assert_allclose(np.asarray(gradient["w"].a).sum(), (up - down) / (2 * step), rtol=1e-6)
found = sj.capture(lambda p, x: x @ p, w, [x], statistics=("gram", "mean"))[""]
np.testing.assert_allclose(found.gram, x.T @ x, rtol=1e-5)
half = sj.adapt({"w": w.astype(np.float32)}, {"w": sj.lora(2)}, key=jax.random.key(0))
assert sj.with_adapters(lambda p, x: x @ p["w"])(half, x.astype(np.float32)).dtype == jnp.float32
"""


def test_double_precision():
    python("-c", DOUBLE, JAX_ENABLE_X64="1")
