"""Pictures of an experiment: its tables, what a number that runs through values does, what trainings saw of
themselves."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from crossguard.errors import CrossguardError
from crossguard.experiment import INDEX
from crossguard.figures import blank, clipped, png
from crossguard.files import write
from crossguard.pivot import Table
from crossguard.reading import read_json
from crossguard.report import Rate, Report
from crossguard.table import Answers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SWEEP, TRAINING = "sweep.png", "training.png"

_NAME, _CAPTION = 48, 95  # signs of a name in a picture, and of a line of a table's caption
_TALLEST = 500.0  # inches of a picture; matplotlib draws 2**16 dots at most

_COLORS = ("#4472a8", "#b00020", "#6b9e57", "#8a5fa8", "#c98a1b", "#3a8f8f", "#5b6673", "#d06a9c")


class _Place(TypedDict):
    cell: str
    line: str
    attack: str
    value: float | None


class _Swept(TypedDict):
    name: str
    points: list[_Place]


class _Drawn(TypedDict, total=False):
    sweep: _Swept
    trained: dict[str, str]


class Point(NamedTuple):
    """What is drawn of a report.

    Args:
        value: of the number that runs; None, where the report does not depend on it.
    """

    value: float | None
    clean: Rate
    robust: Rate


Panels = dict[str, dict[str, list[Point]]]  # by what attacks, and by the line


def draw(folder: str | Path) -> list[Path]:
    """Draws what there is to be drawn of the answers in a folder, beside them: `sweep.png` of a sweep, and
    `training.png` of trainings that measured themselves."""
    folder = Path(folder)
    told: Any = read_json(folder / INDEX, _Drawn, "run the experiment again")
    made: list[Path] = []
    if "sweep" in told and (panels := gathered(Answers.load(folder).reports, told["sweep"]["points"])):
        write(folder / SWEEP, sweep_picture(told["sweep"]["name"], panels))
        made.append(folder / SWEEP)
    if histories := _histories(told.get("trained", {})):
        write(folder / TRAINING, training_picture(histories))
        made.append(folder / TRAINING)
    return made


def gathered(reports: Sequence[Report], places: Sequence[_Place]) -> Panels:
    """The points of a sweep that are answered, in the order of their values."""
    known = {report.key: report for report in reports}
    panels: Panels = {}
    for place in places:
        if (report := known.get(place["cell"])) is None:
            continue
        for score, clean, robust in report.judged.parts:
            panel = ", ".join(one for one in (place["attack"], score) if one)
            points = panels.setdefault(panel, {}).setdefault(place["line"], [])
            points.append(Point(place["value"], clean, robust))
    for lines in panels.values():
        for points in lines.values():
            points.sort(key=lambda point: -1.0 if point.value is None else point.value)
    return panels


def sweep_picture(name: str, panels: Panels) -> bytes:
    """For each attack clean and robust accuracy over the number, with their intervals; below, where clean accuracy
    moves too, one over the other."""
    lines = list(dict.fromkeys(line for panel in panels.values() for line in panel))
    colors = {line: _COLORS[place % len(_COLORS)] for place, line in enumerate(lines)}
    moves = any(
        len({point.clean.successes for point in one}) > 1 for panel in panels.values() for one in panel.values()
    )
    figure, axes = _grid(2 if moves else 1, len(panels))
    for column, (attack, panel) in enumerate(panels.items()):
        for line, points in panel.items():
            _over_value(axes[0][column], points, colors[line], line or attack)
            if moves:
                _over_clean(axes[1][column], points, colors[line])
        axes[0][column].set_title(attack, fontsize=10, parse_math=False)
        axes[0][column].set_xlabel(name)
        axes[0][column].set_ylim(0.0, 102.0)
        if moves:
            axes[1][column].set_xlabel("% right, clean")
    axes[0][0].set_ylabel("% right (dashed: clean)")
    if moves:
        axes[1][0].set_ylabel("% right, clean and under attack")
    if len(lines) > 1:
        axes[0][0].legend(fontsize=8)
    counts = sorted({point.robust.n for panel in panels.values() for one in panel.values() for point in one})
    figure.suptitle(f"n = {', '.join(map(str, counts))}, 95 % intervals", fontsize=9)
    return png(figure)


def _over_value(axes: Axes, points: Sequence[Point], color: str, label: str) -> None:
    moving = [(point.value, point) for point in points if point.value is not None]
    for point in points:
        if point.value is None:  # the same for every value
            axes.axhline(100 * point.robust.value, color=color, linestyle=":", linewidth=1.2, label=label)
    if not moving:
        return
    values = [value for value, _ in moving]
    for rates, style in (([one.clean for _, one in moving], "--"), ([one.robust for _, one in moving], "-")):
        ends = [rate.interval for rate in rates]
        axes.plot(
            values, [100 * rate.value for rate in rates], style, color=color, marker="o", markersize=3,
            label=label if style == "-" else None,
        )  # fmt: skip
        axes.fill_between(
            values,
            [100 * low for low, _ in ends],
            [100 * high for _, high in ends],
            color=color,
            alpha=0.15,
            linewidth=0,
        )


def _over_clean(axes: Axes, points: Sequence[Point], color: str) -> None:
    across, up = ([100 * getattr(point, name).value for point in points] for name in ("clean", "robust"))
    axes.plot(across, up, "-", color=color, linewidth=1.0)
    for point in points:
        (left, right), (low, high) = (
            (100 * end for end in getattr(point, name).interval) for name in ("clean", "robust")
        )
        x, y = 100 * point.clean.value, 100 * point.robust.value
        axes.plot([left, right], [y, y], color=color, linewidth=0.6, alpha=0.5)
        axes.plot([x, x], [low, high], color=color, linewidth=0.6, alpha=0.5)
        axes.plot([x], [y], color=color, marker="o", markersize=4)
    for point in (points[0], points[-1]):
        if point.value is not None:
            axes.annotate(
                f"{point.value:g}", (100 * point.clean.value, 100 * point.robust.value), fontsize=8, color=color,
                xytext=(4, 4), textcoords="offset points",
            )  # fmt: skip


class _Record(TypedDict):
    validation: list[dict[str, float]]


History = Sequence[Mapping[str, float]]  # the accuracies after so many steps


def _histories(folders: Mapping[str, str]) -> dict[str, History]:
    """What finished trainings saw of themselves, by the labels of their models."""
    found: dict[str, History] = {}
    for label, folder in folders.items():
        try:
            record = read_json(Path(folder) / "crossguard.json", _Record, "train again")
        except CrossguardError:  # it is not finished
            continue
        if record["validation"]:
            found[label] = record["validation"]
    return found


def training_picture(histories: Mapping[str, History]) -> bytes:
    """For each accuracy that trainings measured a panel, in which each training is a line over its steps."""
    names = list(dict.fromkeys(name for one in histories.values() for name in one[-1] if name != "step"))
    figure, axes = _grid(1, len(names))
    for column, name in enumerate(names):
        for place, (label, history) in enumerate(histories.items()):
            measured = [(one["step"], 100 * one[name]) for one in history if name in one]
            axes[0][column].plot(
                [step for step, _ in measured], [value for _, value in measured], marker="o", markersize=3,
                color=_COLORS[place % len(_COLORS)], label=label,
            )  # fmt: skip
        axes[0][column].set(xlabel="steps", ylim=(0.0, 102.0))
        axes[0][column].set_title(name, fontsize=10)
    axes[0][0].set_ylabel("% of the images of the validation")
    axes[0][0].legend(fontsize=8)
    return png(figure)


def table_picture(tables: Sequence[Table]) -> bytes:
    """A panel for each table, in which each row has a dot for each of its numbers, with its interval.

    Raises:
        CrossguardError: there are more rows than fit into one picture.
    """
    columns = list(dict.fromkeys(column for table in tables for column in table.columns))
    colors = {column: _COLORS[place % len(_COLORS)] for place, column in enumerate(columns)}
    heights = [(0.09 * len(table.columns) + 0.13) * len(table.rows) + 0.9 for table in tables]  # in inches
    if sum(heights) > _TALLEST:
        raise CrossguardError(
            f"{sum(len(table.rows) for table in tables)} rows in {len(tables)} tables are too many for one picture; "
            "make the rows of something else (--rows), or draw parts of the reports"
        )
    figure = blank(8.4, sum(heights) + 0.2 * (1 + len(columns) // 2))
    panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    shown: dict[str, Any] = {}
    for axes, table in zip(panels, tables, strict=True):
        spread = 0.7 / len(table.columns)
        for row, (_, cells) in enumerate(table.rows):
            if row % 2:
                axes.axhspan(row - 0.5, row + 0.5, color="#f2f4f7", linewidth=0)
            for place, (column, cell) in enumerate(zip(table.columns, cells, strict=True)):
                if cell.rate is None:
                    continue
                y, (low, high) = row + spread * (place - (len(table.columns) - 1) / 2), cell.rate.interval
                axes.plot([100 * low, 100 * high], [y, y], color=colors[column], linewidth=1.0, alpha=0.6)
                (shown[column],) = axes.plot([100 * cell.rate.value], [y], "o", color=colors[column], markersize=4)
        names = [clipped(label, _NAME) for label, _ in table.rows]
        axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
        axes.tick_params("y", length=0)
        axes.set(xlim=(-1.0, 101.0), ylim=(len(names) - 0.5, -0.5))
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_title("\n".join(textwrap.wrap(table.caption, _CAPTION)), fontsize=8, loc="left", parse_math=False)
    panels[-1].set_xlabel(f"%, {tables[-1].legend}" if tables[-1].layout.intervals else "%", fontsize=8)
    figure.legend(
        shown.values(), [clipped(column, _NAME) for column in shown], loc="outside upper left", ncols=2, fontsize=8,
        frameon=False,
    )  # fmt: skip
    return png(figure)


def _grid(rows: int, columns: int) -> tuple[Figure, Any]:
    figure = blank(3.6 * columns + 0.6, 3.2 * rows + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False, sharey="row")
    for one in axes.flat:
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes
