"""Scores images under a fitted model: a table, heat maps, and measures where the truth is known."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from subspace_jax import metrics
from subspace_jax.data import AnomalyFolder, ImageFolder, read_image
from subspace_jax.methods import subspace_ad as ad

from ._console import track
from ._files import write_text
from ._folders import Unfinished
from ._vision import VisionBackbone, in_equal_batches

SECONDS = 5.0  # between two notes of what is done


def patch_scores(
    images: ImageFolder,
    subspace: ad.PatchSubspace,
    backbone: VisionBackbone,
    layers: tuple[int, ...],
    batch: int,
    notes: Unfinished,
) -> np.ndarray:
    """Returns scores of all patches, `[images, rows, columns]`; goes on where an earlier run ended."""
    done, arrays = notes.load()
    encode = backbone.features(layers)
    found = [arrays["scores"]] if done else []
    steps, saved = -(-(len(images) - done) // batch), 0.0
    for part, valid in track(in_equal_batches(images.batches(batch, start=done), batch), "scoring", steps):
        found.append(np.asarray(ad.score_patches(subspace, encode(part)))[:valid])
        if time.monotonic() - saved > SECONDS:  # all of them are written each time
            notes.save(sum(map(len, found)), {"scores": np.concatenate(found)})
            saved = time.monotonic()
    return np.concatenate(found)


def pixel_map(patches: np.ndarray, size: int) -> np.ndarray:
    """Returns the map of one image, `[size, size]`."""
    return np.asarray(ad.anomaly_maps(jnp.asarray(patches), (size, size)))


def table(names: tuple[str, ...], scores: np.ndarray, limit: float, defects: tuple[str, ...] | None) -> str:
    """Returns the scores as CSV: image, score, whether it is above the threshold, and the defect where it is known."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "score", "anomalous", *(["defect"] if defects else [])])
    for i, name in enumerate(names):
        row = [name, f"{scores[i]:.6g}", str(bool(scores[i] > limit)).lower()]
        writer.writerow([*row, defects[i]] if defects else row)
    return text.getvalue()


def measures(
    category: AnomalyFolder, patches: np.ndarray, size: int, scores: np.ndarray, limit: float
) -> dict[str, Any]:
    """Returns how well scores tell defects from normal images, and maps defects from normal pixels."""
    labels, alarms = category.labels, scores > limit
    found: dict[str, Any] = {"category": category.name, "normal": int((~labels).sum()), "anomalous": int(labels.sum())}
    if labels.any() and not labels.all():
        found |= {"image_auroc": metrics.auroc(scores, labels), "image_f1_max": metrics.f1_max(scores, labels)}
        found["false_alarm_rate"] = float(alarms[~labels].mean())
        found["detection_rate"] = float(alarms[labels].mean())
        found["image_auroc_by_defect"] = {
            name: metrics.auroc(scores[chosen], labels[chosen])
            for name in sorted(set(category.defects) - {"good"})
            for chosen in [np.array([d in ("good", name) for d in category.defects])]
        }
    if category.has_masks:
        masks = category.read_masks((size, size))
        if masks.any() and not masks.all():
            maps = np.stack([pixel_map(part, size) for part in patches])
            found |= {"pixel_auroc": metrics.auroc(maps, masks), "pixel_f1_max": metrics.f1_max(maps, masks)}
            found["aupro_0.3"] = metrics.aupro(maps, masks)
    return found


def draw_maps(images: ImageFolder, patches: np.ndarray, size: int, limit: float, folder: Path) -> np.ndarray:
    """Writes a picture for every image: it and its heat map side by side; the threshold is the middle of the colors.

    Returns:
      The score of every image; one map is in memory at a time.
    """
    import matplotlib
    from PIL import Image

    colors = matplotlib.colormaps["inferno"]
    scores, triples = [], list(zip(images.names, images.paths, patches, strict=True))
    for name, path, part in track(triples, "drawing", len(triples)):
        heat = pixel_map(part, size)
        scores.append(float(ad.image_scores(jnp.asarray(heat))))
        picture = read_image(path)
        glow = (255 * colors(np.clip(heat / (2 * limit), 0, 1))[..., :3]).round().astype(np.uint8)
        side = (picture.shape[1], picture.shape[0])
        glow = np.asarray(Image.fromarray(glow).resize(side, Image.Resampling.BILINEAR))
        file = folder / "maps" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate([picture, (0.3 * picture + 0.7 * glow).astype(np.uint8)], axis=1)).save(file)
    return np.array(scores)


def write_scores(
    folder: Path, images: ImageFolder, scores: np.ndarray, limit: float, category: AnomalyFolder | None
) -> None:
    """Writes `scores.csv`."""
    write_text(folder / "scores.csv", table(images.names, scores, limit, category.defects if category else None))


def lines(summary: Mapping[str, Any]) -> list[str]:
    """Returns what is printed of a summary."""
    count, above, limit = (summary[name] for name in ("images", "anomalous_images", "threshold"))
    measured = summary.get("measures", {})
    names = ("image_auroc", "pixel_auroc", "aupro_0.3", "detection_rate", "false_alarm_rate")
    shown = [f"{name.replace('_', ' ')}: {measured[name]:.3f}" for name in names if name in measured]
    return [f"{count} images, {above} above the threshold {limit:.4g}", *shown]
