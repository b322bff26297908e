"""How far rounding may take two results apart: one rule for all comparisons, so that every processor passes them."""

import numpy as np

ROOM = 16


def tolerance(dtype="float32", size=1, norm=1.0, room=ROOM):
    """Returns the largest difference that rounding explains: room x eps of the dtype x a size x a norm.

    Args:
      dtype: what the result is computed in.
      size: how many roundings add up: the length of the sums, or the number of steps.
      norm: of what is compared, its largest entry or its norm.
      room: processors, compilers and orders of summation differ by this much.

    >>> tolerance("float32") < 2e-6 < tolerance("float32", size=2)
    True
    """
    dtype = np.dtype(dtype) if dtype != "bfloat16" else dtype
    eps = 2.0**-7 if dtype == "bfloat16" else float(np.finfo(dtype).eps)
    return room * eps * size * float(norm)


def assert_rounding(actual, expected, *, size=1, dtype=None):
    """Refuses two arrays that differ by more than rounding, relative to the largest entry expected."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    norm = max(np.abs(expected.astype(np.float64)).max(initial=0.0), np.finfo(np.float32).tiny)
    dtype = dtype or str(actual.dtype)
    np.testing.assert_allclose(
        actual.astype(np.float64), expected.astype(np.float64), rtol=0, atol=tolerance(dtype, size, norm)
    )
