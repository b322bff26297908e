"""Packed rows hold every token once, and the loss of a step is that of its labels, however they are cut up."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import subspace_jax as sj
from subspace_jax.models import Llama, small_llama
from subspace_jax.training import chunked_token_loss, init_train_state, make_train_step, pack_sequences, token_loss


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.booleans(), st.integers(0, 5))
def test_every_token_is_there_once(sizes, pack, seed):
    random = np.random.default_rng(seed)
    tokens = [random.integers(1, 50, size) for size in sizes]
    labels = [np.arange(size) > random.integers(0, size) for size in sizes]
    rows = pack_sequences(tokens, labels, 9, pack=pack)
    found = {}
    for row, members in enumerate(rows.members):
        for segment, index in enumerate(members, 1):
            inside = rows.segments[row] == segment
            found[index] = rows.tokens[row][inside].tolist(), rows.labels[row][inside].tolist()
    assert found == {i: (t.tolist(), m.tolist()) for i, (t, m) in enumerate(zip(tokens, labels, strict=True))}
    assert not rows.labels[rows.segments == 0].any()
    # First fit: no two rows could be one.
    if pack:
        used = np.sort((rows.segments > 0).sum(1))
        assert len(used) < 2 or used[0] + used[1] > 9
    else:
        assert rows.members == tuple((i,) for i in range(len(sizes)))


def test_what_cannot_be_packed_is_refused():
    for tokens, labels in (([1, 2, 3], [0, 0, 1]), ([], []), ([1, 2], [0]), ([1, 2], [1, 0])):
        with pytest.raises(ValueError, match="sequence 0"):
            pack_sequences([np.array(tokens)], [np.array(labels, bool)], 2)


def test_token_loss_equals_float64():
    random = np.random.default_rng(0)
    logits = random.normal(size=(2, 5, 7))
    tokens = random.integers(0, 7, (2, 5))
    labels = random.random((2, 5)) < 0.5
    padded = logits.copy()
    padded[:, -1] = np.inf  # nothing reads the last place
    total, count = token_loss(jnp.asarray(padded, jnp.float32), jnp.asarray(tokens), jnp.asarray(labels))
    expected = 0.0
    for row in range(2):
        for place in range(1, 5):
            if labels[row, place]:
                scores = logits[row, place - 1]
                expected += np.log(np.exp(scores).sum()) - scores[tokens[row, place]]
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert int(count) == labels[:, 1:].sum()


def test_logits_in_chunks_give_the_same_loss_and_gradients():
    random = np.random.default_rng(2)
    hidden = jnp.asarray(random.normal(size=(3, 6, 4)), jnp.float32)
    table = jnp.asarray(random.normal(size=(7, 4)), jnp.float32)
    tokens, labels = random.integers(0, 7, (3, 6)), random.random((3, 6)) < 0.5

    def whole(hidden, table):
        return token_loss(hidden @ table.T, tokens, labels)[0]

    def parts(hidden, table, chunk):
        return chunked_token_loss(lambda h: h @ table.T, hidden, tokens, labels, chunk=chunk)[0]

    expected = jax.jit(jax.value_and_grad(whole, (0, 1)))(hidden, table)
    slopes = jax.jit(jax.value_and_grad(parts, (0, 1)), static_argnums=2)
    for chunk in (1, 4, 15, 64):
        found = slopes(hidden, table, chunk)
        for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    assert int(chunked_token_loss(lambda h: h @ table.T, hidden, tokens, labels, chunk=4)[1]) == labels[:, 1:].sum()


@pytest.mark.optimized
def test_logits_in_chunks_need_the_memory_of_one_chunk():
    hidden, table = jnp.zeros((8, 129, 16)), jnp.zeros((5000, 16))
    tokens = jnp.zeros((8, 129), jnp.int32)

    def whole(table):
        return token_loss(hidden @ table.T, tokens, tokens == 0)[0]

    def parts(table):
        return chunked_token_loss(lambda h: h @ table.T, hidden, tokens, tokens == 0, chunk=64)[0]

    bytes_of = lambda f: jax.jit(jax.grad(f)).lower(table).compile().memory_analysis().temp_size_in_bytes
    assert bytes_of(parts) < 0.2 * bytes_of(whole)


def test_packing_accumulation_and_padding_leave_the_step_as_it_is():
    """One step on eight sequences: each alone by hand, as packed rows, in micro-batches, with empty rows added."""
    random = np.random.default_rng(1)
    model = Llama(small_llama())
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    tokens = [random.integers(1, 100, size) for size in (3, 9, 5, 2, 7, 4, 6, 8)]
    labels = [np.arange(len(ids)) >= random.integers(1, len(ids)) for ids in tokens]

    def alone(params):
        sums = []
        for ids, mask in zip(tokens, labels, strict=True):
            logits = model.apply({"params": params}, ids[None])
            sums.append(token_loss(logits, jnp.asarray(ids[None]), jnp.asarray(mask[None])))
        return sum(total for total, _ in sums) / sum(count for _, count in sums)

    expected_loss, gradients = jax.jit(jax.value_and_grad(alone))(params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)

    def loss(adapted, batch, key):
        logits = model.apply({"params": sj.merge(adapted)}, batch["tokens"], batch["segments"] > 0,
                             segments=batch["segments"])  # fmt: skip
        total, count = token_loss(logits, batch["tokens"], batch["labels"])
        return total / jnp.maximum(count, 1.0)

    def count(batch):
        return jnp.sum(batch["labels"][:, 1:])

    for pack, accumulate in ((True, 1), (False, 4), (True, 3)):
        rows = pack_sequences(tokens, labels, 12, pack=pack)
        room = -len(rows.members) % accumulate + accumulate
        batch = {n: np.pad(getattr(rows, n), ((0, room), (0, 0))) for n in ("tokens", "labels", "segments")}
        optimizer = optax.sgd(0.1)
        state = init_train_state(
            sj.adapt(params, {"**": sj.full()}, key=jax.random.key(0)), optimizer, jax.random.key(1)
        )
        step = make_train_step(loss, optimizer, accumulate=accumulate, weight=count)
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], expected_loss, rtol=2e-5)
        found = sj.merge(sj.combine(state.trainable, state.frozen))
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)
