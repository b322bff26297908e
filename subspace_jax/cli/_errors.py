"""What a command says when its user has made a mistake."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """A mistake of the user: the command prints it, with the mend, and ends with exit code 2.

    Args:
      message: what came, what was expected, and the mend.
      lines: one line for each bad row, file or option, printed below the message.
    """

    def __init__(self, message: str, lines: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.lines = tuple(lines)

    def __str__(self) -> str:
        return "\n".join([str(self.args[0]), *(f"  {line}" for line in self.lines)])
