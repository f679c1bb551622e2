"""What of a model can be trained: each part alone wants gradients, leaves the base as it was, and is read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from crossguard import (
    Combined,
    Context,
    Coupled,
    Deep,
    Fit,
    Frame,
    FTStandard,
    HuggingFace,
    Interpolated,
    LoRA,
    Prompts,
    PromptTuned,
    Scenes,
    Tiny,
    build,
    check_model,
    show,
)
from crossguard.defenses.parts import Towers, Trainable
from crossguard.errors import CrossguardError
from crossguard.models.base import Checkpoint, DualEncoder
from fixtures import floats, pictures, save_clip, save_siglip

IMAGES = floats(pictures(4, 32, 32))
LABELS = torch.tensor([0, 2, 1, 0])
PROMPTS = Prompts.of(("circle", "red circle", "star"), ("a photo of a {}",))

PARTS: dict[str, Trainable] = {
    "LoRA": LoRA(2),
    "LoRA of q and v": LoRA(2, alpha=3.0, towers=("image",), layers=("q_proj", "v_proj")),
    "Context": Context(),
    "random Context": Context(tokens=4),
    "specific Context": Context(specific=True),
    "deep Context": Context(depth=2),
    "shallow tokens": Deep(2, depth=1),
    "Deep": Deep(),
    "Coupled": Coupled(depth=2),
    "Frame": Frame(4, start=0.1),
    "normalized Frame": Frame(4, clip=False, normalized=True, start=1.0),
    "addition": Frame(None),
    "prompts": Combined((Frame(4), Deep(2, depth=1), Context())),
    "weights and prompts": Combined((LoRA(2), Deep(2), Context())),
    "last layers and a frame": Combined((Towers(("image",), last=2), Frame(4))),
}
EXACT = [name for name in PARTS if "LoRA" not in name and name != "weights and prompts"]
FOR_TINY = ("LoRA", "Context", "specific Context", "Frame")  # whose image tower is convolutional


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return HuggingFace(str(save_clip(tmp_path_factory.mktemp("parts") / "clip")))


def attached(part: Trainable, base: Checkpoint, seed: int = 0) -> DualEncoder:
    return part.attach(base.load().requires_grad_(False).eval(), PROMPTS, seed)


def trained(network: DualEncoder, steps: int = 2) -> list[float]:
    """Some steps down the cross-entropy of images over prompts; the losses on the way."""
    own = [one for one in network.parameters() if one.requires_grad]
    optimizer, losses = torch.optim.SGD(own, 0.01), list[float]()
    for _ in range(steps):
        optimizer.zero_grad()
        logits = network.logits(network.encode_image(IMAGES), network.encode_text(PROMPTS.flat))
        loss = F.cross_entropy(logits, LABELS)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    return losses


def wanted(network: DualEncoder) -> set[str]:
    return {name for name, one in network.named_parameters() if one.requires_grad}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_learns_alone_and_is_read_again(name: str, clip: Checkpoint, tmp_path: Path) -> None:
    part, before = PARTS[name], clip.load().state_dict()
    assert build(show(part)) == part
    network = attached(part, clip)
    assert wanted(network)
    losses = trained(network, 4)
    assert losses[-1] < losses[0]
    kept = dict(network.named_parameters())
    for key, tensor in before.items():
        inside = [one for one in kept if one.replace(".base_layer", "").removeprefix("inner.").endswith(key)]
        if inside and inside[0] not in wanted(network):
            assert torch.equal(kept[inside[0]], tensor), key
    part.save(network, tmp_path)
    word = part.word(clip, tmp_path)
    with torch.no_grad():
        again = word.load().requires_grad_(False)
        pairs = [
            (again.encode_image(IMAGES), network.requires_grad_(False).encode_image(IMAGES)),
            (again.encode_text(PROMPTS.flat), network.encode_text(PROMPTS.flat)),
        ]
    for own, expected in pairs:
        if name in EXACT:
            assert torch.equal(own, expected)
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    if name in ("weights and prompts", "prompts"):
        check_model(word)


@pytest.mark.parametrize("name", [*PARTS, "all weights"])
def test_a_part_of_a_model_that_has_learned_prompts_is_read_again(name: str, clip: Checkpoint, tmp_path: Path) -> None:
    """Prompts of the base stay behind its word, or are kept with the weights that were trained with them."""
    first, part = Frame(4, start=0.1), PARTS.get(name, Towers())
    first.save(attached(first, clip, seed=1), tmp_path / "first")
    base = first.word(clip, tmp_path / "first")
    network = attached(part, base)
    trained(network)
    part.save(network, tmp_path / "second")
    again = part.word(base, tmp_path / "second").load()
    with torch.no_grad():
        for own, expected in (
            (again.encode_image(IMAGES), network.encode_image(IMAGES)),
            (again.encode_text(PROMPTS.flat), network.encode_text(PROMPTS.flat)),
        ):
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


def test_the_whole_of_a_model_with_prompts_is_its_weights_and_its_prompts() -> None:
    """Whatever word has led to them: what was trained once more is read with both."""
    both, folder = PromptTuned(HuggingFace("out"), "out"), Path("out")
    once = PromptTuned(Tiny(), "once")
    assert once.saved(folder) == both
    assert PromptTuned(once, "twice").saved(folder) == both  # all prompts are in one folder
    assert Interpolated(once, once).saved(folder) == both
    assert Fit(FTStandard(trains=Frame()), Tiny(), Scenes("object")).saved(folder) == both
    assert Fit(FTStandard(), Tiny(), Scenes("object")).saved(folder) is None
    assert Combined((Towers(), Frame())).word(once, folder) == both
    assert LoRA().word(once, folder) == both


@pytest.mark.parametrize("name", FOR_TINY)
def test_parts_of_the_shipped_model(name: str, tmp_path: Path) -> None:
    network = attached(PARTS[name], Tiny())
    losses = trained(network)
    assert losses[1] < losses[0]
    PARTS[name].save(network, tmp_path)
    with torch.no_grad():
        found = PARTS[name].word(Tiny(), tmp_path).load().encode_image(IMAGES)
        torch.testing.assert_close(found, network.encode_image(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PARTS)
def test_what_it_begins_with_follows_from_the_seed(name: str, clip: Checkpoint) -> None:
    part = PARTS[name]
    torch.manual_seed(1)
    first = attached(part, clip, 3).state_dict()
    torch.manual_seed(2)
    again, other = attached(part, clip, 3).state_dict(), attached(part, clip, 4).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    still = name in ("Context", "specific Context", "addition", "last layers and a frame")
    assert all(torch.equal(first[key], other[key]) for key in first) == still


def test_lora_begins_as_the_base_and_is_read_by_peft(clip: Checkpoint, tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    base = clip.load().requires_grad_(False)
    network = attached(LoRA(2), clip)
    with torch.no_grad():
        assert torch.equal(network.encode_image(IMAGES), base.encode_image(IMAGES))
        assert torch.equal(network.encode_text(PROMPTS.flat), base.encode_text(PROMPTS.flat))
    trained(network)
    LoRA(2).save(network, tmp_path)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    read = clip.load()
    read.model = peft.PeftModel.from_pretrained(read.stock, str(tmp_path / "adapter")).base_model.model  # type: ignore[attr-defined]
    with torch.no_grad():
        assert torch.equal(read.encode_image(IMAGES), network.encode_image(IMAGES))
    named = {name for name, _ in HuggingFace(str(tmp_path)).load().named_parameters()}
    assert named == {name for name, _ in base.named_parameters()}
    assert "lora_" in next(iter(wanted(network)))  # the network that was saved is as it was


def test_lora_finds_its_layers(clip: Checkpoint, tmp_path: Path) -> None:
    found = wanted(attached(LoRA(2, layers=("q_proj",), towers=("text",)), clip))
    assert len(found) == 4 and all(name.startswith("model.text_model") and ".q_proj." in name for name in found)
    siglip = HuggingFace(str(save_siglip(tmp_path / "siglip")))
    network = attached(LoRA(2, towers=("image",)), siglip)
    assert not any("head.attention" in name for name in wanted(network))  # its projection would not be heard
    trained(network)
    assert all(bool(one.any()) for name, one in network.named_parameters() if "lora_B" in name)
    with pytest.raises(CrossguardError, match="no linear layer is called query; there are fc1, fc2"):
        attached(LoRA(2, layers=("query",)), clip)


def test_a_rank_that_is_not_low_is_said(clip: Checkpoint) -> None:
    sides = [tuple(one.weight.shape) for one in clip.load().modules() if isinstance(one, torch.nn.Linear)]
    least, most = min(min(both) for both in sides), max(min(both) for both in sides)
    with pytest.raises(CrossguardError, match=r"LoRA\(rank=100000\) is low for no layer: .* is \d+ by \d+.*Towers"):
        attached(LoRA(100_000), clip)
    with pytest.raises(CrossguardError, match=f"give a rank far below, such as rank={max(1, most // 8)}"):
        attached(LoRA(most + 1), clip)
    assert least < most and LoRA(least).doubts(attached(LoRA(least), clip)) == []
    (note,) = LoRA(least + 1).doubts(attached(LoRA(least + 1), clip))
    assert f"LoRA(rank={least + 1}) is not low for {sum(min(both) == least for both in sides)} of its" in note
    assert f"give rank={least} or less" in note
    both = Combined((LoRA(least + 1), Context()))
    assert both.doubts(attached(both, clip)) == [note]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("LoRA(0)", "LoRA.rank=0. is not possible"),
        ("LoRA(alpha=0.0)", "give a positive number"),
        ("LoRA(towers=('head',))", "give 'image', 'text' or both"),
        ("Context(tokens=0)", "tokens=0. is not possible"),
        ("Deep(depth=0)", "depth=0. is not possible"),
        ("Frame(0)", "pad=0. is not possible"),
        ("Frame(start=-1.0)", "no standard deviation"),
        ("Combined(())", "none at all"),
        ("Combined((Frame(), LoRA()))", "LoRA comes later"),
    ],
)
def test_what_is_not_possible_is_refused_in_a_sentence(text: str, says: str) -> None:
    with pytest.raises(CrossguardError, match=says):
        build(text)


def test_parts_that_do_not_fit_are_refused_in_a_sentence(clip: Checkpoint) -> None:
    for part, says in (
        (Frame(16), "a frame of 16 pixels leaves nothing"),
        (Context(tokens=30), "longer than the text tower reads"),
        (Deep(depth=5), "before 5 layers"),
    ):
        with pytest.raises(CrossguardError, match=says):
            attached(part, clip)
    with pytest.raises(CrossguardError, match="reads no class prompts"):
        Context(specific=True).attach(clip.load(), None, 0)
    with pytest.raises(CrossguardError, match="has none that are known here"):
        attached(Deep(), Tiny())
