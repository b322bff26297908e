"""`subspace-jax anomaly`: finds what is unusual in images, from a few normal ones and without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from subspace_jax.data import ImageFolder, anomaly_categories, is_anomaly_folder, load_anomaly_folder, load_image_folder
from subspace_jax.methods import subspace_ad as ad

from . import _anomaly_model as models
from . import _anomaly_score as scoring
from ._console import console
from ._errors import UserError
from ._files import write_json
from ._folders import Unfinished, check_images, check_masks, check_out, mistakes
from ._vision import check_size, load_vision_backbone

Folder = tyro.conf.Positional[Path]
Weights = Annotated[Path | None, tyro.conf.arg(help="An ONNX file of ViT-S/14; the carried weights by default.")]


def fit(
    folder: Folder,
    out: Path,
    *,
    size: int = 448,
    rotations: int = 30,
    tau: float = 0.99,
    layers: tuple[int, ...] = (),
    sigmas: float = 3.0,
    batch: int = 8,
    seed: int = 0,
    resume: bool = False,
    weights: Weights = None,
) -> None:
    """Fits a model to normal images: 1 to 4 do, more are better. No training.

    Args:
      folder: of normal images, or a category in the layout of MVTec AD, whose train/good is taken.
      out: folder for the model; empty or new.
      size: side in pixels that images are resized to, a multiple of 14. 224 is four times as fast, and coarser.
      rotations: turned copies of each image; 0 where orientation matters.
      tau: share of the variance of normal patches that counts as normal.
      layers: hidden states of the transformer whose mean is taken; its middle ones by default.
      sigmas: the threshold lies this many standard deviations above the mean of normal scores.
      batch: images at a time.
      seed: of the rotations.
      resume: go on with an interrupted run.
    """
    with mistakes():
        images = _normal_images(folder, size)
        _check_options(size=size, rotations=rotations, tau=tau, sigmas=sigmas, batch=batch, seed=seed)
        check_out(out, resume)
        check_images(images)
        backbone = load_vision_backbone(weights)
    check_size(size, backbone)
    chosen = layers or tuple(i for i in ad.middle_layers(12) if i <= backbone.blocks) or (backbone.blocks,)
    if not all(0 <= layer <= backbone.blocks for layer in chosen):
        raise UserError(f"--layers {' '.join(map(str, chosen))}: expected numbers from 0 to {backbone.blocks}.")
    settings = models.Settings(size, chosen, rotations, tau, seed, sigmas)
    job = {"command": "fit", "backbone": backbone.name, **vars(settings), "images": _files(images)}
    notes = Unfinished(out, job)
    notes.load()
    moments = models.gather(images, backbone, settings, batch, notes)
    normal = models.held_out_scores(images, moments, backbone, settings, batch)
    limit = models.threshold(normal, sigmas)
    total = moments[0]
    for other in moments[1:]:
        total = ad.merge_moments(total, other)
    subspace = ad.fit_subspace(total, tau=tau)
    rank, width = subspace.components.shape[1], subspace.mean.shape[0]
    record = {k: v for k, v in job.items() if k not in ("command", "images")}
    found = {"rank": rank, "normal_images": len(images), "patches": int(subspace.count), "normal_scores": normal}
    models.save_model(out, subspace, {**record, **found, "threshold": limit})
    notes.clear()
    console().print(f"{len(images)} normal images, {rank} of {width} dimensions, threshold {limit:.4g}: {out}")


def score(
    folder: Folder, model: Path, maps: Path, *, batch: int = 8, resume: bool = False, weights: Weights = None
) -> None:
    """Scores images: a heat map of each, a table with a verdict, and measures where the folder tells the truth.

    Args:
      folder: of images, or a category in the layout of MVTec AD, whose test images are scored and measured.
      model: folder that `fit` wrote.
      maps: folder for scores.csv, summary.json and maps/; empty or new.
      batch: images at a time.
      resume: go on with an interrupted run.
    """
    with mistakes():
        subspace, notes_of_model = models.load_model(model)
        size = notes_of_model["size"]
        _check_options(batch=batch)
        category = load_anomaly_folder(folder, size=(size, size)) if is_anomaly_folder(folder) else None
        images = category.test if category else load_image_folder(folder, (size, size))
        check_out(maps, resume)
        check_images(images)
        if category:
            check_masks(category)
        backbone = load_vision_backbone(weights)
    if backbone.name != notes_of_model["backbone"]:
        raise UserError(
            f"--model {model}: was fitted with {notes_of_model['backbone']}, these weights are {backbone.name}; "
            "give those with --weights."
        )
    limit = notes_of_model["threshold"]
    arrays = [np.asarray(value).tobytes() for value in subspace]
    job = {"command": "score", "model": _digest(arrays), "threshold": limit, "images": _files(images)}
    notes = Unfinished(maps, job)
    patches = scoring.patch_scores(images, subspace, backbone, notes_of_model["layers"], batch, notes)
    scores = scoring.draw_maps(images, patches, size, limit, maps)
    scoring.write_scores(maps, images, scores, limit, category)
    summary: dict[str, Any] = {"images": len(images), "anomalous_images": int((scores > limit).sum())}
    summary |= {"threshold": limit, "model": notes_of_model}
    if category:
        summary["measures"] = scoring.measures(category, patches, size, scores, limit)
    write_json(maps / "summary.json", summary)
    notes.clear()
    for line in [*scoring.lines(summary), f"scores.csv, summary.json and maps/ are in {maps}"]:
        console().print(line)


def demo(
    out: Path = Path("anomaly-demo"), *, texture: str = "brick", shots: int = 2, size: int = 224, seed: int = 0
) -> None:
    """Shows both on photographs of a texture into which defects are pasted; takes about half a minute on a CPU.

    The photographs are real, the defects are synthetic: the numbers say nothing about your own data.

    Args:
      out: folder for data, model and results; empty or new.
      texture: brick, grass or gravel.
      shots: normal images to fit to.
      size: side in pixels that crops of 224 are resized to; half of it takes a quarter of the time.
      seed: of crops and defects.
    """
    from subspace_jax.assets import fetch
    from subspace_jax.data import load_texture_task, textures

    if texture not in textures():
        raise UserError(f"--texture {texture}: expected one of {', '.join(textures())}.")
    check_out(out, resume=False)
    fetch("textures", progress=lambda line: console(stderr=True).print(line))
    with mistakes():
        task = load_texture_task(texture, shots=shots, tests=16, seed=seed)
    data = out / "data" / f"{texture}-with-pasted-defects"
    _write_task(data, task)
    console().print("Real photographs, pasted defects: the numbers below say nothing about your own data.")
    fit(data, out / "model", size=size, rotations=3, batch=4, seed=seed)
    score(data, out / "model", out / "results", batch=4)


COMMANDS = {"fit": fit, "score": score, "demo": demo}


def _normal_images(folder: Path, size: int) -> ImageFolder:
    if is_anomaly_folder(folder):
        return load_anomaly_folder(folder, size=(size, size)).train
    categories = anomaly_categories(folder)
    if categories:
        raise UserError(f"{folder}: holds the categories {', '.join(categories)}; give one, {folder / categories[0]}.")
    return load_image_folder(folder, (size, size))


def _check_options(**options: float) -> None:
    limits = {"rotations": (0, 1000), "tau": (1e-6, 1.0), "sigmas": (0, 1e6), "batch": (1, 4096), "size": (1, 8192)}
    for name, value in options.items():
        low, high = limits.get(name, (0, 2**31 - 1))
        if not low <= value <= high:
            raise UserError(f"--{name} {value}: expected a number from {low:g} to {high:g}.")


def _files(images: ImageFolder) -> list[list[Any]]:
    """Names and sizes in bytes: what a resumed run must find again."""
    return [[name, path.stat().st_size] for name, path in zip(images.names, images.paths, strict=True)]


def _digest(parts: list[bytes]) -> str:
    import hashlib

    return hashlib.sha256(b"".join(parts)).hexdigest()


def _write_task(folder: Path, task: Any) -> None:
    """Writes crops in the layout of MVTec AD."""
    from PIL import Image

    def write(name: str, array: np.ndarray) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / name)

    for i, image in enumerate(task.train):
        write(f"train/good/{i:03}.png", image)
    for i, (image, mask, defect) in enumerate(zip(task.test, task.masks, task.defects, strict=True)):
        write(f"test/{defect}/{i:03}.png", image)
        if defect != "good":
            write(f"ground_truth/{defect}/{i:03}_mask.png", 255 * mask.astype(np.uint8))
