"""Options that no method can serve are refused where the method is made, by their names."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.methods import lora_sb

WITH_DTYPE = {
    "lora": lambda **o: sj.lora(2, **o),
    "pissa": lambda **o: sj.pissa(2, **o),
    "qpissa": lambda **o: sj.qpissa(2, **o),
    "corda": lambda **o: sj.corda(2, **o),
    "flora": lambda **o: sj.flora(2, **o),
    "ssf": lambda **o: sj.ssf(**o),
    "o_lora": lambda **o: sj.o_lora(2, tasks=2, **o),
}
MATRIX_START = {
    "lora_xs": lambda **o: lora_sb.lora_xs(2, **o),
    "lora_sb": lambda **o: sj.lora_sb(2, **{"learning_rate": 1e-3, **o}),
    "svfit": lambda **o: sj.svfit(2, **o),
    "loldu": lambda **o: sj.loldu(2, **o),
    "oft": lambda **o: sj.oft(**o),
    "randlora": lambda **o: sj.randlora(2, **o),
    "soka": lambda **o: sj.soka(**o),
    "loca": lambda **o: sj.loca(3, **o),
    "lift": lambda **o: sj.lift(2, **{"filter_rank": 2, **o}),
    "s2ft": lambda **o: sj.s2ft(0.5, **o),
    "osf": lambda **o: sj.osf(1, **o),
    "dora": lambda **o: sj.dora(sj.lora(2), **o),
    "matryoshka": lambda **o: sj.matryoshka(sj.lora(2), **o),
}
METHODS = WITH_DTYPE | MATRIX_START
NO_NUMBER = (0.0, -1.0, float("nan"), float("inf"), "1")
NO_PROBABILITY = (-0.1, 1.0, float("nan"), "0.1")
NO_COUNT = (-1, 1.5, True, "2")
NO_CHOICE = ("x", "", 1)

BAD = [
    *(
        (name, "alpha", NO_NUMBER)
        for name in ("lora", "pissa", "corda", "lora_xs", "lora_sb", "loldu", "randlora", "loca")
    ),
    ("o_lora", "alpha", NO_NUMBER),
    *((name, "dropout", NO_PROBABILITY) for name in ("lora", "flora", "oft", "randlora", "loca", "o_lora")),
    *((name, "iterations", NO_COUNT) for name in ("pissa", "qpissa", "corda", "lora_xs", "lora_sb", "lift")),
    *((name, "oversample", NO_COUNT) for name in ("pissa", "qpissa", "corda")),
    *((name, "route", NO_CHOICE) for name in ("svfit", "loldu", "randlora", "osf")),
    *((name, "svd", NO_CHOICE) for name in ("pissa", "qpissa", "corda", "svfit", "soka", "lift")),
    ("lora", "init", NO_CHOICE),
    ("qpissa", "order", NO_CHOICE),
    ("qpissa", "steps", (0, *NO_COUNT)),
    ("corda", "mode", NO_CHOICE),
    ("corda", "factors", NO_CHOICE),
    ("corda", "damping", NO_NUMBER),
    ("corda", "threshold", NO_NUMBER),
    ("corda", "doublings", NO_COUNT),
    ("lora_xs", "factors", ("SVD", *NO_CHOICE)),
    ("lora_xs", "noise", (-1.0, float("nan"))),
    ("lora_sb", "learning_rate", NO_NUMBER),
    ("lora_sb", "update", NO_CHOICE),
    ("svfit", "measure", NO_CHOICE),
    ("svfit", "information", (*NO_NUMBER, 1.1)),
    ("loldu", "sigma", NO_NUMBER),
    *(("loldu", name, NO_CHOICE) for name in ("start", "residual", "convolution_order")),
    ("oft", "block_size", (0, *NO_COUNT)),
    ("oft", "terms", (1, *NO_COUNT)),
    ("flora", "out_rank", (0, *NO_COUNT)),
    ("flora", "window_ranks", (0, (2, 0), (1.5,))),
    ("flora", "scale", (float("nan"), "1")),
    ("flora", "factor_init", NO_CHOICE),
    ("randlora", "seed", (2**31, *NO_COUNT)),
    ("randlora", "basis_dtype", (jnp.int32, jnp.float16)),
    ("soka", "terms", (0, *NO_COUNT)),
    ("soka", "least", (0, 9, *NO_COUNT)),
    ("soka", "most", (0, *NO_COUNT)),
    ("soka", "budget", (0, *NO_COUNT)),
    ("soka", "energy", (*NO_NUMBER, 1.1)),
    ("soka", "combine", NO_CHOICE),
    ("loca", "highest", (*NO_NUMBER, 1.1)),
    ("loca", "evaluation", NO_CHOICE),
    ("lift", "filter_rank", (0, *NO_COUNT)),
    ("s2ft", "side", ("rows", *NO_CHOICE)),
    ("s2ft", "heads", (0, *NO_COUNT)),
    ("s2ft", "seed", NO_COUNT),
    *(("s2ft", name, NO_CHOICE) for name in ("per_layer", "parameterization", "prefer")),
    ("osf", "width", NO_CHOICE),
    ("dora", "norm", NO_CHOICE),
    *(("matryoshka", name, NO_CHOICE) for name in ("rank_scale", "a_init")),
    *((name, "dtype", (jnp.float16, "int8", "none")) for name in WITH_DTYPE),
]


@pytest.mark.parametrize(("name", "option", "values"), BAD, ids=[f"{name}-{option}" for name, option, _ in BAD])
def test_bad_options_are_refused_by_name(name, option, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name}: {option}=.*expected|{name}: side='rows' is called"):
            METHODS[name](**{option: value})


def test_shares_of_rows_are_shares():
    for ratio in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="s2ft: ratio="):
            sj.s2ft(ratio)


def test_numpy_integers_are_integers():
    params = {"w": jax.random.normal(jax.random.key(0), (12, 8))}
    two = np.int64(2)
    made = {
        "lora": sj.lora(two),
        "pissa": sj.pissa(two, iterations=two, oversample=two),
        "lora_xs": lora_sb.lora_xs(two),
        "svfit": sj.svfit(two),
        "loldu": sj.loldu(two),
        "oft": sj.oft(np.int64(4), terms=two),
        "flora": sj.flora(two, out_rank=two, window_ranks=two),
        "randlora": sj.randlora(two, seed=two),
        "soka": sj.soka(two),
        "loca": sj.loca(two),
        "lift": sj.lift(two, filter_rank=two, blocks=(two, two)),
        "s2ft": sj.s2ft(0.5, heads=two, seed=two),
        "osf": sj.osf(two),
        "o_lora": sj.o_lora(two, tasks=two),
        "matryoshka": sj.matryoshka(sj.lora(two), ranks=(np.int64(1), two)),
    }
    for name, method in made.items():
        adapted = sj.adapt(params, {"w": method}, key=jax.random.key(1))
        for field, value in vars(adapted["w"]).items():
            assert not isinstance(value, np.integer), (name, field)
        sj.io.describe(adapted)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["lora", "pissa", "flora", "ssf", "o_lora"])
def test_adam_stays_finite_in_every_dtype_that_is_served(name, dtype):
    """In float16 the second step was NaN: the gradient of `a` is zero, and so is Adam's epsilon."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(8, 4)).astype(np.float16)), "bias": jnp.zeros(4, jnp.float16)}
    leaves = "*" if name == "ssf" else "w"
    adapted = sj.adapt(params, {leaves: METHODS[name](dtype=dtype)}, key=jax.random.key(1))
    trainable, frozen = sj.partition(adapted)
    fn = sj.with_adapters(lambda p, x: x @ p["w"] + p["bias"])
    x = rng.normal(size=(5, 8)).astype(np.float16)
    optimizer = optax.adam(1e-3)
    state = optimizer.init(trainable)
    slope = jax.jit(jax.grad(lambda t: jnp.mean(fn(sj.combine(t, frozen), x).astype(jnp.float32) ** 2)))
    for _ in range(3):
        updates, state = optimizer.update(slope(trainable), state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    assert all(bool(jnp.isfinite(v).all()) and v.dtype == dtype for v in jax.tree.leaves(trainable))
