"""Programs that run on 8 host devices, in a process of their own: their number is fixed when JAX starts."""

import os
import subprocess
import sys
from pathlib import Path

import jax
from jax.sharding import AxisType

from .quick import compile_quickly


def eight_devices():
    """Returns the environment variables of a process with 8 devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    return {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def run_on_8_devices(test_file, axes):
    """Runs `sharded.py` beside a test file with "auto" or "explicit" axes; returns its lines and its whole output."""
    done = subprocess.run(
        [sys.executable, str(Path(test_file).with_name("sharded.py")), axes],
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
    """Runs `check(case, mesh, explicit)` on every case, or on those named on the command line, and says how it went."""
    kind, *wanted = sys.argv[1:]
    mesh, failed = make_mesh(kind), False
    for case in cases:
        if wanted and case.name not in wanted:
            continue
        try:
            check(case, mesh, kind == "explicit")
        except Exception as error:
            failed = True
            if len(wanted) == 1:
                raise
            print(f"{case.name}: {type(error).__name__}: {error}"[:1500])
        else:
            print(f"{case.name}: ok")
    sys.exit(failed)
