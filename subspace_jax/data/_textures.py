"""Photographs of textures with defects that are pasted in: real backgrounds, synthetic anomalies, known masks."""

from __future__ import annotations

import dataclasses

import numpy as np

from subspace_jax.assets import find_file
from subspace_jax.data._image_folder import read_image

TEXTURES = ("brick", "grass", "gravel")
DEFECTS = ("patch", "scratch", "blur", "spot")


@dataclasses.dataclass(frozen=True, eq=False)
class TextureTask:
    """Crops of one photograph: normal ones to fit to, and others to test with, half of them with a pasted defect.

    The photographs are real, the defects are not: no result on them says anything about industrial inspection.

    Attributes:
        name: of the texture.
        train: uint8 [shots, side, side, 3], normal crops of the photograph's left half.
        test: uint8 [n, side, side, 3], crops of its right half.
        masks: bool [n, side, side], where a defect was pasted.
        defects: kind of each test crop's defect; "good" where there is none.
    """

    name: str
    train: np.ndarray
    test: np.ndarray
    masks: np.ndarray
    defects: tuple[str, ...]

    @property
    def labels(self) -> np.ndarray:
        """bool [n]: true for crops with a defect."""
        return np.array([defect != "good" for defect in self.defects])


def textures() -> tuple[str, ...]:
    """Returns the names of the photographs.

    Example:
        >>> textures()
        ('brick', 'grass', 'gravel')
    """
    return TEXTURES


def load_texture_task(
    name: str, *, shots: int = 1, tests: int = 40, side: int = 224, contrast: float = 1.0, seed: int = 0
) -> TextureTask:
    """Cuts crops out of a photograph of `scikit-image` and pastes defects into half of those for testing.

    Kinds take turns: a blob of another texture with the mean and contrast of the place it covers, a thin scratch, a
    blob that is out of focus, and a soft stain.

    Args:
        name: one of `textures()`.
        shots: normal crops to fit to.
        tests: test crops, half of them with a defect.
        side: of a crop in pixels, at most half the photograph's 512.
        contrast: strength of scratches and stains; 1 is plain to see.
        seed: of all draws.

    Returns:
        The task.

    Raises:
        AssetMissingError: the package is not here.
        ValueError: an unknown texture, or numbers out of range.
    """
    if name not in TEXTURES:
        raise ValueError(f"no texture is called {name!r}; there are {', '.join(TEXTURES)}")
    photos = {t: read_image(find_file("scikit-image", f"data/{t}.png"))[..., 0].astype(np.float64) for t in TEXTURES}
    height, width = photos[name].shape
    if not 32 <= side <= min(height, width // 2) or shots < 1 or tests < 2:
        raise ValueError(f"{side=}, {shots=}, {tests=}; expected a side of 32 to {width // 2}, 1 shot, 2 tests or more")
    rng = np.random.default_rng([seed, TEXTURES.index(name)])
    train = [_crop(rng, photos[name][:, : width // 2], side) for _ in range(shots)]
    test, masks, defects = [], [], []
    for i in range(tests):
        crop, mask, defect = _crop(rng, photos[name][:, width // 2 :], side), np.zeros((side, side), bool), "good"
        if i % 2:
            defect = DEFECTS[i // 2 % len(DEFECTS)]
            other = photos[TEXTURES[(TEXTURES.index(name) + 1 + i // 8 % 2) % len(TEXTURES)]]
            crop, mask = _paste(rng, crop, defect, _crop(rng, other, side), contrast)
        test.append(crop)
        masks.append(mask)
        defects.append(defect)
    return TextureTask(name, _color(train), _color(test), np.stack(masks), tuple(defects))


def _color(crops: list[np.ndarray]) -> np.ndarray:
    gray = np.clip(np.stack(crops), 0, 255).round().astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=-1)


def _crop(rng: np.random.Generator, photo: np.ndarray, side: int) -> np.ndarray:
    y, x = (rng.integers(0, n - side + 1) for n in photo.shape)
    return photo[y : y + side, x : x + side]


def _paste(
    rng: np.random.Generator, crop: np.ndarray, defect: str, other: np.ndarray, contrast: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the crop with a defect and where that is."""
    from scipy import ndimage

    side = len(crop)
    blob = _scratch(rng, side) if defect == "scratch" else _blob(rng, side)
    place = blob > 0.5
    if defect == "patch":
        inside = other[place]
        new = crop[place].mean() + (other - inside.mean()) * crop[place].std() / max(inside.std(), 1.0)
    elif defect == "blur":
        new = ndimage.gaussian_filter(crop, 3.0)
    else:
        new = crop + rng.choice([-1, 1]) * contrast * 2.0 * crop.std()
    return crop + blob * (new - crop), place


def _grid(side: int) -> np.ndarray:
    return np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).astype(np.float64)


def _blob(rng: np.random.Generator, side: int) -> np.ndarray:
    """An ellipse of 5 to 12 % of the side in its half axes, with a soft edge."""
    axes = rng.uniform(0.05, 0.12, 2) * side
    center = rng.uniform(0.15, 0.85, 2) * side
    angle = rng.uniform(0, np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    radius = np.linalg.norm((_grid(side) - center) @ turn / axes, axis=-1)
    return 1 / (1 + np.exp(np.clip((radius - 1) * axes.mean() / 0.8, -50, 50)))


def _scratch(rng: np.random.Generator, side: int) -> np.ndarray:
    """A line of 15 to 35 % of the side, 2 to 4 pixels wide."""
    start, angle = rng.uniform(0.2, 0.8, 2) * side, rng.uniform(0, 2 * np.pi)
    length, half = rng.uniform(0.15, 0.35) * side, rng.uniform(1.0, 2.0)
    direction = np.array([np.sin(angle), np.cos(angle)])
    along = np.clip((_grid(side) - start) @ direction, 0, length)
    away = np.linalg.norm(_grid(side) - start - along[..., None] * direction, axis=-1)
    return 1 / (1 + np.exp(np.clip((away - half) / 0.3, -50, 50)))
