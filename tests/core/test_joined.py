"""Kernels that a model joins, stacks or batches before it uses them, and forming that is allowed by rules."""

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import pytest
from jax import lax

import subspace_jax as sj
from subspace_jax.core import MaterializeError, PatternError
from tests.core.test_foreign_uses import KEY, X, check, filled, normal
from tests.tolerances import assert_rounding

JOINED = {
    "side by side": (lambda p, x: x @ jnp.concatenate([p["w"], 2.0 * p["w"]], axis=1), (6, 5)),
    "beside an array": (lambda p, x: x @ jnp.concatenate([jnp.ones((6, 2)), p["w"]], axis=1), (6, 5)),
    "along inputs": (lambda p, x: jnp.tile(x, 2) @ jnp.concatenate([p["w"], 3.0 * p["w"]]), (6, 5)),
    "transposed": (lambda p, x: x @ jnp.concatenate([p["w"], p["w"]]).T, (5, 6)),
    "fused heads": (
        lambda p, x: jnp.einsum("bi,ink->bnk", x, jnp.concatenate([p["w"], 2.0 * p["w"]], 1).reshape(6, 4, 4)),
        (6, 8),
    ),
    "cut apart": (lambda p, x: sum(x @ v for v in jnp.split(jnp.concatenate([p["w"], 3.0 * p["w"]], 1), 4, 1)), (6, 4)),
    "cut across": (lambda p, x: x @ jnp.concatenate([p["w"], p["w"]], 1)[:, 2:7], (6, 4)),
    "outputs scaled": (lambda p, x: x @ (jnp.concatenate([p["w"], p["w"]], 1) * jnp.arange(10.0)), (6, 5)),
    "in a loop": (
        lambda p, x: lax.scan(
            lambda h, _: (jnp.tanh(h @ jnp.concatenate([p["w"], p["w"]], 1)), None), x, None, length=3
        )[0],
        (6, 3),
    ),
    "rematerialized": (
        lambda p, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(jnp.concatenate([p["w"], p["w"]], 1), x),
        (6, 3),
    ),
    "stacked": (lambda p, x: jnp.einsum("bi,iso->sbo", x, jnp.stack([p["w"], 2.0 * p["w"]], axis=1)), (6, 5)),
    "stacked for vmap": (lambda p, x: jax.vmap(lambda w: x @ w)(jnp.stack([p["w"], -p["w"]])), (6, 5)),
    "stacked with inputs": (lambda p, x: jnp.stack([x, 2.0 * x]) @ jnp.stack([p["w"], p["w"]]), (6, 5)),
    "stacked for a loop": (
        lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, jnp.stack([p["w"], p["w"]]))[0],
        (6, 6),
    ),
    "layers side by side": (
        lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, jnp.concatenate([p["w"], 2.0 * p["w"]], axis=2))[
            0
        ],
        (4, 6, 3),
    ),
    "layers after layers": (
        lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, jnp.concatenate([p["w"], p["w"]]))[0],
        (2, 6, 6),
    ),
    "stacked, scaled and side by side": (
        lambda p, x: x @ (jnp.stack([p["w"], p["w"]], 1) * jnp.array([[1.0], [3.0]])).reshape(6, 10),
        (6, 5),
    ),
    "layers in batches": (lambda p, x: lax.map(lambda w: x @ w, p["w"], batch_size=2), (4, 6, 5)),
    "one of a stack": (lambda p, x: x @ jnp.stack([p["w"], 3.0 * p["w"]])[1], (6, 5)),
    "unstacked": (lambda p, x: sum(x @ w for w in jnp.stack([p["w"], 3.0 * p["w"]])), (6, 5)),
    "patches": (
        lambda p, x: lax.conv_general_dilated(
            x[None], jnp.concatenate([p["w"], 2.0 * p["w"]], 2), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        (3, 6, 4),
    ),
    "patches along inputs": (
        lambda p, x: lax.conv_general_dilated(
            x[None], jnp.concatenate([p["w"], 2.0 * p["w"]], 1), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        (3, 3, 4),
    ),
}


@pytest.mark.parametrize("name", JOINED)
def test_joined_kernels_are_not_formed(name):
    fn, shape = JOINED[name]
    check(fn, shape, X)
    if name != "patches along inputs":  # half of a column has another length
        check(fn, shape, X, rules={"w": sj.dora(sj.lora(2))})


def test_a_joined_projection_of_three_kernels_costs_three_loras_and_forms_none_of_them():
    """Beside the plain model that joins them: the kernels side by side are in its program, and not in ours."""
    width, rank = 64, 2
    x, names = normal(8, width), ("q", "k", "v")
    params = {n: normal(width, 32 if n == "q" else 16, seed=i) for i, n in enumerate(names)} | {"bias": normal(64)}
    heads = lambda p, x: x @ jnp.concatenate([p[n] for n in names], axis=1) + p["bias"]
    stacked = lambda p, x: jnp.einsum("bi,sio->sbo", x, jnp.stack([p["k"], p["v"]]))
    roles = sj.roles(heads, params, x)
    assert all((roles[n].in_axes, roles[n].out_axes) == ((0,), (1,)) for n in names)
    adapted = filled(params, {"[qkv]": sj.lora(rank)}, roles)
    trainable, frozen = sj.partition(adapted)

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name not in ("stop_gradient", "reshape"):
                yield from (v.aval.size for v in eqn.outvars)
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                yield from sizes(inner)

    for fn in (heads, stacked):
        loss = lambda t, f, x, fn=fn: jnp.sum(jnp.sin(sj.with_adapters(fn)(sj.combine(t, f), x)))
        largest = max(sizes(jax.make_jaxpr(jax.grad(loss))(trainable, frozen, x).jaxpr))
        assert largest < params["k"].size
        plain = jax.jit(lambda p, x, fn=fn: jnp.sum(jnp.sin(fn(p, x)))).lower(params, x).compile().cost_analysis()
        ours = jax.jit(loss).lower(trainable, frozen, x).compile().cost_analysis()
        low_rank = sum(2 * len(x) * rank * (width + params[n].shape[1]) for n in names)
        assert ours["flops"] <= 1.03 * (plain["flops"] + low_rank)


def test_joined_kernels_that_cannot_answer_are_refused_by_path_or_formed():
    table, index = normal(6, 5), jnp.array([1, 8, 3])
    longer = lambda p, i: jnp.take(jnp.concatenate([p["w"], table]), i, axis=0)
    grouped = lambda p, x: lax.conv_general_dilated(
        x[None],
        jnp.concatenate([p["w"], p["w"]], 2),
        (1,),
        "SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=2,
    )
    check(longer, (6, 5), index, roles={"w": sj.Role.embedding()}, allow=True)
    check(grouped, (3, 3, 4), X, roles={"w": sj.Role("conv", (), (0, 1), (2,))}, allow=True)
    window = lambda p, x: lax.conv_general_dilated(
        x[None], jnp.concatenate([p["w"], p["w"]]), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    check(window, (2, 6, 4), X, allow=True)
    picked = lambda p, x: lax.map(lambda i: x @ jnp.stack([p["w"], 3.0 * p["w"]])[i], jnp.arange(2))
    check(picked, (6, 4), X, allow=True)


def test_gates_of_a_recurrent_cell_that_joins_its_kernels():
    """Flax's OptimizedLSTMCell joins eight kernels into two before it multiplies."""
    cell = nn.RNN(nn.OptimizedLSTMCell(4))
    x = normal(2, 5, 3)
    params = cell.init(KEY, x)["params"]
    fn = lambda p, x: cell.apply({"params": p}, x)
    roles = sj.roles(fn, params, x)
    adapted = filled(params, {"**/kernel": sj.lora(2)}, roles)
    assert_rounding(jax.jit(sj.with_adapters(fn))(adapted, x), fn(sj.merge(adapted), x), size=256)


def test_forming_is_allowed_leaf_by_leaf():
    """The first rule that matches counts, as in `adapt`; what none matches is refused."""
    fn = lambda p, x: x @ jnp.tril(p["one"]["w"]) + x @ jnp.tril(p["two"]["w"]) + x @ p["three"]
    params = {"one": {"w": normal(6, 6)}, "two": {"w": normal(6, 6, seed=1)}, "three": normal(6, 6, seed=2)}
    adapted = filled(params, {"**": sj.lora(2)}, sj.roles(fn, params, X))
    want = fn(sj.merge(adapted), X)
    for rules in ({"*/w": "allow"}, (("one/*", "allow"), ("**", "allow")), [(lambda path, leaf: True, "allow")]):
        assert_rounding(jax.jit(sj.with_adapters(fn, on_materialize=rules))(adapted, X), want, size=64)
    with pytest.raises(MaterializeError, match=r"^two/w: .*'two/w': \"allow\"} for this leaf alone"):
        sj.with_adapters(fn, on_materialize={"one/w": "allow"})(adapted, X)
    with pytest.raises(MaterializeError, match=r"^one/w: "):
        sj.with_adapters(fn, on_materialize={"one/**": "error", "**": "allow"})(adapted, X)
    with pytest.warns(UserWarning, match=r"^two/w: "):
        sj.with_adapters(fn, on_materialize={"one/w": "allow", "two/w": "warn"})(adapted, X)
    with pytest.raises(PatternError, match=r"on_materialize: 'four' matches no leaf; nearest paths"):
        sj.with_adapters(fn, on_materialize={"four": "allow"})(adapted, X)
    with pytest.raises(ValueError, match=r'"error", "warn" or "allow", for all or by rules, not \'yes\''):
        sj.with_adapters(fn, on_materialize={"**": "yes"})
    # Joined kernels are formed if every one of them may be.
    both = lambda p, x: x @ jnp.tril(jnp.concatenate([p["one"]["w"], p["two"]["w"]], axis=1))
    found = sj.with_adapters(both, on_materialize={"*/w": "allow"})(adapted, X)
    assert_rounding(found, both(sj.merge(adapted), X), size=64)
    with pytest.raises(MaterializeError, match=r"^one/w, two/w: .*\{one/w,two/w\}"):
        sj.with_adapters(both, on_materialize={"one/w": "allow"})(adapted, X)
    bank, rows = sj.bank(params, [adapted]), jnp.ones(5, jnp.int32)
    assert_rounding(sj.per_row(fn, on_materialize={"*/w": "allow"})(bank, rows, X), want, size=64)
