"""Emoji in two styles: small drawings with their names, the images of one style in each package."""

import json
from collections.abc import Iterator
from functools import partial

import numpy as np

from subspace_jax.assets import find_file
from subspace_jax.data._records import PairRecord

CATEGORIES = (
    "Activities",
    "Animals & Nature",
    "Component",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)
SIDE = 64


def _emoji(style: str) -> Iterator[PairRecord]:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("images are read with Pillow: pip install 'subspace-jax[vision]'") from error
    asset = f"emoji-{style}"
    listed = json.loads(find_file(asset, "package/emoji.json").read_text("utf8"))
    folder = find_file(asset, f"/img/{style}/64/{listed[0]['image']}").parent
    for entry in listed:
        if not entry[f"has_img_{style}"]:
            continue
        with Image.open(folder / entry["image"]) as file:
            pixels = np.asarray(file.convert("RGBA"), np.float32)
        # On white paper: what is transparent has no color of its own.
        opaque = pixels[..., 3:] / 255.0
        image = np.round(pixels[..., :3] * opaque + 255.0 * (1.0 - opaque)).astype(np.uint8)
        if image.shape != (SIDE, SIDE, 3):
            raise ValueError(f"{asset}: {entry['image']} is {image.shape}, expected {SIDE} x {SIDE} pixels of 3 colors")
        yield PairRecord(image, entry["name"].lower(), entry["category"], entry["subcategory"], entry["unified"])


google = partial(_emoji, "google")
twitter = partial(_emoji, "twitter")
