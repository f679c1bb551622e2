"""A folder in which an evaluation keeps what its attack makes: written as it goes on, by one evaluation at a time.

Beside the images lie, until all is kept, a journal (`.kept.json`) and the outcomes so far. The journal says in its
first line which question is asked, and names each file before it is written. Nothing is ever removed but what the
journal or the index names, and only by a name of our kind. What was written before a kill counts if it is there still,
byte for byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from crossguard import files, reading
from crossguard.data import Prompts
from crossguard.datasets.kept import AGAIN, INDEX, REPORT, Kept
from crossguard.datasets.pixels import SUFFIXES
from crossguard.errors import CrossguardError
from crossguard.printing import say
from crossguard.processes import Processes
from crossguard.report import Report, ReportError, differs
from crossguard.shapes import Images
from crossguard.turns import owned

JOURNAL = ".kept.json"
OUTCOMES = ".outcomes.part"  # the outcomes so far
_OURS = re.compile(r"images-[0-9]{6,12}\.safetensors|[0-9]{6,12}\.png")
_PRIVATE = ("embedding", "rounded", "sha256", "shape")  # columns that the index leaves out

Rows = dict[str, dict[str, Any]]  # what is known of samples, by their ids


@contextmanager
def keeping(
    folder: Path, question: Mapping[str, str], form: str, overwrite: bool, group: Processes
) -> Iterator[Keeping]:
    """Lends the folder to an evaluation, to no other meanwhile.

    Args:
        form: of the images, 'safetensors' or 'png'.
        overwrite: what was kept for another question may be replaced.

    Raises:
        CrossguardError: it holds what was kept for another question, or images of somebody else.
    """
    made = not folder.exists()
    with ExitStack() as held:
        with group.together():
            if group.first:
                check_folder(folder, question, overwrite)
                held.enter_context(owned(folder, "keeps images"))
                check_folder(folder, question, overwrite)  # of who was waited for
        try:
            yield Keeping(folder, question, form)
        except CrossguardError:
            if group.first:
                _forget(folder, made)
            raise


def _forget(folder: Path, made: bool) -> None:
    """Takes the lock away again where nothing else was written, and the folder where it was made for that."""
    with suppress(OSError):
        there = list(folder.iterdir())
        if all(path.name.startswith(files.LOCK) for path in there):
            for path in there:
                path.unlink()
            if made:
                folder.rmdir()


def check_folder(folder: Path, question: Mapping[str, str], overwrite: bool = False) -> None:
    """Raises where the images of this question would replace those of another, or lie among images of somebody else:
    these might be overwritten, and a data set that is read from there would have more samples than before.

    Args:
        overwrite: nothing is refused.
    """
    if overwrite:
        return
    for there in (_asked(folder), _begun(folder)):
        if there is not None and there != dict(question):
            raise CrossguardError(
                f"{folder} holds what was kept for another question ({differs(there, question)}); give another "
                "folder, or overwrite this one"
            )
    if folder.is_dir() and not any((folder / name).exists() for name in (INDEX, JOURNAL)):
        for file in sorted(folder.iterdir()):
            if file.name.lower().endswith(SUFFIXES):
                raise CrossguardError(
                    f"{folder} holds images that no evaluation kept ({file.name}); give a folder of its own"
                )


class Keeping:
    """What an evaluation does in its folder; see `keeping`."""

    def __init__(self, folder: Path, question: Mapping[str, str], form: str) -> None:
        self.folder, self.question, self.form = folder, dict(question), form
        self._taken: set[str] = set()  # files whose images are of use

    def held(self, rows: Rows) -> Rows:
        """Those of the rows whose images are still there as they were written; says so where others are not."""
        good: dict[tuple[str, str], bool] = {}
        for row in rows.values():
            file = row["file"], row["sha256"]
            if file not in good:
                good[file] = self._is(*file)
        found = {name: row for name, row in rows.items() if good[row["file"], row["sha256"]]}
        if len(found) < len(rows):
            say(
                f"{len(rows) - len(found)} of the {len(rows)} samples that were asked about are asked again: their "
                f"images are not in {self.folder} any more as they were kept"
            )
        return found

    def take(self, rows: Rows) -> None:
        """Notes which files stay: those with the images of these rows."""
        self._taken = {row["file"] for row in rows.values()}

    def _is(self, name: str, content: str) -> bool:
        path = self.folder / name
        try:
            return bool(_OURS.fullmatch(name)) and not path.is_symlink() and files.hashed(path) == content
        except CrossguardError:  # it is not there
            return False

    def begin(self) -> None:
        """Takes away what an earlier run kept, but for what is of use; the folder is not to be read until `finish`.

        Whatever happens meanwhile, the journal names all that is to be taken away.
        """
        listed = _listed(self.folder)
        lines = [{"question": self.question}, *([{"files": sorted(listed)}] if listed else [])]
        files.write(self.folder / JOURNAL, "".join(json.dumps(line) + "\n" for line in lines))
        there = _asked(self.folder)
        if there not in (None, self.question):
            _remove(self.folder, [REPORT] if _reports(self.folder / REPORT, there) else [])
        _remove(self.folder, [INDEX, *sorted(listed - self._taken)])

    def add(self, indices: Sequence[int], images: Images) -> list[dict[str, Any]]:
        """Writes the images of one batch and says where each is."""
        if self.form == "png":
            names = [self._name(index, "{:06d}.png") for index in indices]
            self._note(names)
            with files.staging(self.folder, names[0]) as stage:
                for name, image in zip(names, images, strict=True):
                    rounded(image).save(stage / name, "PNG")
            rows = [(name, 0) for name in names]
        else:
            name = self._name(indices[0], "images-{:06d}.safetensors")
            self._note([name])
            files.save_tensors(self.folder / name, {"images": images.detach().cpu().contiguous()})
            rows = [(name, row) for row in range(len(indices))]
        hashes = {name: files.hashed(self.folder / name) for name, _ in rows}
        return [
            {"file": name, "row": row, "index": index, "sha256": hashes[name]}
            for (name, row), index in zip(rows, indices, strict=True)
        ]

    def _name(self, index: int, form: str) -> str:
        """A name after the place of a sample in the data; after a later one, where data that came in another order have
        had this one already."""
        name = next(name for number in count(index) if (name := form.format(number)) not in self._taken)
        self._taken.add(name)
        return name

    def _note(self, names: Sequence[str]) -> None:
        """Writes down what is about to be written."""
        if not (self.folder / JOURNAL).is_file():
            raise files.WriteError(f"{self.folder} was removed or emptied while the evaluation kept images in it")
        # A line that a full disk has cut off ends here.
        files.append(self.folder / JOURNAL, "\n" + json.dumps({"files": list(names)}) + "\n", make=False)

    def finish(self, samples: Sequence[Mapping[str, Any]], prompts: tuple[Prompts, Prompts] | None = None) -> None:
        """Writes the index, which says that everything else is there.

        Args:
            prompts: the class prompts before and after the attack; without them the samples have captions of their
                own, as `texts` and `clean_texts`.
        """
        kept = {sample["file"]: sample["sha256"] for sample in samples}
        for name in kept:
            if not (self.folder / name).is_file():
                raise files.WriteError(
                    f"{self.folder / name} was removed while the evaluation went on; ask again to make it again"
                )
        content: dict[str, Any] = {"question": self.question, "names": (), "clean_texts": (), "texts": ()}
        if prompts is not None:
            before, after = prompts
            content |= {"names": before.names, "clean_texts": before.texts, "texts": after.texts}
        content["files"] = kept
        content["samples"] = [
            {name: value for name, value in sample.items() if name not in _PRIVATE} for sample in samples
        ]
        files.write(self.folder / INDEX, json.dumps(content) + "\n")
        _remove(self.folder, [JOURNAL])
        files.tidy(self.folder)


def _remove(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise files.WriteError(f"{folder / name} cannot be removed: {files.reason(error)}") from error


def _asked(folder: Path) -> dict[str, str] | None:
    """What the kept images are the answer to; None where there are none, or their index cannot be read."""
    try:
        return dict(Kept(str(folder)).question)
    except CrossguardError:
        return None


def _begun(folder: Path) -> dict[str, str] | None:
    """The question of an evaluation that has not kept everything yet."""
    for line in _journal(folder):
        return line["question"] if not reading.misfit(line.get("question"), dict[str, str]) else None
    return None


def _listed(folder: Path) -> set[str]:
    """The files in the folder that are ours to remove: those that the index or the journal names, with a name of
    ours."""
    named: list[Any] = []
    with suppress(CrossguardError):
        named += [sample["file"] for sample in Kept(str(folder)).samples]
    for line in _journal(folder):
        listed = line.get("files")
        named += listed if isinstance(listed, list) else []
    return {name for name in named if isinstance(name, str) and _OURS.fullmatch(name)}


def _journal(folder: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of the journal."""
    try:
        lines = reading.content(reading.inside(folder, JOURNAL, "the kept folder"), AGAIN).split(b"\n")
    except CrossguardError:
        return
    for line in lines:
        with suppress(CrossguardError):
            yield reading.parse_json(line, dict[str, Any], JOURNAL, AGAIN)


def _reports(path: Path, question: Mapping[str, str] | None) -> bool:
    """Whether a file is the report of this question."""
    try:
        return dict(Report.load(path).question) == question
    except ReportError:
        return False


def rounded(image: Tensor) -> Image.Image:
    """The image with 8 bits."""
    pixels = (image * 255.0).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels)
