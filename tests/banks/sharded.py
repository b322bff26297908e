"""Banks and bottleneck modules on 8 devices, beside one: run by `test_sharded.py` in a process of its own."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import subspace_jax as sj
from tests.eight_devices import KINDS, make_mesh
from tests.tolerances import assert_rounding

KEY = jax.random.key(0)


def fn(p, x):
    """Feed-forward layers, the second of them summing over an axis that may be split."""
    hidden = jnp.tanh(x @ p["fc1"]["kernel"] + p["fc1"]["bias"])
    explicit = bool(jax.typeof(x).sharding.mesh.explicit_axes)
    whole = P(jax.typeof(x).sharding.spec[0], *(None,) * (x.ndim - 1)) if explicit else None
    return x + jnp.matmul(hidden, p["fc2"]["kernel"], out_sharding=whole) + p["fc2"]["bias"]


def laid_out(p, x):
    """The same, saying of one row how its hidden values are split."""
    hidden = jnp.tanh(x @ p["fc1"]["kernel"] + p["fc1"]["bias"])
    if not jax.sharding.get_abstract_mesh().empty:
        hidden = jax.lax.with_sharding_constraint(hidden, P(None, None, "model"))
    return x + hidden @ p["fc2"]["kernel"] + p["fc2"]["bias"]


def filled(adapted, seed):
    """The adapter with random factors."""
    rng = np.random.default_rng(seed)
    trainable, frozen = sj.partition(adapted)
    return sj.combine(jax.tree.map(lambda v: jnp.asarray(0.3 * rng.normal(size=v.shape), v.dtype), trainable), frozen)


def main():
    """Compares every way with one device, values and gradients."""
    meshes, rng = {kind: make_mesh(kind) for kind in KINDS}, np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.normal(size=s) / 3, jnp.float32)
    params = {"fc1": {"kernel": draw(8, 16), "bias": draw(16)}, "fc2": {"kernel": draw(16, 8), "bias": draw(8)}}
    specs = {"fc1": {"kernel": P(None, "model"), "bias": P("model")}, "fc2": {"kernel": P("model", None), "bias": P()}}
    x, rows = draw(8, 5, 8), jnp.array([0, 1, 2, 1, 0, 2, 2, 1])
    methods = (sj.lora(2), sj.dora(sj.lora(3)))
    made = [filled(sj.adapt(params, {"*/kernel": m}, key=KEY), i) for i, m in enumerate(methods)]
    parallel = sj.bottleneck(4, placement="parallel", reads="fc1")
    cases = {
        "bank": (sj.bank(params, made, trainable=True), lambda t, x: sj.per_row(fn)(t, rows, x)),
        "sequential": (sj.adapt(params, {"fc2/{kernel,bias}": sj.bottleneck(4)}, key=KEY), sj.with_adapters(fn)),
        "parallel": (sj.adapt(params, {"{fc1,fc2}/kernel": parallel}, key=KEY), sj.with_adapters(fn)),
    }
    split = sj.per_row(laid_out, spmd_axis_name="data")
    cases["split bank"] = cases["bank"][0], lambda t, x: split(t, rows, x)
    kinds = [filled(cases[name][0], i) for i, name in enumerate(("sequential", "parallel"))]
    cases["modules"] = sj.bank(params, kinds, trainable=True), cases["bank"][1]
    for name, (tree, apply) in cases.items():
        banked = name in ("bank", "split bank", "modules")
        tree = tree if banked else filled(tree, 3)

        def step(trainable, frozen, x, apply=apply):
            return jax.value_and_grad(lambda t: jnp.sum(jnp.sin(apply(sj.combine(t, frozen), x))))(trainable)

        want = jax.jit(step)(*sj.partition(tree), x)
        for kind, mesh in meshes.items():
            if kind == "explicit" and name == "split bank":
                continue
            found = on_mesh(kind, mesh, step, tree, x, params, specs, banked)
            for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
                assert_rounding(one, other, size=512)
            print(f"{kind}: {name}")


def on_mesh(kind, mesh, step, tree, x, params, specs, banked):
    base = jax.tree.map(lambda v, s: jax.device_put(v, NamedSharding(mesh, s)), params, specs)
    # A bank's rows are batches of one, so what the model says of the batch's placement is not for it.
    layout = jax.tree.map(lambda v: NamedSharding(mesh, P()), base) if banked and kind == "explicit" else None
    own = base if layout is None else jax.tree.map(jax.device_put, params, layout)
    with jax.set_mesh(mesh):
        placed = jax.tree.map(jax.device_put, tree, sj.shardings(tree, own))
        data = P(None) if layout is not None else P("data", None, None)
        return jax.jit(step)(*sj.partition(placed), jax.device_put(x, NamedSharding(mesh, data)))


if __name__ == "__main__":
    main()
