"""What is printed: text that no terminal, log or page obeys, and sentences that fit on a screen.

Labels, notes, ids and captions come from reports, data and checkpoints of strangers, and reach people's terminals.
"""

from __future__ import annotations

import logging
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

LONGEST = 288  # signs of an error message: with `crossguard: ` before it, 300

_LATEST = 4e9  # seconds: a time beyond is none, and some systems cannot show it
_JOINERS = "\u200c\u200d"  # they shape letters of Persian and make one emoji of several


def plain(text: str) -> str:
    r"""The text in one line, in which whatever a terminal would obey is spelled out: control characters and so escape
    sequences (`\x1b`), line breaks (`\n`), overrides of the reading direction (`\u202e`), signs without a form, and
    what cannot be encoded."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(sign if _is_harmless(sign) else repr(sign)[1:-1] for sign in text)


def _is_harmless(sign: str) -> bool:
    return sign.isprintable() or sign in _JOINERS or unicodedata.category(sign) == "Zs"


def plain_lines(text: str) -> str:
    """The text with the lines that it has, each as `plain` as can be."""
    return "\n".join(plain(line) for line in text.split("\n"))


def one_line(text: str) -> str:
    """The text in one line, plain, where other programs that were asked said several."""
    return plain(" ".join(line.strip() for line in text.splitlines() if line.strip()))


def brief(text: str, most: int = LONGEST) -> str:
    """The text in one line of at most so many signs. Of a longer one the beginning stays, which says what is wrong, and
    the end, which says what would do."""
    line = one_line(text)
    if len(line) <= most:
        return line
    gap = f" [... {len(line):,} signs, all of them with --debug ...] "
    end = (most - len(gap)) // 3
    return line[: most - len(gap) - end] + gap + line[len(line) - end :]


def clock(seconds: float) -> str:
    """A time, in seconds as of `time.time()`, as the clock shows it here; with the day, where that is not today."""
    then = datetime.fromtimestamp(min(max(seconds, 0.0), _LATEST)).astimezone()
    return then.strftime("%H:%M" if then.date() == datetime.now().astimezone().date() else "%Y-%m-%d %H:%M")


def lasting(seconds: float) -> str:
    """How long something takes, as people say it: 90 seconds, 25 minutes, 1.5 hours."""
    for unit, size, least in (("days", 86400.0, 1.0), ("hours", 3600.0, 1.0), ("minutes", 60.0, 2.0)):
        if seconds >= least * size:
            return f"{seconds / size:.{0 if unit == 'minutes' else 1}f} {unit}"
    return f"{seconds:.0f} second{'s' * (round(seconds) != 1)}"


def in_notebook() -> bool:
    """Whether what is shown goes to a notebook, which can show pictures."""
    shell = sys.modules.get("IPython")
    running = shell.get_ipython() if shell is not None else None
    return running is not None and hasattr(running, "kernel")


@contextmanager
def progress_bar(doing: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on standard error, which is told how many are done of how many; None where nobody would see it move."""
    if not (sys.stderr.isatty() or in_notebook()):
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc=doing, leave=False, file=sys.stderr) as bar:

        def tell(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        yield tell


def say(note: str) -> None:
    """Tells whoever started this what happens, in one line on standard error."""
    print(f"crossguard: {one_line(note)}", file=sys.stderr)


class LogFormatter(logging.Formatter):
    """Writes what is logged in one plain line each, and tracebacks below it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return plain(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return plain_lines(super().formatException(ei))
