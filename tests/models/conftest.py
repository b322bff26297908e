import numpy as np
import pytest

from subspace_jax.assets import AssetMissingError, find_file


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def carried():
    """Path of a carried file, or a skip that says how to fetch it."""

    def path(asset, suffix):
        try:
            return find_file(asset, suffix)
        except AssetMissingError as error:
            pytest.skip(str(error))

    return path
