"""Programs that run on 8 host devices, in a process of their own: their number is fixed when JAX starts."""

import os
import subprocess
import sys
from pathlib import Path

import jax
from jax.sharding import AxisType

from .quick import compile_quickly

KINDS = ("auto", "explicit")


def eight_devices():
    """Returns the environment variables of a process with 8 devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    return {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def run_on_8_devices(test_file, *arguments):
    """Runs `sharded.py` beside a test file with these arguments; returns its lines and its whole output."""
    done = subprocess.run(
        [sys.executable, str(Path(test_file).with_name("sharded.py")), *arguments],
        env=os.environ | eight_devices(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    output = done.stdout + done.stderr[-2000:]
    assert done.returncode == 0, output
    return [line for line in done.stdout.splitlines() if line], output


def make_mesh(kind):
    """Returns a mesh of 4 x 2 devices with "auto" or "explicit" axes; from here on programs are compiled quickly."""
    compile_quickly()
    axis = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis, axis))


def check_cases(cases, check):
    """Runs `check(case, mesh, explicit)` on every case, or on those named on the command line, and says how it went.

    Both kinds of axes in one process: what a case compiles for one device serves twice.
    """
    wanted, failed = sys.argv[1:], False
    meshes = {kind: make_mesh(kind) for kind in KINDS}
    for case in cases:
        if wanted and case.name not in wanted:
            continue
        for kind, mesh in meshes.items():
            try:
                check(case, mesh, kind == "explicit")
            except Exception as error:
                failed = True
                if len(wanted) == 1:
                    raise
                print(f"{case.name}, {kind}: {type(error).__name__}: {error}"[:1500])
            else:
                print(f"{case.name}, {kind}: ok")
    sys.exit(failed)


def all_ok(cases):
    """The lines of `check_cases` where every case holds."""
    return [f"{case.name}, {kind}: ok" for case in cases for kind in KINDS]
