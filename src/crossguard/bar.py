"""What people see of a long run: a bar where there is a terminal, elsewhere a line for each cell and one a minute."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from crossguard.errors import CrossguardError
from crossguard.experiment import Cell, Watch
from crossguard.printing import brief, lasting, plain
from crossguard.report import Report

EVERY = 60.0  # seconds between lines where there is no terminal
_WIDEST = 60  # signs of what a part of the work says beside a bar


class Bar(Watch):
    """Progress on standard error. Where there is no terminal somebody may read a log while nothing ends for hours: so a
    line is written at least once a minute, whatever the work does."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, markup=False, highlight=False)
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[part]}", markup=False),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self.cells = self.samples = None
        self.done = self.total = self.here = 0  # cells, and those of them that were answered or failed here
        self.answered = self.asked = self.known = 0  # samples of the cell at hand, and those known from before
        self.doing, self.at_hand = "", ""
        self.began = self.spoke = self.started = time.monotonic()
        self.reasons: set[str] = set()
        self._ended = threading.Event()
        self._speaking = threading.Lock()
        self._beat = None if self.console.is_terminal or EVERY <= 0 else threading.Thread(target=self._go, daemon=True)

    def __enter__(self) -> Bar:
        self.bar.start()
        if self._beat is not None:
            self._beat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.bar.stop()

    def step(self, description: str) -> None:
        """A bar of samples, with this description."""
        description = plain(description)
        if self.samples is not None:
            self.bar.remove_task(self.samples)
        self.samples = self.bar.add_task(description, total=None, part="")
        self.doing, self.at_hand, self.answered, self.asked, self.known = description, "", 0, 0, -1
        self.began = self.spoke = time.monotonic()

    def start(self, cells: int, answered: int) -> None:
        self.cells = self.bar.add_task("cells", total=cells, completed=answered, part="")
        self.done, self.total, self.started = answered, cells, time.monotonic()
        self.line(f"{cells} cells, {answered} answered already")

    def asks(self, cell: Cell) -> None:
        self.step(cell.label)

    def progress(self, done: int, total: int) -> None:
        self.answered, self.asked, self.at_hand = done, total, ""
        if self.known < 0:
            self.known, self.began = done, time.monotonic()
        if self.samples is not None:
            self.bar.update(self.samples, completed=done, total=total, part="")
        self._speak()

    def part(self, text: str) -> None:
        self.at_hand = plain(text)
        if self.samples is not None:
            short = self.at_hand if len(self.at_hand) <= _WIDEST else f"...{self.at_hand[3 - _WIDEST :]}"
            self.bar.update(self.samples, part=short)
        self._speak()

    def _go(self) -> None:
        while not self._ended.wait(EVERY / 4):
            self._speak()

    def _speak(self) -> None:
        """A line about the work at hand, unless there was one less than a minute ago."""
        with self._speaking:
            now = time.monotonic()
            if self.console.is_terminal or not self.doing or now - self.spoke < EVERY:
                return
            self.spoke = now
        so_far = now - self.began
        line = self.doing
        if self.asked:
            line += f": {self.answered}/{self.asked} samples"
        line += f" after {so_far:.0f} seconds"
        if (left := self.left(so_far)) is not None:
            line += f", about {lasting(left)} left"
        self.line(line + (f"; {self.at_hand}" if self.at_hand else ""))

    def left(self, so_far: float) -> float | None:
        """The seconds that the samples of the work at hand may still take, as those before took; None, where there are
        none."""
        done = self.answered - self.known
        return so_far / done * (self.asked - self.answered) if self.asked > self.answered and done > 0 else None

    def stopped(self, kept: bool) -> str:
        """Where an evaluation that was stopped goes on.

        Args:
            kept: whether the outcomes so far are on the disk.
        """
        if not self.answered:
            return " before a batch was answered; the same command starts from the beginning"
        after = f" after {self.answered} of {self.asked} samples"
        if kept:
            return f"{after}; run the same command to go on from there"
        return f"{after}, which are lost, since nothing can be written here; give --out for a place that can"

    def interrupted(self) -> str:
        """Where a grid that was stopped goes on."""
        if not self.total:
            return ""
        inside = f" and {self.answered} of {self.asked} samples of the next" if self.answered < self.asked else ""
        return f" after {self.done} of {self.total} cells{inside}; run the same command to go on"

    def answers(self, cell: Cell, report: Report) -> None:
        left = self._advance()
        self.line(f"[{self.done}/{self.total}] {cell.label}: {report.headline}{left}")

    def fails(self, cell: Cell, error: CrossguardError) -> None:
        self._advance()
        reason = "for the same reason" if str(error) in self.reasons else brief(str(error))
        self.reasons.add(str(error))
        self.line(f"[{self.done}/{self.total}] {cell.label}: not answered: {reason}")

    def waits(self, cells: int, others: Mapping[str, str]) -> None:
        if not others and self.doing.startswith("waiting for "):  # who it is has not said what comes next
            return
        waited = plain(f"waiting for {' and '.join(others) or 'another process'}")
        if not self.doing.startswith(waited):
            self.step(f"{waited} ({cells} cell{'s' * (cells > 1)})")
            self.line(": ".join([self.doing, *filter(None, ["; ".join(others.values())])]))
        self.part("; ".join(others.values()))

    def _advance(self) -> str:
        """Counts a cell; how long the others may take, where that is worth a word."""
        self.done += 1
        self.here += 1
        self.answered = self.asked = 0
        if self.cells is not None:
            self.bar.advance(self.cells)
        left = (time.monotonic() - self.started) / self.here * (self.total - self.done)
        return f"; about {lasting(left)} left" if left >= EVERY else ""

    def line(self, text: str) -> None:
        self.console.print(plain(text), soft_wrap=True)
