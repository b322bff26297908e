"""What tests of all folders share: most of their time is compiling tiny programs, so that is done quickly."""

import os
from importlib import metadata

# Read when JAX starts; this and every process that a test starts has it. Newer releases do not know the first one.
if tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    quick = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()

# Two workers on two cores: threads of a decomposition would wait for each other, which costs ten times its time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's: a third of the time of tests against PEFT

# For those processes; here a plugin may have imported JAX before.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import ctypes
import gc

import jax
import pytest

from .quick import compile_quickly, keep_compiled_programs

compile_quickly()
keep_compiled_programs()

# Tracing makes objects by the million, nearly all of which live: looking for garbage less often saves a tenth.
gc.set_threshold(100_000, 50, 100)


@pytest.fixture(autouse=True)
def _all_optimizations(request):
    """Compiles with all optimizations for tests marked `optimized`, which look at the compiled program."""
    if request.node.get_closest_marker("optimized") is None:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def _stay_small():
    """Frees compiled programs where thousands of them grow beyond what a laptop has to spare.

    Not after each module: what is freed then, the small programs of ordinary operations, is compiled again in the next.
    """
    yield
    if _resident_bytes() > LARGEST:
        _free()


@pytest.fixture
def quick_collections():
    """Leaves what a long session holds out of each `gc.collect()`, which takes a second otherwise."""
    gc.freeze()
    yield
    gc.unfreeze()


LARGEST = 2.0e9
_LIBC = ctypes.CDLL(None) if os.name == "posix" else None


def _free():
    jax.clear_caches()
    gc.collect()
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


def _resident_bytes():
    """Memory that this process holds; zero where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def pytest_collection_modifyitems(items):
    """Puts long tests first: one that begins last keeps a single worker busy while the others have nothing left."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_report_header(config):
    """Says how long it will take: under xdist a newcomer sees nothing but dots."""
    return "subspace_jax: the whole suite takes about 20 minutes on 2 cores; the slowest tests are listed at the end"
