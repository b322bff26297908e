"""iGSP against a NumPy pool, closed-form gradients of its price, and streams whose old tasks must not change."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.continual import StreamError
from subspace_jax.core import PatternError, RankError, RoleError, StructureError
from subspace_jax.methods.continual.igsp import (
    ExpertPool,
    add_task,
    at_task,
    compact,
    igsp,
    init_selector,
    kept_experts,
    learner,
    price_at,
    probabilities,
    prune,
    select_task,
    stored_values,
    subspace_penalty,
)
from tests.tolerances import assert_rounding

KEY = jax.random.key(0)
D, OUT, R, TASKS, NEW = 6, 5, 3, 3, 2


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def moved(tree, seed=1):
    """Everything that learns, moved; all experts active in two tasks, some in the last."""
    trainable, frozen = sj.partition(tree)
    tree = sj.combine(jax.tree.map(lambda v: v + jnp.asarray(draw(*v.shape, seed=seed), v.dtype), trainable), frozen)

    def filled(pool):
        active = np.ones(pool.active.shape, np.float32)
        active[..., 0, 3:] = 0
        active[..., 2, [0, 4]] = 0
        return dataclasses.replace(pool, active=jnp.asarray(active))

    return jax.tree.map(lambda w: filled(w) if isinstance(w, ExpertPool) else w, tree, is_leaf=sj.core.is_weight)


def softmax(logits, active):
    e = np.exp(logits - logits.max(-1, keepdims=True)) * active
    return e / e.sum(-1, keepdims=True)


def reference(pool, x, task, top=None):
    """The pool's formula, expert by expert, of one sample `[tokens, in]`."""
    get = lambda name: np.asarray(getattr(pool, name), np.float64)
    y = x @ get("base")
    if task < 0:
        return y
    logits, active = x[0] @ get("router")[task], np.array(get("active")[task])
    if top is not None:
        active = active * (logits >= np.sort(np.where(active > 0, logits, -np.inf))[-top])
    p = softmax(logits, active)
    for e in range(len(p)):
        hidden = np.maximum(x @ get("down")[e] + get("down_bias")[e], 0)
        y = y + p[e] * 0.1 * (hidden @ get("up")[e] + get("up_bias")[e])
    return y


def made(**options):
    params = {"w": jnp.asarray(draw(D, OUT), jnp.float32)}
    return moved(sj.adapt(params, {"w": igsp(R, tasks=TASKS, candidates=NEW, **options)}, key=KEY))


apply = jax.jit(sj.with_adapters(lambda p, x: x @ p["w"]))


def test_experts_are_mixed_by_the_router_of_the_first_token():
    tree, x = made(top=2), draw(4, 7, D, seed=2)
    rows = jnp.asarray(x, jnp.float32)
    for task in (0, 2):
        settled = at_task(tree, task)
        found = apply(settled, rows)
        assert_rounding(found, np.stack([reference(tree["w"], one, task, top=2) for one in x]), size=64)
    dense = {"w": dataclasses.replace(settled["w"], settled=jnp.zeros([]))}
    assert_rounding(apply(dense, rows), np.stack([reference(tree["w"], one, 2) for one in x]), size=64)
    each = np.array([2, -1, 0, 1])
    found = apply(at_task(tree, jnp.asarray(each)), rows)
    expected = np.stack([reference(tree["w"], one, t, top=2) for one, t in zip(x, each, strict=True)])
    assert_rounding(found, expected, size=64)
    np.testing.assert_array_equal(found[1], (rows @ tree["w"].base)[1])
    # Samples without tokens are their own first one.
    assert_rounding(apply(at_task(tree, 1), rows[:, 0]), apply(at_task(tree, 1), rows[:, :1])[:, 0], size=64)


def test_the_router_reads_the_last_token_where_it_is_told_to():
    tree, x = made(token=-1), draw(2, 4, D, seed=2)
    found = apply(at_task(tree, 1), jnp.asarray(x, jnp.float32))
    turned = np.stack([reference(tree["w"], one[::-1], 1)[::-1] for one in x])
    assert_rounding(found, turned, size=64)


def test_probabilities_and_what_new_experts_cost():
    logits, active = jnp.asarray(draw(8, 5)), jnp.array([1.0, 1, 0, 1, 1])
    p = probabilities(logits, active)
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-6)
    assert not np.any(p[:, 2])
    np.testing.assert_allclose(p, softmax(np.asarray(logits), np.asarray(active)), atol=1e-6)
    assert not np.any(probabilities(logits, jnp.zeros(5)))  # no NaN
    few = probabilities(logits, active, 2)
    assert np.array_equal((few > 0).sum(-1), np.full(8, 2))
    new = jnp.array([0.0, 0, 0, 1, 1])
    cost = lambda a: subspace_penalty(probabilities(a, active), new)
    mass = np.asarray(p * new).sum(-1, keepdims=True)
    assert float(cost(logits)) == pytest.approx(mass.mean(), rel=1e-5)
    np.testing.assert_allclose(jax.jit(jax.grad(cost))(logits), np.asarray(p) * (np.asarray(new) - mass) / 8, atol=1e-7)
    step = draw(8, 5, seed=3)
    wide = lambda a: np.mean((softmax(a, np.asarray(active)) * np.asarray(new)).sum(-1))
    quotient = (wide(np.asarray(logits) + 1e-5 * step) - wide(np.asarray(logits) - 1e-5 * step)) / 2e-5
    assert float(jnp.sum(jax.jit(jax.grad(cost))(logits) * step)) == pytest.approx(quotient, rel=1e-3)
    assert float(subspace_penalty(p, jnp.zeros(5))) == 0


def test_an_experts_gradient_is_its_probability_times_what_it_could_do():
    """Other outputs fixed at zero: halving p by the logit halves the gradient."""
    tree = made()["w"]
    tree = dataclasses.replace(tree, up=jnp.zeros_like(tree.up), up_bias=jnp.zeros_like(tree.up_bias))
    x = jnp.asarray(draw(1, D), jnp.float32)
    target = jnp.asarray(draw(1, OUT), jnp.float32)

    def of_up(shift):
        router = tree.router.at[1, :, 2].add(shift * x[0] / jnp.sum(x[0] ** 2))
        pool = dataclasses.replace(tree, router=router, task=jnp.ones([], jnp.int32))
        run = lambda up: jnp.sum(target * sj.with_adapters(lambda p: x @ p)(dataclasses.replace(pool, up=up)))
        return jax.grad(run)(pool.up)[2], probabilities((x @ router[1]), tree.active[1])[0, 2]

    (one, p), (other, q) = of_up(0.0), of_up(-1.0)
    np.testing.assert_allclose(other, one * (q / p), rtol=1e-4)
    assert float(q) < 0.7 * float(p)


def test_the_price_rises_when_experts_had_time_to_become_useful():
    steps = np.arange(90)
    expected = 1.5 * np.clip((steps - 30) / 30, 0, 1)
    np.testing.assert_allclose(price_at(steps, 90, 1.5), expected, atol=1e-6)


def test_what_is_pruned():
    pi = np.array([0.4, 0.05, 0.3, 0.16, 0.09, 0.0])
    active, new = np.array([1.0, 1, 1, 1, 1, 0]), np.array([0.0, 0, 1, 1, 1, 0])
    keep = lambda *a, **k: np.asarray(prune(jnp.asarray(pi), jnp.asarray(active), jnp.asarray(new), *a, **k))
    assert keep(0.5).tolist() == [1, 1, 1, 1, 0, 0]  # 5 experts: below 0.1
    assert keep(0.5, 0.5).tolist() == [1, 0, 1, 1, 0, 0]
    assert keep(0.0).tolist() == active.tolist()
    assert keep(9.0).tolist() == [1, 1, 0, 0, 0, 0]  # later tasks may keep none
    assert keep(9.0, first=True).tolist() == [1, 1, 1, 0, 0, 0]
    kept = [keep(k).sum() for k in (0.0, 0.2, 0.5, 1.2, 2.0)]
    assert kept == sorted(kept, reverse=True)
    order = np.random.default_rng(0).permutation(6)
    np.testing.assert_array_equal(prune(*(jnp.asarray(v[order]) for v in (pi, active, new)), 0.5), keep(0.5)[order])
    both = prune(*(jnp.asarray(np.stack([v, v])) for v in (pi, active, new)), 0.5)
    assert both.tolist() == [keep(0.5).tolist()] * 2


def model(params, batch):
    """A frozen tower of images with tokens and one of class texts; cosines, as in an image-text model."""

    def tower(p, x):
        for block in p:
            x = x + jnp.tanh(x @ block["fc1"]) @ block["fc2"]
        return x[:, 0] / jnp.linalg.norm(x[:, 0], axis=-1, keepdims=True)

    texts = tower(params["text"], batch["texts"])
    return 5 * tower(params["image"], batch["x"]) @ texts.T


def objective(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model(params, batch), batch["y"]).mean()


def towers():
    shapes = {"fc1": (D, 8), "fc2": (8, D)}
    one = lambda seed: {n: jnp.asarray(draw(*s, seed=seed) / 3, jnp.float32) for n, s in shapes.items()}
    return {"image": [one(0), one(1)], "text": [one(2), one(3)]}


def batch_of(task, number=0):
    rng = np.random.default_rng([task, number])
    y = rng.integers(0, 4, 12)
    means = np.random.default_rng(task).normal(size=(4, D))
    x = means[y][:, None] + 0.3 * rng.normal(size=(12, 3, D))
    texts = np.random.default_rng([9, task]).normal(size=(4, 2, D))
    return {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y), "texts": jnp.asarray(texts, jnp.float32)}


STEPS = 10
OPTIONS = {"tasks": TASKS, "steps": STEPS, "size": R, "reads": "fc1", "scale": 1.0}


def follow(made, tasks=TASKS, on_step=None):
    step = jax.jit(made.step)
    state = made.init(towers(), KEY)
    states = []
    for task in range(tasks):
        state = made.start_task(state, task, jax.random.key(task))
        for i in range(STEPS):
            state, metrics = step(state, batch_of(task, i), jax.random.key(100 * task + i))
            if on_step is not None:
                on_step(task, i, state, metrics)
        state = made.end_task(state, task, [])
        states.append(state)
    assert step._cache_size() == 1
    return states


@pytest.fixture(scope="module")
def stream():
    """States after every task, with a keep of 1 that prunes something."""
    seen = []
    made = learner(objective, ["*/*/*"], optax.adamw(0.02), keep=1.0, price=1.0, **OPTIONS)
    states = follow(made, on_step=lambda task, i, state, metrics: seen.append((task, i, metrics)))
    return states, seen


def pools(state):
    return {p: w for p, w in sj.core.leaves_with_paths(state.adapted) if isinstance(w, ExpertPool)}


def test_old_experts_routers_and_outputs_are_the_same_bits_after_every_later_task(stream):
    states, _ = stream
    run = jax.jit(sj.with_adapters(model))
    for early in range(TASKS - 1):
        before, after = pools(states[early]), pools(states[-1])
        for path, pool in before.items():
            used = np.asarray(pool.active[: early + 1]).any(0)
            for name in ("down", "down_bias", "up", "up_bias"):
                old, new = (np.asarray(getattr(p, name))[used] for p in (pool, after[path]))
                np.testing.assert_array_equal(old, new)
            for name in ("router", "noise_router", "active"):
                old, new = (np.asarray(getattr(p, name))[: early + 1] for p in (pool, after[path]))
                np.testing.assert_array_equal(old, new)
        batch = batch_of(early, 99)
        outputs = [run(at_task(s.adapted, early), batch) for s in (states[early], states[-1])]
        np.testing.assert_array_equal(*outputs)
        assert not np.array_equal(outputs[1], run(at_task(states[-1].adapted, -1), batch))
    np.testing.assert_array_equal(run(at_task(states[-1].adapted, -1), batch), jax.jit(model)(towers(), batch))


def test_phases_prices_and_slots(stream):
    states, seen = stream
    switch = round(0.4 * STEPS)
    for task, i, metrics in seen:
        expected = float(price_at(i, switch, 1.0)) if task and i < switch else 0.0
        assert float(metrics["price"]) == pytest.approx(expected)
        assert 0 <= float(metrics["penalty"]) <= 1 + 1e-6
    counts = np.stack(list(kept_experts(states[-1].adapted).values()))
    assert counts.shape == (4, TASKS)
    assert np.all(counts[:, 0] >= 1)
    assert 0 < counts.sum() < 4 * TASKS * NEW  # something went, and its slot is free again
    used = {p: np.asarray(w.active).any(0) for p, w in pools(states[-1]).items()}
    assert all(used[p].sum() == n.sum() for p, n in zip(used, counts, strict=True))
    for pool in pools(states[-1]).values():
        # What this task's router gives its experts, and nothing else, makes its gates.
        assert float(pool.noise) == 0
        assert float(pool.settled) == 1
    for memory in states[-1].memory.values():
        assert float(memory.pi.sum()) == pytest.approx(1, abs=1e-5)


def test_what_is_stored_is_what_a_pool_without_empty_slots_holds(stream):
    tree = stream[0][-1].adapted
    small, counted = compact(tree), stored_values(tree)
    experts = sum(int(np.asarray(p.active).any(0).sum()) for p in pools(stream[0][-1]).values())
    assert counted["experts"] == experts * (2 * D * R + R + D)
    routers = sum(D * int(np.asarray(p.active).sum()) for p in pools(stream[0][-1]).values())
    assert counted["routers"] == routers
    held = [w for _, w in sj.core.leaves_with_paths(small) if isinstance(w, ExpertPool)]
    assert sum(w.down.size + w.down_bias.size + w.up.size + w.up_bias.size for w in held) == counted["experts"]
    run = jax.jit(sj.with_adapters(model))
    for task in range(TASKS):
        big, little = (run(at_task(t, task), batch_of(task)) for t in (tree, small))
        np.testing.assert_allclose(little, big, atol=1e-5)


def test_a_new_task_starts_from_the_history_diluted_and_without_a_threshold_all_stay():
    """A router of zeros over H old and N new experts that are zero: every old one has the gate 1 / (H + N)."""
    made = learner(objective, "image/0/fc2", optax.adam(0.02), keep=0.0, price=0.0, **(OPTIONS | {"reads": None}))
    states = follow(made)
    assert [v.tolist() for v in kept_experts(states[-1].adapted).values()] == [[NEW] * TASKS]
    state = made.start_task(states[0], 1, KEY)
    ((path, before),) = pools(states[0]).items()
    pool, history = pools(state)[path], np.flatnonzero(np.asarray(before.active[0]))
    x = jnp.asarray(draw(2, 8), jnp.float32)
    expected = np.asarray(x @ pool.base, np.float64)
    for e in history:
        hidden = np.maximum(x @ before.down[e] + before.down_bias[e], 0)
        expected += (hidden @ before.up[e] + before.up_bias[e]) / (len(history) + NEW)
    assert_rounding(sj.with_adapters(lambda p: x @ p)(pool), expected, size=64)
    assert not np.any(pool.up[np.asarray(pool.candidates) > 0])
    assert int(pool.candidates.sum()) == NEW
    assert not np.any(np.asarray(pool.candidates)[history])


def test_new_experts_read_only_what_old_ones_do_not():
    inner, sizes = [], []

    def look(task, i, state, metrics):
        pool = next(iter(pools(state).values()))
        active = np.asarray(pool.active)
        old = np.asarray(pool.down)[active[:task].any(0)]
        new = np.asarray(pool.down)[np.asarray(pool.candidates) > 0]
        if task and i >= 4 and len(new):
            inner.append(np.abs(np.einsum("ndr,mds->nmrs", new, old)).max())
            sizes.append(np.abs(new).max())

    options = OPTIONS | {"size": 1, "reads": None, "tasks": 2}
    made = learner(objective, "image/0/fc2", optax.adamw(0.02), keep=0.0, price=0.0, orth_residual=True, **options)
    states = follow(made, tasks=2, on_step=look)
    assert max(inner) < 1e-5
    assert min(sizes) > 0.05
    # Two of four slots are in use: the basis has two directions, not those that a factorization makes of empty slots.
    basis = next(iter(states[-1].memory.values())).basis
    assert np.linalg.matrix_rank(basis) == 2
    np.testing.assert_allclose(basis.T @ basis, np.diag([1, 1, 0, 0]), atol=1e-5)
    full = learner(objective, "image/0/fc2", optax.sgd(0.0), keep=0.0, orth_residual=True, **(options | {"size": 8}))
    state = full.end_task(full.start_task(full.init(towers(), KEY), 0, KEY)._replace(steps=jnp.array(9)), 0, [])
    with pytest.warns(UserWarning, match=r"image/0/fc2: .*every direction of 8 inputs"):
        full.start_task(state, 1, KEY)


def test_layers_in_a_loop_have_pools_of_their_own():
    def scanned(params, batch):
        h = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), batch["x"][:, 0], params["w"])[0]
        return h @ batch["texts"][:, 0].T

    def cost(params, batch):
        return optax.softmax_cross_entropy_with_integer_labels(scanned(params, batch), batch["y"]).mean()

    roles = {"w": sj.Role.dense((1,), (2,), (0,))}
    options = {"tasks": 2, "steps": 4, "size": 1, "scale": 1.0, "price": 1.0, "keep": 0.9, "orth_residual": True}
    made = learner(cost, "w", optax.adam(0.05), roles=roles, **options)
    step, state, states = jax.jit(made.step), made.init({"w": jnp.asarray(draw(3, D, D) / 4, jnp.float32)}, KEY), []
    for task in range(2):
        state = made.start_task(state, task, jax.random.key(task))
        for i in range(4):
            state, _ = step(state, batch_of(task, i), jax.random.key(i))
        state = made.end_task(state, task, [])
        states.append(state)
    assert kept_experts(state.adapted)["w"].shape == (3, 2)
    run = jax.jit(sj.with_adapters(scanned))
    np.testing.assert_array_equal(*(run(at_task(s.adapted, 0), batch_of(0, 9)) for s in states))
    assert_rounding(
        run(at_task(compact(state.adapted), 1), batch_of(1)), run(at_task(state.adapted, 1), batch_of(1)), size=64
    )
    pool, old = state.adapted["w"], np.asarray(states[0].adapted["w"].active[:, 0]) > 0
    for layer in range(3):
        new = (np.asarray(pool.active[layer, 1]) > 0) & ~old[layer]
        inner = np.einsum("ndr,mds->nmrs", np.asarray(pool.down[layer])[new], np.asarray(pool.down[layer])[old[layer]])
        assert np.abs(inner).max(initial=0.0) < 1e-5
    assert step._cache_size() == 1


def test_noise_and_dropout_are_for_training_alone():
    tree = made(dropout=0.5)
    x = jnp.asarray(draw(3, D), jnp.float32)
    run = lambda t: np.asarray(apply(t, x))
    plain = run(tree)
    one, other = (run(sj.with_dropout(tree, jax.random.key(k))) for k in (1, 2))
    assert not np.array_equal(one, other)
    quiet = {"w": dataclasses.replace(tree["w"], noise=jnp.zeros([]), dropout=0.0)}
    np.testing.assert_allclose(run(sj.with_dropout(quiet, jax.random.key(1))), plain, atol=1e-6)
    low = jax.tree.map(lambda v: v.astype(jnp.bfloat16) if v.ndim == 2 and v.shape == (D, OUT) else v, tree)
    assert_rounding(run(low).astype(np.float32), plain, size=4, dtype="bfloat16")


def test_an_input_goes_to_the_task_of_its_nearest_class_or_to_none():
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(3, 4, 20))
    centers[1] *= 2
    sample = lambda task, each: (
        jnp.asarray(np.repeat(centers[task], each, 0) + 0.35 * rng.normal(size=(4 * each, 20))),
        jnp.repeat(jnp.arange(4), each),
    )
    selector = init_selector(3, 5, 20)
    add = jax.jit(add_task)
    for task in (0, 1):
        selector = add(selector, task, *sample(task, 16))
    fresh = [np.asarray(select_task(selector, sample(task, 250)[0])) for task in (0, 1)]
    for task, found in enumerate(fresh):
        assert np.mean(found == 1 - task) < 0.01
        assert 0.01 < np.mean(found == -1) < 0.12  # 5 % were to be
    assert np.mean(select_task(selector, sample(2, 250)[0]) == -1) > 0.95
    # A task with one example a class has nothing to measure, and refuses nothing.
    single = add(init_selector(3, 5, 20), 2, *sample(2, 1))
    assert float(single.thresholds[2]) == -np.inf
    assert np.all(np.asarray(select_task(single, sample(0, 5)[0])) == 2)
    # The threshold is of examples without their own part in the mean.
    x, y = sample(0, 4)
    own = np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True)
    scores = []
    for i in range(16):
        rest = [own[(np.asarray(y) == c) & (np.arange(16) != i)].mean(0) for c in range(4)]
        scores.append(max(own[i] @ m / np.linalg.norm(m) for m in rest))
    threshold = add(init_selector(1, 5, 20), 0, x, y).thresholds[0]
    assert float(threshold) == pytest.approx(np.quantile(scores, 0.05), abs=1e-5)


def test_bad_use_is_refused():
    params = {"fc1": {"kernel": jnp.ones((3, 4))}, "fc2": {"kernel": jnp.ones((4, 3))}}
    with pytest.raises(RankError, match="tasks=0"):
        igsp(2, tasks=0)
    with pytest.raises(ValueError, match=r"dropout=1\.0"):
        igsp(2, tasks=1, dropout=1.0)
    with pytest.raises(PatternError, match="match both"):
        sj.adapt(params, {"fc2/kernel": igsp(2, tasks=1, reads="fc1")}, key=KEY)
    with pytest.raises(PatternError, match="kept for no one"):
        sj.adapt(params, {"fc1/kernel": igsp(2, tasks=1, reads="fc1")}, key=KEY)
    with pytest.raises(StructureError, match="no pool"):
        at_task(params, 0)
    tree = sj.adapt(params, {"*/kernel": igsp(2, tasks=2, reads="fc1")}, key=KEY)
    with pytest.raises(StructureError, match=r"at_task\(2\)"):
        at_task(tree, 2)
    with pytest.raises(RoleError, match="no kernel has kept"):
        sj.with_adapters(lambda p, x: x @ p["fc2"]["kernel"])(tree, jnp.ones((1, 4)))
    with pytest.raises(RoleError, match=r"task \(3,\) names a task for every sample"):
        apply(at_task(made(), jnp.zeros(3, jnp.int32)), jnp.ones((2, D)))
    with pytest.raises(ValueError, match="price=-1"):
        learner(objective, "w", optax.sgd(0.1), tasks=1, steps=4, price=-1)
    with pytest.raises(RankError, match="steps=1"):
        learner(objective, "w", optax.sgd(0.1), tasks=1, steps=1)
    short = learner(objective, "image/0/fc2", optax.sgd(0.1), tasks=1, steps=10, size=2)
    state = short.start_task(short.init(towers(), KEY), 0, KEY)
    with pytest.raises(StreamError, match="ends after 0 steps"):
        short.end_task(state, 0, [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert at_task(tree, 1) is not None
