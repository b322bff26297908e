"""What models do to a kernel before they use it: found by `roles`, exact with adapters, or refused with the mend.

Every case compares value and gradients with the model on merged weights: with respect to a factor, the chain rule from
the gradient of the whole weight, which JAX computes of the plain model.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import subspace_jax as sj
from subspace_jax.core import MaterializeError, PatternError, RoleError
from subspace_jax.weights import SparseDelta
from tests.tolerances import assert_rounding

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def filled(params, rules, roles):
    adapted = sj.adapt(params, rules, key=KEY, roles=roles)
    trainable, frozen = sj.partition(adapted)
    rng = np.random.default_rng(5)
    return sj.combine(jax.tree.map(lambda v: jnp.asarray(0.3 * rng.normal(size=v.shape), v.dtype), trainable), frozen)


def check(fn, shape, x, *, rules=None, roles=None, allow=False, **found):
    """Compares an adapted run with the merged one; returns the roles that were found."""
    params = {"w": normal(*shape)}
    roles = sj.roles(fn, params, x) if roles is None else roles
    for name, axes in found.items():
        assert getattr(roles["w"], name) == axes, roles["w"]
    adapted = filled(params, rules or {"w": sj.lora(2, alpha=3.0)}, roles)
    apply = sj.with_adapters(fn, on_materialize="allow" if allow else "error")
    if allow:
        with pytest.raises(MaterializeError, match=r"^w: "):
            sj.with_adapters(fn)(adapted, x)
    trainable, frozen = sj.partition(adapted)
    weight = normal(*jax.eval_shape(fn, params, x).shape, seed=9)

    def run(trainable):
        y = apply(sj.combine(trainable, frozen), x)
        return jnp.sum(weight * y), y

    def plain(merged):
        y = fn(merged, x)
        return jnp.sum(weight * y), y

    @jax.jit
    def both(trainable):
        """Outputs and gradients of either; by the chain rule those of the whole weight give those of its parts."""
        merged, pull = jax.vjp(lambda t: sj.merge(sj.combine(t, frozen)), trainable)
        whole, expected = jax.grad(plain, has_aux=True)(merged)
        return jax.grad(run, has_aux=True)(trainable), (pull(whole)[0], expected)

    (ours, y), (wanted, expected) = both(trainable)
    assert_rounding(y, expected, size=64)
    for name in adapted["w"].trainable:
        assert_rounding(getattr(ours["w"], name), getattr(wanted["w"], name), size=512)
    return roles


X = normal(5, 6, seed=1)
NOT_FORMED = {
    "reshaped to heads": (lambda p, x: jnp.einsum("bi,ihk->bhk", x, p["w"].reshape(6, 2, 4)), (6, 8)),
    "qkv heads": (lambda p, x: jnp.einsum("bi,ihkc->bhkc", x, p["w"].reshape(6, 3, 2, 4)), (6, 24)),
    "transposed and reshaped": (lambda p, x: x @ p["w"].T.reshape(6, 2, 4).reshape(6, 8), (8, 6)),
    "split": (lambda p, x: sum(x @ part * (i + 1) for i, part in enumerate(jnp.split(p["w"], 3, axis=1))), (6, 12)),
    "sliced outputs": (lambda p, x: x @ p["w"][:, 2:7], (6, 9)),
    "sliced inputs": (lambda p, x: x[:, :4] @ p["w"][:4] + x[:, 4:] @ p["w"][4:], (6, 8)),
    "strided": (lambda p, x: x @ p["w"][:, ::2], (6, 9)),
    "dynamic slice": (lambda p, x: x @ lax.dynamic_slice_in_dim(p["w"], jnp.argmax(x[0]), 4, 1), (6, 9)),
    "heads sliced": (lambda p, x: jnp.einsum("bi,ihk->bhk", x, p["w"][:, 1:]), (6, 3, 4)),
    "chunks in a scan": (
        lambda p, x: lax.map(lambda i: x @ lax.dynamic_slice_in_dim(p["w"], i * 4, 4, 1), jnp.arange(3)),
        (6, 12),
    ),
    "scaled": (lambda p, x: x @ (p["w"] * 0.5), (6, 5)),
    "scaled by what is traced": (lambda p, x: x @ (jnp.mean(x) * p["w"]), (6, 5)),
    "divided": (lambda p, x: x @ (p["w"] / jnp.sqrt(6.0)), (6, 5)),
    "negated": (lambda p, x: x @ -p["w"], (6, 5)),
    "scaled heads": (lambda p, x: jnp.einsum("bi,ihk->bhk", x, 2.0 * p["w"]), (6, 2, 4)),
    "outputs scaled": (lambda p, x: x @ (p["w"] * jnp.arange(5.0)), (6, 5)),
    "inputs scaled": (lambda p, x: x @ (p["w"] * jnp.arange(6.0)[:, None] / x[0][:, None]), (6, 5)),
    "each of several heads scaled": (
        lambda p, x: jnp.einsum("bi,ihk->bhk", x, p["w"] * jnp.array([[1.0], [3.0]]) * jnp.arange(4.0)),
        (6, 2, 4),
    ),
    "transposed, scaled and cut": (lambda p, x: x @ (p["w"].T * jnp.arange(5.0)).T[:, :6].T, (5, 6)),
}


@pytest.mark.parametrize("name", NOT_FORMED)
@pytest.mark.parametrize("method", ["lora", "dora", "svfit", "matryoshka"])
def test_views_of_a_kernel_are_not_formed(name, method):
    fn, shape = NOT_FORMED[name]
    if method == "dora" and name == "sliced inputs":
        pytest.skip("half of a column has another length")
    lora = sj.lora(2, alpha=3.0)
    methods = {"lora": lora, "dora": sj.dora(lora), "svfit": sj.svfit(2), "matryoshka": sj.matryoshka(lora)}
    check(fn, shape, X, rules={"w": methods[method]})


def test_factors_that_vary_along_both_sides_or_entries_need_the_array():
    for factor in (jnp.ones((6, 5)), jnp.ones((6, 1)) * jnp.arange(5.0)):
        fn = lambda p, x, factor=factor: x @ (p["w"] * factor)
        adapted = filled({"w": normal(6, 5)}, {"w": sj.lora(2)}, {})
        with pytest.raises(MaterializeError, match=r"^w: .*'mul'"):
            sj.with_adapters(fn)(adapted, X)
    convolution = lambda p, x: lax.conv_general_dilated(x, p["w"] * jnp.arange(4.0)[:, None], (1,), "SAME", **WIO)
    adapted = filled({"w": normal(3, 4, 5)}, {"w": sj.lora(2)}, {"w": sj.Role("conv", (), (0, 1), (2,))})
    with pytest.raises(MaterializeError, match=r"^w: .*'mul'"):
        sj.with_adapters(convolution)(adapted, normal(2, 7, 4))


WIO = {"dimension_numbers": ("NWC", "WIO", "NWC")}


def test_entries_of_what_is_no_matrix_are_not_moved_with_its_axes():
    base = normal(2, 3, 4)
    options = {"dtype": base.dtype, "trainable": ("values",), "indices": jnp.array([5]), "values": jnp.ones(1)}
    assert SparseDelta(base=base, role=sj.Role("other"), **options).permuted((2, 0, 1)) is None
    one = SparseDelta(base=base, role=sj.Role.dense((1,), (2, 0)), **options)
    np.testing.assert_array_equal(one.permuted((2, 0, 1)).materialize(), one.materialize().transpose(2, 0, 1))


FORMED = {
    "masked": (lambda p, x: x @ jnp.tril(p["w"]), (6, 6)),
    "weight norm": (lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0)), (6, 5)),
    "rounded": (lambda p, x: x @ lax.reduce_precision(p["w"], 8, 7), (6, 5)),
    "penalty": (lambda p, x: x @ p["w"] + jnp.sum(p["w"] ** 2), (6, 5)),
}


@pytest.mark.parametrize("name", FORMED)
def test_computed_kernels_have_the_role_of_their_product_and_are_exact_where_forming_is_allowed(name):
    fn, shape = FORMED[name]
    out = tuple(range(1, len(shape)))
    check(fn, shape, X, allow=True, kind="dense", in_axes=(0,), out_axes=out)


def test_roles_never_make_a_kernel_of_two_axes_worse():
    """The use cannot be followed (a mask from outside), so it counts as `adapt` counts it without roles."""
    fn = lambda p, x, mask: x @ (p["w"] * mask)
    params, mask = {"w": normal(6, 5)}, jnp.asarray(np.random.default_rng(0).random((6, 5)) > 0.5, jnp.float32)
    roles = sj.roles(fn, params, X, mask)
    adapted = filled(params, {"w": sj.lora(2)}, roles)
    assert (adapted["w"].role.in_axes, adapted["w"].role.out_axes) == ((0,), (1,))
    with pytest.raises(MaterializeError, match=r"^w: .*'mul'.*on_materialize=\"allow\""):
        sj.with_adapters(fn)(adapted, X, mask)
    found = sj.with_adapters(fn, on_materialize="allow")(adapted, X, mask)
    assert_rounding(found, fn(sj.merge(adapted), X, mask), size=64)


def test_the_refusal_of_a_kernel_names_what_the_model_does_and_another_way_than_was_taken():
    fn = lambda p, x: jnp.einsum("bi,ihk->bhk", x, jnp.flip(p["w"], 0))
    params = {"w": normal(6, 2, 4)}
    roles = sj.roles(fn, params, X)
    with pytest.raises(RoleError, match=r"^w: .*'rev'.*Role\.dense\(in_axes=.*on_materialize=\"allow\"") as caught:
        sj.adapt(params, {"w": sj.lora(2)}, key=KEY, roles=roles)
    assert "sj.roles(" not in str(caught.value)
    check(fn, (6, 2, 4), X, roles={"w": sj.Role.dense((0,), (1, 2))}, allow=True)


def test_what_the_user_writes_wins_over_what_was_found_first_or_last():
    params = {"experts": {"up": normal(3, 6, 8)}, "head": normal(6, 5)}

    def fn(p, x):
        return jnp.sum(jnp.einsum("nd,edf->nef", x, p["experts"]["up"]), (1, 2))[:, None] + x @ p["head"]

    found = sj.roles(fn, params, X)
    assert found["experts/up"].stack_axes == ()
    mine = sj.Role.dense((1,), (2,), (0,))
    for roles in ({**found, "experts/*": mine}, {"experts/*": mine, **found}, found | {"experts/up": mine}):
        adapted = sj.adapt(params, {"**": sj.lora(2)}, key=KEY, roles=roles)
        assert adapted["experts"]["up"].a.shape == (3, 6, 2)
        assert adapted["head"].a.shape == (6, 2)
    again = sj.roles(fn, params, X, stack={"experts/*": 0})
    assert sj.adapt(params, {"**": sj.lora(2)}, key=KEY, roles=again)["experts"]["up"].b.shape == (3, 2, 8)
    with pytest.raises(PatternError, match=r"stack=.*'expert/up'.* matches no leaf; nearest"):
        sj.roles(fn, params, X, stack={"expert/up": 0})
    with pytest.raises(PatternError, match=r"^head: stack=4 names an axis"):
        sj.roles(fn, params, X, stack={"head": 4})


@pytest.mark.parametrize("up", [True, False])
def test_einsum_experts_have_an_adapter_each(up):
    formula, shape = ("nd,edf->nef", (3, 6, 4)) if up else ("nef,efd->ned", (3, 4, 6))
    x = X if up else normal(5, 3, 4, seed=2)
    fn = lambda p, x: jnp.einsum(formula, x, p["w"])
    roles = sj.roles(fn, {"w": normal(*shape)}, x, stack={"w": 0})
    check(fn, shape, x, roles=roles, stack_axes=(0,), in_axes=(1,), out_axes=(2,))


def ragged(p, x, sizes):
    return lax.ragged_dot(x, p["w"], sizes)


@pytest.mark.parametrize("method", [sj.lora(2, alpha=3.0), sj.dora(sj.lora(2)), sj.methods.lora_sb.lora_xs(2)])
@pytest.mark.parametrize("form", ["plain", "transposed", "reshaped"])
def test_ragged_experts_have_an_adapter_each(method, form):
    """Tokens in no group stay zero, an empty group is none, and nothing of the stack's size is formed."""
    sizes, x = jnp.array([3, 0, 4, 1]), normal(10, 6, seed=1)
    shapes = {"plain": (4, 6, 5), "transposed": (4, 5, 6), "reshaped": (4, 6, 5)}
    fns = {
        "plain": lambda p, x: lax.ragged_dot(x, p["w"], sizes),
        "transposed": lambda p, x: lax.ragged_dot(x, jnp.swapaxes(p["w"], 1, 2), sizes),
        "reshaped": lambda p, x: lax.ragged_dot(x, p["w"].reshape(4, 6, 5, 1).reshape(4, 6, 5), sizes),
    }
    inputs, outputs = (2, 1) if form == "transposed" else (1, 2)
    roles = check(fns[form], shapes[form], x, rules={"w": method})
    assert (roles["w"].stack_axes, roles["w"].in_axes, roles["w"].out_axes) == ((0,), (inputs,), (outputs,))
    adapted = filled({"w": normal(*shapes[form])}, {"w": method}, roles)
    assert not np.asarray(sj.with_adapters(fns[form])(adapted, x))[8:].any()


def test_ragged_experts_cost_little_more_than_the_plain_program():
    sizes, x = jnp.array([16, 16, 16, 16]), jnp.ones((64, 128))
    params = {"w": normal(4, 128, 128)}
    adapted = sj.adapt(params, {"w": sj.lora(2)}, key=KEY, roles={"w": sj.Role.dense((1,), (2,), (0,))})

    def flops(tree):
        program = jax.jit(lambda p, x: sj.with_adapters(ragged)(p, x, sizes)).lower(tree, x).compile()
        cost = program.cost_analysis()
        assert cost is not None
        return cost["flops"]

    assert flops(adapted) < 1.06 * flops(params)


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, i: jax.vmap(lambda j: p["w"][j])(i),
        lambda p, i: jax.vmap(jax.vmap(lambda j: p["w"][j]))(i[:, None]),
        lambda p, i: p["w"][i[1]],
        lambda p, i: jnp.take(p["w"], i, axis=0),
    ],
)
def test_lookups_in_every_form(fn):
    check(fn, (7, 4), jnp.array([3, 0, 6]), kind="embedding", in_axes=(0,), out_axes=(1,))
    check(fn, (7, 4), jnp.array([3, 0, 6]), roles={"w": sj.Role.embedding()})


def test_kernels_chosen_by_tokens_are_a_stack_and_no_table():
    fn = lambda p, x: jnp.einsum("ti,tio->to", x, p["w"][jnp.array([3, 1, 1, 0, 2])])
    check(fn, (4, 6, 8), X, kind="dense", stack_axes=(0,), in_axes=(1,), out_axes=(2,))


def test_norms_of_one_plus_scale_are_scales():
    fn = lambda p, x: x * (1.0 + p["s"]) + p["b"]
    roles = sj.roles(fn, {"s": jnp.zeros(6), "b": jnp.zeros(6)}, X)
    assert (roles["s"].kind, roles["b"].kind) == ("scale", "bias")


@jax.custom_vjp
def straight_through(w):
    return jnp.round(w)


straight_through.defvjp(lambda w: (jnp.round(w), None), lambda _, g: (g,))


@jax.custom_vjp
def clipped(w, x):
    return x @ w


clipped.defvjp(
    lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ jnp.clip(g, -0.1, 0.1), jnp.clip(g, -0.1, 0.1) @ r[0].T)
)


@jax.custom_jvp
def tripled(w):
    return 1.0 * w


tripled.defjvp(lambda p, t: (p[0], 3.0 * t[0]))


def fixed_point(w, x):
    @jax.custom_vjp
    def solve(w, x):
        return lax.while_loop(
            lambda c: jnp.max(jnp.abs(c[0] - c[1])) > 1e-7, lambda c: (jnp.tanh(c[0] @ w + x), c[0]), (x, x + 1.0)
        )[0]

    def forward(w, x):
        return (z := solve(w, x)), (w, x, z)

    def backward(kept, g):
        w, x, z = kept
        _, pull = jax.vjp(lambda z: jnp.tanh(z @ w + x), z)
        u = lax.fori_loop(0, 50, lambda _, u: g + pull(u)[0], g)
        return jax.vjp(lambda w, x: jnp.tanh(z @ w + x), w, x)[1](u)

    solve.defvjp(forward, backward)
    return solve(w, x)


CUSTOM = {
    "straight through": (lambda p, x: x @ straight_through(p["w"]), (6, 5)),
    "clipped cotangent": (lambda p, x: clipped(p["w"], x), (6, 5)),
    "tripled tangent": (lambda p, x: x @ tripled(p["w"]), (6, 5)),
    "fixed point": (lambda p, x: fixed_point(0.1 * p["w"], x), (6, 6)),
}


@pytest.mark.parametrize("name", CUSTOM)
def test_derivative_rules_of_the_model_are_kept(name):
    fn, shape = CUSTOM[name]
    check(fn, shape, X, allow=True, kind="dense", in_axes=(0,), out_axes=(1,))
    params = {"w": normal(*shape)}
    adapted = filled(params, {"w": sj.lora(2)}, None)
    if name != "fixed point":
        with pytest.raises(MaterializeError, match=r"^w: .*derivative rule of its own.*custom_rules=\"inline\""):
            sj.with_adapters(fn)(adapted, X)
    # The input's gradient is that of the rule too.
    ours = jax.grad(lambda x: jnp.sum(sj.with_adapters(fn, on_materialize="allow")(adapted, x) * X[:, :1]))(X)
    assert_rounding(ours, jax.grad(lambda x: jnp.sum(fn(sj.merge(adapted), x) * X[:, :1]))(X), size=256)


def test_inlining_a_rule_is_the_callers_choice():
    @jax.custom_jvp
    def product(x, w):
        return x @ w

    product.defjvp(lambda p, t: (p[0] @ p[1], t[0] @ p[1] + 3.0 * p[0] @ t[1]))
    fn = lambda p, x: product(x, p["w"])
    adapted = filled({"w": normal(6, 5)}, {"w": sj.lora(2)}, None)
    trainable, frozen = sj.partition(adapted)

    def gradient(**options):
        return jax.grad(lambda t: jnp.sum(sj.with_adapters(fn, **options)(sj.combine(t, frozen), X)))(trainable)["w"].a

    assert_rounding(gradient(on_materialize="allow"), 3.0 * gradient(custom_rules="inline"), size=64)
    with pytest.raises(ValueError, match="custom_rules is"):
        sj.with_adapters(fn, custom_rules="drop")


def test_roles_written_by_hand_are_not_marked_as_found():
    roles = sj.roles(lambda p, x: x @ p["w"], {"w": normal(6, 5)}, X)
    assert roles["w"].found
    assert not sj.adapt({"w": normal(6, 5)}, {"w": sj.lora(1)}, key=KEY, roles=roles)["w"].role.found
    assert dataclasses.replace(roles["w"], found=False) == roles["w"]


def test_complex_weights_are_adapted_in_their_parts():
    w = jax.lax.complex(normal(6, 5), normal(6, 5, seed=3))
    with pytest.raises(PatternError, match=r"^w: holds complex64; adapt its real and its imaginary part"):
        sj.adapt({"w": w}, {"w": sj.lora(2)}, key=KEY)
    fn = lambda p, x: jnp.abs(x.astype(jnp.complex64) @ lax.complex(p["re"], p["im"]))
    params = {"re": w.real, "im": w.imag}
    adapted = filled(params, {"*": sj.lora(2)}, sj.roles(fn, params, X))
    found = sj.with_adapters(fn, on_materialize="allow")(adapted, X)
    assert_rounding(found, fn(sj.merge(adapted), X), size=64)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float4_e2m1fn])
def test_weights_of_few_bits_are_computed_in_float32_and_rounded_once(dtype):
    w = normal(6, 5).astype(dtype)
    wide = lambda p, x: x @ p["w"].astype(jnp.float32)
    for method in (sj.lora(2), sj.dora(sj.lora(2)), sj.pissa(2), sj.lift(2, filter_rank=2)):
        adapted = filled({"w": w}, {"w": method}, None)
        exact = sj.merge(adapted, keep_float32=True)["w"]
        rounded = sj.merge(adapted)["w"]
        assert exact.dtype == jnp.float32
        assert rounded.dtype == dtype
        np.testing.assert_array_equal(rounded.astype(jnp.float32), exact.astype(dtype).astype(jnp.float32))
        allowed = sj.with_adapters(wide, on_materialize="allow")
        assert_rounding(allowed(adapted, X), X @ exact, size=64)
