"""The small image-text model of emoji, on features that are made up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tasks import emoji_pairs


@pytest.fixture
def emoji(monkeypatch):
    """240 things in 12 topics of 4 categories, whose images and texts are turns of one vector."""
    rng = np.random.default_rng(0)
    categories = np.repeat(np.arange(4), 60)
    topics = np.repeat(np.arange(12), 20)
    shared = rng.normal(size=(240, 16)) + 2 * rng.normal(size=(12, 16))[topics]

    def turned(size, noise, vectors=shared, seed=1):
        basis = np.random.default_rng(seed).normal(size=(16, size))
        found = vectors @ basis + noise * rng.normal(size=(len(vectors), size))
        return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)

    means = np.stack([shared[topics == t].mean(0) for t in range(12)])
    held = emoji_pairs.Emoji(
        images={"google": turned(768, 0.1), "twitter": turned(768, 2.0)},
        texts=turned(384, 0.1, seed=2),
        topics=topics,
        topic_texts=turned(384, 0.1, means, seed=2),
        topic_names=tuple(f"topic-{i}" for i in range(12)),
        categories=categories,
        category_names=("Objects", "Animals & Nature", "Symbols", "Food & Drink"),
        split=np.where(np.arange(240) % 5 == 0, "test", "train"),
    )
    monkeypatch.setattr(emoji_pairs, "load", lambda: held)
    for cached in (emoji_pairs.parts, emoji_pairs.pretrained, emoji_pairs.few_shot):
        cached.cache_clear()
    yield held
    for cached in (emoji_pairs.parts, emoji_pairs.pretrained, emoji_pairs.few_shot):
        cached.cache_clear()


def test_new_categories_are_never_trained_on(emoji):
    parts = emoji_pairs.parts()
    new = np.isin(emoji.categories, (1, 3))
    assert not (parts["train"] & new).any()
    assert not (parts["train"] & parts["kept"]).any()
    np.testing.assert_array_equal(parts["new"], new)
    shots = emoji_pairs.few_shot(0, 4)
    assert (shots.x.shape, shots.topics.shape) == ((24, 768), (6, 384))
    assert np.bincount(shots.y).tolist() == [4] * 6
    assert len(shots.y_test) == 120 - 24 == len(shots.test["twitter"])
    seen = {row.tobytes() for row in shots.x}
    assert not seen & {row.tobytes() for row in shots.test["google"]}


def test_the_heads_learn_to_find_names(emoji):
    start, images, texts = emoji_pairs.start(jax.random.key(0)), emoji.images["google"], emoji.texts
    kept = emoji_pairs.parts()["kept"]
    own = jnp.arange(int(kept.sum()))
    untrained = emoji_pairs.accuracy(start, images[kept], texts[kept], own)
    trained = emoji_pairs.pretrained(0, steps=30, batch=64)
    found = emoji_pairs.accuracy(trained, images[kept], texts[kept], own)
    assert found > 0.5 > untrained
    embedded = emoji_pairs.head(trained["image"], images[:3])
    np.testing.assert_allclose(jnp.linalg.norm(embedded, axis=-1), 1, rtol=1e-5)
    cosines = embedded @ emoji_pairs.head(trained["text"], texts[:2]).T
    np.testing.assert_allclose(
        emoji_pairs.logits(trained, images[:3], texts[:2]), jnp.exp(trained["scale"]) * cosines, rtol=1e-4
    )
