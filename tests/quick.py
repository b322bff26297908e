"""Quick compilation: most of the tests' time goes into compiling thousands of tiny programs."""

import os
import threading

import jax
import jax.numpy as jnp
import numpy as np


def compile_quickly():
    """Leaves most optimizations out, and spares a context for each program and a program for each array of numbers."""
    jax.config.update("jax_disable_most_optimizations", True)
    _share_one_context()
    _make_arrays_by_numpy()


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


def _make_arrays_by_numpy():
    """Lets `jnp.asarray` of a numpy array, `jnp.zeros` and their like make the array by numpy, outside of a trace.

    The numbers are the same; JAX by itself compiles a program for every shape and dtype, every sixth of all that the
    tests compile. On a mesh, and for what numpy would convert in another way, everything is as it was.
    """
    try:
        from jax._src.core import stage_p
    except ImportError:
        return
    from jax.extend.core.primitives import broadcast_in_dim_p, convert_element_type_p

    if getattr(stage_p.impl, "by_numpy", False):
        return
    floats = {jnp.dtype(name) for name in ("float64", "float32", "float16", "bfloat16")}
    integers = {jnp.dtype(name) for name in ("int64", "int32", "uint32")}
    stage, convert, fill = stage_p.impl, convert_element_type_p.impl, broadcast_in_dim_p.impl

    def known(x):
        """Tells whether these are numbers on the host, of a dtype that is their own."""
        return isinstance(x, np.ndarray) and not getattr(x, "weak_type", False) and no_mesh()

    def no_mesh():
        return jax.sharding.get_abstract_mesh().empty

    def put(x):
        return jax.device_put(x, may_alias=False)

    def staged(x):
        return put(x) if known(x) and x.dtype in floats | integers else stage(x)

    def converted(x, *, new_dtype, weak_type, sharding):
        alike = known(x) and any({x.dtype, new_dtype} <= kind for kind in (floats, integers))
        if alike and not weak_type and sharding is None:
            return put(x.astype(jax.dtypes.canonicalize_dtype(x.dtype)).astype(new_dtype))
        return convert(x, new_dtype=new_dtype, weak_type=weak_type, sharding=sharding)

    def filled(x, *dynamic, shape, broadcast_dimensions, sharding):
        anywhere = known(x) or (isinstance(x, jax.Array) and not (x.committed or x.weak_type) and no_mesh())
        if np.ndim(x) == 0 and anywhere and x.dtype in floats | integers and not dynamic and sharding is None:
            return put(np.full(shape, x))
        return fill(x, *dynamic, shape=shape, broadcast_dimensions=broadcast_dimensions, sharding=sharding)

    staged.by_numpy = True
    stage_p.def_impl(staged)
    convert_element_type_p.def_impl(converted)
    broadcast_in_dim_p.def_impl(filled)
