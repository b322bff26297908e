"""Fits the subspace of normal images and its threshold; saves and loads both."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.data import ImageFolder
from subspace_jax.io import read_safetensors, write_safetensors
from subspace_jax.methods import subspace_ad as ad

from ._console import track
from ._errors import UserError
from ._files import write_json
from ._folders import Unfinished
from ._vision import VisionBackbone, in_equal_batches

ARRAYS, NOTES = "model.safetensors", "model.json"
FORMAT = "subspace-jax anomaly model, 1"
FOLDS = 5


@dataclasses.dataclass(frozen=True)
class Settings:
    """What features a model is made of.

    Attributes:
      size: side of the square that images are resized to.
      layers: hidden states whose mean is taken.
      rotations: turned copies of each normal image.
      tau: share of the variance in the subspace.
      seed: of the angles.
      sigmas: how many standard deviations above the mean of normal scores the threshold is.
    """

    size: int
    layers: tuple[int, ...]
    rotations: int
    tau: float
    seed: int
    sigmas: float


def gather(
    images: ImageFolder, backbone: VisionBackbone, settings: Settings, batch: int, notes: Unfinished
) -> list[ad.Moments]:
    """Returns the moments of every fold of images with their turned copies; goes on where an earlier run ended."""
    done, arrays = notes.load()
    encode = backbone.features(settings.layers)
    width = backbone.model.config.width
    folds = min(len(images), FOLDS)
    moments = [ad.no_moments(width) for _ in range(folds)]
    if done:
        stacked = [jnp.asarray(arrays[name]) for name in ad.Moments._fields]
        moments = [ad.Moments(*(part[k] for part in stacked)) for k in range(folds)]
    angles = ad.rotation_angles(jax.random.key(settings.seed), settings.rotations)
    remaining = enumerate(images.batches(1, start=done), start=done)
    for i, (image,) in track(remaining, "fitting", len(images) - done):
        unit = image.astype(np.float32) / 255
        copies = [unit[None], np.asarray(ad.rotate(unit, angles))] if settings.rotations else [unit[None]]
        for part, valid in in_equal_batches(copies, batch):
            moments[i % folds] = ad.add_patches(moments[i % folds], encode(part)[:valid])
        notes.save(i + 1, {name: np.stack([getattr(m, name) for m in moments]) for name in ad.Moments._fields})
    return moments


def held_out_scores(
    images: ImageFolder, moments: list[ad.Moments], backbone: VisionBackbone, settings: Settings, batch: int
) -> list[float]:
    """Returns the scores of the normal images, each under a subspace of the others.

    Of a single image it is each half under a subspace of the other, without turned copies, which would hold both.
    """
    encode, size = backbone.features(settings.layers), (settings.size, settings.size)
    if len(images) == 1:
        patches = encode(next(images.batches(1)))
        half = max(patches.shape[2] // 2, 1)
        parts = (patches[:, :, :half], patches[:, :, half:])
        if parts[1].size == 0:
            return []
        scores = [ad.score_patches(ad.fit_subspace(b, tau=settings.tau), a) for a, b in (parts, parts[::-1])]
        return [float(ad.image_scores(ad.anomaly_maps(s, size))[0]) for s in scores]
    others = [
        ad.fit_subspace(functools.reduce(ad.merge_moments, moments[:k] + moments[k + 1 :]), tau=settings.tau)
        for k in range(len(moments))
    ]
    found: list[float] = []
    steps = -(-len(images) // batch)
    for part, valid in track(in_equal_batches(images.batches(batch), batch), "normal scores", steps):
        for patches in encode(part)[:valid]:
            patch_scores = ad.score_patches(others[len(found) % len(others)], patches)
            found.append(float(ad.image_scores(ad.anomaly_maps(patch_scores, size))))
    return found


def threshold(scores: list[float], sigmas: float) -> float:
    """Returns the mean of normal scores plus some standard deviations, and no less than the highest of them."""
    spread = np.std(scores, ddof=1) if len(scores) > 1 else 0.0
    return float(max(np.mean(scores) + sigmas * spread, *scores, np.finfo(np.float32).tiny)) if scores else np.inf


def save_model(folder: Path, subspace: ad.PatchSubspace, notes: dict[str, Any]) -> None:
    """Writes the arrays, and then the notes, without which a folder is no model."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(value) for name, value in subspace._asdict().items()}
    write_safetensors(folder / ARRAYS, arrays, {})
    write_json(folder / NOTES, {"format": FORMAT, **notes})


def load_model(folder: Path) -> tuple[ad.PatchSubspace, dict[str, Any]]:
    """Reads what `save_model` wrote.

    Raises:
      UserError: the folder is no model, or a damaged one.
    """
    mend = "give the folder that `subspace-jax anomaly fit` wrote"
    if not (folder / NOTES).is_file():
        raise UserError(f"--model {folder}: holds no {NOTES}; {mend}.")
    try:
        notes = json.loads((folder / NOTES).read_text(encoding="utf8"))
        arrays, _ = read_safetensors(folder / ARRAYS)
        if notes["format"] != FORMAT:
            raise UserError(f"--model {folder}: is a {notes['format']!r}; this version reads {FORMAT!r}.")
        subspace = ad.PatchSubspace(*(jnp.asarray(arrays[name]) for name in ad.PatchSubspace._fields))
        kinds = {"size": int, "layers": tuple, "backbone": str, "threshold": float}
        return subspace, {**notes, **{name: kind(notes[name]) for name, kind in kinds.items()}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--model {folder}: is damaged ({error}); {mend}.") from error
