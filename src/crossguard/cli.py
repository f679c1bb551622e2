"""The command line. It speaks words; what a user got wrong is one sentence and exit code 2."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import typer
from rich.console import Console
from typer.core import TyperGroup

from crossguard import __version__, files, own
from crossguard.bar import Bar
from crossguard.errors import CrossguardError
from crossguard.experiment import Experiment, Unanswered
from crossguard.limits import at_least, shortly, whole
from crossguard.printing import brief, one_line, plain_lines, say
from crossguard.processes import leads, several, speaks
from crossguard.reading import read_json
from crossguard.telling import listening

if TYPE_CHECKING:
    from crossguard.pivot import Layout

PARTIAL = Path("runs/.partial")  # the outcomes so far of evaluations without a file for their report

_UsageError: Any = typer.BadParameter.__base__  # click's own, or that of the copy of click inside newer typers


class _Group(TyperGroup):
    """All commands, with one place where errors become sentences."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = bool(args)
        try:
            return super().parse_args(ctx, args)
        except _UsageError as error:
            if not given:  # the help is shown
                raise
            say(brief(_misused(error)))
            raise typer.Exit(2) from None

    def invoke(self, ctx: Any) -> Any:
        try:
            with _stoppable():
                return super().invoke(ctx)
        except BrokenPipeError:  # the reader (`| head`) has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except KeyboardInterrupt as stop:
            sentence, code = f"interrupted{stop}", 143 if isinstance(stop, _Terminated) else 130
        except _UsageError as error:
            sentence, code = _misused(error), 2
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if _debugging():
                typer.echo(plain_lines(traceback.format_exc()), err=True, nl=False)
            sentence, code = _explained(error)
        if speaks():
            say(sentence if _debugging() else brief(sentence))
        raise typer.Exit(code)


def _misused(error: Any) -> str:
    """What is wrong with the options that were given, and where to look."""
    command = error.ctx.command_path if error.ctx is not None else "crossguard"
    return f"error: {one_line(error.format_message()).rstrip('.')}; see '{command} --help'"


def _explained(error: Exception) -> tuple[str, int]:
    """What went wrong, and the exit code: 2 where the user can mend it, 1 for what nobody expected."""
    if isinstance(error, CrossguardError):
        return f"error: {error}", 2
    if isinstance(error, OSError):
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        return f"error: {where}{files.reason(error)}", 2
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the latter is torch's, of a GPU
        what = "the GPU" if not isinstance(error, MemoryError) else "this machine"
        return f"error: the memory of {what} is full; a smaller --batch needs less, and changes no result", 2
    first = (str(error).strip().splitlines() or [""])[0]
    return (
        f"error: unexpected {type(error).__name__}{': ' * bool(first)}{first.rstrip('.')}; this may be a fault of "
        "Crossguard, and 'crossguard --debug COMMAND ...' shows where it happened",
        1,
    )


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it: it ends a command as Ctrl-C does."""


@contextmanager
def _stoppable() -> Iterator[None]:
    """Inside, SIGTERM ends the command in order. `torchrun` ends its processes itself, where they wait for others and
    would not hear."""
    usual = signal.getsignal(signal.SIGTERM)
    if several() or usual is not signal.SIG_DFL or threading.current_thread() is not threading.main_thread():
        yield
        return
    mine = os.getpid()

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends at once
        if os.getpid() != mine:  # a worker that was forked from here
            os.kill(os.getpid(), number)
            return
        raise _Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


app = typer.Typer(
    cls=_Group,
    name="crossguard",
    help="Attack, defend and measure CLIP-like vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _add_words(files: list[Path] | None) -> list[Path] | None:
    """Makes what these files hold words before the other options are read."""
    for file in files or []:
        try:
            own.add(file)
        except CrossguardError as error:
            raise CrossguardError(f"--words: {error}") from error
    return files


_Task = Annotated[str | None, typer.Option(help="What is asked: ZeroShot(Scenes('object')).")]
_Data = Annotated[
    str | None,
    typer.Option(
        help="In place of --task, data to be classified, or to be retrieved where they have captions only: a folder of "
        "class folders, a Parquet file, shards, a file of captions, or a word such as CIFAR10('data')."
    ),
]
_Model = Annotated[str, typer.Option(help="Who answers: a folder or hub id of a checkpoint, or a word such as Tiny().")]
_Eps = Annotated[str | None, typer.Option(help="In place of --budget, how far it may go: 4/255.")]
_Norm = Annotated[str | None, typer.Option(help="What --eps is measured in: linf (the default), l2 or l1.")]
_Attack = Annotated[str, typer.Option(help="How the adversary searches: PGD(steps=100).")]
_Budget = Annotated[str | None, typer.Option(help="How far it may go: Linf(8/255).")]
_Surrogate = Annotated[str, typer.Option(help="The model that it attacks; the answering one, if None.")]
_Limit = Annotated[int | None, typer.Option(help="How many samples; all, if not given.")]
_Seed = Annotated[int, typer.Option(help="Seed of all noise.")]
_Batch = Annotated[int, typer.Option(help="Samples at once; results do not depend on it.")]
_Out = Annotated[Path | None, typer.Option(help="A JSON file for the report with every outcome.")]
_Doubt = Annotated[
    int, typer.Option(help="Look on so many samples for signs that the number is too kind; 64 is a good start.")
]
_Keep = Annotated[
    Path, typer.Option(help="A folder for the images and texts under attack; the word Kept(folder) reads it.")
]
_KeepOrNot = Annotated[
    Path | None, typer.Option(help="A folder for the images and texts under attack, as for 'attack'.")
]
_KeepAs = Annotated[str, typer.Option(help="How to keep images: safetensors (exact) or png (8 bits).")]
_Device = Annotated[
    str | None,
    typer.Option(
        help="Where networks live: cpu, cuda, cuda:1; if not given, what CROSSGUARD_DEVICE says, else the first GPU, "
        "if there is one."
    ),
]
_Dtype = Annotated[str | None, typer.Option(help="The precision of networks: float32 (the default) or bfloat16.")]
_Own = Annotated[
    list[Path] | None,
    typer.Option(
        "--words", metavar="FILE.py", is_eager=True, callback=_add_words,
        help="A Python file of words of your own, whose code is run; may be given several times.",
    ),
]  # fmt: skip
_SkipBroken = Annotated[
    bool, typer.Option("--skip-broken", help="Go on without images that cannot be read, and count them.")
]


_Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Let --out and --keep replace what they hold of another question."),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits: 0 if all is well, 2 with a sentence if the input is wrong, 1 with a sentence if
    something happened that nobody expected, 130 or 143 if stopped by Ctrl-C or SIGTERM."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")
    app(list(arguments) if arguments is not None else None, prog_name="crossguard")


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"crossguard {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show all of an error and its traceback, as CROSSGUARD_DEBUG=1 does.")
    ] = False,
) -> None:
    if debug:
        os.environ["CROSSGUARD_DEBUG"] = "1"


@app.command("eval")
def evaluate_command(
    model: _Model,
    task: _Task = None,
    data: _Data = None,
    attack: _Attack = "None",
    budget: _Budget = None,
    eps: _Eps = None,
    norm: _Norm = None,
    surrogate: _Surrogate = "None",
    limit: _Limit = None,
    seed: _Seed = 0,
    batch: _Batch = 128,
    out: _Out = None,
    doubt: _Doubt = 0,
    keep: _KeepOrNot = None,
    keep_as: _KeepAs = "safetensors",
    skip_broken: _SkipBroken = False,
    overwrite: _Overwrite = False,
    device: _Device = None,
    dtype: _Dtype = None,
    own_words: _Own = None,
) -> None:
    """Answer one question: how often is the model right, clean and under attack?"""
    words = _asked(model, task, data, attack, budget, eps, norm) | {"surrogate": surrogate}
    reports = [] if out is None else [out]
    with _placed(device, dtype):
        _ask(words, limit, seed, batch, reports, doubt, keep, keep_as, skip_broken, overwrite)


@app.command("attack")
def attack_command(
    model: _Model,
    attack: _Attack,
    keep: _Keep,
    task: _Task = None,
    data: _Data = None,
    budget: _Budget = None,
    eps: _Eps = None,
    norm: _Norm = None,
    surrogate: _Surrogate = "None",
    limit: _Limit = None,
    seed: _Seed = 0,
    batch: _Batch = 128,
    out: _Out = None,
    doubt: _Doubt = 0,
    keep_as: _KeepAs = "safetensors",
    skip_broken: _SkipBroken = False,
    overwrite: _Overwrite = False,
    device: _Device = None,
    dtype: _Dtype = None,
    own_words: _Own = None,
    first: Annotated[int, typer.Option("--show", help="How many samples to print at the end.")] = 3,
) -> None:
    """Keep what an attack makes, with the report, in a folder, and print its first samples."""
    _at_least("--show", first, 0)
    if attack.strip() == "None":
        raise CrossguardError("--attack None makes nothing; name an attack, or ask without one by 'crossguard eval'")
    words = _asked(model, task, data, attack, budget, eps, norm) | {"surrogate": surrogate}
    _check_names({f"--{kind}": text for kind, text in words.items()})
    from crossguard.datasets.kept import REPORT

    reports = [keep / REPORT] if out is None else [keep / REPORT, out]
    with _placed(device, dtype):
        told = _ask(words, limit, seed, batch, reports, doubt, keep, keep_as, skip_broken, overwrite)
    if told:
        if first:
            _print()
            _print_samples(keep, first)
        _print(f"'crossguard show {shlex.quote(str(keep))}' shows more")


@app.command("show")
def show_command(
    folder: Annotated[Path, typer.Argument(help="What --keep wrote.", metavar="FOLDER")],
    count: Annotated[int, typer.Option(help="How many samples.")] = 4,
    changed: Annotated[
        bool, typer.Option("--changed", help="Those first that the attack turned from right to wrong.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="A picture (FILE.png) or a page (FILE.html) of them.", metavar="FILE"),
    ] = None,
    ids: Annotated[
        list[str] | None, typer.Option("--id", help="A sample to show, by its id; may be given several times.")
    ] = None,
    own_words: _Own = None,
) -> None:
    """Look at a few samples before and under attack: answers, perturbation, and the words that changed."""
    from crossguard import look

    _at_least("--count", count, 1)
    if out is not None:
        look.check(out)
        _check_file("--out", out)
    _print_samples(folder, len(ids) if ids else count, changed, out, ids or ())


def _ask(
    words: Mapping[str, str],
    limit: int | None,
    seed: int,
    batch: int,
    reports: Sequence[Path],
    doubt: int,
    keep: Path | None,
    keep_as: str,
    skip_broken: bool,
    overwrite: bool,
) -> bool:
    """Answers one question, writes the report to every one of `reports` and prints it; False in a process that has
    nothing to say."""
    _check_names({f"--{kind}": text for kind, text in words.items()})
    _at_least("--limit", limit, 1)
    _at_least("--batch", batch, 1)
    _at_least("--seed", seed, 0)
    _at_least("--doubt", doubt, 0)
    for path in reports:
        _check_file("--out", path)
    from crossguard.datasets.kept import FORMATS

    if keep_as not in FORMATS:
        raise CrossguardError(f"--keep-as: images cannot be kept as {keep_as!r}; give one of {', '.join(FORMATS)}")
    chosen = {kind: _read(f"--{kind}", kind, text) for kind, text in words.items()}
    if keep is not None:
        files.check_writable(keep)
    if skip_broken:
        chosen["task"] = _skipping("--task", chosen["task"])

    from crossguard.evaluate import evaluate, question
    from crossguard.report import check_place

    asked = question(**chosen, limit=limit, seed=seed)
    for path in reports:
        check_place(path, asked, overwrite)

    placed = bool(reports) or keep is not None
    with _partial(placed, asked) as partial, Bar() as bar, listening(bar.part):
        bar.step("evaluating")
        try:
            report = evaluate(
                chosen["task"], chosen["model"], chosen["attack"], chosen["budget"], chosen["surrogate"],
                limit=limit, seed=seed, batch=batch, progress=bar.progress, keep=keep, keep_as=keep_as, doubt=doubt,
                partial=partial, out=reports[0] if reports else None, overwrite=overwrite,
            )  # fmt: skip
        except KeyboardInterrupt as stop:
            stop.args = (bar.stopped(placed or partial is not None),)
            raise
    if not leads():
        return False
    for path in reports[1:]:
        report.save(path, overwrite)
    _print(str(report))
    for path in reports:
        _print(f"written to {path}")
    return True


@contextmanager
def _partial(placed: bool, asked: Mapping[str, str]) -> Iterator[Path | None]:
    """A place for the outcomes so far where no report and no image is written, beside which they would lie: in a folder
    here that goes away with the last of them. None where nothing can be written."""
    if placed:
        yield None
        return
    from crossguard.report import key

    made = not PARTIAL.parent.exists()
    try:
        files.check_writable(PARTIAL)
    except files.WriteError:
        yield None
        return
    try:
        yield PARTIAL / key(asked)
    finally:
        with suppress(OSError):  # something is left in them
            PARTIAL.rmdir()
            if made:
                PARTIAL.parent.rmdir()


@app.command()
def train(
    recipe: Annotated[str, typer.Option(help="How to train: MMCoA(), TeCoA(epochs=3).")],
    model: Annotated[str, typer.Option(help="What to start from: a checkpoint, or a word such as Tiny().")],
    data: Annotated[str, typer.Option(help="What to learn from: a path, or a word such as Scenes('object', 'train').")],
    out: Annotated[Path, typer.Option(help="The folder of the checkpoint; a run that was stopped goes on there.")],
    skip_broken: _SkipBroken = False,
    device: _Device = None,
    own_words: _Own = None,
) -> None:
    """Train a model, or go on with a run that was stopped; prints the word that reads the result."""
    from crossguard.words import show

    _check_names({"--recipe": recipe, "--model": model, "--data": data})
    chosen_recipe = _read("--recipe", "recipe", recipe)
    chosen_model = _read("--model", "model", model)
    chosen_data = _read("--data", "data", data)
    if skip_broken:
        chosen_data = _skipping("--data", chosen_data)
    with _placed(device, None):
        try:
            trained = chosen_recipe.fit(chosen_model, chosen_data, out)
        except KeyboardInterrupt as stop:
            stop.args = (_saved(out),)
            raise
    if leads():
        if told := _trained(out):
            say(told)
            model = show(trained, short=True) if (out / "prompts.json").exists() else str(out)  # which is half of it
            say(f"to measure it: crossguard eval --model {shlex.quote(model)} --data ... --attack APGD --eps 4/255")
        _print(show(trained, short=True))


def _saved(out: Path) -> str:
    """Where a training that was stopped goes on."""
    from safetensors import safe_open

    try:
        with safe_open(out / "training.safetensors", "pt") as file:
            return f"; run the same command to go on behind step {file.metadata()['step']}"
    except Exception:  # it is not there, or damaged in one of the many ways of safetensors
        return " before a step was saved; the same command starts from the beginning"


class _Loss(TypedDict, total=False):
    loss: float


class _Trained(_Loss):
    """What is told of the record of a training."""

    steps: int
    seconds: float


def _trained(out: Path) -> str:
    """What a finished training cost, and where it got to; empty where it does not say so."""
    try:
        record = read_json(out / "crossguard.json", _Trained, "train again")
    except CrossguardError:  # a recipe of somebody's own
        return ""
    loss = f", loss {record['loss']:.4g}" if "loss" in record else ""
    return f"{record['steps']} steps in {record['seconds']:.0f} seconds{loss}"


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="A TOML file with a grid of words.", metavar="FILE.toml")],
    out: Annotated[
        Path | None, typer.Option(help="The folder of the answers; runs/<name of the file>, if not given.")
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            help="Answer the i-th of n parts of the grid, without file locks: for many machines.", metavar="I/N"
        ),
    ] = None,
    device: _Device = None,
    dtype: _Dtype = None,
    own_words: _Own = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Run the code of the files of words that the experiment names.")
    ] = False,
) -> None:
    """Answer every question of an experiment; what was answered is not asked again."""
    number, of = (whole(one) for one in (shard or "1/1").partition("/")[::2])
    if number is None or of is None:
        raise CrossguardError(f"--shard must be such as 2/8, the second of eight parts, not {shortly(shard)}")
    experiment = Experiment.load(file, trust)
    given = {name: value for name, value in (("device", device), ("dtype", dtype)) if value is not None}
    folder = Path("runs") / file.stem if out is None else out
    _run(dataclasses.replace(experiment, **given), folder, None if shard is None else (number, of))


def _run(experiment: Experiment, folder: Path, shard: tuple[int, int] | None = None, crossed: bool = False) -> None:
    """Answers an experiment and prints its table, also where some cells could not be answered."""
    failure: Unanswered | None = None
    with Bar() as bar:
        try:
            experiment.run(folder, bar, shard)
        except Unanswered as error:
            failure = error
        except KeyboardInterrupt as stop:
            stop.args = (bar.interrupted(),)
            raise
    if leads():
        try:
            _print_table(folder, None, False, crossed)
        except CrossguardError:  # nothing is answered yet
            if failure is None and shard is None:
                raise
        else:
            _draw(folder)
    if failure is not None:
        raise failure


def _draw(folder: Path) -> None:
    """Draws the curves of an experiment that has some, and says where they are."""
    from crossguard.curves import draw

    for path in draw(folder):
        say(f"the curves as a picture: {path}")


@app.command()
def table(
    folder: Annotated[Path, typer.Argument(help="A folder of reports.", metavar="FOLDER")],
    form: Annotated[str | None, typer.Option("--format", help="markdown, csv, json or latex.")] = None,
    worst: Annotated[
        bool, typer.Option("--worst", help="Pool all attacks on a model within a budget: the worst case per image.")
    ] = False,
    crossed: Annotated[
        bool, typer.Option("--transfer", help="Who was crafted on against who was asked, one table per attack.")
    ] = False,
    rows: Annotated[
        str | None, typer.Option(help="What makes the rows: model (the default), task, attack, budget, class, ...")
    ] = None,
    columns: Annotated[str | None, typer.Option(help="What makes the columns: attack,budget, if not given.")] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="A row for each class, as --rows class.")] = False,
    mean: Annotated[bool, typer.Option("--mean", help="The mean over tasks, beside them.")] = False,
    digits: Annotated[int, typer.Option(help="Digits behind the point.")] = 1,
    intervals: Annotated[bool, typer.Option(help="An interval beside each number.")] = True,
    bold: Annotated[
        bool, typer.Option("--bold", help="Mark the best model, where it is above each other one by more than chance.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the tables too: a dot for each number.")
    ] = None,
    own_words: _Own = None,
) -> None:
    """Print the reports of a folder as tables, one for all that is in neither rows nor columns."""
    if worst and crossed:
        raise CrossguardError("--worst pools the models that were crafted on, which --transfer tells apart; give one")
    if per_class and rows is not None:
        raise CrossguardError("--per-class makes the rows, and so does --rows; give one of them, or --rows class,...")
    if crossed and (rows or columns or per_class or mean or bold):
        raise CrossguardError("--transfer lays its tables out itself; leave out what else lays them out")
    from crossguard.pivot import Layout

    taken = "class" if per_class else rows
    given = {"rows": taken, "columns": columns}
    axes = {name: tuple(one.strip() for one in text.split(",")) for name, text in given.items() if text is not None}
    layout = Layout(**axes, mean=mean, digits=digits, intervals=intervals, bold=bold)
    if picture is not None and picture.suffix.lower() != ".png":
        raise CrossguardError(f"pictures are PNG files, and --picture {picture} is none; give a name that ends in .png")
    _print_table(folder, form, worst, crossed, layout, picture)


@app.command("status")
def status_command(
    folder: Annotated[Path, typer.Argument(help="What --out or --keep named, or a folder of such.", metavar="FOLDER")],
) -> None:
    """Say what runs in a folder, what waits for whom, and what is left to do."""
    from crossguard.status import status

    _print("\n".join(status(folder)))


@app.command("audit")
def audit_command(
    model: _Model,
    out: Annotated[Path, typer.Option(help="The folder of the reports, the ladder and its picture.")],
    task: _Task = None,
    data: _Data = None,
    budget: _Budget = None,
    eps: _Eps = None,
    norm: _Norm = None,
    attack: Annotated[str, typer.Option(help="What is carried out on each rung.")] = "APGD()",
    against: Annotated[
        list[str] | None,
        typer.Option(help="A model to compare with, as WORD or as LABEL=WORD; may be given several times."),
    ] = None,
    transfer: Annotated[
        list[str] | None,
        typer.Option(help="Another model to craft on too, as WORD or as LABEL=WORD; may be given several times."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Draws that attacks average over, if the defense draws noise.")] = 4,
    queries: Annotated[int, typer.Option(help="Of the attacks without gradients; 0 leaves them out.")] = 1000,
    draws: Annotated[int, typer.Option(help="Draws that judge each image, if the defense draws noise.")] = 5,
    whole: Annotated[
        bool,
        typer.Option("--whole", help="Ask every adversary about all samples, not the dear ones about what is left."),
    ] = False,
    limit: _Limit = None,
    seed: _Seed = 0,
    batch: _Batch = 128,
    doubt: _Doubt = 0,
    device: _Device = None,
    dtype: _Dtype = None,
    own_words: _Own = None,
) -> None:
    """Attack a defense in every way that its construction allows, and say what is left of it.

    Adversaries that could not be carried out are named below the ladder, and on standard error with exit code 2.
    """
    from crossguard.audit import PICTURE, audit

    for option, value, least in (
        ("--limit", limit, 1), ("--batch", batch, 1), ("--seed", seed, 0), ("--samples", samples, 1),
        ("--queries", queries, 0), ("--draws", draws, 1), ("--doubt", doubt, 0),
    ):  # fmt: skip
        _at_least(option, value, least)
    named = {"--against": _labelled("--against", against or []), "--transfer": _labelled("--transfer", transfer or [])}
    texts = _asked(model, task, data, attack, budget, eps, norm)
    _check_names({f"--{kind}": text for kind, text in texts.items()})
    others = {
        option: {label: _read(option, "model", word) for label, word in words.items()}
        for option, words in named.items()
    }
    asked = {kind: _read(f"--{kind}", kind, text) for kind, text in texts.items()}
    with _placed(device, dtype), Bar() as bar:
        try:
            made = audit(
                **asked, out=out, against=others["--against"], transfer=others["--transfer"], samples=samples,
                queries=queries, draws=draws, limit=limit, seed=seed, batch=batch, doubt=doubt, whole=whole, watch=bar,
            )  # fmt: skip
        except KeyboardInterrupt as stop:
            stop.args = (bar.interrupted(),)
            raise
    if leads():
        _print("\n".join(made.lines()))
        _print()
        _print(f"the ladder as a picture: {out / PICTURE}")
    if made.unanswered is not None:
        raise made.unanswered


@app.command("calibrate")
def calibrate_command(
    model: _Model,
    task: _Task = None,
    data: _Data = None,
    share: Annotated[
        float, typer.Option("--open", help="The share of clean images that each gate is to open for.")
    ] = 0.05,
    limit: Annotated[int, typer.Option(help="Clean samples to look at.")] = 200,
    seed: _Seed = 0,
    batch: _Batch = 128,
    device: _Device = None,
    dtype: _Dtype = None,
    own_words: _Own = None,
) -> None:
    """Find the thresholds of a defense on clean images of this model, and print it with these."""
    for option, value, least in (("--limit", limit, 1), ("--batch", batch, 1), ("--seed", seed, 0)):
        _at_least(option, value, least)
    texts = {"task": _task(task, data), "model": model}
    _check_names({f"--{kind}": text for kind, text in texts.items()})
    asked = {kind: _read(f"--{kind}", kind, text) for kind, text in texts.items()}
    from crossguard.calibrate import calibrate
    from crossguard.words import show

    with _placed(device, dtype):
        made = calibrate(**asked, share=share, limit=limit, seed=seed, batch=batch)
    if leads():
        for threshold in made.thresholds:
            say(str(threshold))
        _print(show(made.model, short=True))


@app.command("certify")
def certify_command(
    model: Annotated[
        list[str],
        typer.Option(
            help="Who answers: a vote over noise, as Smoothed(Tiny(), 0.25) or LABEL=WORD; may be given several times."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder of the results, the picture and what was said to noise.")],
    task: _Task = None,
    data: _Data = None,
    samples: Annotated[
        int, typer.Option(help="Noisy copies of each image that are counted; the paper takes 100000.")
    ] = 1000,
    guesses: Annotated[int, typer.Option(help="Noisy copies before these that guess the class.")] = 100,
    alpha: Annotated[float, typer.Option(help="How likely the certificate of an image may be wrong.")] = 0.001,
    radius: Annotated[
        list[float] | None,
        typer.Option(help="An L2 radius of the table, in pixels of [0, 1]; may be given several times."),
    ] = None,
    embeddings: Annotated[
        bool, typer.Option(help="Keep the embeddings of noisy copies, so that other classes ask no image tower.")
    ] = True,
    limit: _Limit = None,
    seed: _Seed = 0,
    batch: Annotated[int, typer.Option(help="Noisy copies at once; results do not depend on it.")] = 128,
    device: _Device = None,
    dtype: _Dtype = None,
    own_words: _Own = None,
) -> None:
    """Certify the vote over noise of each image: within which L2 radius nothing changes it.

    The results, one file for each model and task, and the noisy embeddings stay in --out, where the same command goes
    on, and another task over the same images asks no image tower.
    """
    for option, value, least in (
        ("--samples", samples, 1), ("--guesses", guesses, 1), ("--limit", limit, 1), ("--batch", batch, 1),
        ("--seed", seed, 0),
    ):  # fmt: skip
        _at_least(option, value, least)
    named = _labelled("--model", model)
    text = _task(task, data)
    _check_names({"--task": text})
    from crossguard.certify import PICTURE, TEXT, certify, check_smoothed, checked_alpha, checked_radii, lines, picture

    chosen = {label: _read("--model", "model", word) for label, word in named.items()}
    chosen_task = _read("--task", "task", text)
    for one in chosen.values():
        check_smoothed(one)
    checked_alpha(alpha)
    checked_radii(radius or ())
    found = {}
    with _placed(device, dtype), Bar() as bar, listening(bar.part):
        for label, one in chosen.items():
            bar.step(label)
            try:
                found[label] = certify(
                    chosen_task, one, samples, guesses, alpha, limit, seed, batch, out, embeddings, bar.progress
                )
            except KeyboardInterrupt as stop:
                stop.args = (bar.stopped(True),)
                raise
    if leads():
        told = "\n".join(lines(found, radius))
        files.write(out / PICTURE, picture(found))
        files.write(out / TEXT, f"{told}\n")
        asked = sum(one.asked for one in found.values())
        say(f"{asked:,} images went through an image tower now; what was said to noise before was kept")
        _print(told)
        _print()
        _print(f"certified accuracy over the radius as a picture: {out / PICTURE}")


def _labelled(option: str, texts: Sequence[str], known: Sequence[str] = ()) -> dict[str, str]:
    """Words by label, from 'WORD' or 'LABEL=WORD'; names are checked before anything is loaded.

    Args:
        known: names that words may use in addition.
    """
    found: dict[str, str] = {}
    for text in texts:
        named = re.fullmatch(r"\s*([^()=]+?)\s*=(.*)", text, re.DOTALL)
        label, word = named.groups() if named else (text, text)
        if label in found:
            raise CrossguardError(f"{option}: {label!r} is given twice; give each {_kind(option)} a label of its own")
        found[label] = word
        _check_names({option: word}, known)
    return found


@app.command("convert")
def convert_command(
    file: Annotated[Path, typer.Argument(help="A .bin, .pt or .pth of plain tensors.")],
    out: Annotated[Path, typer.Argument(help="A folder for a whole checkpoint, or a file that ends in .safetensors.")],
    config: Annotated[
        Path | None, typer.Option(help="The folder with config.json or open_clip_config.json; that of the file.")
    ] = None,
) -> None:
    """Make a pickle of plain tensors a checkpoint that can be read.

    Nothing in the package reads pickles by itself, since they can run code; here one is opened with torch's
    weights_only, which makes tensors and nothing else.
    """
    from crossguard.convert import convert

    for line in convert(file, out, config):
        _print(line)


@app.command()
def transfer(
    model: Annotated[
        list[str], typer.Option(help="A model to craft on and to ask; give two or more, as WORD or as LABEL=WORD.")
    ],
    attack: _Attack,
    task: _Task = None,
    data: _Data = None,
    budget: _Budget = None,
    eps: _Eps = None,
    norm: _Norm = None,
    limit: _Limit = None,
    seed: _Seed = 0,
    batch: _Batch = 128,
    out: Annotated[Path, typer.Option(help="The folder of the answers.")] = Path("runs/transfer"),
    device: _Device = None,
    dtype: _Dtype = None,
    own_words: _Own = None,
) -> None:
    """Attack every model with what was crafted on every other: a matrix of pairs, the white boxes on its diagonal."""
    _at_least("--limit", limit, 1)
    _at_least("--batch", batch, 1)
    _at_least("--seed", seed, 0)
    labelled = _labelled("--model", model)
    texts = {"task": _task(task, data), "attack": attack, "budget": _budget(budget, eps, norm)}
    _check_names({f"--{kind}": text for kind, text in texts.items()})
    models = {label: _read("--model", "model", word) for label, word in labelled.items()}
    if len(models) < 2:
        raise CrossguardError("--model: a transfer needs two models or more; repeat the option")
    crafted = _read("--attack", "attack", attack)
    if crafted is None:
        raise CrossguardError("--attack: a transfer needs an attack to craft with, such as 'PGD()'")
    grid = {
        "task": {texts["task"]: _read("--task", "task", texts["task"])},
        "model": models,
        "attack": {attack: crafted},
        "budget": {texts["budget"]: _read("--budget", "budget", texts["budget"])},
        "surrogate": models,
    }
    _run(Experiment(grid, seed, limit, batch, device, dtype, "transfer"), out, crossed=True)


@app.command()
def sweep(
    model: Annotated[
        list[str], typer.Option(help="Who answers, as WORD or as LABEL=WORD; may be given several times.")
    ],
    over: Annotated[
        str,
        typer.Option(
            help="A name and the numbers that it runs through in every word with this name in it: alpha=0:1:0.125, or "
            "eps=0,1,2,4.",
            metavar="NAME=VALUES",
        ),
    ],
    attack: Annotated[
        list[str], typer.Option(help="How the adversary searches, as --model; may be given several times.")
    ],
    task: _Task = None,
    data: _Data = None,
    budget: _Budget = None,
    eps: _Eps = None,
    norm: _Norm = None,
    limit: _Limit = None,
    seed: _Seed = 0,
    batch: _Batch = 128,
    out: Annotated[Path, typer.Option(help="The folder of the answers and of the picture.")] = Path("runs/sweep"),
    device: _Device = None,
    dtype: _Dtype = None,
    own_words: _Own = None,
) -> None:
    """Ask again for each value of a number in any of the words, and draw the curve.

    Between two models: --model "Interpolated(Tiny(), HuggingFace('runs/tecoa'), alpha)" --over alpha=0:1:0.125. Over
    budgets: --budget "Linf(eps/255)" --over eps=0:8:1.
    """
    from crossguard.sweep import Names, Sweep, laid_out

    _at_least("--limit", limit, 1)
    _at_least("--batch", batch, 1)
    _at_least("--seed", seed, 0)
    name, equals, values = (one.strip() for one in over.partition("="))
    if not equals:
        raise CrossguardError(f"--over must be a name and its values, such as alpha=0:1:0.125, not {shortly(over)}")
    try:
        swept = Sweep.read(name, values)
    except CrossguardError as error:
        raise CrossguardError(f"--over: {error}") from error
    labelled = {
        "task": {None: _task(task, data)},
        "model": _labelled("--model", model, (name,)),
        "attack": _labelled("--attack", attack, (name,)),
        "budget": {None: _budget(budget, eps, norm, (name,))},
    }
    for kind, texts in labelled.items():
        for text in texts.values():
            _check_names({f"--{kind}": text}, (name,))
    names = Names([{name: value} for value in swept.values])
    grid: dict[str, dict[str, Any]] = {"surrogate": {"None": None}}
    for kind, texts in labelled.items():
        try:
            grid[kind] = {
                label: word
                for own, text in texts.items()
                for label, word in laid_out(kind, None if own == text else own, text, names, swept).items()
            }
        except CrossguardError as error:
            raise CrossguardError(f"--{kind}: {error}") from error
    if not swept.points:
        raise CrossguardError(f"--over: nothing depends on {name}; put it into a word, such as --budget 'Linf({name})'")
    _run(Experiment(grid, seed, limit, batch, device, dtype, "sweep", sweep=swept), out)


@app.command()
def words(
    name: Annotated[
        str | None, typer.Argument(help="One word, to be shown with its fields, or a kind of words, such as Recipe.")
    ] = None,
    own_words: _Own = None,
) -> None:
    """List the words: everything that can be named on the command line and in experiment files."""
    from crossguard import signatures

    if name is None:
        _print_vocabulary(_vocabulary())
    elif name not in signatures.names() and (listed := _vocabulary().get(_heading(name))):
        _print_vocabulary({_heading(name): listed})
    else:
        _print_word(name)


# Printing


def _print(text: str = "") -> None:
    typer.echo(plain_lines(text))


def _print_samples(
    folder: Path, count: int, changed: bool = False, out: Path | None = None, ids: Sequence[str] = ()
) -> None:
    from crossguard import look

    kept = look.Look(folder)
    samples = kept.pick(count, changed, ids)
    doubt = None if out is None else look.save(kept, samples, out)
    console = Console(markup=False, highlight=False)
    _print(kept.summary)
    for number, sample in enumerate(samples, 1):
        console.print()
        for line in look.lines(number, sample, console.is_terminal and not console.no_color):
            console.print(line, soft_wrap=True)
    if out is not None:
        console.print()
        _print(f"written to {out}")
    if doubt:
        say(doubt)


def _print_table(
    folder: Path,
    form: str | None,
    worst: bool,
    crossed: bool = False,
    layout: Layout | None = None,
    picture: Path | None = None,
) -> None:
    from crossguard.table import FORMATS, Answers, pretty, render

    if form is not None and form not in FORMATS:
        raise CrossguardError(f"unknown format {shortly(form)}; give one of {', '.join(FORMATS)}")
    answers = Answers.load(folder)
    answers = answers.pooled() if worst else answers
    answers = dataclasses.replace(answers, crossed=crossed)
    if picture is not None:
        from crossguard import curves, files

        files.write(picture, curves.table_picture(answers.tables(layout)))
    if form is None and sys.stdout.isatty():
        Console(markup=False, highlight=False).print(pretty(answers, layout))
    else:
        typer.echo(render(answers, form or "markdown", layout), nl=False)


def _heading(kind: str) -> str:
    """The name of a kind of words as it stands above them: `CandidateSource` is 'candidate source'."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind).lower()


def _vocabulary() -> dict[str, list[tuple[str, str]]]:
    """The words by their kinds, each with a line about it."""
    from crossguard import signatures

    groups: dict[str, list[tuple[str, str]]] = {}
    for name, kind, summary in signatures.listed():
        groups.setdefault(kind, []).append((name, summary))
    for name in signatures.others():
        try:
            found = signatures.find(name)
        except CrossguardError as error:
            groups.setdefault("cannot be loaded", []).append((name, str(error)))
        else:
            groups.setdefault(found.kind, []).append((name, found.summary))
    return groups


def _print_vocabulary(groups: dict[str, list[tuple[str, str]]]) -> None:
    width = max(len(name) for listed in groups.values() for name, _ in listed)
    for kind, listed in sorted(groups.items(), key=lambda group: group[0] == "cannot be loaded"):
        _print(kind)
        for name, line in listed:
            _print(f"  {name:<{width}}  {one_line(line)}")
        _print()
    _print("'crossguard words NAME' shows the fields of a word.")


def _print_word(name: str) -> None:
    from crossguard import signatures

    found = signatures.find(name)
    _print(f"{name} ({found.kind})")
    _print()
    for one in found.parameters:
        _print(f"  {one.name}: {one.type}{'' if one.default is None else f' = {one.default}'}")
    if not found.parameters:
        _print("  no fields")
    _print()
    _print(found.doc)
    for base, options in found.inherited:  # what inherited fields mean stands with the class that brought them
        _print(f"\nArgs of every {base}:\n{options}")


# Checking


def _asked(
    model: str, task: str | None, data: str | None, attack: str, budget: str | None, eps: str | None, norm: str | None
) -> dict[str, str]:
    """The parts of a question as words, from what was given for them."""
    return {"task": _task(task, data), "model": model, "attack": attack, "budget": _budget(budget, eps, norm)}


def _task(task: str | None, data: str | None) -> str:
    """What is asked: data alone stand for the task that fits them."""
    if task is not None and data is not None:
        raise CrossguardError("--task and --data say both what is asked; give one of them")
    if task is None and data is None:
        raise CrossguardError("nothing is asked; give --data, such as a folder of class folders, or a --task")
    return str(data) if task is None else task


def _budget(budget: str | None, eps: str | None, norm: str | None, known: Sequence[str] = ()) -> str:
    """The budget: `--eps 4/255 --norm linf` stand for `Linf(4/255)`.

    Args:
        known: names that stand for numbers.
    """
    from crossguard.words import build

    if eps is None:
        if norm is not None:
            raise CrossguardError("--norm says what --eps is measured in; give --eps, such as 4/255")
        return "None" if budget is None else budget
    if budget is not None:
        raise CrossguardError("--budget and --eps say both how far the adversary may go; give one of them")
    norms = {"linf": "Linf", "l2": "L2", "l1": "L1"}
    if (norm or "linf").lower() not in norms:
        raise CrossguardError(f"--norm {shortly(norm)} is not known; give one of {', '.join(norms)}")
    try:
        size = build(eps, dict.fromkeys(known, 1))
    except CrossguardError:
        size = None
    if isinstance(size, bool) or not isinstance(size, int | float):
        raise CrossguardError(f"--eps must be a number such as 4/255, not {shortly(eps)}")
    return f"{norms[(norm or 'linf').lower()]}({eps})"


def _kind(option: str) -> str:
    """What an option wants: that of `--against` and `--transfer` are models."""
    kind = option.removeprefix("--")
    return "model" if kind in ("against", "transfer") else kind


def _check_names(texts: Mapping[str, str], known: Sequence[str] = ()) -> None:
    """Refuses a misspelt name in the word of any option before the words of the others load what they name.

    Args:
        known: names that words may use in addition.
    """
    from crossguard import signatures
    from crossguard.words import expanded

    for option, text in texts.items():
        try:
            signatures.check(expanded(_kind(option), text, known), known)
        except CrossguardError as error:
            raise CrossguardError(f"{option}: {error}") from error


def _read(option: str, kind: str, text: str) -> Any:
    """The object that was given; what a short form stands for is said."""
    from crossguard.words import expanded, read, show

    try:
        value = read(kind, text)
        if leads() and expanded(kind, text) != text:
            say(f"{option} {text} is {show(value, short=True)}")
        return value
    except CrossguardError as error:
        raise CrossguardError(f"{option}: {error}") from error


@contextmanager
def _placed(device: str | None, dtype: str | None) -> Iterator[None]:
    """Inside, networks live where and are as precise as the options say."""
    if device is None and dtype is None:
        yield
        return
    from crossguard.device import choosing

    with choosing(device, dtype or "float32"):
        yield


def _check_file(option: str, path: Path) -> None:
    """Raises now rather than after hours of work if a file cannot be written."""
    if path.is_dir():
        raise CrossguardError(f"{option} {path} is a folder; give the name of a file in it")
    files.check_writable(path.parent)


def _at_least(option: str, value: int | None, least: int) -> None:
    if value is not None:
        at_least(option, value, least)


def _skipping(option: str, word: Any) -> Any:
    """The word with `skip_broken` set wherever something in it has that field."""
    from crossguard.words import mapped

    def skip(part: Any) -> Any:
        has = any(field.name == "skip_broken" for field in dataclasses.fields(part))
        return dataclasses.replace(part, skip_broken=True) if has else part

    changed = mapped(word, skip)
    if changed is word:
        raise CrossguardError(f"--skip-broken: nothing in {option} reads files that could be broken")
    return changed


def _debugging() -> bool:
    """Whether errors show their traceback and all of their text."""
    return os.environ.get("CROSSGUARD_DEBUG", "0") not in ("", "0")
