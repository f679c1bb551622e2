"""Long evaluations: killed and continued, shared among processes, kept for later."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from crossguard import (
    PGD,
    Both,
    CrossguardError,
    Independent,
    Kept,
    Linf,
    Scenes,
    Substitute,
    Tiny,
    Words,
    ZeroShot,
    evaluate,
    turns,
    words,
)
from crossguard.attacks.base import ImageAttack
from crossguard.data import Dataset
from crossguard.evaluate import _checksum, question
from crossguard.report import _COLUMNS, Report

TASK = ZeroShot(Scenes("color", count=40))
ATTACK, BUDGET = PGD(steps=3), Linf(5 / 255)


def same(one: Report, other: Report) -> None:
    """The same report: answers and counts are equal, margins but for the rounding of batches of another size."""
    assert one.question == other.question and one.outcomes.id == other.outcomes.id and one.notes == other.notes
    for name in _COLUMNS:
        assert np.allclose(getattr(one.outcomes, name), getattr(other.outcomes, name), atol=1e-4), name
    assert np.array_equal(one.outcomes.adversarial, other.outcomes.adversarial)


class Killed(Exception):
    pass


def killing_after(batches: int):
    def progress(done: int, total: int) -> None:
        nonlocal batches
        batches -= done > 0
        if not batches:
            raise Killed

    return progress


@dataclasses.dataclass(frozen=True)
class Counting(ImageAttack):
    """PGD that remembers which noise keys it was asked for."""

    seen: ClassVar[list[int]] = []

    def search(self, victim, clean, goal, budget, seeds):
        self.seen.extend(seeds.tolist())
        return ATTACK.search(victim, clean, goal, budget, seeds)


def test_a_killed_evaluation_goes_on_and_redoes_nothing(tmp_path: Path) -> None:
    partial = tmp_path / "report.part"
    whole = evaluate(TASK, Tiny(), Counting(), BUDGET, batch=16)
    once = sorted(Counting.seen)
    Counting.seen.clear()
    with pytest.raises(Killed):
        evaluate(TASK, Tiny(), Counting(), BUDGET, batch=16, partial=partial, progress=killing_after(2))
    assert len(Counting.seen) == 32
    with (tmp_path / "report.part.0").open("a") as file:
        file.write('{"rows": {"33": {"id"')  # the kill came in the middle of a line
    after = evaluate(TASK, Tiny(), Counting(), BUDGET, batch=7, partial=partial)
    assert sorted(Counting.seen) == once, "a finished image was attacked again, or one was not attacked"
    same(whole, after)
    assert not list(tmp_path.iterdir()), "the file of the outcomes so far is left"


WRONG = [
    "5", "[]", "{}", '{"rows": "text", "seconds": 1.0}', '{"rows": [null], "seconds": 1.0}', '{"rows": {}}',
    '{"rows": [], "seconds": "x"}', '{"rows": [{"index": "x"}], "seconds": 1.0}',
    '{"rows": [{"id": 5}], "seconds": 1.0}', "\x00", "[" * 100_000,
]  # fmt: skip


def test_lines_that_are_not_what_was_written_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial, name = tmp_path / "part", "part.0"
    with pytest.raises(Killed):
        evaluate(TASK, Tiny(), Counting(), BUDGET, batch=16, partial=partial, progress=killing_after(2))
    head, first, second = (tmp_path / name).read_text().splitlines()
    whole = evaluate(TASK, Tiny(), Counting(), BUDGET, batch=16)
    same_rows = json.loads(second.partition(" ")[2])
    changed = second.replace('"right": true', '"right": false').replace('"adversarial"', '"adversarial" ')
    lines = [*WRONG, second[:-5], changed, second.replace(" ", "", 1), json.dumps(same_rows), head]
    # Whoever makes the checksum as well is not believed either, as long as the form is another.
    lines += [f"{_checksum(line.encode())} {line}" for line in WRONG[:-2]]
    assert len(set(lines)) == len(lines)
    (tmp_path / name).write_text("\n".join([head, *lines, first]) + "\n")
    Counting.seen.clear()
    same(whole, evaluate(TASK, Tiny(), Counting(), BUDGET, batch=16, partial=partial))
    assert len(Counting.seen) == 40 - 16, "the whole line counts, and no other"
    for broken in ("", "\xff\n", f"{first}\n{second}\n", f"{head[1:]}\n{first}\n"):
        (tmp_path / name).write_text(broken, "latin-1")
        Counting.seen.clear()
        same(whole, evaluate(TASK, Tiny(), Counting(), BUDGET, batch=16, partial=partial))
        assert len(Counting.seen) == 40, broken


def test_what_another_question_left_is_not_taken(tmp_path: Path) -> None:
    partial = tmp_path / "report.part"
    with pytest.raises(Killed):
        evaluate(TASK, Tiny(), ATTACK, BUDGET, batch=16, partial=partial, progress=killing_after(2))
    other = evaluate(TASK, Tiny(), ATTACK, Linf(1 / 255), partial=partial)
    same(other, evaluate(TASK, Tiny(), ATTACK, Linf(1 / 255)))


@dataclasses.dataclass(frozen=True)
class Renamed(Dataset):
    """Data whose samples a test may change behind the same word."""

    rows: ClassVar[list[int]] = []

    names = tuple(Scenes("color").names)

    def __len__(self) -> int:
        return len(self.rows)

    def id(self, index: int) -> str:
        return f"s{self.rows[index]}"

    def image(self, index: int) -> torch.Tensor:
        return Scenes("color").image(self.rows[index])

    def labels(self) -> torch.Tensor:
        return Scenes("color").labels()[self.rows]


def test_a_row_is_taken_for_its_sample_and_not_for_its_place(tmp_path: Path) -> None:
    task, partial = ZeroShot(Renamed()), tmp_path / "part"
    Renamed.rows[:] = range(1, 13)
    with pytest.raises(Killed):
        evaluate(task, Tiny(), ATTACK, BUDGET, batch=4, partial=partial, progress=killing_after(2))
    Renamed.rows[:] = [0, 13, *range(2, 11)]  # two came before the others, and two of those that were asked are gone
    after = evaluate(task, Tiny(), ATTACK, BUDGET, batch=4, partial=partial)
    assert after.outcomes.id == tuple(f"s{row}" for row in Renamed.rows)
    same(evaluate(task, Tiny(), ATTACK, BUDGET), after)


def test_samples_of_one_id_are_refused() -> None:
    Renamed.rows[:] = [3, 4, 3]
    with pytest.raises(CrossguardError, match=r"two samples of the data have the same id \('s3'\)"):
        evaluate(ZeroShot(Renamed()), Tiny())


def test_outcomes_are_kept_until_the_report_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise CrossguardError("no space left")

    out = tmp_path / "report.json"
    with monkeypatch.context() as patch:
        patch.setattr(Report, "save", full)
        with pytest.raises(CrossguardError, match="no space"):
            evaluate(TASK, Tiny(), Counting(), BUDGET, out=out)
    assert [path.name for path in tmp_path.iterdir()] == [".report.json.part.0"]
    Counting.seen.clear()
    made = evaluate(TASK, Tiny(), Counting(), BUDGET, out=out)
    assert not Counting.seen, "what was known was asked again"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    same(Report.load(out), made)


def test_a_file_of_outcomes_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CrossguardError, match="cannot be written"):
        evaluate(TASK, Tiny(), ATTACK, BUDGET, partial=tmp_path / "file" / "report.part")


@pytest.mark.parametrize("form", ["safetensors", "png"])
def test_kept_images_are_judged_again_as_they_were(tmp_path: Path, form: str) -> None:
    made = evaluate(TASK, Tiny(), ATTACK, Linf(4.4 / 255), batch=16, keep=tmp_path, keep_as=form)
    again = evaluate(ZeroShot(Kept(str(tmp_path))), Tiny(), batch=40)
    assert again.outcomes.id == made.outcomes.id and np.array_equal(again.outcomes.label, made.outcomes.label)
    (note,) = [note for note in made.notes if "rounded to 8 bits" in note]
    if form == "safetensors":
        assert np.array_equal(again.outcomes.clean, made.outcomes.adversarial)
    else:
        kept = np.asarray(again.outcomes.clean) == again.outcomes.label
        left = 100 * np.mean(kept & (np.asarray(made.outcomes.clean) == made.outcomes.label))
        assert f"leave {left:.1f} %" in note
    assert f"instead of {100 * made.robust_accuracy:.1f} %" in note
    assert "stay inside" not in " ".join(made.notes), "4.4/255 is rounded to 4/255, which stays in the budget"
    data = Kept(str(tmp_path))
    assert data.image(3).dtype == torch.uint8 and len(data) == 40


def test_rounding_out_of_the_budget_is_said(tmp_path: Path) -> None:
    report = evaluate(TASK, Tiny(), ATTACK, Linf(1.6 / 255), limit=8, keep=tmp_path)
    (note,) = [note for note in report.notes if "stay inside" in note]
    assert "has size 2/255 in a budget of 1.6/255" in note
    whole = evaluate(TASK, Tiny(), ATTACK, Linf(1 / 255), limit=8, keep=tmp_path, overwrite=True)
    assert "8 bits" not in " ".join(whole.notes), "nothing is lost by rounding, so nothing is said"


def test_kept_texts_are_the_rewritten_ones(tmp_path: Path) -> None:
    attack, budget = Independent(ATTACK, Substitute()), Both(BUDGET, Words(1))
    made = evaluate(TASK, Tiny(), attack, budget, keep=tmp_path)
    again = evaluate(ZeroShot(Kept(str(tmp_path))), Tiny())
    assert np.array_equal(again.outcomes.clean, made.outcomes.adversarial)
    clean = Kept(str(tmp_path), rewritten=False).prompts()
    assert clean.texts == TASK.data.prompts().texts != Kept(str(tmp_path)).prompts().texts


def test_an_evaluation_that_keeps_is_continued_too(tmp_path: Path) -> None:
    keep, partial = tmp_path / "kept", tmp_path / "report.part"
    with pytest.raises(Killed):
        evaluate(TASK, Tiny(), ATTACK, BUDGET, batch=16, partial=partial, keep=keep, progress=killing_after(1))
    with pytest.raises(CrossguardError, match="finished"):
        len(Kept(str(keep)))
    made = evaluate(TASK, Tiny(), ATTACK, BUDGET, batch=7, partial=partial, keep=keep)
    again = evaluate(ZeroShot(Kept(str(keep))), Tiny())
    assert np.array_equal(again.outcomes.clean, made.outcomes.adversarial)


def test_a_killed_run_leaves_no_index_over_the_images_of_two_runs(tmp_path: Path) -> None:
    evaluate(TASK, Tiny(), ATTACK, BUDGET, batch=16, keep=tmp_path)
    with pytest.raises(Killed):
        evaluate(TASK, Tiny(), ATTACK, Linf(0.5), batch=16, keep=tmp_path, progress=killing_after(1), overwrite=True)
    assert [path.name for path in tmp_path.glob("images-*")] == ["images-000000.safetensors"]
    with pytest.raises(CrossguardError, match="finished"):
        len(Kept(str(tmp_path)))


def test_what_a_stopped_evaluation_keeps_is_neither_mixed_nor_taken_for_there(tmp_path: Path) -> None:
    keep, partial = tmp_path / "kept", tmp_path / "part"
    with pytest.raises(Killed):
        evaluate(TASK, Tiny(), ATTACK, BUDGET, batch=16, partial=partial, keep=keep, progress=killing_after(1))
    with pytest.raises(CrossguardError, match=r"kept for another question \(seed: 0 there, 1 here\)"):
        evaluate(TASK, Tiny(), ATTACK, BUDGET, keep=keep, seed=1)
    for file in keep.iterdir():
        file.unlink()
    made = evaluate(TASK, Tiny(), ATTACK, BUDGET, batch=16, partial=partial, keep=keep)
    again = evaluate(ZeroShot(Kept(str(keep))), Tiny())
    assert np.array_equal(again.outcomes.clean, made.outcomes.adversarial), "the first images were thought to be there"


def stopped(keep: Path, batches: int = 2, **other: Any) -> None:
    asked = {"attack": Counting(), "budget": BUDGET, "batch": 8} | other
    with pytest.raises(Killed):
        evaluate(TASK, Tiny(), keep=keep, progress=killing_after(batches), **asked)


def kept_images(keep: Path) -> tuple[dict[str, Any], list[torch.Tensor]]:
    data = Kept(str(keep))
    return data._index, [data.stored(index) for index in range(len(data))]


@pytest.fixture(scope="module")
def kept_whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, evaluate(TASK, Tiny(), Counting(), BUDGET, batch=8, keep=folder)


def delete_folder(keep: Path) -> None:
    shutil.rmtree(keep)


def delete_file(keep: Path) -> None:
    (keep / "images-000008.safetensors").unlink()


def keep_another(keep: Path) -> None:
    evaluate(TASK, Tiny(), PGD(steps=1), Linf(1 / 255), limit=16, batch=8, keep=keep, overwrite=True)
    (keep / ".outcomes.part.0").write_bytes((keep.parent / "kept-aside").read_bytes())


def swap_image(keep: Path) -> None:
    (keep / "images-000008.safetensors").write_bytes((keep / "images-000000.safetensors").read_bytes())


def link_image(keep: Path) -> None:
    path = keep / "images-000008.safetensors"
    path.symlink_to(path.rename(keep.parent / "elsewhere.safetensors"))


def lose_journal(keep: Path) -> None:
    (keep / ".kept.json").unlink()


def lose_outcomes(keep: Path) -> None:
    (keep / ".outcomes.part.0").unlink()


@pytest.mark.parametrize(
    ("harm", "asked"),
    [(delete_folder, 40), (delete_file, 32), (keep_another, 40), (swap_image, 32), (link_image, 32), (lose_journal, 24),
     (lose_outcomes, 40)],
)  # fmt: skip
def test_what_is_kept_belongs_to_its_question_and_its_folder(
    tmp_path: Path, kept_whole: tuple[Path, Report], capsys: pytest.CaptureFixture[str], harm: Any, asked: int
) -> None:
    keep, (folder, report) = tmp_path / "kept", kept_whole
    stopped(keep)
    (tmp_path / "kept-aside").write_bytes((keep / ".outcomes.part.0").read_bytes())
    harm(keep)
    capsys.readouterr()
    Counting.seen.clear()
    same(report, evaluate(TASK, Tiny(), Counting(), BUDGET, batch=8, keep=keep, overwrite=harm is keep_another))
    assert len(Counting.seen) == asked
    said = f"{asked - 24} of the 16 samples that were asked about are asked again: their images are not in {keep}"
    assert (said in capsys.readouterr().err) == (harm in (delete_file, keep_another, swap_image, link_image))
    (index, images), (index_whole, images_whole) = kept_images(keep), kept_images(folder)
    assert index == index_whole and all(map(torch.equal, images, images_whole))
    assert {path.name for path in keep.iterdir()} == {path.name for path in folder.iterdir()}


def test_only_what_we_wrote_and_an_index_of_ours_names_is_removed(tmp_path: Path) -> None:
    keep, outside = tmp_path / "kept", tmp_path / "outside"
    evaluate(TASK, Tiny(), ATTACK, BUDGET, limit=4, keep=keep, keep_as="png")
    outside.mkdir()
    mine = [keep / name for name in ("thesis.tex", "report.json", "999999.png", "000001.PNG", "images-1.safetensors")]
    mine += [outside / "000002.png", outside / "linked.png"]
    for path in mine:
        path.write_text("mine")
    linked = keep / Kept(str(keep)).samples[0]["file"]
    linked.unlink()
    linked.symlink_to(outside / "linked.png")
    index = json.loads((keep / "kept.json").read_text())
    named = [
        "thesis.tex",
        "report.json",
        "000001.PNG",
        "../outside/000002.png",
        str(outside / "000002.png"),
        "kept.json",
    ]
    index["samples"] += [{"id": name, "file": name, "row": 0} for name in named]
    (keep / "kept.json").write_text(json.dumps(index))
    evaluate(TASK, Tiny(), ATTACK, Linf(1 / 255), limit=4, keep=keep, overwrite=True)
    assert all(path.read_text() == "mine" for path in mine)
    assert {path.name for path in keep.iterdir()} == {
        *(path.name for path in mine if path.parent == keep), "kept.json", ".lock", Kept(str(keep)).samples[0]["file"],
    }  # fmt: skip


def test_files_of_a_stopped_evaluation_do_not_stay(tmp_path: Path) -> None:
    stopped(tmp_path, 3)
    evaluate(TASK, Tiny(), Counting(), BUDGET, batch=20, keep=tmp_path)  # 16 more than what is known
    stopped(tmp_path / "b", 3)
    (tmp_path / "b" / ".outcomes.part.0").unlink()
    evaluate(TASK, Tiny(), Counting(), BUDGET, batch=20, keep=tmp_path / "b")
    stopped(tmp_path / "c", 1, limit=10)
    evaluate(TASK, Tiny(), Counting(), BUDGET, limit=10, keep=tmp_path / "c", keep_as="png")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        ".lock", "images-000000.safetensors", "images-000020.safetensors", "kept.json",
    ]  # fmt: skip
    assert {path.suffix for path in (tmp_path / "c").iterdir()} == {".png", ".json", ""}
    assert len(list((tmp_path / "c").iterdir())) == 10 + 2
    for folder in (tmp_path, tmp_path / "b", tmp_path / "c"):
        assert not [name for name in folder.glob(".*") if name.name != ".lock"]


def test_a_folder_is_kept_in_by_one_evaluation_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(TASK, Tiny(), ATTACK, BUDGET, limit=4, keep=tmp_path)
    found = list[Report]()
    thread = threading.Thread(
        target=lambda: found.append(evaluate(TASK, Tiny(), ATTACK, BUDGET, limit=4, keep=tmp_path))
    )
    with turns.owned(tmp_path, "keeps images"):
        thread.start()
        thread.join(0.5)
        assert not found and thread.is_alive()
    thread.join()
    assert (
        len(found) == 1
        and f"waiting for process {os.getpid()} that keeps images in {tmp_path} since " in capsys.readouterr().err
    )


@pytest.mark.parametrize("after", [1, 5])
def test_a_folder_that_is_removed_meanwhile_is_one_sentence(tmp_path: Path, after: int) -> None:
    keep = tmp_path / "kept"

    def removing(done: int, total: int) -> None:
        if done == 8 * after:
            shutil.rmtree(keep)

    with pytest.raises(CrossguardError, match=r"kept.* (was removed|cannot be written)"):
        evaluate(TASK, Tiny(), ATTACK, BUDGET, batch=8, keep=keep, progress=removing)
    assert not (keep / "kept.json").exists()


def test_data_in_another_order_takes_no_name_of_a_kept_file(tmp_path: Path) -> None:
    task = ZeroShot(Renamed())
    Renamed.rows[:] = range(1, 13)
    with pytest.raises(Killed):
        evaluate(task, Tiny(), ATTACK, BUDGET, batch=4, keep=tmp_path, progress=killing_after(1))
    Renamed.rows[:] = [0, 13, *range(2, 11)]
    made = evaluate(task, Tiny(), ATTACK, BUDGET, batch=4, keep=tmp_path)
    again = evaluate(ZeroShot(Kept(str(tmp_path))), Tiny())
    assert again.outcomes.id == made.outcomes.id and np.array_equal(again.outcomes.clean, made.outcomes.adversarial)
    assert [sample["index"] for sample in Kept(str(tmp_path)).samples] == list(range(11))


def test_the_fingerprint_of_kept_images_is_that_of_their_content(tmp_path: Path) -> None:
    evaluate(TASK, Tiny(), ATTACK, BUDGET, limit=4, batch=2, keep=tmp_path)
    one, two = sorted(tmp_path.glob("images-*"))
    before, whole = Kept(str(tmp_path)).fingerprint, one.read_bytes()
    one.write_bytes(two.read_bytes())
    assert len(whole) == one.stat().st_size
    with pytest.raises(CrossguardError, match=f"{one.name} is not the file that was kept there"):
        Kept(str(tmp_path)).fingerprint  # noqa: B018
    index = json.loads((tmp_path / "kept.json").read_text())
    (tmp_path / "kept.json").write_text(json.dumps({name: index[name] for name in index if name != "files"}))
    other = Kept(str(tmp_path)).fingerprint
    one.write_bytes(whole)
    assert len({before, other, Kept(str(tmp_path)).fingerprint}) == 3
    save_file({"images": load_file(one)["images"] * 300}, one)
    with pytest.raises(CrossguardError, match=rf"{one.name} is damaged \(its pixels are not in \[0, 1\]"):
        Kept(str(tmp_path)).stored(0)
    one.unlink()
    with pytest.raises(CrossguardError, match=f"{one.name} cannot be read: no such file"):
        Kept(str(tmp_path)).fingerprint  # noqa: B018


def test_an_index_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    keep = tmp_path / "kept"
    evaluate(TASK, Tiny(), ATTACK, BUDGET, limit=4, keep=keep)
    (keep / "kept.json").rename(tmp_path / "private.json")
    (keep / "kept.json").symlink_to(tmp_path / "private.json")
    with pytest.raises(CrossguardError, match="a link that leads out of"):
        len(Kept(str(keep)))


def test_images_are_not_kept_over_the_ones_that_are_asked_about(tmp_path: Path) -> None:
    evaluate(TASK, Tiny(), ATTACK, BUDGET, limit=4, keep=tmp_path)
    with pytest.raises(CrossguardError, match="another folder"):
        evaluate(ZeroShot(Kept(str(tmp_path))), Tiny(), ATTACK, BUDGET, keep=tmp_path)
    assert len(Kept(str(tmp_path))) == 4


def test_images_are_not_kept_among_those_of_somebody_else(tmp_path: Path) -> None:
    """In a folder of a class they would be samples of that class the next time."""
    red, mine = tmp_path / "red", tmp_path / "mine"
    for folder in (red, mine):
        folder.mkdir()
        (folder / "note.txt").write_text("no image")
    (red / "000001.PNG").write_bytes(b"mine")
    with pytest.raises(CrossguardError, match=r"holds images that no evaluation kept \(000001.PNG\)"):
        evaluate(TASK, Tiny(), ATTACK, BUDGET, limit=4, keep=red, keep_as="png")
    assert {path.name for path in red.iterdir()} == {"note.txt", "000001.PNG"}
    for _ in range(2):  # its own images, the second time, are in no way
        evaluate(TASK, Tiny(), ATTACK, BUDGET, limit=4, keep=mine, keep_as="png")
    (mine / "kept.json").write_text("broken")
    evaluate(TASK, Tiny(), ATTACK, BUDGET, limit=4, keep=mine, keep_as="png")
    assert len(Kept(str(mine))) == 4


def test_other_files_beside_the_outcomes_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "report.2024-paper.json").write_text("mine")
    evaluate(TASK, Tiny(), None, limit=4, partial=tmp_path / "report")
    assert [path.name for path in tmp_path.iterdir()] == ["report.2024-paper.json"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "no kept images"),
        ("{", "broken"),
        ('{"samples": []}', "broken"),
        ('{"samples": 3, "names": [], "texts": [], "clean_texts": []}', "broken"),
        ('{"samples": [{"id": "a"}], "names": [], "texts": [], "clean_texts": []}', "broken"),
    ],
)
def test_a_folder_without_kept_images_is_one_sentence(tmp_path: Path, content: str | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "kept.json").write_text(content)
    with pytest.raises(CrossguardError, match=sentence):
        len(Kept(str(tmp_path)))


def test_a_damaged_kept_image_is_one_sentence(tmp_path: Path) -> None:
    evaluate(TASK, Tiny(), ATTACK, BUDGET, limit=8, keep=tmp_path)
    (shard,) = tmp_path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CrossguardError, match="damaged"):
        evaluate(ZeroShot(Kept(str(tmp_path))), Tiny())
    with pytest.raises(CrossguardError, match="kept as 'jpeg'"):
        evaluate(TASK, Tiny(), ATTACK, BUDGET, keep=tmp_path, keep_as="jpeg")


CASES = {
    "pairs": ("Retrieval(Scenes('relation'))", "CoAttack(PGD(steps=1))", 140),
    "names": ("ZeroShot(Scenes('color'))", "Independent(PGD(steps=1), Substitute())", 20),
}
SHARED = f"""
import sys
from crossguard import Both, Linf, Tiny, Words, evaluate, words
from crossguard.cli import main
from crossguard.processes import joined

folder = sys.argv[1]
try:
    main(["eval", "--task", "ZeroShot(Scenes('color', count=41))", "--model", "Tiny()", "--attack", "PGD(steps=3)",
          "--budget", "Linf(5/255)", "--batch", "16", "--out", folder + "/report.json", "--keep", folder + "/kept"])
except SystemExit as end:
    assert not end.code
group = joined()
for name, (task, attack, limit) in {CASES}.items():
    task, attack = map(words.build, (task, attack))
    evaluate(task, Tiny(), attack, Both(Linf(5 / 255), Words(1)), limit=limit, out=folder + "/two-" + name + ".json")
try:
    group.each([1, 0], lambda item: 1 // item)
except Exception as error:
    with open(folder + "/error-" + str(group.rank), "w") as file:  # what two processes print is mixed
        file.write(type(error).__name__ + " " + str(error))
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What two processes wrote, which `torchrun` started once for all that they do together, and what they printed."""
    folder = tmp_path_factory.mktemp("shared")
    code, out = folder / "shared.py", folder / "out"
    code.write_text(SHARED)
    out.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(code), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_two_processes_share_an_evaluation_and_end_in_the_same_report(tmp_path: Path, shared: tuple[Path, str]) -> None:
    folder, said = shared
    assert said.count("clean accuracy") == 1
    alone = evaluate(ZeroShot(Scenes("color", count=41)), Tiny(), ATTACK, BUDGET, keep=tmp_path)
    same(alone, Report.load(folder / "report.json"))
    samples = json.loads((folder / "kept" / "kept.json").read_text())["samples"]
    assert [sample["id"] for sample in samples] == list(alone.outcomes.id)
    left = {"kept", "report.json", *(f"two-{name}.json" for name in CASES), "error-0", "error-1"}
    assert {path.name for path in folder.iterdir()} == left


def test_what_happens_once_is_shared_and_the_failure_of_one_is_told_to_all(shared: tuple[Path, str]) -> None:
    folder, _ = shared
    first, second = ((folder / f"error-{rank}").read_text() for rank in range(2))
    assert first == "CrossguardError process 1 of 2 failed: integer division or modulo by zero"
    assert second.startswith("ZeroDivisionError")
    for name, (task, attack, limit) in CASES.items():
        two = Report.load(folder / f"two-{name}.json")
        one = evaluate(words.build(task), Tiny(), words.build(attack), Both(BUDGET, Words(1)), limit=limit)
        assert one.question == two.question and one.notes == two.notes and one.texts == two.texts
        for column in set(one.outcomes.columns) - {"clean_margin", "adversarial_margin", "size"}:
            assert np.array_equal(one.outcomes.columns[column], two.outcomes.columns[column]), (name, column)


def test_outcomes_of_an_older_format_are_asked_again(tmp_path: Path) -> None:
    part = tmp_path / "report.part"
    asked = question(TASK, Tiny(), ATTACK, BUDGET)
    old = [{"question": asked, "kept": "None"}, {"rows": {"0": {"rounded": True}}, "seconds": 1.0}]
    (tmp_path / "report.part.0").write_text("".join(json.dumps(line) + "\n" for line in old))
    report = evaluate(TASK, Tiny(), ATTACK, BUDGET, partial=part, keep=tmp_path / "kept")
    assert len(report.outcomes) == len(TASK) and not list(tmp_path.glob("report.part*"))
