"""The frozen residual under a LoRA whose start was taken out of the base, where the base alone gives that start."""

from __future__ import annotations

import numpy as np

from subspace_jax.io._errors import ManifestError
from subspace_jax.io.peft._names import TensorPlace

# `init_lora_weights` of these: PEFT does the same to the base again when it loads such a folder.
STARTS = ("pissa", "olora")
# What PEFT computes in float32 must not depend on how it rounds.
_NOISE = 1000.0 * float(np.finfo(np.float32).eps)


def start_factors(
    kind: str, matrix: np.ndarray, rank: int, scale: float, place: TensorPlace
) -> tuple[np.ndarray, np.ndarray]:
    r"""Returns the factors whose product, times the scale, PEFT takes out of a module's weight at the start.

    "pissa": \(s\,a\,b\) is the best approximation of that rank. "olora": \(a\,b\) is the projection of the weight
    onto the span of its first `rank` inputs; it is multiplied by \(s\) and not divided, as PEFT does.

    Args:
      kind: one of STARTS.
      matrix: the weight, `[in, out]`.
      rank: of the factors.
      scale: \(s\).
      place: of the weight.

    Returns:
      \(a\) `[in, rank]` and \(b\) `[rank, out]`, in float64.

    Raises:
      ManifestError: the module is not linear, or rounding decides what was taken out.
    """
    where = f"init_lora_weights={kind!r}: {place.path}"
    if place.rule.kind != "dense":
        raise ManifestError(f"{where} is a {place.rule.kind}, of which PEFT has no such start.")
    if rank > min(matrix.shape):
        raise ManifestError(f"{where} has rank {rank}, above the smaller side of {list(matrix.shape)}.")
    wide = matrix.astype(np.float64).T
    return _principal(wide, rank, scale, where) if kind == "pissa" else _leading(wide, rank, where)


def _principal(matrix: np.ndarray, rank: int, scale: float, where: str) -> tuple[np.ndarray, np.ndarray]:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    following = s[rank] if rank < len(s) else 0.0
    if scale <= 0.0 or s[rank - 1] - following <= _NOISE * s[0] < s[rank - 1]:
        raise ManifestError(
            f"{where}: singular values {rank} and {rank + 1} are equal but for rounding (or the scale {scale} is not "
            f"positive), so what was taken out of the base is not known. {CONVERT}"
        )
    roots = np.sqrt(s[:rank] / scale)
    return (roots[:, None] * vt[:rank]).T, (u[:, :rank] * roots).T


def _leading(matrix: np.ndarray, rank: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    q, r = np.linalg.qr(matrix)
    values = np.linalg.svd(r[:rank, :rank], compute_uv=False)
    if values[-1] <= _NOISE * values[0]:
        raise ManifestError(
            f"{where}: its first {rank} inputs are dependent, so what was taken out of the base is not known. {CONVERT}"
        )
    return r[:rank].T, q[:, :rank].T


CONVERT = (
    "Save it in PEFT with save_pretrained(folder, path_initial_model_for_weight_conversion=...), which makes plain "
    "LoRA of it."
)
