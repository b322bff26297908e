"""Connects the processes of a program that runs as one process per host."""

from __future__ import annotations

from typing import Any

import jax


def initialize_distributed(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    **options: Any,
) -> bool:
    """Connects the processes of a run by `jax.distributed.initialize`; does nothing where there is only one.

    Call it first in a program, before anything of JAX runs. Without arguments JAX asks the cluster (a TPU pod, Slurm,
    Open MPI, Kubernetes); where it finds none, the program is one process.

    Args:
      coordinator_address: host and port of the first process.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      **options: others of `jax.distributed.initialize`, such as `heartbeat_timeout_seconds`.

    Returns:
      Whether this process is connected with others.

    Raises:
      ValueError: some of what is needed was given, and the rest is not known.

    Example:
      >>> initialize_distributed(num_processes=1)
      False
    """
    if jax.distributed.is_initialized():
        return True
    if num_processes == 1:
        return False
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    try:
        jax.distributed.initialize(**given, **options)
    except ValueError as error:
        if all(value is None for value in given.values()):  # no cluster tells where the others are
            return False
        missing = ", ".join(name for name, value in given.items() if value is None) or "nothing"
        raise ValueError(
            f"initialize_distributed: {error} Given were {given}; missing: {missing}. Outside a known cluster all "
            "three are needed, num_processes=1 alone for a single process."
        ) from error
    return True
