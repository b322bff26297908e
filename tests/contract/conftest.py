import jax
import pytest


@pytest.fixture(autouse=True)
def _quick_compilation():
    """Compilation is most of the time here, and the programs are tiny."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
