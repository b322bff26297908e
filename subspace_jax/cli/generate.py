"""`subspace-jax generate`: continues prompts with a run's adapter."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

from ._errors import UserError
from ._generate import Prompt, Writer
from ._load_run import load_run


def run(
    run: Annotated[Path, tyro.conf.Positional],
    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    file: Path | None = None,
    max_new_tokens: int = 64,
    batch: int = 8,
) -> None:
    """Continue prompts; answers go to stdout, one JSON line each.

    Args:
      run: folder of a finished run of a language model.
      prompts: texts; where the run was trained on conversations, messages of a user.
      file: read prompts from a file, one on each line; "-" reads stdin.
      max_new_tokens: tokens to add at most; generation also stops at the trained end token and at the context's end.
      batch: prompts at a time.
    """
    texts = list(prompts)
    if file is not None:
        source = sys.stdin.read() if str(file) == "-" else _read(file)
        texts += [line for line in source.splitlines() if line.strip()]
    if not texts or max_new_tokens < 1 or batch < 1:
        raise UserError("expected at least one prompt, and positive --max-new-tokens and --batch.")
    loaded = load_run(run)
    writer = Writer(loaded)
    chats = loaded.data["form"] == "messages"
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        given: list[Prompt] = [[{"role": "user", "content": text}] for text in part] if chats else list(part)
        for text, answer in zip(part, writer.write(given, max_new_tokens), strict=True):
            print(json.dumps({"prompt": text, "completion": answer}, ensure_ascii=False), flush=True)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file {file}: cannot be read: {error}") from error
