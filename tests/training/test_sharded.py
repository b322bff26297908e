"""Training on 8 host devices, as fsdp x tensor layouts, is training on one."""

from ..eight_devices import KINDS, run_on_8_devices


def test_training_on_8_devices_is_training_on_one():
    lines, output = run_on_8_devices(__file__)
    assert len(lines) == 4 * len(KINDS), output
    assert all(line.endswith(": ok") for line in lines), output
