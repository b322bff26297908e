"""Two processes on one machine train data-parallel; one is killed, both start again, and the end is the same bits."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = 8


class Pair:
    """Both processes of one run."""

    def __init__(self, folder, cache):
        folder.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # The test may run where each process would have several devices.
        flags = os.environ.get("XLA_FLAGS", "").replace("--xla_force_host_platform_device_count=8", "")
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": flags,
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        program = str(Path(__file__).with_name("two_processes.py"))
        self.errors = [open(folder / f"errors{i}", "a+") for i in range(2)]  # noqa: SIM115
        self.processes = [
            subprocess.Popen(
                [sys.executable, program, str(i), str(port), str(folder), str(STEPS)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=self.errors[i],
                text=True,
            )
            for i in range(2)
        ]

    def until(self, number):
        """Reads what the first process says until it has taken a step."""
        for line in self.processes[0].stdout:
            if line.split()[:1] == [str(number)]:
                return
        raise AssertionError(self.said())

    def said(self):
        for file in self.errors:
            file.seek(0)
        return "\n".join(file.read()[-1500:] for file in self.errors)

    def outputs(self):
        try:
            said = [process.communicate(timeout=60)[0].splitlines() for process in self.processes]
            return [[line for line in lines if not line.startswith("[Gloo]")] for lines in said]
        finally:
            self.kill()

    def kill(self):
        for process in self.processes:
            process.kill()
            process.wait()


def finish(pair, step):
    outputs = pair.outputs()
    assert [process.returncode for process in pair.processes] == [0, 0], pair.said()
    assert [lines[-1] for lines in outputs] == [f"ended {step}"] * 2
    return outputs


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled functions of all runs, which are the same."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
def test_killed_processes_end_in_the_same_bits(tmp_path, cache):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    first, second = finish(Pair(whole, cache), STEPS)
    assert first == second  # the losses too
    expected = [(whole / f"final{i}.bin").read_bytes() for i in range(2)]
    assert expected[0] == expected[1]

    pair = Pair(broken, cache)
    pair.until(3)
    pair.processes[1].send_signal(signal.SIGKILL)
    assert pair.processes[1].wait() == -signal.SIGKILL
    pair.kill()  # the other waits for it or has given up: whoever started them ends it
    assert not (broken / "final0.bin").exists()

    outputs = finish(Pair(broken, cache), STEPS)
    assert int(outputs[0][0].split()[0]) in (3, 5), "it went on from the checkpoint of step 2 or 4"
    assert [(broken / f"final{i}.bin").read_bytes() for i in range(2)] == expected


@pytest.mark.slow
def test_a_signal_to_one_stops_both_after_the_same_step(tmp_path, cache):
    pair = Pair(tmp_path / "run", cache)
    pair.until(1)
    pair.processes[1].send_signal(signal.SIGTERM)
    outputs = pair.outputs()
    assert [process.returncode for process in pair.processes] == [0, 0], pair.said()
    assert outputs[0][-1] == outputs[1][-1]
    assert outputs[0][-1].startswith("ended ")
