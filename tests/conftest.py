"""What tests of many folders share."""

import jax
import pytest

# Here compilation is most of the time, and the programs are tiny.
QUICKLY_COMPILED = {"adapters", "continual", "contract", "manifolds", "optim", "weights"}


@pytest.fixture(autouse=True)
def _quick_compilation(request):
    """Compiles without most optimisations, but for tests marked `optimized`, which look at the compiled program."""
    root = request.config.rootpath / "tests"
    inside = root in request.path.parents and request.path.relative_to(root).parts[0] in QUICKLY_COMPILED
    if not inside or request.node.get_closest_marker("optimized"):
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
