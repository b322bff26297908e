"""`subspace-jax chat`: a conversation with a run's adapter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from ._generate import Writer
from ._load_run import load_run


def run(run: Annotated[Path, tyro.conf.Positional], /, system: str | None = None, max_new_tokens: int = 256) -> None:
    """Talk with a run's adapter: a line of yours, an answer; an empty line or Ctrl-D ends it.

    Args:
      run: folder of a finished run of a language model.
      system: an instruction in front of the conversation.
      max_new_tokens: longest answer in tokens.
    """
    writer = Writer(load_run(run))
    messages = [] if system is None else [{"role": "system", "content": system}]
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        messages.append({"role": "user", "content": line})
        answer = writer.write([messages], max_new_tokens)[0].strip()
        messages.append({"role": "assistant", "content": answer or " "})
        print(answer, flush=True)
