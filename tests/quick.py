"""Quick compilation: most of the tests' time goes into compiling thousands of tiny programs."""

import os
import threading

import jax


def compile_quickly():
    """Leaves most optimizations out, and lowers all programs in one MLIR context where JAX would make one for each."""
    jax.config.update("jax_disable_most_optimizations", True)
    _share_one_context()


def keep_compiled_programs():
    """Keeps what is compiled in the folder JAX_COMPILATION_CACHE_DIR, for the next run; does nothing without one.

    Most programs are single operations that every test has, so a second run takes a third of the processor time with
    jax 0.12. A first one takes an eighth more with jax 0.10, where writing a program costs a tenth of compiling it.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    for name, value in {"min_entry_size_bytes": -1, "min_compile_time_secs": 0.0}.items():
        jax.config.update(f"jax_persistent_cache_{name}", value)
        os.environ[f"JAX_PERSISTENT_CACHE_{name.upper()}"] = str(value)  # for processes that tests start


def _share_one_context():
    """A context of its own costs each program 4 ms and, as long as the program lives, 1.2 MB: a quarter of all time.

    Newer releases of JAX use contexts again by themselves. There is no public setting, so this is of the tests alone,
    and a release that has moved the function goes on as it is.
    """
    if jax.__version_info__ >= (0, 11):
        return
    try:
        from jax._src.interpreters import mlir
        from jax._src.lib.mlir import ir

        one, make = mlir.make_ir_context(), mlir.make_ir_context
    except (ImportError, AttributeError):
        return

    def make_or_share():
        """The one context, but where a program is lowered within the lowering of another, or beside it in a thread."""
        busy = ir.Context.current is not None or threading.current_thread() is not threading.main_thread()
        return make() if busy else one

    mlir.make_ir_context = make_or_share
