import os
import subprocess
import sys
from pathlib import Path

import pytest

from .contract import CASES


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["auto", "explicit"])
def test_every_transformation_gives_the_same_on_8_devices_and_traces_once(axes):
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
    lines = [line for line in done.stdout.splitlines() if line]
    assert lines == [f"{case.name}: ok" for case in CASES], done.stdout + done.stderr[-2000:]
    assert done.returncode == 0
