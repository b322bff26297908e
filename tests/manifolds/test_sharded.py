import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["auto", "explicit"])
def test_every_manifold_gives_the_same_on_8_devices(axes):
    """In a process of its own, because the number of host devices is fixed when JAX starts."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sharded.py")), axes],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.stdout.split("\n")[:3] == ["Stiefel: ok", "Grassmann: ok", "SpecialOrthogonal: ok"], done.stderr[-2000:]
