"""What all pictures of matplotlib have in common on their way to a file."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, with its own number of dots to the inch."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def clipped(name: str, most: int) -> str:
    """The name, or its beginning, in so many characters at most."""
    return name if len(name) <= most else f"{name[: most - 3]}..."
