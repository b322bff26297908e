"""The command `subspace-jax`: a user's own model and data, from the shell."""

from typing import TYPE_CHECKING

from ._errors import UserError as UserError
from ._main import main as main

if TYPE_CHECKING:
    from ._console import console as console
    from ._console import track as track
    from ._load_run import Run as Run
    from ._load_run import load_run as load_run
    from ._options import FinetuneOptions as FinetuneOptions
    from .finetune import finetune as finetune

try:
    from ._console import console, track
    from ._load_run import Run, load_run
    from ._options import FinetuneOptions
    from .finetune import finetune
except ModuleNotFoundError as missing:
    # Without the extra `[cli]` there is `main`, which says so.
    if str(missing.name).startswith("subspace_jax"):
        raise

__all__ = ["FinetuneOptions", "Run", "UserError", "console", "finetune", "load_run", "main", "track"]
