"""`subspace-jax export`: a run's adapter for other programs, checked by reading it back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

import subspace_jax as sj

from ._console import console
from ._errors import UserError
from ._export import check_export, probe, read_merged, write_gguf_file, write_merged
from ._load_run import load_run
from ._peft import peft_names, save_peft_folder


def run(
    run: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    /,
    to: Literal["peft", "hf", "gguf"],
    precision: Literal["f16", "f32"] = "f16",
) -> None:
    """Write a run's adapter in another program's form, and read it back to see that nothing was lost.

    Args:
      run: folder of a finished run.
      out: folder to write, or file of GGUF; it must not exist.
      to: peft for the adapter alone, hf for the whole model with the adapter merged in, gguf for the same as a file of
        llama.cpp's, where the model came in one.
      precision: of a GGUF file's matrices; never that of the blocks that the model came in.
    """
    if out.exists():
        raise UserError(f"{out}: it exists; name a new one.")
    loaded = load_run(run)
    if to == "peft":
        reason = save_peft_folder(out, loaded.adapted, loaded.problem, loaded.backbone)
        if reason is not None:
            raise UserError(f"PEFT has no form for this adapter: {reason}")
        names = peft_names(loaded.backbone, classifies=loaded.problem.classifies)
        found = sj.load_peft(out, loaded.problem.params, names)  # pyright: ignore[reportArgumentType]
    elif to == "gguf":
        found = write_gguf_file(out, loaded, precision)
    else:
        write_merged(out, sj.merge(loaded.adapted), loaded.backbone, loaded.problem)
        found = read_merged(out, loaded.problem.params, loaded.backbone, loaded.problem)
    try:
        share = check_export(found, loaded.adapted, loaded.problem.params, loaded.apply, probe(loaded), str(out))
    except UserError:
        if to == "gguf":  # a file of its own, which nothing should pick up
            out.unlink()
        raise
    console().print(f"{out}: written and read back; it differs by {share:.2e} of what the adapter changes")
