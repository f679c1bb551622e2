"""The generated scenes: the same everywhere, disjoint splits, true captions, synonyms without rivals."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection
from itertools import pairwise

import pytest
import torch

from crossguard.datasets import embedded, grammar
from crossguard.datasets.embedded import Scenes
from crossguard.errors import CrossguardError

CLASSES = ("shape", "color", "texture", "object", "texture_object")
EVERYTHING = (*CLASSES, "relation")


@pytest.fixture(scope="module")
def written() -> list[str]:
    """What a model that was trained on the world has read."""
    return list(grammar.sentences("train", 6_000))


def mentions(caption: str, canonical: str) -> bool:
    return bool({canonical, *grammar.ALIASES.get(canonical, ())} & set(caption.split()))


def named(caption: str, canonicals: Collection[str]) -> set[str]:
    return {canonical for canonical in grammar.ALIASES if canonical in canonicals and mentions(caption, canonical)}


def combinations(caption: str) -> set[tuple[str, str]]:
    """Every color directly before a shape, by canonical names."""
    colors = {word: color for color, aliases in grammar.COLORS.items() for word in (color, *aliases)}
    shapes = {word: shape for shape, aliases in grammar.SHAPES.items() for word in (shape, *aliases)}
    words = caption.split()
    return {(colors[a], shapes[b]) for a, b in pairwise(words) if a in colors and b in shapes}


def test_class_sets_have_unique_names() -> None:
    counts = {classes: len(Scenes(classes).names) for classes in EVERYTHING}
    assert counts == {
        "shape": 12,
        "color": 10,
        "texture": 5,
        "object": 120,
        "texture_object": 60,
        "relation": 0,
    }
    for classes in CLASSES:
        names = Scenes(classes).names
        assert len(set(names)) == len(names)
    assert "red circle" in Scenes().names
    assert "striped circle" in Scenes("texture_object").names


@pytest.mark.parametrize("style", grammar.STYLES)
def test_images_do_not_depend_on_instance_or_order(style: str) -> None:
    forward = [Scenes(style=style).image(index) for index in range(20)]
    embedded._cache.cache_clear()
    data = Scenes("shape", style=style, count=40)
    backward = [data.image(index) for index in reversed(range(20))]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))
    assert Scenes(style=style).captions(7) == data.captions(7)
    assert Scenes(style=style).id(7) == data.id(7)


def test_pixels_are_the_published_ones() -> None:
    digest = hashlib.sha256()
    for classes in ("object", "relation"):
        for style in grammar.STYLES:
            for index in range(25):
                digest.update(Scenes(classes, style=style).image(index).numpy().tobytes())
    assert digest.hexdigest()[:16] == "0b230f8b9fc2db57"


def test_an_image_that_was_changed_is_not_remembered() -> None:
    data = Scenes()
    before = data.image(0).clone()
    data.image(0).zero_()
    assert torch.equal(data.image(0), before)


@pytest.mark.parametrize("style", grammar.STYLES)
@pytest.mark.parametrize("classes", EVERYTHING)
@pytest.mark.parametrize("size", [16, 32, 47])
def test_everything_renders(classes: str, style: str, size: int) -> None:
    data = Scenes(classes, style=style, size=size, count=6)
    for index in range(len(data)):
        image = data.image(index)
        assert image.shape == (3, size, size) and image.dtype == torch.uint8
        assert image.float().std() > 5
    assert data.labels().shape == (6,) and data.labels().dtype == torch.int64


def test_splits_share_no_image() -> None:
    seen: Counter[bytes] = Counter()
    ids: Counter[str] = Counter()
    for split in grammar.SPLITS:
        for classes in ("object", "relation"):
            data = Scenes(classes, split, count=60)
            seen.update(data.image(index).numpy().tobytes() for index in range(60))
            ids.update(data.id(index) for index in range(60))
    assert max(seen.values()) == 1 and max(ids.values()) == 1


def test_held_out_combinations_cover_every_shape_and_color_and_so_does_training() -> None:
    assert len(grammar.HELDOUT) == 12
    assert {shape for _, shape in grammar.HELDOUT} == set(grammar.SHAPES)
    assert {color for color, _ in grammar.HELDOUT} == set(grammar.COLORS)
    for part in (0, 1):
        assert len({pair[part] for pair in grammar.SPLITS["train"]}) == (10, 12)[part]


def test_training_never_shows_or_names_a_held_out_combination(written: list[str]) -> None:
    names = {f"{color} {shape}" for color, shape in grammar.HELDOUT}
    present = {Scenes(split="train").names[label] for label in Scenes(split="train").labels().tolist()}
    assert len(present) == 108 and not present & names
    for classes in ("object", "relation"):
        data = Scenes(classes, "train")
        for index in range(100):
            assert not {(thing.color, thing.shape) for thing in data.scene(index).things} & grammar.HELDOUT
            assert not any(combinations(caption) & grammar.HELDOUT for caption in data.captions(index))
    assert not any(combinations(line) & grammar.HELDOUT for line in written[:1000])


def test_held_out_split_shows_nothing_else_and_the_test_split_shows_all() -> None:
    heldout, test = Scenes(split="heldout"), Scenes()
    assert {heldout.names[label] for label in heldout.labels().tolist()} == {
        f"{color} {shape}" for color, shape in grammar.HELDOUT
    }
    assert set(test.labels().tolist()) == set(range(120))
    pairs = Scenes("relation", "heldout")
    assert all((thing.color, thing.shape) in grammar.HELDOUT for i in range(50) for thing in pairs.scene(i).things)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("split", ["val", "test"])
def test_labels_are_balanced(classes: str, split: str) -> None:
    data = Scenes(classes, split)
    labels, many = data.labels(), len(data.names)
    counts = labels.bincount(minlength=many) * many / len(data)
    assert counts.max() <= 1.5 and counts.min() >= 0.6


@pytest.mark.parametrize("classes", ["shape", "color", "texture"])
@pytest.mark.parametrize("split", grammar.SPLITS)
def test_every_beginning_and_stride_is_balanced(classes: str, split: str) -> None:
    data = Scenes(classes, split, count=20_000)
    labels, many = data.labels(), len(data.names)
    share = labels.bincount(minlength=many) / len(data)
    for part in (labels[:240], *(labels[:total][:: total // 240] for total in (500, 1000, 2000, 5000, 20_000))):
        counts = part.bincount(minlength=many) / len(part) / share
        assert counts.max() <= 1.5 and counts.min() >= 0.6


def test_labels_say_what_the_scene_shows() -> None:
    for split in grammar.SPLITS:
        for classes in CLASSES:
            data = Scenes(classes, split)
            labels = data.labels()
            for index in range(0, len(data), len(data) // 20):
                thing = data.scene(index).things[0]
                name = {
                    "shape": thing.shape,
                    "color": thing.color,
                    "texture": thing.texture,
                    "object": f"{thing.color} {thing.shape}",
                    "texture_object": f"{thing.texture} {thing.shape}",
                }[classes]
                assert data.names[int(labels[index])] == name
    assert set(Scenes("relation").labels().tolist()) == {-1}


@pytest.mark.parametrize("style", grammar.STYLES)
def test_captions_of_one_thing_are_true(style: str) -> None:
    data = Scenes(style=style)
    for index in range(60):
        thing = data.scene(index).things[0]
        written = data.captions(index)
        assert len(written) == len(set(written)) == 5
        assert {(thing.color, thing.shape)} == combinations(written[0]) == combinations(written[1])
        for caption in written:
            assert named(caption, grammar.COLORS) <= {thing.color}
            assert named(caption, grammar.SHAPES) <= {thing.shape}
            assert named(caption, grammar.TEXTURES) <= {thing.texture}
            assert named(caption, grammar.SIZES) <= {thing.size}
            assert named(caption, grammar.GROUNDS) <= {data.scene(index).ground}


@pytest.mark.parametrize("style", grammar.STYLES)
def test_captions_of_two_things_are_true(style: str) -> None:
    data = Scenes("relation", style=style)
    for index in range(60):
        seen = data.scene(index)
        first, second = seen.things
        apart = {
            "left": second.x - first.x,
            "right": first.x - second.x,
            "above": second.y - first.y,
            "below": first.y - second.y,
        }
        assert apart[seen.relation] > 0.4
        assert first.color != second.color and first.shape != second.shape
        written = data.captions(index)
        assert len(written) == len(set(written)) == 5
        for caption in written:
            assert combinations(caption) == {(thing.color, thing.shape) for thing in seen.things}
            head = min((first, second), key=lambda thing: _position(caption, thing.color))
            relation = seen.relation if head is first else grammar.RELATIONS[seen.relation]
            if " with " in caption:
                relation = grammar.RELATIONS[relation]
            assert named(caption, ("above", "below")) <= {relation}
            assert any(phrase in caption for phrase in (*grammar.NEARNESS[relation], *grammar.BESIDE[relation]))
            assert not {"left", "right"} - {relation} & set(caption.split())


def _position(caption: str, color: str) -> int:
    return min(caption.split().index(word) for word in (color, *grammar.COLORS[color]) if word in caption.split())


def test_captions_are_lower_case_words_with_the_right_article() -> None:
    for line in grammar.sentences("val", 600):
        words = line.split(" ")
        assert all(word.isalpha() and word.islower() for word in words)
        for article, noun in pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (noun[0] in "aeiou")


def test_sentences_are_as_many_as_asked_for_and_repeat() -> None:
    assert list(grammar.sentences("train", 12)) == list(grammar.sentences("train", 17))[:12]
    assert list(grammar.sentences("train", 12)) != list(grammar.sentences("val", 12))
    with pytest.raises(CrossguardError, match="train, val, test, heldout"):
        next(grammar.sentences("trian", 5))
    with pytest.raises(CrossguardError, match="a count of 0"):
        next(grammar.sentences("train", 0))


def test_canonical_words_are_commoner_than_synonyms_and_all_occur(written: list[str]) -> None:
    words = Counter(word for line in written for word in line.split())
    for canonical, aliases in {**grammar.COLORS, **grammar.SHAPES, **grammar.TEXTURES}.items():
        counts = [words[word] for word in (canonical, *aliases)]
        assert counts == sorted(counts, reverse=True) and counts[-1] > 0, canonical


def test_no_synonym_names_anything_else() -> None:
    names = {word for classes in CLASSES for name in Scenes(classes).names for word in name.split()}
    synonyms = Counter(alias for aliases in grammar.ALIASES.values() for alias in aliases)
    assert max(synonyms.values()) == 1
    assert not set(synonyms) & set(grammar.ALIASES)
    assert not set(synonyms) & names
    assert all(alias.isalpha() and alias.islower() for alias in synonyms)
    assert names <= set(grammar.ALIASES) and dict(Scenes().aliases) == dict(grammar.ALIASES)


@pytest.mark.parametrize("classes", CLASSES)
def test_templates_are_grammatical_and_occur_in_training(classes: str, written: list[str]) -> None:
    data = Scenes(classes)
    prompts = data.prompts()
    assert not prompts.duplicates
    assert not any(" a a" in text or " a e" in text or " a o" in text for text in prompts.flat)
    common = set(written) & set(prompts.flat)
    assert len(common) >= 0.65 * len(set(prompts.flat))


def test_batches_hold_pixels_between_zero_and_one() -> None:
    batch = next(Scenes(count=10).batches(8))
    assert len(batch) == 8 and batch.images.min() >= 0 and batch.images.max() <= 1


def test_defaults_and_counts() -> None:
    assert [len(Scenes(split=split)) for split in grammar.SPLITS] == [20_000, 1_000, 2_000, 1_000]
    assert len(Scenes(count=3)) == 3
    assert repr(Scenes("shape")) == "Scenes(classes='shape', split='test', style='photo', size=32, count=None)"
    with pytest.raises(IndexError):
        Scenes(count=3).image(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": "shapes"}, "unknown class set 'shapes' of Scenes; choose one of shape, color"),
        ({"split": "dev"}, "unknown split 'dev' of Scenes; choose one of train, val, test, heldout"),
        ({"style": "oil"}, "unknown style 'oil' of Scenes; choose one of photo, sketch, night, cartoon"),
        ({"size": 8}, "from 16 to 512"),
        ({"count": 0}, "a count of 0 scenes is not possible; give 1 or more"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(CrossguardError, match=message):
        Scenes(**arguments)  # pyright: ignore[reportArgumentType]
