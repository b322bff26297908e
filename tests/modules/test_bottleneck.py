"""Bottleneck adapters against models in which the same modules are written by hand, and the context they use."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import subspace_jax as sj
from subspace_jax.core import MaterializeError, NotMergeableError, PatternError, RoleError, Weight, register_weight
from subspace_jax.models import Bert, Vit, small_bert, small_vit
from subspace_jax.modules import Bottleneck
from subspace_jax.modules._weights import ACTIVATIONS
from tests.models.model_helpers import random_params
from tests.tolerances import assert_rounding

KEY = jax.random.key(0)


def filled(adapted, seed=1):
    rng = np.random.default_rng(seed)
    trainable, frozen = sj.partition(adapted)
    random = lambda v: jax.device_put((0.3 * rng.normal(size=v.shape)).astype(v.dtype))
    return sj.combine(jax.tree.map(random, trainable), frozen)


def by_hand(weight, h, layer=None):
    """The module, written out."""
    parts = {n: getattr(weight, n) for n in ("down", "down_bias", "up", "up_bias")}
    if layer is not None:
        parts = {n: v[layer] for n, v in parts.items()}
    few = ACTIVATIONS[weight.activation](h @ parts["down"] + parts["down_bias"])
    return weight.scale * (few @ parts["up"] + parts["up_bias"])


def block(p, x):
    """A pre-norm block of a transformer's MLP."""
    normed = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    hidden = jnp.tanh(normed @ p["fc1"]["kernel"] + p["fc1"]["bias"])
    return x + 0.5 * (hidden @ p["fc2"]["kernel"] + p["fc2"]["bias"])


def block_by_hand(p, modules, x, parallel, layer=None):
    normed = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    hidden = jnp.tanh(normed @ p["fc1"]["kernel"] + p["fc1"]["bias"])
    y = hidden @ p["fc2"]["kernel"] + p["fc2"]["bias"]
    return x + 0.5 * (y + by_hand(modules, normed if parallel else y, layer))


def make_block(stack=(), seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"fc1": {"kernel": (6, 10), "bias": (10,)}, "fc2": {"kernel": (10, 6), "bias": (6,)}}
    draw = lambda s: jnp.asarray(rng.normal(size=(*stack, *s)) / 2, jnp.float32)
    return jax.tree.map(draw, shapes, is_leaf=lambda v: isinstance(v, tuple))


METHODS = {
    "sequential": ({"**/fc2/{kernel,bias}": sj.bottleneck(3, activation="gelu")}, False),
    "parallel": ({"**/{fc1,fc2}/kernel": sj.bottleneck(3, placement="parallel", reads="fc1", scale=0.1)}, True),
}
X = jnp.asarray(np.random.default_rng(7).normal(size=(4, 5, 6)), jnp.float32)


@functools.cache
def objective(fn):
    """Value, outputs and gradients of the modules and of the input."""

    def loss(trainable, frozen, x):
        y = fn(sj.combine(trainable, frozen), x)
        return jnp.sum(jnp.cos(jnp.arange(y.size).reshape(y.shape)) * y), y

    return jax.jit(jax.value_and_grad(loss, (0, 2), has_aux=True))


def compare(apply, plain, adapted, x, size=128):
    """Values and gradients of the modules and of the input, against a function of the modules written by hand."""
    trainable, frozen = sj.partition(adapted)
    ours, want = (objective(fn)(trainable, frozen, x) for fn in (apply, plain))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        assert_rounding(one, other, size=size)


@pytest.mark.parametrize("name", METHODS)
def test_a_plain_function(name):
    rules, parallel = METHODS[name]
    params = make_block()
    adapted = sj.adapt(params, rules, key=KEY)
    np.testing.assert_array_equal(sj.with_adapters(block)(adapted, X), block(params, X))
    compare(
        sj.with_adapters(block), lambda t, x: block_by_hand(params, t["fc2"]["kernel"], x, parallel), filled(adapted), X
    )
    sizes = {"down": 6 * 3, "down_bias": 3, "up": 3 * 6, "up_bias": 6}
    assert sj.summary(adapted).trainable == sum(sizes.values())


@functools.cache
def layers_by_hand(name, layers):
    params, parallel = make_block((3,)), METHODS[name][1]

    def plain(t, x):
        for i in range(layers):
            x = block_by_hand(jax.tree.map(lambda v, i=i: v[i], params), t["fc2"]["kernel"], x, parallel, i)
        return x

    return plain


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("way", ["scan", "scan of remat", "unrolled", "cond", "vmap", "switch in scan"])
def test_layers_in_loops_and_branches(name, way):
    rules, _ = METHODS[name]
    params = make_block((3,))
    one = jax.checkpoint(block) if "remat" in way else block

    def fn(p, x):
        if way == "unrolled":
            for i in range(3):
                x = block(jax.tree.map(lambda v, i=i: v[i], p), x)
            return x
        if way == "cond":
            first = jax.tree.map(lambda v: v[0], p)
            return lax.cond(jnp.sum(x) > -1e9, lambda x: block(first, x), lambda x: x, x)
        if way == "vmap":
            return jax.vmap(lambda row: lax.scan(lambda h, layer: (block(layer, h), None), row, p)[0])(x)
        if way == "switch in scan":
            step = lambda h, layer: (lax.switch(1, [lambda h: h, lambda h: block(layer, h)], h), None)
            return lax.scan(step, x, p)[0]
        return lax.scan(lambda h, layer: (one(layer, h), None), x, p)[0]

    roles = {"*/kernel": sj.Role.dense((1,), (2,), (0,)), "*/bias": sj.Role("bias", (0,))}
    adapted = filled(sj.adapt(params, rules, key=KEY, roles=roles))
    compare(sj.with_adapters(fn), layers_by_hand(name, 1 if way == "cond" else 3), adapted, X, size=512)


def intercepted(module, weights, parallel):
    """The Linen model in which an interceptor writes the modules by hand."""

    def interceptor(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        path = "/".join(context.module.path)
        if context.method_name != "__call__":
            return y
        if not parallel and f"{path}/kernel" in weights:
            return y + by_hand(weights[f"{path}/kernel"], y)
        if parallel and f"{path}/fc2/kernel" in weights and path.endswith("mlp"):
            return y + by_hand(weights[f"{path}/fc2/kernel"], args[0])
        return y

    def apply(variables, *args):
        with nn.intercept_methods(interceptor):
            return module.apply(variables, *args)

    return apply


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model", ["vit", "bert"])
def test_linen_models_as_they_are(name, model):
    _, parallel = METHODS[name]
    if model == "vit":
        module = Vit(small_vit())
        side = module.config.patch_size * module.config.position_grid
        inputs = jnp.asarray(
            np.random.default_rng(0).normal(size=(2, side, side, 3)),
            jnp.float32,
        )
    else:
        module = Bert(small_bert())
        inputs = np.random.default_rng(0).integers(1, 50, (2, 7))
    params = random_params(module, inputs)
    fn = lambda p, x: jax.tree.leaves(module.apply({"params": p}, x))[0]
    rules = {
        "sequential": {"**/mlp/fc2/{kernel,bias}": sj.bottleneck(4, activation="silu")},
        "parallel": {"**/mlp/{fc1,fc2}/kernel": sj.bottleneck(4, placement="parallel", reads="fc1", scale=0.1)},
    }[name]
    adapted = filled(sj.adapt(params, rules, key=KEY, roles=sj.roles(fn, params, inputs)))
    weights = {p: w for p, w in sj.core.leaves_with_paths(adapted) if isinstance(w, Bottleneck)}
    found = sj.with_adapters(fn)(adapted, inputs)
    want = jax.tree.leaves(intercepted(module, weights, parallel)({"params": params}, inputs))[0]
    assert_rounding(found, want, size=512)
    assert float(jnp.abs(found - fn(params, inputs)).max()) > 1e-3


def test_nnx():
    class Mlp(nnx.Module):
        def __init__(self, rngs):
            self.fc1, self.fc2 = nnx.Linear(6, 10, rngs=rngs), nnx.Linear(10, 6, rngs=rngs)

        def __call__(self, x):
            return self.fc2(jnp.tanh(self.fc1(x)))

    graph, params = nnx.split(Mlp(nnx.Rngs(0)), nnx.Param)
    adapted = filled(sj.adapt(params, {"fc2/{kernel,bias}": sj.bottleneck(3)}, key=KEY))
    found = sj.with_adapters(lambda p, x: nnx.merge(graph, p)(x))(adapted, X)
    weight = next(w for _, w in sj.core.leaves_with_paths(adapted) if isinstance(w, Bottleneck))
    y = nnx.merge(graph, params)(X)
    assert_rounding(found, y + by_hand(weight, y), size=128)


def test_files_and_refusals(tmp_path):
    params = make_block()
    adapted = filled(sj.adapt(params, METHODS["sequential"][0], key=KEY))
    loaded = sj.load_adapter(sj.save_adapter(tmp_path / "x.safetensors", adapted, base=params), params)
    np.testing.assert_array_equal(sj.with_adapters(block)(loaded, X), sj.with_adapters(block)(adapted, X))
    with pytest.raises(NotMergeableError, match="fc2/kernel"):
        sj.merge(adapted)
    with pytest.raises(PatternError, match=r"fc2/kernel: .*does not match 'fc2/bias'"):
        sj.adapt(params, {"fc2/kernel": sj.bottleneck(3)}, key=KEY)
    with pytest.raises(PatternError, match=r"reads='fc3' is in no path"):
        sj.adapt(params, {"*/kernel": sj.bottleneck(3, placement="parallel", reads="fc3")}, key=KEY)
    with pytest.raises(PatternError, match="matches no other kernel"):
        sj.adapt(params, {"fc1/kernel": sj.bottleneck(3, placement="parallel", reads="fc1")}, key=KEY)
    with pytest.raises(ValueError, match="a parallel module needs the name"):
        sj.bottleneck(3, placement="parallel")
    backwards = sj.adapt(params, {"*/kernel": sj.bottleneck(3, placement="parallel", reads="fc2")}, key=KEY)
    with pytest.raises(RoleError, match="that no kernel has kept before it"):
        sj.with_adapters(block)(backwards, X)


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class Counting(Weight):
    """A kernel that adds the number of kernels before it to its result, and reports the mean of its input."""

    base: jax.Array
    axes: ClassVar[Mapping[str, str]] = {"base": "array"}
    uses_context: ClassVar[bool] = True

    @property
    def shape(self):
        return self.base.shape

    def materialize(self, dtype: Any = None):
        return self.base

    def contract(self, x, operation):
        before = operation.context.read("count")
        before = jnp.zeros(()) if before is None else before
        operation.context.write("count", before + 1.0)
        operation.context.report(operation.name, {"mean": jnp.mean(x), "before": before})
        return operation.apply(x, self.base) + before


def counting(shape, stack=()):
    role = sj.Role.dense((len(stack),), (len(stack) + 1,), tuple(range(len(stack))))
    base = jnp.asarray(np.random.default_rng(0).normal(size=(*stack, *shape)) / 3, jnp.float32)
    return Counting(base=base, role=role, dtype=base.dtype, trainable=())


def test_the_state_goes_from_layer_to_layer_and_over_nothing_else():
    """A first kernel makes the state; a scan over layers carries it on, one over time starts each step from it."""
    tree = {"first": counting((6, 6)), "layers": counting((6, 6), (3,)), "last": counting((6, 6))}

    def fn(p, x):
        x = x @ p["first"]
        x, _ = lax.scan(lambda h, w: (jax.checkpoint(lambda w, h: h @ w)(w, h), None), x, p["layers"])
        x, _ = lax.scan(lambda h, row: (h @ p["last"] + row, None), x, jnp.zeros((4, 6)))
        return x @ p["last"]

    def plain(x):
        x = x @ tree["first"].base
        for i in range(3):
            x = x @ tree["layers"].base[i] + (i + 1.0)
        for _ in range(4):
            x = x @ tree["last"].base + 4.0
        return x @ tree["last"].base + 4.0

    x = X[0]
    found, reports = jax.jit(sj.with_adapters(fn, collect=True))(tree, x)
    assert_rounding(found, plain(x), size=512)
    np.testing.assert_array_equal(reports["layers"]["before"], [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(reports["last"][0]["before"], [4.0] * 4)
    np.testing.assert_array_equal(reports["last"][1]["before"], 4.0)
    assert_rounding(reports["first"]["mean"], jnp.mean(x), size=64)
    # The state is data: gradients pass through it, and through reports.
    gradient = jax.jit(jax.grad(lambda x: sj.with_adapters(fn, collect=True)(tree, x)[1]["layers"]["mean"][1]))(x)
    want = jax.jit(jax.grad(lambda x: jnp.mean((x @ tree["first"].base) @ tree["layers"].base[0] + 1.0)))(x)
    assert_rounding(gradient, want, size=64)


def test_branches_that_are_not_run_report_zeros_and_write_nothing():
    tree = {"w": counting((6, 6)), "v": counting((6, 6))}

    def fn(p, x, run):
        x = x @ p["w"]
        x = lax.cond(run, lambda x: x @ p["v"], lambda x: x, x)
        return x @ p["w"]

    apply = jax.jit(sj.with_adapters(fn, collect=True))
    for run in (True, False):
        _, reports = apply(tree, X[0], run)
        assert float(reports["v"]["before"]) == (1.0 if run else 0.0)
        assert bool(reports["v"]["mean"] != 0) == run
        assert float(reports["w"][1]["before"]) == (2.0 if run else 1.0)


def test_reports_from_a_while_loop_are_refused():
    tree = {"w": counting((6, 6))}
    fn = lambda p, x: lax.while_loop(lambda h: jnp.sum(h) < 0, lambda h: h @ p["w"], x)
    assert sj.with_adapters(fn)(tree, X[0]).shape == X[0].shape
    with pytest.raises(MaterializeError, match=r"^w: reports values inside a while_loop"):
        sj.with_adapters(fn, collect=True)(tree, X[0])


def test_nothing_is_collected_without_stand_ins():
    assert sj.with_adapters(lambda p, x: x, collect=True)({"w": jnp.ones(2)}, 3.0) == (3.0, {})
