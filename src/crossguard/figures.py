"""What pictures of matplotlib have in common: the empty figure, and its way to a file."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from crossguard.errors import CrossguardError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def blank(width: float, height: float) -> Figure:
    """A white figure of so many inches, which makes room for what stands around its axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CrossguardError("a picture needs matplotlib ('pip install matplotlib')") from error
    return Figure((width, height), dpi=110, facecolor="white", layout="constrained")


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, with its own number of dots to the inch."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def clipped(name: str, most: int) -> str:
    """The name, or its beginning, in so many characters at most."""
    return name if len(name) <= most else f"{name[: most - 3]}..."
