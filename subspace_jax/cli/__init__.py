"""The command `subspace-jax`: a user's own model and data, from the shell."""

from ._console import console as console
from ._console import track as track
from ._errors import UserError as UserError
from ._load_run import Run as Run
from ._load_run import load_run as load_run
from ._main import main as main
from ._options import FinetuneOptions as FinetuneOptions
from .finetune import finetune as finetune

__all__ = ["FinetuneOptions", "Run", "UserError", "console", "finetune", "load_run", "main", "track"]
