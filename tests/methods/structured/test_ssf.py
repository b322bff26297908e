"""SSF: folding, gradients and placement, against plain affine maps."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import subspace_jax as sj
from subspace_jax.core import MaterializeError, NotMergeableError, PatternError, RoleError
from subspace_jax.models import Vit, VitConfig
from tests.tolerances import tolerance


class Affine(nn.Module):
    """Scale and shift as a layer of the model: SSF's module form."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return scale * x + self.param("shift", nn.initializers.zeros, x.shape[-1:])


def network(affine):
    """Dense, convolution, depthwise convolution, norms and heads, with or without a map after each."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            after = (lambda y: Affine()(y)) if affine else (lambda y: y)
            x = after(nn.Conv(4, (3, 3), name="conv")(x))
            x = nn.relu(after(nn.Conv(4, (3, 3), feature_group_count=4, name="depthwise")(x)))
            x = after(nn.BatchNorm(use_running_average=True, name="batch_norm")(x)).mean((1, 2))
            x = after(nn.LayerNorm(name="norm")(x))
            x = after(nn.Dense(12, name="qkv")(x))
            return nn.Dense(3, name="head")(nn.gelu(x))

    return Network()


LAYERS = ("conv", "depthwise", "batch_norm", "norm", "qkv")
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6, 6, 2)), jnp.float32)


def variables():
    """Parameters with biases that are not zero, and statistics of the batch norm."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda v: jnp.asarray(v + 0.3 * np.abs(rng.normal(size=v.shape)), jnp.float32),
        network(False).init(jax.random.key(0), X),
    )


def adapted(params, std=0.3, **options):
    rules = [("head/*", None), ("**", sj.ssf(std=std, **options))]
    roles = sj.roles(lambda p, x: network(False).apply({**variables(), "params": p}, x), params, X)
    return sj.adapt(params, rules, key=jax.random.key(2), roles=roles)


def maps_of(tree):
    """Scales and shifts as parameters of the module form."""
    found = {}
    for i, name in enumerate(LAYERS):
        layer = tree[name]
        owner = layer.get("kernel", layer.get("scale"))
        found[f"Affine_{i}"] = {"scale": owner.scale, "shift": layer["bias"].shift}
    return found


def run(tree, x):
    model = sj.with_adapters(lambda p, x: network(False).apply({**variables(), "params": p}, x))
    return model(tree, x)


def module_form(maps, x):
    given = variables()
    return network(True).apply({**given, "params": {**given["params"], **maps}}, x)


def test_equals_the_module_form_in_outputs_and_gradients():
    tree = adapted(variables()["params"])
    np.testing.assert_allclose(run(tree, X), module_form(maps_of(tree), X), rtol=1e-4, atol=1e-5)
    learned, frozen = sj.partition(tree)
    found = jax.jit(jax.grad(lambda t: jnp.sin(run(sj.combine(t, frozen), X)).sum()))(learned)
    expected = jax.jit(jax.grad(lambda m: jnp.sin(module_form(m, X)).sum()))(maps_of(tree))
    for i, name in enumerate(LAYERS):
        layer = found[name]
        owner = layer.get("kernel", layer.get("scale"))
        np.testing.assert_allclose(owner.scale, expected[f"Affine_{i}"]["scale"], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(layer["bias"].shift, expected[f"Affine_{i}"]["shift"], rtol=1e-3, atol=1e-4)


def test_folding_gives_a_plain_tree_with_the_same_outputs():
    params = variables()["params"]
    tree = adapted(params)
    folded = sj.methods.ssf.fold(tree)
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, params)
    plain = network(False).apply({**variables(), "params": folded}, X)
    np.testing.assert_allclose(plain, run(tree, X), rtol=1e-4, atol=1e-5)
    for name in ("conv", "qkv"):
        kernel, bias, maps = params[name]["kernel"], params[name]["bias"], maps_of(tree)[f"Affine_{LAYERS.index(name)}"]
        np.testing.assert_allclose(folded[name]["kernel"], kernel * maps["scale"], rtol=tolerance())
        np.testing.assert_allclose(folded[name]["bias"], bias * maps["scale"] + maps["shift"], rtol=tolerance())


def test_identity_maps_change_nothing():
    params = variables()["params"]
    tree = adapted(params, std=0.0)
    np.testing.assert_array_equal(run(tree, X), network(False).apply({**variables(), "params": params}, X))
    jax.tree.map(np.testing.assert_array_equal, sj.merge(tree), params)


def test_two_maps_compose():
    """SSF(g2, t2) after SSF(g1, t1) is SSF(g1 g2, g2 t1 + t2)."""
    first = sj.methods.ssf.fold(adapted(variables()["params"]))
    second = adapted(first)
    maps = maps_of(adapted(variables()["params"]))["Affine_4"]
    again = maps_of(second)["Affine_4"]
    folded, plain = sj.methods.ssf.fold(second)["qkv"], variables()["params"]["qkv"]
    scale = maps["scale"] * again["scale"]
    np.testing.assert_allclose(folded["kernel"], plain["kernel"] * scale, rtol=1e-5)
    shift = again["scale"] * maps["shift"] + again["shift"]
    np.testing.assert_allclose(folded["bias"], plain["bias"] * scale + shift, rtol=1e-5, atol=tolerance(size=4))


def test_scale_and_shift_before_a_norm_cancel():
    """Equal factors on scale and shift of an operation that feeds a LayerNorm leave its output unchanged."""

    def model(p, x):
        y = x @ p["layer"]["kernel"] + p["layer"]["bias"]
        return (y - y.mean(-1, keepdims=True)) / y.std(-1, keepdims=True)

    rng = np.random.default_rng(3)
    params = {"layer": {"kernel": jnp.asarray(rng.normal(size=(5, 8)), jnp.float32), "bias": jnp.ones(8)}}
    tree = sj.adapt(params, {"**": sj.ssf(std=0.3)}, key=jax.random.key(0))
    layer = tree["layer"]
    larger = {
        "kernel": dataclasses.replace(layer["kernel"], scale=3.0 * layer["kernel"].scale),
        "bias": dataclasses.replace(layer["bias"], shift=3.0 * layer["bias"].shift),
    }
    x = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    apply = sj.with_adapters(model)
    np.testing.assert_allclose(apply({"layer": larger}, x), apply(tree, x), rtol=1e-4, atol=1e-5)


def test_stacked_layers_and_heads():
    """Kernels (layers, d, heads, size) with biases (layers, heads, size), in a loop."""
    rng = np.random.default_rng(4)
    params = {"attention": {"kernel": rng.normal(size=(3, 8, 2, 4)), "bias": rng.normal(size=(3, 2, 4))}}
    params = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), params)

    def model(p, x):
        def layer(h, one):
            return jnp.tanh(jnp.einsum("bd,dhk->bhk", h, one["kernel"]) + one["bias"]).reshape(h.shape), None

        return jax.lax.scan(layer, x, p["attention"])[0]

    x = jnp.asarray(rng.normal(size=(2, 8)), jnp.float32)
    tree = sj.adapt(params, {"**": sj.ssf(std=0.3)}, key=jax.random.key(0), roles=sj.roles(model, params, x))
    assert tree["attention"]["kernel"].scale.shape == tree["attention"]["bias"].shift.shape == (3, 8)
    np.testing.assert_allclose(sj.with_adapters(model)(tree, x), model(sj.merge(tree), x), rtol=1e-4, atol=1e-5)
    scale = np.asarray(tree["attention"]["kernel"].scale).reshape(3, 2, 4)
    shift = np.asarray(tree["attention"]["bias"].shift).reshape(3, 2, 4)
    np.testing.assert_allclose(
        sj.merge(tree)["attention"]["bias"],
        params["attention"]["bias"] * scale + shift,
        rtol=1e-5,
        atol=tolerance(size=4),
    )


def test_kernels_without_a_bias_get_one_by_folding():
    rng = np.random.default_rng(5)
    params = {"dense": {"kernel": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)}}
    x = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    tree = sj.adapt(params, {"**": sj.ssf(std=0.3, create_bias=True)}, key=jax.random.key(0))
    weight = tree["dense"]["kernel"]
    outputs = sj.with_adapters(lambda p, x: x @ p["dense"]["kernel"])(tree, x)
    np.testing.assert_allclose(
        outputs, x @ params["dense"]["kernel"] * weight.scale + weight.shift, rtol=1e-5, atol=tolerance(size=4)
    )
    folded = sj.methods.ssf.fold(tree)["dense"]
    np.testing.assert_allclose(x @ folded["kernel"] + folded["bias"], outputs, rtol=1e-5, atol=tolerance(size=4))
    with pytest.raises(NotMergeableError):
        sj.merge(tree)
    with pytest.raises(MaterializeError, match="shifted output features"):
        sj.with_adapters(lambda p, x: x @ p["dense"]["kernel"].T)(tree, jnp.ones((3, 4)))


def test_vit_base_has_the_published_count():
    config = VitConfig(
        patch_size=16, position_grid=14, width=768, num_layers=12, num_heads=12, mlp_width=3072, scan_layers=True
    )
    model, images = Vit(config), jnp.zeros((1, 224, 224, 3))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), images))["params"]
    roles = sj.roles(lambda p, x: model.apply({"params": p}, x), params, images)
    # Layer scales, which multiply a whole branch, stay as they are; tokens and positions are no layers.
    rules = [("**/layer_scale*/**", None), ("**/kernel", method := sj.ssf()), ("**/scale", method), ("**/bias", method)]
    tree = jax.eval_shape(lambda p: sj.adapt(p, rules, key=jax.random.key(0), roles=roles), params)
    assert sj.summary(tree).trainable == 205_824


def test_start_has_the_published_spread():
    params = {"layer": {"kernel": jnp.ones((2, 4000)), "bias": jnp.zeros(4000)}}
    layer = sj.adapt(params, {"**": sj.ssf()}, key=jax.random.key(0))["layer"]
    for values, mean in ((layer["kernel"].scale, 1.0), (layer["bias"].shift, 0.0)):
        assert abs(float(values.mean()) - mean) < 4 * 0.02 / np.sqrt(4000)
        np.testing.assert_allclose(values.std(), 0.02, rtol=0.1)


def test_only_maps_learn_and_the_scale_is_held_once():
    tree = adapted(variables()["params"])
    learned, _ = sj.partition(tree)
    channels = 4 + 4 + 4 + 4 + 12
    assert sum(v.size for v in jax.tree.leaves(learned)) == 2 * channels == sj.summary(tree).trainable
    assert tree["qkv"]["bias"].scale is None


def test_nnx():
    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.norm, self.dense = nnx.LayerNorm(6, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)

        def __call__(self, x):
            return self.dense(self.norm(x))

    graph, state = nnx.split(Model())
    params = nnx.to_pure_dict(state)

    def apply(params, x):
        copy = jax.tree.map(lambda v: v, state)
        nnx.replace_by_pure_dict(copy, params)
        return nnx.merge(graph, copy)(x)

    x = jnp.asarray(np.random.default_rng(6).normal(size=(3, 6)), jnp.float32)
    tree = sj.adapt(params, {"**": sj.ssf(std=0.3)}, key=jax.random.key(0), roles=sj.roles(apply, params, x))
    np.testing.assert_allclose(
        sj.with_adapters(apply)(tree, x), apply(sj.methods.ssf.fold(tree), x), rtol=1e-4, atol=1e-5
    )


def test_checkpoint_round_trip(tmp_path):
    tree = adapted(variables()["params"])
    sj.save_checkpoint(tmp_path / "one", 0, tree)
    back = sj.restore_checkpoint(tmp_path / "one").adapted
    np.testing.assert_array_equal(run(back, X), run(tree, X))


def test_bad_rules_are_refused():
    params = {"layer": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}}
    with pytest.raises(PatternError, match="layer/kernel: ssf shifts through the layer's bias"):
        sj.adapt(params, {"**/kernel": sj.ssf()}, key=jax.random.key(0))
    with pytest.raises(PatternError, match="one kernel"):
        sj.adapt(
            {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2)), "bias": jnp.ones(4)}, {"*": sj.ssf()}, key=jax.random.key(0)
        )
    with pytest.raises(PatternError, match=r"layer/bias: ssf scales the layer's kernel or scale"):
        sj.adapt(params, {"**/bias": sj.ssf()}, key=jax.random.key(0))
    tree = sj.adapt(params, [("**/kernel", sj.ssf(create_bias=True))], key=jax.random.key(0))
    with pytest.raises(PatternError, match="has a 'bias' already"):
        sj.methods.ssf.fold(tree)
    for wrong in ({"std": -1.0}, {"std": float("nan")}, {"unit_offset": 1}, {"dtype": jnp.float16}):
        with pytest.raises(ValueError, match=f"ssf: {next(iter(wrong))}="):
            sj.ssf(**wrong)


class Norms(nn.Module):
    """Norms with and without scale and bias, and one that multiplies by 1 + scale."""

    bias: bool = False
    scale: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(use_bias=self.bias, name="scale_only")(x)
        x = nn.LayerNorm(use_scale=self.scale, name="bias_only")(x + 1.0)
        return self.offset(x)

    def offset(self, x):
        scale = self.param("offset_scale", nn.initializers.normal(0.3), x.shape[-1:])
        shift = self.param("offset_bias", nn.initializers.normal(0.3), x.shape[-1:])
        return jnp.tanh(x) * (1.0 + scale) + shift


V = jnp.asarray(np.random.default_rng(3).normal(size=(5, 6)), jnp.float32)


def norms_of(model):
    """The parameters, with scale and bias of the last norm in a dict of their own, and the model on them."""

    def apply(params, x):
        last = params["offset"]
        rest = {name: value for name, value in params.items() if name != "offset"}
        return model.apply({"params": {**rest, "offset_scale": last["scale"], "offset_bias": last["bias"]}}, x)

    params = model.init(jax.random.key(5), V)["params"]
    last = {"scale": params.pop("offset_scale"), "bias": params.pop("offset_bias")}
    return {**params, "offset": last}, apply


def test_norms_that_lack_a_scale_or_a_bias_are_refused_and_completed():
    """RMSNorm and LayerNorm(use_bias=False) were scaled alone, in silence."""
    params, apply = norms_of(Norms())
    roles = sj.roles(apply, params, V)
    for create in (False, True):
        with pytest.raises(PatternError, match=r"scale_only/scale: ssf shifts.*complete_norms.*full\(\)"):
            sj.adapt(params, {"scale_only/*": sj.ssf(create_bias=create)}, key=jax.random.key(0), roles=roles)
        with pytest.raises(PatternError, match=r"bias_only/bias: ssf scales.*use_scale=True on ssf.complete_norms"):
            sj.adapt(params, {"bias_only/*": sj.ssf(create_bias=create)}, key=jax.random.key(0), roles=roles)
    completed = sj.methods.ssf.complete_norms(params, "*_only")
    _, whole = norms_of(Norms(bias=True, scale=True))
    np.testing.assert_array_equal(whole(completed, V), apply(params, V))
    roles = sj.roles(whole, completed, V)
    tree = sj.adapt(completed, {"*_only/*": sj.ssf(std=0.3)}, key=jax.random.key(0), roles=roles)
    found = sj.with_adapters(whole)(tree, V)
    np.testing.assert_allclose(found, whole(sj.methods.ssf.fold(tree), V), atol=tolerance("float32", 6, 4.0))
    assert sj.summary(tree).trainable == 4 * 6
    with pytest.raises(PatternError, match=r"complete_norms: 'scale_onyl' matches no dict.*'scale_only'"):
        sj.methods.ssf.complete_norms(params, "scale_onyl")


def test_norms_that_multiply_by_one_plus_scale_fold_right():
    params, apply = norms_of(Norms())
    roles = sj.roles(apply, params, V)
    with pytest.raises(RoleError, match=r"offset/scale: the model adds to it.*unit_offset=True"):
        sj.adapt(params, {"offset/*": sj.ssf()}, key=jax.random.key(0), roles=roles)
    with pytest.raises(RoleError, match=r"offset/scale: whether the model multiplies by it or by 1 \+ it is not known"):
        sj.adapt(params, {"offset/*": sj.ssf()}, key=jax.random.key(0))
    with pytest.raises(RoleError, match="scale_only/scale: the model multiplies by it as it is"):
        sj.adapt(params, {"scale_only/*": sj.ssf(unit_offset=True)}, key=jax.random.key(0), roles=roles)
    for known in (roles, None):
        method = sj.ssf(std=0.3, unit_offset=True)
        tree = sj.adapt(params, {"offset/*": method}, key=jax.random.key(0), roles=known)
        maps = tree["offset"]["scale"].scale, tree["offset"]["bias"].shift
        expected = np.asarray(apply(params, V), np.float64) * maps[0] + maps[1]
        room = tolerance("float32", 6, np.abs(expected).max())
        np.testing.assert_allclose(sj.with_adapters(apply)(tree, V), expected, rtol=0, atol=room)
        np.testing.assert_allclose(apply(sj.methods.ssf.fold(tree), V), expected, rtol=0, atol=room)
        still = sj.adapt(params, {"offset/*": sj.ssf(std=0, unit_offset=True)}, key=jax.random.key(0), roles=known)
        jax.tree.map(np.testing.assert_array_equal, sj.merge(still), params)
