"""Mutated files end in an object or in one sentence, and in nothing else.

A short slice runs always, drawn anew by whoever sets CROSSGUARD_FUZZ_SEED; thousands with `-m slow`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import crossguard
from crossguard.attacks.candidates import MaskedLM
from crossguard.errors import CrossguardError
from crossguard.models.fresh import Fresh
from crossguard.models.huggingface import HuggingFace
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


def survives(ask: Callable[[], object], what: str) -> None:
    """Raises unless an object comes out, or a sentence that a terminal can show."""
    try:
        ask()
    except CrossguardError as error:
        told = str(error)
        assert told.isprintable() and len(told) <= 300, f"{what}: {told!r}"
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def each(count: int, seed: int, kinds: list[tuple[Path, Callable[[Path], object]]]) -> None:
    """Mutates one file of one folder at a time, asks, and puts it back."""
    dice = random.Random(f"{SEED}:{seed}")
    for number in range(count):
        folder, ask = kinds[number % len(kinds)]
        file = dice.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        data = file.read_bytes()
        changed = mutated(dice, data, file.name)
        file.write_bytes(changed)
        try:
            survives(lambda: ask(folder), f"{file.name} of mutation {number} of {folder.name}")  # noqa: B023
        finally:
            file.write_bytes(data)


# --- Checkpoints ---


def encode(folder: Path) -> None:
    network = HuggingFace(str(folder)).load()
    assert bool(network.encode_text(["a red circle", "😀 two"]).isfinite().all())


def propose(folder: Path) -> None:
    MaskedLM(str(folder)).read(["a photo of a red circle"], 5, 0.0, False)


def begin(folder: Path) -> None:
    Fresh(str(folder), widths=(8,), depths=(1,), text_width=32).load().encode_text(["a red circle"])


def checkpoints(root: Path) -> list[tuple[Path, Callable[[Path], object]]]:
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
