"""The reports of a folder as a table: a row per model, a column per attack and budget."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from crossguard import files
from crossguard.errors import CrossguardError
from crossguard.experiment import INDEX
from crossguard.report import Outcomes, Rate, Report, ReportError

FORMATS = ("markdown", "csv", "json", "latex")


@dataclass(frozen=True)
class Table:
    """Numbers that may be compared: one task, one limit, one surrogate, one seed.

    Args:
        header: what holds for every number, by name.
        columns: `clean`, then one heading per attack and budget.
        rows: the label of a model and a cell per column; None where nothing was asked.
    """

    header: Mapping[str, str]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Rate | None, ...]], ...]

    @property
    def cells(self) -> list[list[str]]:
        """The texts of the table without its headings; a cell says its n if the cells differ in it."""
        differ = len({rate.n for _, rates in self.rows for rate in rates if rate}) > 1
        return [[label, *(_cell(rate, differ) for rate in rates)] for label, rates in self.rows]

    @property
    def caption(self) -> str:
        return "; ".join(f"{name}: {value}" for name, value in self.header.items())


@dataclass(frozen=True, eq=False)
class Answers:
    """All reports of a folder, the labels of the experiment that asked, and doubts about the folder."""

    reports: tuple[Report, ...]
    labels: Mapping[str, Mapping[str, str]]
    doubts: tuple[str, ...] = ()

    @staticmethod
    def load(folder: str | Path) -> Answers:
        """Reads every report of a folder; what cannot be read is named among the doubts."""
        folder = Path(folder)
        if not folder.is_dir():
            raise CrossguardError(f"there is no folder {folder}; give the one that 'crossguard run' wrote to")
        labels, order = _index(folder / INDEX)
        reports, doubts = {}, []
        try:
            paths = sorted(path for path in folder.glob("*.json") if path.name != INDEX)
        except OSError as error:
            raise CrossguardError(f"the folder {folder} cannot be read: {files.reason(error)}") from None
        for path in paths:
            try:
                reports[path.stem] = Report.load(path)
            except ReportError as error:
                doubts.append(f"left out: {error}.")
        if not reports:
            broken = f" that can be read ({doubts[0]})" if doubts else ""
            raise CrossguardError(f"there is no report in {folder}{broken}")
        missing = len([one for one in order if one not in reports])
        if missing:
            doubts.append(f"{missing} of {len(order)} cells are not answered yet; run the experiment again to go on.")
        first = [reports.pop(one) for one in order if one in reports]
        return Answers((*first, *reports.values()), labels, tuple(doubts))

    def pooled(self) -> Answers:
        """The worst case per image over all attacks, surrogates and seeds that met a model within the same budget.

        Carlini et al. 2019 count an image as robust only if no attack breaks it. Reports are pooled where task, limit,
        model and budget agree; those of other images (by their ids) are left out and named.
        """
        groups: dict[str, list[Report]] = {}
        for report in self.reports:
            if _attacked(report):
                groups.setdefault(_part(report, "task", "limit", "model", "weights", "budget"), []).append(report)
        pooled, doubts = [report for report in self.reports if not _attacked(report)], list(self.doubts)
        for reports in groups.values():
            first = reports[0]
            same = [report for report in reports if report.outcomes.id == first.outcomes.id]
            if len(same) < len(reports):
                where = f"{self.label(first, 'model')}, {self.label(first, 'budget')}"
                doubts.append(f"{len(reports) - len(same)} reports of other images were not pooled [{where}]")
            pooled.append(_worst(same))
        return replace(self, reports=tuple(pooled), doubts=tuple(doubts))

    def tables(self) -> list[Table]:
        """One table per task, limit, surrogate and seed, in the order of the reports.

        Clean accuracy has no adversary, so it is taken from any report of the same task, limit and model, and
        a clean evaluation makes a table of its own only where nothing attacked.
        """
        attacked = [report for report in self.reports if _part(report, "attack") != "None"]
        covered = {_part(report, "task", "limit", "model") for report in attacked}
        groups: dict[str, list[Report]] = {}
        for report in attacked:
            groups.setdefault(_part(report, "task", "limit", "surrogate", "seed"), []).append(report)
        for report in self.reports:
            if report not in attacked:
                self._place_clean(report, groups, _part(report, "task", "limit", "model") in covered)
        return [self._table(reports) for reports in groups.values()]

    def _place_clean(self, report: Report, groups: dict[str, list[Report]], covered: bool) -> None:
        """A clean evaluation is a row of every table of its task and limit, or of a table of its own."""
        homes = [
            group for group in groups.values() if _part(group[0], "task", "limit") == _part(report, "task", "limit")
        ]
        if not homes:
            groups[_part(report, "task", "limit")] = [report]
        for group in homes:
            models = {_part(one, "model") for one in group}
            if not covered or _part(report, "model") in models:
                group.append(report)

    def _table(self, reports: list[Report]) -> Table:
        columns: dict[str, str] = {}
        rows: dict[str, dict[str, Rate]] = {}
        for model in self._order("model", reports):
            rows[model] = {}
        for report in reports:
            row = rows[_part(report, "model")]
            if _part(report, "attack") == "None":
                row["clean"] = report.clean
                continue
            row.setdefault("clean", report.clean)
            column = _part(report, "attack", "budget")
            columns[column] = f"{self.label(report, 'attack')}, {self.label(report, 'budget')}"
            row[column] = report.robust
        knowledge = {
            _part(report, "model"): report.question.get("knowledge", "") for report in reports if _attacked(report)
        }
        same = len(set(knowledge.values())) < 2
        labels = {_part(report, "model"): self.label(report, "model") for report in reports}
        first = next((report for report in reports if _attacked(report)), reports[0])
        counts = sorted({rate.n for row in rows.values() for rate in row.values()})
        header = {"task": self.label(first, "task"), "n": " and ".join(f"{count}" for count in counts)}
        if _attacked(first):
            header["surrogate"] = self.label(first, "surrogate")
            header["knowledge"] = knowledge[_part(first, "model")] if same else "differs, see the rows"
        header["seed"] = first.question.get("seed", "")
        if len(counts) > 1:
            header["beware"] = "the cells differ in n and are not of the same samples"
        return Table(
            header=header,
            columns=("clean", *columns.values()),
            rows=tuple(
                (
                    labels[model] if same or model not in knowledge else f"{labels[model]} ({knowledge[model]})",
                    tuple(row.get(column) for column in ("clean", *columns)),
                )
                for model, row in rows.items()
            ),
        )

    def notes(self) -> list[str]:
        """Every warning once, with the cell that it is about, or how many."""
        about: dict[str, list[str]] = {}
        for report in self.reports:
            where = ", ".join(
                self.label(report, part) for part in ("model", "attack", "budget") if _part(report, part) != "None"
            )
            for note in report.notes:
                about.setdefault(note, []).append(where)
        listed = [
            f"{note} [{where[0] if len(where) == 1 else f'{len(where)} of {len(self.reports)} reports'}]"
            for note, where in about.items()
        ]
        return [*listed, *self.doubts]

    def label(self, report: Report, part: str) -> str:
        """A word of a question for people: the experiment's label, or the word without its defaults."""
        full = report.question.get(part, "None")
        return self.labels.get(part, {}).get(full) or report.short.get(part, full)

    def records(self) -> list[dict[str, Any]]:
        """One flat record per report, for machines: labels, counts, rates and intervals."""
        return [
            {part: self.label(report, part) for part in ("task", "model", "attack", "budget", "surrogate")}
            | {part: report.question.get(part, "") for part in ("knowledge", "seed", "limit")}
            | {"n": report.n}
            | _rate("clean", report.clean)
            | _rate("robust", report.robust)
            | {"seconds": round(report.seconds, 3)}
            for report in self.reports
        ]

    def _order(self, part: str, reports: list[Report]) -> list[str]:
        """The words of a part of the questions, as the experiment lists them, then the others."""
        present = dict.fromkeys(_part(report, part) for report in reports)
        listed = [word for word in self.labels.get(part, {}) if word in present]
        return list(dict.fromkeys([*listed, *present]))


def _worst(reports: list[Report]) -> Report:
    """One report of what is left of each image after all of these: the first attack that broke it, or else the one
    that came nearest."""
    first = reports[0]

    def stack(name: str) -> np.ndarray:
        return np.stack([np.asarray(getattr(report.outcomes, name)) for report in reports])

    def picked(right: str, margin: str, *names: str) -> dict[str, np.ndarray]:
        """The columns of the report whose answer is wrong, or else has the smallest margin, sample by sample."""
        rank = np.where(stack(right) == first.outcomes.label, np.nan_to_num(stack(margin), nan=np.inf), -np.inf)
        return {name: stack(name)[rank.argmin(0), np.arange(first.n)] for name in (right, margin, *names)}

    columns = {
        **picked("clean", "clean_margin"),  # a random model answers anew each time
        **picked("adversarial", "adversarial_margin", "size"),
        **{name: stack(name).sum(0) for name in ("gradients", "forwards")},
    }
    attack = f"worst case of {len(reports)} reports"
    known = ", ".join(dict.fromkeys(report.question.get("knowledge", "") for report in reports))
    question = {**first.question, "attack": attack, "surrogate": "pooled", "seed": "pooled", "knowledge": known}
    notes = tuple(dict.fromkeys(note for report in reports for note in report.notes))
    return Report(
        question=question,
        outcomes=Outcomes(first.outcomes.id, first.outcomes.label, **columns),
        notes=notes,
        versions=first.versions,
        seconds=sum(report.seconds for report in reports),
        short={**first.short, "attack": attack, "surrogate": "pooled"},
    )


def render(answers: Answers, form: str) -> str:
    """The answers as text: markdown and latex for reading, csv and json with a record per report."""
    if form == "markdown":
        return _markdown(answers)
    if form == "latex":
        return _latex(answers)
    if form == "csv":
        return _csv(answers)
    if form == "json":
        full = [
            {
                **record,
                "question": dict(report.question),
                "notes": list(report.notes),
                "versions": dict(report.versions),
            }
            for record, report in zip(answers.records(), answers.reports, strict=True)
        ]
        return json.dumps({"reports": full, "doubts": list(answers.doubts)}, indent=2) + "\n"
    raise CrossguardError(f"unknown format {form!r}; give one of {', '.join(FORMATS)}")


def pretty(answers: Answers) -> RenderableType:
    """The answers for a terminal."""
    shown: list[RenderableType] = []
    for table in answers.tables():
        grid = RichTable(title=Text(table.caption), title_justify="left", caption=Text(_LEGEND), caption_justify="left")
        grid.add_column("model", overflow="fold")
        for column in table.columns:
            grid.add_column(Text(column), justify="right", overflow="fold")
        for row in table.cells:
            grid.add_row(*(Text(cell) for cell in row))
        shown.append(grid)
    shown.extend(Text(f"- {note}") for note in answers.notes())
    return Group(*shown)


_LEGEND = "accuracy [95 % Wilson interval]; robust = right both clean and under attack"


def _markdown(answers: Answers) -> str:
    lines = []
    for table in answers.tables():
        lines += [_in_markdown(table.caption), ""]
        lines.append(_row(["model", *table.columns]))
        lines.append("|" + "---|" + "---:|" * len(table.columns))
        lines += [_row(row) for row in table.cells]
        lines += ["", f"{_LEGEND}.", ""]
    lines += [f"- {_in_markdown(note)}" for note in answers.notes()]
    return "\n".join(lines).rstrip("\n") + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(_in_markdown(cell) for cell in cells) + " |"


def _in_markdown(text: str) -> str:
    for sign in "\\|*_`<":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def _csv(answers: Answers) -> str:
    records = answers.records()
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _latex(answers: Answers) -> str:
    lines = []
    for table in answers.tables():
        lines += [
            f"% {_in_latex(table.caption)}",
            f"\\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
            "\\hline",
        ]
        lines.append(" & ".join(_in_latex(cell) for cell in ("model", *table.columns)) + " \\\\")
        lines.append("\\hline")
        lines += [" & ".join(_in_latex(cell) for cell in row) + " \\\\" for row in table.cells]
        lines += ["\\hline", "\\end{tabular}", ""]
    lines += [f"% {_in_latex(note)}" for note in answers.notes()]
    return "\n".join(lines).rstrip("\n") + "\n"


_LATEX = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}


def _in_latex(text: str) -> str:
    text = " ".join(text.split())
    return "".join(_LATEX.get(sign, f"\\{sign}" if sign in "&%$#_{}" else sign) for sign in text)


def _cell(rate: Rate | None, with_n: bool) -> str:
    if rate is None:
        return "-"
    return f"{rate} (n={rate.n})" if with_n else str(rate)


def _rate(name: str, rate: Rate) -> dict[str, Any]:
    low, high = rate.interval
    return {name: round(rate.value, 6), f"{name}_low": round(low, 6), f"{name}_high": round(high, 6)}


def _attacked(report: Report) -> bool:
    return _part(report, "attack") != "None"


def _part(report: Report, *parts: str) -> str:
    return "\n".join(report.question.get(part, "None") for part in parts)


def _index(path: Path) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The labels by full word, and the names of the cells; nothing, if no experiment wrote to the folder."""
    try:
        content = json.loads(path.read_bytes())
        labels = {
            kind: {str(word): str(label) for label, word in axis.items()} for kind, axis in content["labels"].items()
        }
        return labels, [str(cell) for cell in content["cells"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, []
