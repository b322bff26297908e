"""`subspace-jax cluster`: groups images or features that lie near subspaces; no label is read."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from subspace_jax.data import load_image_folder
from subspace_jax.methods import deep_subspace_clustering as dsc

from ._console import console, track
from ._errors import UserError
from ._files import write_json, write_text
from ._folders import check_images, check_out, mistakes
from ._vision import check_size, in_equal_batches, load_vision_backbone

MOST = 5000


def run(
    data: tyro.conf.Positional[Path],
    clusters: int,
    out: Path,
    *,
    kept: int = 12,
    widths: tuple[int, ...] = (64, 48, 24),
    raw_mean: bool = False,
    size: int = 224,
    batch: int = 8,
    seed: int = 0,
    weights: Annotated[Path | None, tyro.conf.arg(help="An ONNX file of ViT-S/14; the carried one by default.")] = None,
) -> None:
    """Groups samples into clusters, each near a subspace of its own: labels, a picture of who is like whom, and losses.

    Writes clusters.csv, affinity.png, summary.json and features.npy (of images) or latent.npy. Labels are never read:
    subfolders of images mean nothing to it. A thousand samples take about a minute, a few thousand some ten.

    Args:
      data: a folder of images, or features.npy of shape (samples, features).
      clusters: how many there are.
      out: folder for the results; empty or new.
      kept: neighbors of each sample; one more than the dimension that you think the subspaces have.
      widths: of the autoencoder's layers.
      raw_mean: keep the mean of all samples; by default it is taken away, since subspaces go through the origin.
      size: side in pixels that images are resized to, a multiple of 14.
      batch: images at a time.
      seed: of the autoencoder and of k-means.
      weights: an ONNX file.
    """
    with mistakes():
        _check_options(clusters=clusters, kept=kept, batch=batch, seed=seed)
        if not all(w > 0 for w in widths):
            raise UserError(f"--widths {' '.join(map(str, widths))}: expected positive numbers.")
        check_out(out, resume=False)
        names, features, made = _read(data, clusters, size, batch, weights)
    x = features.reshape(len(features), -1).astype(np.float32)
    x = x if raw_mean else x - x.mean(0)
    x = x / max(float(np.sqrt(np.mean(np.square(x)))), 1e-12)
    remark = console(stderr=True)
    remark.print(f"clustering {len(x)} samples of {x.shape[1]} features: three stages, each stops by itself")

    def tell(stage: str, losses: np.ndarray) -> None:
        remark.print(f"  {stage}: {len(losses)} iterations, loss {losses[0]:.4g} to {losses[-1]:.4g}")

    network, key = dsc.dense_network(widths), jax.random.key(seed)
    found = dsc.cluster(jnp.asarray(x), clusters, network, d_sub=kept, key=key, seed=seed, on_stage=tell)
    options = {"kept": kept, "widths": list(widths), "raw_mean": raw_mean, "seed": seed}
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / ("features.npy" if made else "latent.npy"), features if made else found.features)
    write_text(out / "clusters.csv", _table(names, found.labels))
    draw_affinity(found.affinity, found.labels, out / "affinity.png")
    summary = _summary(found, clusters)
    write_json(out / "summary.json", {**summary, "features": x.shape[1], "options": options})
    sizes, share = ", ".join(map(str, summary["sizes"])), 100 * summary["affinity_inside_clusters"]
    console().print(f"{clusters} clusters of {sizes} samples; {share:.0f} % of the affinity inside")
    console().print(f"clusters.csv, affinity.png and summary.json are in {out}")


def _summary(found: dsc.Clustering, clusters: int) -> dict[str, Any]:
    inside = found.labels[:, None] == found.labels
    return {
        "samples": len(found.labels),
        "clusters": clusters,
        "sizes": np.bincount(found.labels, minlength=clusters).tolist(),
        "affinity_inside_clusters": float(found.affinity[inside].sum() / max(found.affinity.sum(), 1e-30)),
        "stages": {
            name: {"iterations": len(losses), "first": float(losses[0]), "last": float(losses[-1])}
            for name, losses in found.stages.items()
        },
    }


def _check_options(clusters: int, kept: int, batch: int, seed: int) -> None:
    for name, value, least in (("clusters", clusters, 2), ("kept", kept, 1), ("batch", batch, 1), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"--{name} {value}: expected an integer of at least {least}.")


def _read(data: Path, clusters: int, size: int, batch: int, weights: Path | None) -> tuple[list[str], np.ndarray, bool]:
    """Returns names, features, and whether they were made here."""
    if data.is_dir():
        images = load_image_folder(data, (size, size))
        _check_count(data, len(images), clusters)
        check_images(images)
        backbone = load_vision_backbone(weights)
        check_size(size, backbone)
        encode, parts = backbone.features((backbone.blocks,)), []
        steps = -(-len(images) // batch)
        for part, valid in track(in_equal_batches(images.batches(batch), batch), "reading images", steps):
            parts.append(np.asarray(encode(part)).mean((1, 2))[:valid])
        return list(images.names), np.concatenate(parts), True
    if data.suffix != ".npy" or not data.is_file():
        raise UserError(f"{data}: is no folder and no .npy file; give a folder of images, or features.npy.")
    features = _load(data)
    _check_count(data, len(features), clusters)
    return [str(i) for i in range(len(features))], features, False


def _load(path: Path) -> np.ndarray:
    try:
        array: Any = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is no readable array ({error}); write it with numpy.save.") from error
    if not isinstance(array, np.ndarray) or array.ndim < 2 or not np.issubdtype(array.dtype, np.number):
        shape = getattr(array, "shape", "?")
        raise UserError(f"{path}: has shape {shape}; expected numbers of shape (samples, features).")
    if np.iscomplexobj(array) or not np.isfinite(array).all():
        bad = [] if np.iscomplexobj(array) else np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(1))
        raise UserError(
            f"{path}: holds values that are not finite real numbers; mend or remove these rows:",
            [f"row {i}" for i in bad[:20]],
        )
    return array


def _check_count(data: Path, count: int, clusters: int) -> None:
    if count <= clusters:
        raise UserError(f"{data}: holds {count} samples; expected more than --clusters {clusters}.")
    if count > MOST:
        raise UserError(f"{data}: holds {count} samples; matrices of all by all allow at most {MOST}: give a part.")


def _table(names: list[str], labels: np.ndarray) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["sample", "cluster"])
    writer.writerows(zip(names, labels.tolist(), strict=True))
    return text.getvalue()


def draw_affinity(affinity: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """Draws who is like whom, samples in the order of their clusters: blocks where the clusters are clean.

    Args:
      affinity: `[samples, samples]`.
      labels: `[samples]`.
      path: of the picture.
    """
    from matplotlib.figure import Figure

    order = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.bincount(labels))
    figure = Figure(figsize=(6, 6), layout="constrained")
    axis = figure.subplots()
    axis.imshow(np.sqrt(affinity[np.ix_(order, order)]), cmap="magma", interpolation="nearest")
    for end in ends[:-1]:
        axis.axhline(end - 0.5, color="white", linewidth=0.5)
        axis.axvline(end - 0.5, color="white", linewidth=0.5)
    starts = np.concatenate([[0], ends[:-1]])
    axis.set_xticks((starts + ends - 1) / 2, [str(k) for k in range(len(ends))])
    axis.set_yticks((starts + ends - 1) / 2, [str(k) for k in range(len(ends))])
    axis.set_xlabel("cluster")
    axis.set_title("affinity of samples, sorted by cluster")
    figure.savefig(path, dpi=120)
