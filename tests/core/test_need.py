"""Statistics that methods need: gathered where they are needed, as they are needed, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.core import InputStatistic, Method, Need, StatisticsError, register_statistic
from tests.tolerances import assert_rounding

KEY = jax.random.key(0)
ABSOLUTE = InputStatistic(lambda inputs, outputs: (inputs,), lambda rows: jnp.sum(jnp.abs(rows), axis=-2))


def fn(p, x):
    return jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"]) ** 2)


def make():
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
    return {"a": draw(6, 5), "b": draw(5, 4), "c": draw(3)}, [draw(7, 6) for _ in range(3)]


def method(name, *needs):
    return Method(name, lambda key, array, role, stats: stats, needs=needs)


def test_each_leaf_gets_what_its_method_needs():
    params, batches = make()
    rules = {"a": method("one", Need("gram", scale_examples="max_abs"), "gradient"), "b": method("two", "mean")}
    found = sj.capture(fn, params, batches, rules=rules)
    assert set(found) == {"a", "b"}
    x = np.concatenate(batches).astype(np.float64)
    scaled = x / np.abs(x).max(axis=1, keepdims=True)
    assert_rounding(found["a"].gram, scaled.T @ scaled, size=64)
    whole = np.mean([jax.grad(fn)(params, batch)["a"] for batch in batches], axis=0)
    assert_rounding(found["a"].gradient, whole, size=64)
    assert_rounding(found["b"].mean, np.tanh(x @ np.asarray(params["a"])).mean(axis=0), size=64)
    assert (found["a"].mean, found["a"].squared_gradient, found["b"].gram, found["b"].gradient) == (None,) * 4


def test_rules_give_what_the_names_give():
    params, batches = make()
    rules = {"a": sj.corda(2), "b": sj.lora(2)}
    by_rules = sj.capture(fn, params, batches, rules=rules)
    by_name = sj.capture(fn, params, batches, statistics="gram", select="a")
    jax.tree.map(np.testing.assert_array_equal, by_rules, by_name)
    assert type(sj.adapt(params, rules, key=KEY, stats=by_rules)["a"]).__name__ == "LowRank"


@pytest.mark.parametrize("scan", [False, True])
def test_a_new_statistic_registers_where_it_is_used(scan):
    register_statistic("test_absolute", ABSOLUTE)
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 6, 6)) / 3, jnp.float32), "out": jnp.ones((6, 2))}
    batches = [jnp.asarray(rng.normal(size=(5, 6)), jnp.float32) for _ in range(2)]

    def model(p, x):
        if scan:
            x = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]
        else:
            for i in range(3):
                x = jnp.tanh(x @ p["w"][i])
        return x @ p["out"]

    found = sj.capture(model, params, batches, rules={"w": method("new", "test_absolute")})
    want = np.zeros((3, 6))
    for x in batches:
        for i in range(3):
            want[i] += np.abs(np.asarray(x)).sum(axis=0)
            x = jnp.tanh(x @ params["w"][i])
    assert set(found) == {"w"}
    assert_rounding(found["w"].extra["test_absolute"], want, size=64)
    register_statistic("test_absolute", ABSOLUTE)  # the same again is no other
    with pytest.raises(StatisticsError, match="'gram' is taken"):
        register_statistic("gram", ABSOLUTE)


def test_what_does_not_fit_is_refused():
    params, batches = make()
    with pytest.raises(StatisticsError, match="leave statistics, select and scale_examples out"):
        sj.capture(fn, params, batches, rules={"a": sj.corda(2)}, statistics="mean")
    with pytest.raises(StatisticsError, match="No method of these rules needs"):
        sj.capture(fn, params, batches, rules={"a": sj.lora(2)})
    with pytest.raises(StatisticsError, match=r"choose from \('gram', 'mean'"):
        sj.capture(fn, params, batches, rules={"a": method("one", "grram")})
    with pytest.raises(StatisticsError, match=r"^a: one needs inputs scaled in several ways"):
        sj.capture(fn, params, batches, rules={"a": method("one", Need("gram", "max_abs"), Need("mean"))})
    with pytest.raises(StatisticsError, match=r"^a: corda: .*|^a: corda needs gram.*rules="):
        sj.adapt(params, {"a": sj.corda(2)}, key=KEY)
