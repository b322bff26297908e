"""Run by test_sharding.py on eight host devices: prints one JSON object with the outcome of each case."""

import json
import re
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import subspace_jax as sj
from tests.core.helpers import adapt, close, compare_gradients, merged, normal, weighted_sum
from tests.quick import compile_quickly

EXPLICIT = sys.argv[-1] == "explicit"
TYPES = (AxisType.Explicit if EXPLICIT else AxisType.Auto,) * 2
MESH = jax.make_mesh((2, 4), ("data", "model"), axis_types=TYPES) if __name__ == "__main__" else None
B, D, F = 8, 128, 256
X = normal(0, B, D)
LARGE = D * F // 8  # elements in the smallest shard of a frozen weight; every activation is smaller
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def put(value, *spec):
    return jax.device_put(value, NamedSharding(MESH, P(*spec)))


def place(tree, specs, parts):
    """Arrays by their specs; the parts of a weight by what follows from the weight's, or replicated."""

    def one(leaf, spec):
        if not sj.core.is_weight(leaf):
            return put(leaf, *spec)
        follow = leaf.partition_specs(spec) if parts == "follow" else leaf.partition_specs(P())
        placed = jax.tree.map(lambda v, s: put(v, *s), leaf, follow, is_leaf=lambda v: isinstance(v, P))
        return type(leaf)(**{**vars(placed), "base": put(leaf.base, *spec)})

    return jax.tree.map(one, tree, specs, is_leaf=sj.core.is_weight)


def product(x, w, spec):
    """A model for explicit axes names the layout where a contracted axis is sharded."""
    return jnp.einsum("bd,df->bf", x, w, out_sharding=P(*spec) if EXPLICIT else None)


def collectives(compiled):
    """Sizes of the results of all collectives in a compiled program."""
    sizes = []
    for line in compiled.as_text().splitlines():
        found = re.match(
            r".* = (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(-start)?\(", line
        )
        if found:
            shapes = re.findall(r"[a-z0-9]+\[([0-9,]*)\]", found.group(1))
            sizes.append(max(int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes))
    return sorted(sizes)


def check(fn, adapted, specs, x, x_spec, *, large=LARGE):
    """Values, gradients, and no collective of a weight's size that the frozen model has not itself."""
    dense = merged(adapted)

    def loss(p, x):
        out = fn(p, x)
        return weighted_sum(out), out

    with jax.set_mesh(MESH):
        sharded_x = put(x, *x_spec)
        sharded_dense = place(dense, specs, "follow")
        dense_step = (
            jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True)).lower(sharded_dense, sharded_x).compile()
        )
        (_, expected), _ = dense_step(sharded_dense, sharded_x)
        model_alone = [n for n in collectives(dense_step) if n >= large]
        wanted = jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(sharded_dense, sharded_x)[0])
        for parts in ("follow", "replicated"):
            trainable, frozen = sj.partition(place(adapted, specs, parts))

            def adapted_loss(trainable, frozen, x):
                out = sj.with_adapters(fn)(sj.combine(trainable, frozen), x)
                return weighted_sum(out), out

            step = jax.jit(jax.value_and_grad(adapted_loss, has_aux=True)).lower(trainable, frozen, sharded_x).compile()
            (_, out), gradient = step(trainable, frozen, sharded_x)
            close(out, expected)
            for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(trainable), strict=True):
                assert one.shape == other.shape
                if EXPLICIT:
                    assert jax.typeof(one).sharding == jax.typeof(other).sharding, (parts, one, other)
            compare_gradients(jax.device_get(gradient), wanted, adapted)
            found = [n for n in collectives(step) if n >= large]
            assert len(found) <= len(model_alone), (parts, found, model_alone)
    return expected


def mlp(first, second):
    """Two layers with the layouts of their results."""
    return lambda p, x: product(jnp.tanh(product(x, p["in"], first)), p["out"], second)


def two():
    return adapt({"in": normal(1, D, F), "out": normal(2, F, D)})


def single(adapted, fn, x):
    """The same on one device, by the plain model."""
    p = jax.tree.map(np.asarray, merged(adapted))
    return np.tanh(x.astype(np.float64) @ p["in"]) @ p["out"]


@case
def data_parallel():
    fn, adapted = mlp(("data", None), ("data", None)), two()
    close(check(fn, adapted, {"in": P(), "out": P()}, X, ("data",)), single(adapted, fn, X))


@case
def tensor_parallel():
    fn, adapted = mlp(("data", "model"), ("data", None)), two()
    specs = {"in": P(None, "model"), "out": P("model", None)}
    close(check(fn, adapted, specs, X, ("data",)), single(adapted, fn, X))


@case
def tensor_parallel_the_other_way():
    fn, adapted = mlp(("data", None), ("data", "model")), two()
    specs = {"in": P("model", None), "out": P(None, "model")}
    close(check(fn, adapted, specs, X, ("data", "model")), single(adapted, fn, X))


@case
def input_axis_with_a_replicated_batch():
    fn, adapted = mlp((None, None), (None, None)), two()
    specs = {"in": P("model", None), "out": P("data", None)}
    close(check(fn, adapted, specs, X, (None, "model")), single(adapted, fn, X))


@case
def both_axes():
    """Each weight is split on both axes, and the batch is whole."""
    fn, adapted = mlp((None, "model"), (None, "data")), two()
    specs = {"in": P("data", "model"), "out": P("model", "data")}
    close(check(fn, adapted, specs, X, (None, "data")), single(adapted, fn, X))


@case
def gathered_before_use():
    """Fully sharded data parallelism: the model itself gathers each weight, and the adapter gathers none more."""

    def fn(p, x):
        gather = jax.sharding.reshard if EXPLICIT else lax.with_sharding_constraint
        x = jnp.tanh(product(x, gather(p["in"], P()), ("data", None)))
        return product(x, gather(p["out"], P()), ("data", None))

    adapted = two()
    specs = {"in": P("data", None), "out": P("data", None)}
    close(check(fn, adapted, specs, X, ("data",)), single(adapted, fn, X))


@case
def heads():
    adapted = adapt(
        {"w": normal(1, D, 4, 32), "o": normal(2, 4, 32, D)},
        roles={"w": sj.Role.dense((0,), (1, 2)), "o": sj.Role.dense((0, 1), (2,))},
    )

    def fn(p, x):
        y = jnp.einsum("bd,dhk->bhk", x, p["w"], out_sharding=P("data", "model", None) if EXPLICIT else None)
        return jnp.einsum("bhk,hkd->bd", jnp.tanh(y), p["o"], out_sharding=P("data", None) if EXPLICIT else None)

    check(fn, adapted, {"w": P(None, "model", None), "o": P("model", None, None)}, X, ("data",))


@case
def scanned_stack():
    adapted = adapt({"w": normal(1, 3, D, D) / 12}, roles={"w": sj.Role.dense((1,), (2,), (0,))})
    fn = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(product(x, w, ("data", None))), None), x, p["w"])[0]
    check(fn, adapted, {"w": P(None, "model", None)}, X, ("data",), large=D * D // 4)


@case
def tied_embedding():
    adapted = adapt({"e": normal(1, 256, D)}, roles={"e": sj.Role.embedding()})
    tokens = np.arange(B) * 7 % 256

    def fn(p, t):
        rows = p["e"].at[t].get(out_sharding=P("data", None)) if EXPLICIT else p["e"][t]
        return jnp.einsum("bd,vd->bv", jnp.tanh(rows), p["e"], out_sharding=P("data", "model") if EXPLICIT else None)

    dense = merged(adapted)
    with jax.set_mesh(MESH):
        placed = place(adapted, {"e": P("model", None)}, "follow")
        sharded = put(tokens, "data")
        expected = np.tanh(np.asarray(dense["e"])[tokens]) @ np.asarray(dense["e"]).T
        close(jax.jit(sj.with_adapters(fn))(placed, sharded), expected)


@case
def magnitudes():
    params = {"w": normal(1, D, F)}
    fn = lambda p, x: product(x, p["w"], ("data", "model"))
    with jax.set_mesh(MESH):
        sharded = {"w": put(params["w"], None, "model")}
        adapted = sj.adapt(sharded, {"w": sj.dora(sj.lora(2))}, key=jax.random.key(0))
        found = jax.jit(sj.with_adapters(fn))(adapted, put(X, "data"))
        close(found, X @ params["w"])


@case
def outer_product_of_two_that_one_axis_splits():
    """Nothing is summed, and the result can have the mesh axis only once."""
    with jax.set_mesh(MESH):
        left, right = put(normal(1, B), "data"), put(normal(2, 4, D), "model", "data")
        out = jax.jit(lambda a, b: sj.core.product(a, ("a",), b, ("b", "c"), ("a", "b", "c")))(left, right)
    close(out, np.asarray(left)[:, None, None] * np.asarray(right))


@case
def adapt_and_merge_where_the_weight_lives():
    fn = lambda p, x: product(x, p["w"], ("data", "model"))
    params = {"w": normal(1, D, F)}
    with jax.set_mesh(MESH):
        sharded = {"w": put(params["w"], None, "model")}
        adapted = sj.adapt(sharded, {"w": sj.lora(2)}, key=jax.random.key(0))
        close(jax.jit(sj.with_adapters(fn))(adapted, put(X, "data")), X @ params["w"])
        plain = sj.merge(adapted)["w"]
        close(plain, params["w"])
        assert plain.sharding.is_equivalent_to(sharded["w"].sharding, 2)


@case
def roles_and_capture():
    fn = lambda p, x: product(x, p["w"], ("data", "model"))
    with jax.set_mesh(MESH):
        sharded = {"w": put(normal(1, D, F), None, "model")}
        assert sj.roles(fn, sharded, put(X, "data"))["w"].in_axes == (0,)
        for layout in (("data",), ("data", "model")):
            batches = [put(X, *layout), put(2 * X, *layout)]
            found = sj.capture(fn, {"w": put(normal(1, D, F), None, None)}, batches, statistics=("gram", "mean"))["w"]
            close(found.gram, 5 * X.T.astype(np.float64) @ X)
            close(found.mean, 1.5 * X.mean(0))


def shard_map_case(adapted, body, in_specs, x_spec, out_spec):
    fn = lambda p, x: jax.shard_map(body, mesh=MESH, in_specs=(in_specs, P(*x_spec)), out_specs=P(*out_spec))(p, x)
    specs = in_specs
    check(fn, adapted, specs, X, x_spec)


@case
def shard_map_output_axis():
    shard_map_case(
        adapt({"w": normal(1, D, F)}),
        lambda p, x: jnp.tanh(x @ p["w"]),
        {"w": P(None, "model")},
        ("data",),
        ("data", "model"),
    )


@case
def shard_map_input_axis():
    body = lambda p, x: jnp.tanh(lax.psum(x @ p["w"], "model"))
    shard_map_case(adapt({"w": normal(1, D, F)}), body, {"w": P("model", None)}, ("data", "model"), ("data", None))


@case
def shard_map_stack_axis():
    adapted = adapt({"w": normal(1, 4, D, F)}, roles={"w": sj.Role.dense((1,), (2,), (0,))})
    body = lambda p, x: lax.psum(jnp.tanh(jnp.einsum("bd,edf->ebf", x, p["w"])).sum(0), "model")
    shard_map_case(adapted, body, {"w": P("model")}, ("data",), ("data", None))


@case
def shard_map_refuses_what_cannot_be_split():
    adapted = adapt({"w": normal(1, D, 4, 32)}, roles={"w": sj.Role.dense((0,), (1, 2))})
    body = lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"])
    fn = lambda p, x: jax.shard_map(
        body, mesh=MESH, in_specs=({"w": P(None, None, "model")}, P()), out_specs=P(None, None, "model")
    )(p, x)
    with jax.set_mesh(MESH), pytest.raises(sj.core.RoleError, match="only the first can be split"):
        sj.with_adapters(fn)(place(adapted, {"w": P(None, None, "model")}, "follow"), put(X))


@case
def without_a_mesh_in_context():
    """Arrays carry their mesh with them; nobody has to set one."""
    adapted, fn = two(), lambda p, x: jnp.tanh(x @ p["in"])
    placed = place({"in": adapted["in"]}, {"in": P(None, "model")}, "follow")
    close(jax.jit(sj.with_adapters(fn))(placed, put(X, "data")), np.tanh(X @ np.asarray(merged(adapted)["in"])))


def outcome(function):
    try:
        function()
    except Exception:
        return traceback.format_exc()[-1500:]
    return "ok"


if __name__ == "__main__":
    compile_quickly()
    print(json.dumps({name: outcome(function) for name, function in CASES.items()}))
