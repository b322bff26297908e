"""The command `subspace-jax`: a user's own model and data, from the shell."""

from ._console import console as console
from ._console import track as track
from ._errors import UserError as UserError
from ._main import main as main

__all__ = ["UserError", "console", "main", "track"]
