"""What tests of all folders share: most of their time is compiling tiny programs, so that is done quickly."""

import os
from importlib import metadata

# Read when JAX starts; this and every process that a test starts has it. Newer releases do not know the first one.
if tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    quick = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()

# For those processes; here a plugin may have imported JAX before.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import jax
import pytest

jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def _all_optimizations(request):
    """Compiles with all optimizations for tests marked `optimized`, which look at the compiled program."""
    if request.node.get_closest_marker("optimized") is None:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
