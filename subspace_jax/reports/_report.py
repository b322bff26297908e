"""`report`: compares a tuned tree with the pretrained one, matrix by matrix."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import Params, Role, Weight, check_int, check_number
from subspace_jax.merging import Selector, Site, sites, wide_array
from subspace_jax.reports._compare import compare


@dataclasses.dataclass(frozen=True)
class MatrixChange:
    r"""What happened to one matrix; of stacked layers each is one.

    Attributes:
      path: of the leaf, with the layer's index behind it where layers are stacked.
      shape: inputs and outputs.
      method: what stands there, empty for an ordinary array.
      moved: \(\|\Delta\| / \|W\|\), in the Frobenius norm.
      rank: number of singular values of \(\Delta\) above 1e-5 of the largest.
      directions: how many of them hold 90 % of its energy \(\|\Delta\|^2\).
      inside: share of the energy of \(\Delta\) within the leading pretrained directions, as many as `directions`, on
        the side of the outputs; what chance gives is `directions` / outputs.
      intruders: how many of the leading tuned directions resemble no pretrained one.
      rounding: what casting the merged matrix to its own dtype loses, as a share of \(\|\Delta\|\).
      cosine: with the other tree's change, \(\langle \Delta, \Delta' \rangle / \|\Delta\| \|\Delta'\|\); None without.
      overlap: share of the other change's leading directions that lie in this one's, 0 to 1; None without.
    """

    path: str
    shape: tuple[int, int]
    method: str
    moved: float
    rank: int
    directions: int
    inside: float
    intruders: int
    rounding: float
    cosine: float | None = None
    overlap: float | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What happened to all matrices of a tree; prints as a table.

    Attributes:
      matrices: one entry for each, in the order of the tree.
      spectra: singular values of each change, by path.
      others: how far leaves that are no matrices moved, by path.
    """

    matrices: Sequence[MatrixChange]
    spectra: Mapping[str, np.ndarray]
    others: Mapping[str, float]

    def __iter__(self) -> Iterator[MatrixChange]:
        return iter(self.matrices)

    def __str__(self) -> str:
        from subspace_jax.reports._show import text_table

        return text_table(self)

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as lists, numbers and strings, for JSON; None stands for what is not finite."""
        return {
            "matrices": [{k: _finite(v) for k, v in dataclasses.asdict(one).items()} for one in self.matrices],
            "spectra": {path: [float(v) for v in values] for path, values in self.spectra.items()},
            "others": {path: _finite(value) for path, value in self.others.items()},
        }

    def save(self, folder: str | os.PathLike[str]) -> pathlib.Path:
        """Writes report.json, report.png and report.html, which needs nothing beside it.

        Args:
          folder: is made where it is missing.

        Returns:
          The path of the HTML file.

        Raises:
          ImportError: matplotlib is not installed.
        """
        from subspace_jax.reports._show import draw, html_page

        place = pathlib.Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        picture = draw(self)
        (place / "report.json").write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        (place / "report.png").write_bytes(picture)
        (place / "report.html").write_text(html_page(self, picture))
        return place / "report.html"


def report(
    before: Params,
    after: Params,
    *,
    other: Params | None = None,
    k: int = 10,
    threshold: float = 0.5,
    select: Selector | None = None,
    roles: Mapping[str, Role] | None = None,
) -> Report:
    r"""Tells what a training did to the weights: how far they moved, in how many directions, which, and what is lost.

    With \(\Delta = W - W_0\), a matrix at a time: nothing as large as the model is held beside the two trees.

    Args:
      before: the pretrained parameters.
      after: the tuned ones: a tree of arrays or of stand-in weights, such as `adapt` and training left.
      other: another tree that was tuned from the same parameters; its changes are compared with those of `after`.
      k: how many leading tuned directions are looked at for intruders, as in
        `sj.methods.intruder_dimensions.intruder_dimensions`.
      threshold: a direction whose largest cosine with any pretrained one is below this is an intruder.
      select: which leaves; all by default.
      roles: how arrays of more than two axes are read as matrices: what `sj.roles` returns. Without, those that no
        stand-in explains are among `others`.

    Returns:
      A `Report`: `print` it, or `.save(folder)` it as JSON, a picture and one HTML file.

    Raises:
      StructureError: the trees differ; the message has the leaf's path.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> before = {"w": jnp.eye(6, 4)}
      >>> after = {"w": before["w"] + 0.1 * jnp.outer(jnp.arange(6.0), jnp.ones(4))}
      >>> [one] = sj.report(before, after)
      >>> (one.rank, one.directions, round(one.moved, 3))
      (1, 1, 0.742)

    References:
      Intruders: Shuttleworth et al., LoRA vs Full Fine-tuning: An Illusion of Equivalence, 2025.
    """
    check_int("report: k", k)
    check_number("report: threshold", threshold)
    trees = [after] if other is None else [after, other]
    matrices: list[MatrixChange] = []
    spectra: dict[str, np.ndarray] = {}
    others: dict[str, float] = {}
    for site in sites(trees, before, select=select, roles=roles, least=1):
        if site.role is None or not site.role.is_matrix:
            others[site.path] = _moved(site)
            continue
        for path, found, values in _changes(site, k, threshold):
            matrices.append(found)
            spectra[path] = values
    return Report(tuple(matrices), spectra, others)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _moved(site: Site) -> float:
    base, tuned = wide_array(site.base), wide_array(site.leaves[0])
    norm = float(jnp.linalg.norm(base.ravel()))
    change = float(jnp.linalg.norm((tuned - base).ravel()))
    return change / norm if norm else (math.inf if change else 0.0)


def _changes(site: Site, k: int, threshold: float) -> Iterator[tuple[str, MatrixChange, np.ndarray]]:
    """The matrices of a leaf, one after the other."""
    role, tuned = site.role, site.leaves[0]
    assert role is not None
    base, *found = (_matrices(role, leaf) for leaf in (site.base, *site.leaves))
    method = tuned.method if isinstance(tuned, Weight) else ""
    for i, index in enumerate(np.ndindex(*role.stack_shape(site.base.shape))):
        path = site.path + "".join(f"[{n}]" for n in index)
        if len(found) == 1 and not bool(jnp.any(found[0][i] != base[i])):
            sizes = (int(base.shape[-2]), int(base.shape[-1]))
            yield path, MatrixChange(path, sizes, method, 0.0, 0, 0, 0.0, 0, 0.0), np.zeros(min(sizes))
            continue
        numbers = jax.device_get(
            compare(base[i], *(one[i] for one in found), k=k, threshold=threshold, dtype=tuned.dtype)
        )
        norm, values = float(numbers["norm"]), np.asarray(numbers["values"])
        change = float(np.linalg.norm(values))
        shape = tuple(base.shape[-2:])
        yield (
            path,
            MatrixChange(
                path=path,
                shape=(int(shape[0]), int(shape[1])),
                method=method,
                moved=change / norm if norm else (math.inf if change else 0.0),
                rank=int((values > 1e-5 * values[:1]).sum()) if change else 0,
                directions=int(numbers["directions"]) if change else 0,
                inside=float(numbers["inside"]) if change else 0.0,
                intruders=int(numbers["intruders"]),
                rounding=float(numbers["rounding"]) / change if change else 0.0,
                cosine=float(numbers["cosine"]) if "cosine" in numbers else None,
                overlap=float(numbers["overlap"]) if "overlap" in numbers else None,
            ),
            values,
        )


def _matrices(role: Role, leaf: Any) -> jax.Array:
    """The matrices of a leaf, `[layers, in, out]`, in at least float32."""
    matrix = role.matrix(wide_array(leaf))
    return matrix.reshape(-1, *matrix.shape[-2:])
