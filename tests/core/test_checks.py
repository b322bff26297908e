import ml_dtypes
import numpy as np
import pytest

from subspace_jax.core import RankError, check_choice, check_dtype, check_int, check_number, check_probability


def test_numpy_integers_are_integers_and_come_back_as_python_ones():
    for value in (3, np.int64(3), np.uint8(3), np.array(3)):
        found = check_int("demo: n", value)
        assert (found, type(found)) == (3, int)
    for wrong in (True, np.bool_(True), 3.0, "3", None, 0, -1):
        with pytest.raises(RankError, match=r"demo: n=.*expected an int of at least 1"):
            check_int("demo: n", wrong)


def test_dtypes_in_which_adam_gives_nan_are_refused_with_the_mend():
    for sound in ("float32", "float64", "bfloat16", np.float32):
        assert check_dtype("demo: dtype", sound) == np.dtype(sound if sound != "bfloat16" else ml_dtypes.bfloat16)
    for wrong in ("float16", np.float16, "int32", np.dtype(ml_dtypes.float8_e4m3fn), "no such", bool):
        with pytest.raises(ValueError, match=r"demo: dtype=.*expected jnp.float32, or jnp.bfloat16"):
            check_dtype("demo: dtype", wrong)
    with pytest.raises(ValueError, match=r"float16.*underflow"):
        check_dtype("demo: dtype", np.float16)


def test_probabilities_and_choices():
    for sound in (0, 0.0, 0.5, np.float32(0.9)):
        check_probability("demo: dropout", sound)
    for wrong in (1.0, -0.1, float("nan"), "0.1", True, None):
        with pytest.raises(ValueError, match="demo: dropout="):
            check_probability("demo: dropout", wrong)
    for wrong in (float("inf"), 0.0, -1):
        with pytest.raises(ValueError, match=r"demo: alpha=.*above 0"):
            check_number("demo: alpha", wrong, above=0.0)
    with pytest.raises(ValueError, match=r"demo: side='rows': expected one of 'in', 'out'"):
        check_choice("demo: side", "rows", ("in", "out"))
