"""What is said to the user: the one kind of error that is meant to be read, and notes on the way."""

from __future__ import annotations

import sys


class CrossguardError(ValueError):
    """Something the user gave cannot be used; the command line prints the message alone and exits with code 2."""


def say(note: str) -> None:
    """Tells whoever started this what happens, in one line on standard error."""
    print(f"crossguard: {note}", file=sys.stderr)
