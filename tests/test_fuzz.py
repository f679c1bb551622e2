"""Mutated files and odd words end in an object or in one sentence, and in nothing else: no other error, no hang, no
full memory.

A short slice runs always, drawn anew by whoever sets CROSSGUARD_FUZZ_SEED; thousands with `-m slow`.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

import crossguard
from crossguard import (
    PGD,
    Captions,
    Experiment,
    Images,
    Kept,
    Linf,
    Parquet,
    Report,
    Retrieval,
    Scenes,
    Shards,
    Tiny,
    ZeroShot,
    build,
    evaluate,
    show,
    words,
)
from crossguard.attacks.candidates import MaskedLM
from crossguard.data import Dataset
from crossguard.errors import CrossguardError
from crossguard.models.fresh import Fresh
from crossguard.models.huggingface import HuggingFace
from crossguard.table import Answers, pretty, render
from fixtures import save_clip

ASSETS = Path(crossguard.__file__).parent / "assets"
SEED = int(os.environ.get("CROSSGUARD_FUZZ_SEED", "0"))

# What stands in JSON where something else is expected.
ODD: tuple[object, ...] = (
    None, True, -1, 0, 1, 3, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e308, float("nan"), float("inf"),
    "", "x", "1", "../../x", "/etc/passwd", "\ud800", "\0", "x\ny", "x" * 5000, "evil.Evil", "somebody/else",
    [], [[]], [None], ["x"], [1, 2, 3], {}, {"a": 1}, {"auto_map": {"AutoModel": "evil.Evil"}},
)  # fmt: skip


def bytewise(dice: random.Random, data: bytes) -> bytes:
    """Some bytes changed, cut off, put in, taken out or set to zero; the beginning, where headers are, more often."""
    out = bytearray(data)
    at = dice.randrange(min(len(out), dice.choice([64, 600, len(out)])) or 1) if out else 0
    match dice.choice("changed cut in out zero".split()):  # noqa: SIM905
        case "changed":
            for _ in range(dice.choice([1, 1, 2, 8, 40])):
                spot = dice.randrange(min(len(out), dice.choice([64, 600, len(out)])) or 1)
                out[spot : spot + 1] = dice.randbytes(1)
        case "cut":
            del out[at:]
        case "in":
            out[at:at] = dice.randbytes(dice.choice([1, 4, 100]))
        case "out":
            del out[at : at + dice.choice([1, 4, 100])]
        case _:
            size = dice.choice([8, 16, 512])
            out[at : at + size] = bytes(len(out[at : at + size]))
    return bytes(out)


def inside(dice: random.Random, told: object) -> object:
    """JSON with one of its values replaced, removed, wrapped or doubled."""
    spots: list[tuple[object, object]] = []
    nodes = [told]
    while nodes:
        node = nodes.pop()
        held = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
        for key, value in held if len(held) < 60 else dice.sample(held, 60):  # else all are words of a vocabulary
            spots.append((node, key))
            nodes.append(value)
    if not spots or dice.random() < 0.03:
        return dice.choice(ODD)
    node, key = dice.choice(spots)
    assert isinstance(node, dict | list)
    chance = dice.random()
    if chance < 0.15:
        del node[key]  # type: ignore[arg-type]
    elif chance < 0.2 and isinstance(node, dict):
        node[str(dice.choice(ODD))[:9]] = node[key]
    elif chance < 0.25:
        node[key] = [node[key]]  # type: ignore[index]
    elif chance < 0.3 and type(node[key]) is int:  # type: ignore[index]
        node[key] *= dice.choice([-1, 2, 1000, 10**6])  # type: ignore[index]
    else:
        node[key] = dice.choice(ODD)  # type: ignore[index]
    return told


def mutated(dice: random.Random, data: bytes, name: str) -> bytes:
    """A file with something wrong in it: in its JSON if it has some, else in its bytes."""
    length = int.from_bytes(data[:8], "little") if name.endswith(".safetensors") else 0
    start, body = (data[8 : 8 + length], data[8 + length :]) if length else (data, b"")
    if (name.endswith(".json") or length) and dice.random() < 0.65:
        try:
            start = json.dumps(inside(dice, json.loads(start))).encode()
        except ValueError:
            start = bytewise(dice, start)
        return len(start).to_bytes(8, "little") + start + body if length else start
    return bytewise(dice, data)


Kinds = list[tuple[Path, Callable[[Path], object]]]  # folders, and what reads them

SECONDS = 5.0  # of the processor, for one input
MEMORY = 2_000_000  # kilobytes that the process may have held at most


def survives(ask: Callable[[], object], what: str) -> bool:
    """Whether an object comes out; raises unless one does, or a sentence that a terminal can show."""
    began = time.process_time()
    try:
        ask()
        read = True
    except CrossguardError as error:
        told, read = str(error), False
        assert told.isprintable() and told, f"{what}: {told!r}"
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert time.process_time() - began < SECONDS, what
    return read


def each(count: int, seed: int, kinds: Kinds) -> Counter[bool]:
    """Mutates one file of one folder at a time, asks, and puts it back; how often an object came out, or a sentence."""
    dice = random.Random(f"{SEED}:{seed}")
    ends: Counter[bool] = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        folder, ask = kinds[number % len(kinds)]
        file = dice.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        data = file.read_bytes()
        changed = mutated(dice, data, file.name)
        file.write_bytes(changed)
        try:
            ends[survives(lambda: ask(folder), f"{file.name} of mutation {number} of {folder.name}")] += 1  # noqa: B023
        finally:
            file.write_bytes(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < max(before, MEMORY)
    return ends


# --- Checkpoints ---


def encode(folder: Path) -> None:
    network = HuggingFace(str(folder)).load()
    assert bool(network.encode_text(["a red circle", "😀 two"]).isfinite().all())


def propose(folder: Path) -> None:
    MaskedLM(str(folder)).read(["a photo of a red circle"], 5, 0.0, False)


def begin(folder: Path) -> None:
    Fresh(str(folder), widths=(8,), depths=(1,), text_width=32).load().encode_text(["a red circle"])


def checkpoints(root: Path) -> Kinds:
    """One of each kind of files: whole or in shards, with tokenizers new and old."""
    import transformers

    for name, source in (("dual", "tiny"), ("words", "masked_lm"), ("fresh", "tiny")):
        shutil.copytree(ASSETS / source, root / name)
        (root / name / "README.md").unlink()
    (root / "fresh" / "model.safetensors").unlink()
    save_clip(root / "clip")
    transformers.CLIPModel.from_pretrained(root / "clip").save_pretrained(root / "shards", max_shard_size="40KB")
    shutil.copy(root / "clip" / "preprocessor_config.json", root / "shards")
    tokenizer = json.loads((root / "clip" / "tokenizer.json").read_text())
    (root / "shards" / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    (root / "shards" / "merges.txt").write_text("#version: 0.2\n")
    (root / "shards" / "special_tokens_map.json").write_text(
        '{"unk_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}'
    )
    (root / "words" / "vocab.txt").write_text(
        "\n".join(json.loads((root / "words" / "tokenizer.json").read_text())["model"]["vocab"])
    )
    return [(root / name, ask) for name, ask in (
        ("dual", encode), ("words", propose), ("clip", encode), ("shards", encode), ("fresh", begin),
    )]  # fmt: skip


@pytest.mark.parametrize("count", [30, pytest.param(1500, marks=pytest.mark.slow)])
def test_checkpoints(tmp_path: Path, count: int) -> None:
    kinds = checkpoints(tmp_path)
    for folder, ask in kinds:
        ask(folder)
    each(count, 1, kinds)


# --- Data, reports and experiments ---


def picture(seed: int, form: str = "PNG", **options: Any) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (12, 10, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, form, **options)
    return content.getvalue()


def look_through(data: Dataset) -> None:
    for index in range(len(data)):
        data.id(index), data.stored(index), data.captions(index)
    _ = data.labels(), data.fingerprint, data.names and data.prompts()
    list(data.batches(4, workers=0))


def images(root: Path) -> Kinds:
    turned = Image.Exif()
    turned[0x0112] = 6
    forms = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF", "tif": "TIFF", "bmp": "BMP"}
    for number, (ending, form) in enumerate(forms.items()):
        for name in ("cat", "dog"):
            (root / name).mkdir(exist_ok=True)
            options = {"exif": turned} if form in ("PNG", "JPEG", "WEBP") else {}
            (root / name / f"{number}.{ending}").write_bytes(picture(number, form, **options))
    return [
        (root, lambda folder: look_through(Images(str(folder)))),
        (root, lambda folder: look_through(Images(str(folder), size=8, skip_broken=True))),
    ]


def tables(root: Path) -> Kinds:
    pictures = [picture(number) for number in range(4)]
    columns = {"label": [0, 1] * 2, "name": ["a", "b"] * 2, "key": list("wxyz"), "domain": ["p"] * 4}
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    nested = pa.array([{"bytes": one, "path": "x"} for one in pictures], struct)
    written = {
        "a": pa.table({"image": pictures} | columns),
        "b": pa.table({"image": nested, "caption": [["a red thing", "b"]] * 4}),
    }
    for name, table in written.items():
        (root / name).mkdir()
        pq.write_table(table, root / name / "x.parquet", compression="zstd" if name == "b" else "snappy")
    return [(root / name, lambda folder: look_through(Parquet(str(folder / "x.parquet")))) for name in written]


def shards(root: Path) -> Kinds:
    (root / "test").mkdir()
    texts = {
        "classnames.txt": "cat\ndog\n",
        "zeroshot_classification_templates.txt": "a {c}\n",
        "test/nshards.txt": "1",
    }
    for name, text in texts.items():
        (root / name).write_text(text)
    with tarfile.open(root / "test" / "0.tar", "w") as opened:
        for number in range(4):
            for ending, data in ((".png", picture(number)), (".cls", str(number % 2).encode())):
                member = tarfile.TarInfo(f"s{number}{ending}")
                member.size = len(data)
                opened.addfile(member, io.BytesIO(data))
    one = (root / "test", lambda folder: look_through(Shards(str(folder.parent))))
    return [one, one, (root, lambda folder: look_through(Shards(str(folder))))]


def captions(root: Path) -> Kinds:
    (root / "i").mkdir()
    told = {f"{number}.png": text for number, text in enumerate(("a red circle", 'a big, "blue" star', "é 😀"))}
    for number, name in enumerate(told):
        (root / "i" / name).write_bytes(picture(number))
    coco = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(told)],
        "annotations": [{"image_id": number, "caption": text} for number, text in enumerate(told.values())],
    }
    karpathy = [
        {"filename": name, "filepath": "v", "split": "test", "sentences": [{"raw": text}]}
        for name, text in told.items()
    ]
    quoted = {name: text.replace('"', '""') for name, text in told.items()}
    texts = {
        "a/x.json": json.dumps([{"image": name, "caption": [text, "b"]} for name, text in told.items()]),
        "b/x.json": json.dumps(coco),
        "c/x.json": json.dumps({"images": karpathy}),
        "d/x.txt": "".join(f"{name}#0\t{text}\n" for name, text in told.items()),
        "e/x.csv": "image,caption\n" + "".join(f'{name},"{text}"\n' for name, text in quoted.items()),
        "f/x.csv": "image_name| comment_number| comment\n"
        + "".join(f"{name}| 0| {text}\n" for name, text in told.items()),
    }
    for name, text in texts.items():
        (root / name).parent.mkdir()
        (root / name).write_text(text)

    def read(folder: Path) -> None:
        (file,) = folder.iterdir()
        data = Captions(str(root / "i"), str(file))
        look_through(data)
        Tiny().encode_text([text for index in range(len(data)) for text in data.captions(index)])

    return [((root / name).parent, read) for name in texts]


def reports(root: Path) -> Kinds:
    evaluate(ZeroShot(Scenes("shape")), Tiny(), PGD(steps=1), Linf(2 / 255), limit=3, out=root / "a.json")
    evaluate(Retrieval(Scenes("relation")), Tiny(), limit=3, out=root / "b.json")
    index = {"source": "x", "labels": {"model": {"Tiny()": "mine"}}, "cells": ["a", "c"]}
    (root / "experiment.json").write_text(json.dumps(index))

    def read(folder: Path) -> None:
        answers = Answers.load(folder)
        for form in ("markdown", "csv", "json", "latex"):
            render(answers, form)
        Console(file=io.StringIO()).print(pretty(answers))
        render(answers.pooled(), "markdown")
        render(replace(answers, crossed=True), "markdown")
        for name in ("a.json", "b.json"):
            report = Report.load(folder / name)
            str(report), repr(report), report._repr_html_()

    return [(root, read)]


def kept(root: Path) -> Kinds:
    from crossguard.look import Look, page

    asked = (ZeroShot(Scenes("shape")), Tiny(), PGD(steps=1), Linf(2 / 255))
    for form in ("safetensors", "png"):
        evaluate(*asked, limit=3, batch=2, keep=root / form, keep_as=form)

    def read(folder: Path) -> None:
        look_through(Kept(str(folder)))
        look = Look(folder)
        samples = look.pick(3, True)
        page(look, samples, *look.shots(samples))

    return [(root / form, read) for form in ("safetensors", "png")]


def experiments(root: Path) -> Kinds:
    text = """seed = 1
limit = 4
task = "ZeroShot(Scenes('shape'))"
model = { tiny = "Tiny()", bits = "coarse" }
attack = ["PGD(steps=1)", "None"]
budget = ["Linf(1/255)", "small"]
[let]
small = "Linf(2/255)"
coarse = "BitDepth(Tiny())"
"""
    (root / "a.toml").write_text(text)
    return [(root, lambda folder: Experiment.load(folder / "a.toml").cells())]


KINDS = {
    "images": (images, 120),
    "tables": (tables, 200),
    "shards": (shards, 120),
    "captions": (captions, 90),
    "reports": (reports, 50),
    "kept": (kept, 40),
    "experiments": (experiments, 80),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "count", "seed"),
    [(name, count, 0) for name, (_, count) in KINDS.items()]
    + [pytest.param(name, 350, seed, marks=pytest.mark.slow) for name in KINDS for seed in (1, 2, 3)],
)
def test_files(name: str, count: int, seed: int, tmp_path: Path) -> None:
    kinds = KINDS[name][0](tmp_path)
    for folder, ask in kinds:
        ask(folder)
    ends = each(count, seed, kinds)
    assert ends[True] and ends[False]
    for folder, ask in kinds:  # whole again, and read again
        ask(folder)


# --- Words ---

GOOD = (
    "PGD(steps=10, step=0.1, goal=Targeted(3))", "Both(Linf(8/255), Words(1))",
    "ZeroShot(Scenes('object', 'test'))", "Joint(PGD(steps=20), Substitute(collisions='forbid'))",
    "Worst((PGD(), APGD(), Square()))", "Tiny", "(1, 'a', -2.5e3)",
    "MMCoA(steps=10, optimizer=AdamW(lr=2e-3), budget=Both(Linf(1/255), Words(1)))", "BitDepth(Tiny(), 3)", "None",
    "Fit(FTStandard(steps=1), Tiny(), Scenes())", "Concat((Scenes('shape'), Scenes('color')), size=32)",
    "EOT(PGD(), 4)", "Captions('a', 'b.json', split='test')", "Fresh(widths=(8, 16), depths=(1, 1))",
    "Subset(Scenes(), 40)",
)  # fmt: skip
STRANGE = (
    "__import__('os').system('true')", "().__class__.__mro__[1].__subclasses__()", "f'{1}'", "[x for x in (1, 2)]",
    "(y := 3)", "b'x'", "lambda: 1", "1 if True else 2", "PGD(**{'steps': 1})", "PGD(*[1])", "...", "1j", "{1: 2}",
    "PGD.__init__", "PGD()()", "PGD()[0]", "evaluate(1, 2)", "eval('1')", "open('x')", "getattr(PGD, 'x')", "not 1",
    "1 < 2", "~1", "2 ** 9999", "1 << 999999", "'a' * 99999999", "'%s' % 1", "'a' 'b'", "1_000", "0x" + "f" * 9000,
    "9" * 4301, "1e400", "-1e400", "1e308 * 10", "1/3e-320", "nan", "(" * 9000, "-" * 9000 + "1", "1" + "+1" * 4900,
    "[" * 300 + "]" * 300, "EOT(" * 39 + "PGD()" + ")" * 39, "a" * 9999, "a." * 4000 + "b", "a[" * 2000, "'\\x00'",
    "'\\ud800'", "'\\u202e'", "PGD(steps=\u0663)", "ＰＧＤ()", "PGD\u200b()", "PGD()\n", "PGD(\n)", "PGD()#x",
    "PGD();PGD()", "x = 1", "\0", "\x1b[31m", "\\", "'''", "PGD(steps=1, steps=2)", "Scenes(count=99999999999999)",
    "Linf(1e308)", "Linf(5e-324)", "PGD(steps=9223372036854775808)", "HuggingFace('../..')", "Task()", "Attack()",
    "CrossguardError('x')", "__builtins__", "VOCABULARY", "sys", "", " ", "1+" * 4000,
)  # fmt: skip
BITS = (
    *"()[]{},='\".*+-/%:@\\\n\t #01", "**", "//", ":=", "8/255", "1e9", "9" * 30, "None", "True", "f'", "b'",
    "lambda", "for x in", "if", "not", "await", "__class__", "\0", "\ud800", "é", "漢", "\u202e", "🙂", "steps",
    "goal", "eps",
)  # fmt: skip
VALUES = ("1", "0", "-1", "0.5", "8/255", "'x'", "''", "None", "True", "()", "(1, 2)", "1e300", "9223372036854775807")


def odd_words(dice: random.Random) -> Iterator[str]:
    """Texts that may be words or not, without end."""
    known = [name for name in crossguard.VOCABULARY if words.is_word(getattr(crossguard, name))]

    def value(depth: int) -> str:
        return dice.choice(VALUES) if depth > 3 or dice.random() < 0.5 else call(depth + 1)

    def call(depth: int) -> str:
        name = dice.choice(known)
        fields = [one for one in words.fields(getattr(crossguard, name)) if dice.random() < 0.5]
        return f"{name}({', '.join(f'{one.name}={value(depth)}' for one in fields)})"

    while True:
        chance = dice.random()
        if chance < 0.1:
            yield dice.choice(STRANGE)
        elif chance < 0.2:
            yield "".join(dice.choice((*BITS, *known)) for _ in range(dice.randint(1, 40)))
        elif chance < 0.25:
            yield "".join(chr(dice.choice((dice.randint(0, 127), dice.randint(0, 0x10FFFF)))) for _ in range(30))
        elif chance < 0.4:
            yield call(0)
        else:
            text = dice.choice(GOOD)
            for _ in range(dice.randint(1, 6)):
                at = dice.randint(0, len(text))
                parts = (
                    text[:at] + dice.choice(BITS) + text[at:],
                    text[:at] + text[at + dice.randint(1, 4) :],
                    text[:at] + dice.choice(GOOD)[dice.randint(0, 20) :],
                    text[:at] + dice.choice(known) + text[at:],
                    text[:at] + text[at:] * dice.randint(2, 20),
                )
                text = dice.choice(parts)
            yield text


def built(count: int, seed: int) -> Counter[bool]:
    """How many words were built, and how many refused."""
    texts = odd_words(random.Random(f"{SEED}:{seed}"))
    ends: Counter[bool] = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def again(text: str) -> None:
        made = build(text)
        assert build(show(made)) == made and build(show(made, short=True)) == made

    for _ in range(count):
        text = next(texts)
        ends[survives(lambda: again(text), f"the word {text[:200]!r}")] += 1  # noqa: B023
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < max(before, MEMORY)
    return ends


def test_odd_words() -> None:
    ends = built(4000, 0)
    assert ends[True] > 100 and ends[False] > 1000


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_many_odd_words_run_nothing(seed: int) -> None:
    ran: list[str] = []
    building = False

    def watch(event: str, given: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(given[1], str) and set(given[1]) & set("wax+")
        if building and (writes or event.startswith(("os.system", "os.exec", "os.spawn", "subprocess.", "socket."))):
            ran.append(f"{event} {given}")

    built(1000, 0)  # what is imported on the way may be written as byte code
    sys.addaudithook(watch)
    building = True
    try:
        assert built(70_000, seed).total() == 70_000
    finally:
        building = False
    assert not ran
