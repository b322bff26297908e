"""Queryable LoRA against a loop over tokens and blocks in numpy, and against LoRA where routing does not matter."""

from __future__ import annotations

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax, softmax

import subspace_jax as sj
from subspace_jax.core import NotMergeableError, PatternError, RankError, RoleError, StructureError
from tests.tolerances import tolerance

queryable = sj.methods.queryable_lora
BLOCKS = ("one/**", "two/**", "three/**")
RANK, ATOMS, KEPT, WIDTH, SIZE = 4, 5, 3, 6, 7


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def params():
    shapes = {"up": {"kernel": (SIZE, 9)}, "down": {"kernel": (9, SIZE)}}
    leaf = lambda s, seed: jnp.asarray(draw(s, seed) / 3)
    return {
        block: {n: {"kernel": leaf(s["kernel"], 10 * i + j)} for j, (n, s) in enumerate(shapes.items())}
        for i, block in enumerate(("one", "two", "three"))
    }


def network(p, x):
    for block in ("one", "two", "three"):
        x = x + jnp.tanh(x @ p[block]["up"]["kernel"]) @ p[block]["down"]["kernel"]
    return x


run = jax.jit(sj.with_adapters(network, collect=True))
X = jnp.asarray(draw((2, 3, SIZE), 99))


def adapt(**options):
    options = {"atoms": ATOMS, "kept": KEPT, "width": WIDTH, "blocks": BLOCKS, "head": "**/up/kernel", **options}
    return sj.adapt(params(), {"**/kernel": queryable.queryable_lora(RANK, **options)}, key=jax.random.key(0))


def moved(adapted, seed=1, size=0.5):
    rng = np.random.default_rng(seed)
    trainable, frozen = sj.partition(adapted)
    noisy = lambda v: jax.device_put(np.asarray(v) + (size * rng.normal(size=v.shape)).astype(v.dtype))
    return sj.combine(jax.tree.map(noisy, trainable), frozen)


def memory(adapted):
    return adapted["one"]["up"]["kernel"]


def change(adapted, **fields):
    """The tree with other values in the weight that stores the memory."""
    one = adapted["one"]
    return {**adapted, "one": {**one, "up": {"kernel": dataclasses.replace(memory(adapted), **fields)}}}


def by_hand(adapted, x, kept=KEPT, prior=None):
    """One token through all blocks, in float64, written as the equations are; outputs and routings."""
    wide = lambda v: np.asarray(v, np.float64)
    m = {n: wide(getattr(memory(adapted), n)) for n in ("atoms", "keys", "query", "summary", "depth", "blocks")}
    norm = lambda u: (u - u.mean()) / np.sqrt(u.var() + 1e-6)
    history, routings = [], []
    for number, block in enumerate(("one", "two", "three")):
        up, down = (adapted[block][n]["kernel"] for n in ("up", "down"))
        u = norm(x @ wide(up.a))
        summary = np.zeros(RANK)
        if history:
            scores = [(u @ m["query"]) @ (c @ m["depth"]) / np.sqrt(WIDTH) for c in history]
            summary = sum(a * c for a, c in zip(softmax(scores), history, strict=True))
        query = u @ m["query"] + summary @ m["summary"] + m["blocks"][number]
        z = m["keys"] @ query / np.sqrt(WIDTH) + (0 if prior is None else prior)
        alpha = np.zeros(len(z))
        best = np.argsort(-z, kind="stable")[:kept]
        alpha[best] = softmax(z[best])
        operator = np.einsum("m,mrq->rq", alpha, m["atoms"])
        layer = lambda w, v, r=operator: v @ wide(w.base) + float(w.scale) * v @ wide(w.a) @ r @ wide(w.b)
        x = x + layer(down, np.tanh(layer(up, x)))
        history.append(u)
        routings.append(alpha)
    return x, routings


@pytest.mark.parametrize("kept", [1, KEPT, ATOMS])
def test_every_token_is_routed_as_the_equations_say(kept):
    adapted = moved(adapt(kept=kept, alpha=2.0))
    y, reports = run(adapted, X)
    for place in itertools.product(range(2), range(3)):
        expected, routings = by_hand(adapted, np.asarray(X[place], np.float64), kept)
        np.testing.assert_allclose(y[place], expected, rtol=2e-4, atol=2e-4)
        for block, alpha in zip(("one", "two", "three"), routings, strict=True):
            found = reports[f"{block}/up/kernel"]["weights"][place]
            np.testing.assert_allclose(found, alpha, atol=1e-4)
            assert (np.asarray(found) >= 0).all()
            assert float(found.sum()) == pytest.approx(1.0, abs=1e-5)
            assert (np.asarray(found) > 0).sum() <= kept


def test_starts_at_the_model_and_only_the_last_factor_has_a_gradient():
    adapted = adapt()
    np.testing.assert_array_equal(run(adapted, X)[0], jax.jit(network)(params(), X))
    trainable, frozen = sj.partition(adapted)
    gradient = jax.jit(jax.grad(lambda t: jnp.sum(jnp.sin(run(sj.combine(t, frozen), X)[0]))))(trainable)
    for keys, value in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.asarray(value).any() == (keys[-1].name == "b"), jax.tree_util.keystr(keys)


def lora_of(adapted, operator):
    """The LoRA of one operator for all rows."""

    def one(weight):
        fields = {n: getattr(weight, n) for n in ("base", "a", "scale", "role", "dtype")}
        return sj.weights.LowRank(b=operator @ weight.b, trainable=("a", "b"), **fields)

    return jax.tree.map(one, adapted, is_leaf=sj.core.is_weight)


@pytest.mark.parametrize("atoms", [1, ATOMS])
def test_equal_atoms_are_lora_whatever_the_router_does(atoms):
    adapted = moved(adapt(atoms=atoms, kept=min(atoms, KEPT)))
    same = jnp.broadcast_to(memory(adapted).atoms[:1], memory(adapted).atoms.shape)
    adapted = change(adapted, atoms=same)
    expected = jax.jit(sj.with_adapters(network))(lora_of(adapted, same[0]), X)
    np.testing.assert_allclose(run(adapted, X)[0], expected, rtol=1e-4, atol=1e-4)
    other = change(adapted, keys=memory(adapted).keys[::-1] * 3)
    np.testing.assert_allclose(run(other, X)[0], expected, rtol=1e-4, atol=1e-4)
    frozen = queryable.freeze_routing(network, adapted, [X, X[::-1]])
    assert frozen.gap < 1e-4
    np.testing.assert_allclose(network(sj.merge(frozen.adapted), X), expected, rtol=1e-4, atol=1e-4)


def test_freezing_takes_the_mean_routing_and_tells_what_it_loses():
    adapted = moved(adapt())
    found = queryable.freeze_routing(network, adapted, [X, 2 * X])
    reports = [run(adapted, x)[1] for x in (X, 2 * X)]
    for number, block in enumerate(("one", "two", "three")):
        means = np.mean([np.asarray(r[f"{block}/up/kernel"]["weights"]) for r in reports], axis=(0, 1, 2))
        np.testing.assert_allclose(found.weights[number], means, rtol=1e-4)
    y = [np.asarray(run(adapted, x)[0]) for x in (X, 2 * X)]
    merged = sj.merge(found.adapted)
    apart = sum(((np.asarray(network(merged, x)) - v) ** 2).sum() for x, v in zip((X, 2 * X), y, strict=True))
    change_ = sum(((np.asarray(network(params(), x)) - v) ** 2).sum() for x, v in zip((X, 2 * X), y, strict=True))
    assert found.gap == pytest.approx(np.sqrt(apart / change_), rel=1e-3)
    assert found.gap > 0.01, "the routing does not matter here, so the test shows nothing"


def test_scale_shift_and_permutation_of_the_atoms():
    adapted = moved(adapt())
    alpha = lambda tree: run(tree, X)[1]["two/up/kernel"]["weights"]
    m, order = memory(adapted), np.array([3, 1, 4, 0, 2])
    permuted = change(adapted, atoms=m.atoms[order], keys=m.keys[order])
    np.testing.assert_allclose(alpha(permuted), alpha(adapted)[..., order], atol=1e-5)
    np.testing.assert_allclose(run(permuted, X)[0], run(adapted, X)[0], rtol=1e-4, atol=1e-4)
    first = lambda p, x: x @ p["one"]["up"]["kernel"]
    added = lambda tree: sj.with_adapters(first)(tree, X) - first(params(), X)
    np.testing.assert_allclose(added(change(adapted, atoms=3 * m.atoms)), 3 * added(adapted), rtol=1e-3, atol=1e-4)
    logits = jnp.asarray(draw((4, ATOMS)))
    np.testing.assert_allclose(
        queryable.sparse_softmax(logits + 5.0, KEPT), queryable.sparse_softmax(logits, KEPT), atol=1e-5
    )


def test_ties_keep_exactly_so_many_atoms():
    found = queryable.sparse_softmax(jnp.zeros((2, 6)), 4)
    np.testing.assert_allclose(jnp.sort(found), [[0, 0, 0.25, 0.25, 0.25, 0.25]] * 2)


def test_the_update_is_bounded_by_the_atoms():
    adapted = moved(adapt(), size=2.0)
    weight, m = adapted["one"]["up"]["kernel"], memory(adapted)
    first = lambda p, x: x @ p["one"]["up"]["kernel"]
    update = sj.with_adapters(first)(adapted, X) - first(params(), X)
    norm = lambda v: np.linalg.norm(np.asarray(v), ord=2)
    bound = float(weight.scale) * norm(weight.a) * max(norm(a) for a in m.atoms) * norm(weight.b)
    lengths = np.linalg.norm(np.asarray(update), axis=-1), np.linalg.norm(np.asarray(X), axis=-1)
    assert (lengths[0] <= bound * lengths[1] * (1 + tolerance())).all()


def test_what_reaches_which_block():
    """The summary acts from the second block on, its attention from the third, and nothing acts backwards."""
    adapted = moved(adapt())
    alpha = lambda tree: [np.asarray(run(tree, X)[1][f"{b}/up/kernel"]["weights"]) for b in ("one", "two", "three")]
    m, base = memory(adapted), alpha(adapted)
    noise = lambda v, seed: v + 0.5 * jnp.asarray(draw(v.shape, seed))
    for fields, moves in (
        ({"summary": noise(m.summary, 1)}, [False, True, True]),
        ({"depth": noise(m.depth, 2)}, [False, False, True]),
        ({"query": noise(m.query, 3)}, [True, True, True]),
        ({"blocks": m.blocks.at[1].add(1.0)}, [False, True, True]),
    ):
        found = alpha(change(adapted, **fields))
        assert [not np.allclose(a, b, atol=1e-6) for a, b in zip(base, found, strict=True)] == moves, list(fields)
    two = adapted["two"]
    other = {
        **adapted,
        "two": {**two, "up": {"kernel": dataclasses.replace(two["up"]["kernel"], a=-two["up"]["kernel"].a)}},
    }
    assert np.allclose(base[0], alpha(other)[0])
    assert not np.allclose(base[1], alpha(other)[1])


def test_tokens_look_at_themselves_alone():
    adapted = moved(adapt())
    jacobian = np.asarray(jax.jit(jax.jacobian(lambda x: run(adapted, x)[0][0]))(X))  # [token, out, example, token, in]
    for token, other in itertools.product(range(3), range(3)):
        assert np.any(jacobian[token, :, 0, other]) == (token == other)
    assert not jacobian[:, :, 1].any()


def test_the_prior_is_the_softmax_of_descriptors_and_shifts_logits():
    adapted = moved(adapt(text=3, kept=ATOMS, strength=0.7))
    t = draw((3,), 5)
    told = queryable.with_instruction(adapted, jnp.asarray(t))
    m = memory(told)
    logs = log_softmax(t @ np.asarray(m.projection) @ np.asarray(m.descriptors).T / np.sqrt(WIDTH))
    expected, _ = by_hand(told, np.asarray(X[0, 0], np.float64), ATOMS, 0.7 * logs)
    np.testing.assert_allclose(run(told, X)[0][0, 0], expected, rtol=2e-4, atol=2e-4)
    silent = dataclasses.replace(memory(told), strength=jnp.float32(0))
    zero = {**told, "one": {**told["one"], "up": {"kernel": silent}}}
    every = lambda tree, beta: jax.tree.map(
        lambda w: dataclasses.replace(w, strength=jnp.float32(beta)), tree, is_leaf=sj.core.is_weight
    )
    np.testing.assert_allclose(run(every(told, 0.0), X)[0], run(adapted, X)[0], rtol=1e-4, atol=1e-4)
    assert zero is not told
    sharp = run(every(told, 300.0), X)[1]["one/up/kernel"]["weights"]
    assert (np.asarray(sharp).argmax(-1) == logs.argmax()).all()
    both = queryable.with_instruction(adapted, jnp.stack([jnp.asarray(t), jnp.zeros(3)]))
    np.testing.assert_allclose(run(both, X)[0][0], run(told, X)[0][0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(run(both, X)[0][1], run(adapted, X)[0][1], rtol=1e-4, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(run(change(told, projection=v), X)[0])))(m.projection)
    assert np.asarray(gradient).any()


def test_routing_with_a_prior_is_the_best_of_gain_less_divergence():
    """For three atoms, over a grid of the simplex: <alpha, z> - KL(alpha || prior)."""
    z, prior = np.array([0.3, -0.4, 1.1]), np.array([0.5, 0.3, 0.2])
    found = np.asarray(queryable.sparse_softmax(jnp.asarray(z + np.log(prior), jnp.float32), 3), np.float64)
    value = lambda a: a @ z - np.sum(a * np.log(a / prior))
    steps = np.arange(1, 100) / 100
    grid = [np.array([p, q, 1 - p - q]) for p, q in itertools.product(steps, steps) if p + q < 0.995]
    assert value(found) >= max(map(value, grid))


def test_count_is_the_formula():
    trainable, _ = sj.partition(adapt(text=3))
    size = sum(v.size for v in jax.tree.leaves(trainable))
    kernels = 3 * 2 * RANK * (SIZE + 9)
    shared = ATOMS * RANK**2 + ATOMS * WIDTH + 3 * RANK * WIDTH + 3 * WIDTH
    assert size == kernels + shared + 3 * WIDTH + ATOMS * WIDTH


def test_the_balance_is_the_divergence_of_mean_use_from_even_use():
    adapted = moved(adapt())
    reports = run(adapted, X)[1]
    means = [np.asarray(r["weights"], np.float64).mean((0, 1)) for r in reports.values()]
    expected = sum(np.sum(np.where(m > 0, m * np.log(np.maximum(m, 1e-30) * ATOMS), 0.0)) for m in means)
    assert float(queryable.balance(reports)) == pytest.approx(expected, rel=1e-4)


def test_layers_of_one_block_share_a_routing_and_stacks_count_on():
    """Four scanned layers in two blocks, behind a kernel that is a block of its own."""
    tree = {"first": jnp.asarray(draw((SIZE, SIZE))), "layers": jnp.asarray(draw((4, SIZE, SIZE), 1) / 3)}
    role = {"layers": sj.Role.dense((1,), (2,), (0,))}
    method = queryable.queryable_lora(RANK, blocks=("first", "layers"), head="*", layers_per_block=2)
    adapted = moved(sj.adapt(tree, {"*": method}, key=jax.random.key(0), roles=role))
    assert adapted["layers"].block.tolist() == [1, 1, 2, 2]
    assert adapted["first"].blocks.shape == (3, 16)

    def forward(p, x):
        return jax.lax.scan(lambda h, k: (h + jnp.tanh(h @ k), None), x @ p["first"], p["layers"])[0]

    y, reports = jax.jit(sj.with_adapters(forward, collect=True))(adapted, X)
    weights = np.asarray(reports["layers"]["weights"])
    np.testing.assert_array_equal(weights[0], weights[1])
    np.testing.assert_array_equal(weights[2], weights[3])
    assert not np.allclose(weights[0], weights[2])
    frozen = queryable.freeze_routing(forward, adapted, [X])
    assert frozen.weights.shape == (3, 8)
    np.testing.assert_allclose(frozen.weights[2], weights[2].mean(axis=(0, 1)), rtol=1e-4)
    assert np.isfinite(np.asarray(y)).all()


def test_dropout_is_of_the_update_and_not_of_the_routing():
    adapted = moved(adapt(dropout=0.5))
    first = sj.with_adapters(lambda p, x: x @ p["one"]["up"]["kernel"], collect=True)
    (plain, still), (dropped, routed) = (first(t, X) for t in (adapted, sj.with_dropout(adapted, jax.random.key(1))))
    assert not np.allclose(plain, dropped)
    np.testing.assert_array_equal(*(r["one/up/kernel"]["weights"] for r in (still, routed)))


def test_a_linen_model_learns():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in ("one", "two"):
                x = x + nn.Dense(6, name=name)(x)
            return x

    model, x = Net(), jnp.asarray(draw((16, 6)))
    variables = model.init(jax.random.key(0), x)["params"]
    method = queryable.queryable_lora(3, blocks=("one/*", "two/*"), head="**")
    adapted = sj.adapt(variables, {"*/kernel": method}, key=jax.random.key(1))
    target = jnp.where(x[:, :1] > 0, x[:, ::-1], -x)
    loss = lambda t, _: jnp.mean((sj.with_adapters(lambda p: model.apply({"params": p}, x))(t) - target) ** 2)
    end = jax.jit(lambda t: sj.training.scan_steps(loss, optax.adam(1e-2), t, steps=150))(adapted)
    assert end.losses[-1] < 0.5 * end.losses[0]


def test_bad_input_is_refused():
    for name, value in {"atoms": 0, "kept": 6, "width": 0, "text": 0, "layers_per_block": 0}.items():
        with pytest.raises(RankError, match=name):
            adapt(**{name: value})
    for name, value in {"temperature": 0.0, "sigma": 0.0, "alpha": -1.0, "dropout": 1.0, "strength": "x"}.items():
        with pytest.raises(ValueError, match=name):
            adapt(**{name: value})
    with pytest.raises(RankError, match="rank=2: expected at least 3"):
        queryable.queryable_lora(2, blocks=("a",), head="a")
    with pytest.raises(PatternError, match="blocks='one'"):
        queryable.queryable_lora(3, blocks="one", head="a")
    with pytest.raises(PatternError, match="three/down/kernel: queryable_lora: expected one of blocks"):
        adapt(blocks=BLOCKS[:2])
    with pytest.raises(PatternError, match="matches 2 kernels of the block 'one"):
        adapt(head="**/kernel")
    with pytest.raises(PatternError, match="matches 0 kernels"):
        adapt(head="**/none")
    with pytest.raises(RoleError, match="one/down/kernel: no kernel of its block has found a routing before"):
        sj.with_adapters(lambda p, x: x @ p["one"]["down"]["kernel"])(adapt(), jnp.ones((2, 9)))
    short = lambda p, x: (x @ p["one"]["up"]["kernel"])[:1] @ p["one"]["down"]["kernel"]
    with pytest.raises(RoleError, match=r"one/down/kernel: rows \(1,\) meet a routing of rows \(2,\)"):
        sj.with_adapters(short)(adapt(), jnp.ones((2, SIZE)))
    with pytest.raises(NotMergeableError):
        sj.merge(adapt())
    with pytest.raises(StructureError, match="no weight has a prior"):
        queryable.with_instruction(adapt(), jnp.ones(3))
    with pytest.raises(StructureError, match=r"one/up/kernel: an instruction of shape \(4,\): expected \[3\]"):
        queryable.with_instruction(adapt(text=3), jnp.ones(4))
    with pytest.raises(StructureError, match="no batches"):
        queryable.freeze_routing(network, adapt(), [])
    with pytest.raises(StructureError, match="no weight of queryable_lora"):
        queryable.freeze_routing(network, params(), [X])
