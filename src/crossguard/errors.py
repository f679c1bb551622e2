"""The one kind of error a user is meant to read: a sentence that says what was given and what would do."""

from __future__ import annotations


class CrossguardError(ValueError):
    """Something the user gave cannot be used; the command line prints the message alone and exits with code 2."""
