"""Pages and pieces of pages from the templates beside this file: one style, no other files, all that is given
escaped."""

from __future__ import annotations

import base64
import io
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from jinja2 import Environment
    from PIL.Image import Image

_WIDTH = 165  # pixels of a picture on a page, as its style says


class Figure(NamedTuple):
    """An image of a page, which holds the image itself.

    Args:
        source: a `data:` address.
        sharp: whether its pixels stay squares, because it is shown larger than it is.
    """

    title: str
    source: str
    sharp: bool


def figure(title: str, image: Image) -> Figure:
    """An image with its title, for the templates."""
    content = io.BytesIO()
    image.save(content, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
    return Figure(title, source, image.width < _WIDTH)


def render(template: str, **given: Any) -> str:
    """The HTML of a template. What is given is text, and stays text: signs that HTML would obey are escaped."""
    return _environment().get_template(template).render(given)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("crossguard"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
