"""The training loop against brute force: its losses, its gradients, what it trains, and what survives a kill."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from crossguard import (
    FARE,
    HPTGPD,
    AdvPT,
    ClassFrames,
    Context,
    DisentangledDistillation,
    Scenes,
    SelfTraining,
    Tiny,
    turns,
)
from crossguard.attacks.base import TextAttack, TextVictim
from crossguard.attacks.gradient import PGD
from crossguard.budgets import Both, Linf, Words
from crossguard.defenses.finetuning import Contrastive, FTStandard, MMCoA, TeCoA
from crossguard.defenses.fit import Fit
from crossguard.defenses.optimizers import SGD, Adam, AdamW, Optimizer
from crossguard.defenses.parts import Towers, Trainable
from crossguard.defenses.plan import Adversary, Augment
from crossguard.defenses.recipe import Recipe
from crossguard.defenses.run import Run
from crossguard.defenses.step import Inputs, Learner
from crossguard.defenses.terms import BATCH, CLASSES, DRIFTED, InBatch, Need, OverClasses, Seen, in_batch
from crossguard.errors import CrossguardError
from crossguard.goals import Untargeted
from crossguard.models.fresh import Fresh
from crossguard.models.huggingface import HuggingFace, TransformersEncoder
from crossguard.models.purification import BitDepth
from crossguard.processes import ALONE, joined
from crossguard.shapes import Labels
from crossguard.telling import listening
from crossguard.words import Reads, build, contents
from fixtures import Blots, changed, equal, floats, pictures, small, tensors

ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
}
STRONG = PGD(steps=3, step=0.5, best=False, stop=False)
BUDGET = Both(Linf(16 / 255), Words(1))
MMCOA = MMCoA(steps=2, batch=8, optimizer=SGD(lr=0.1), image_attack=STRONG, budget=BUDGET)
TECOA = TeCoA(steps=2, batch=8, optimizer=SGD(lr=0.1), warmup=0, image_attack=STRONG, budget=Linf(16 / 255))


LONG = replace(MMCOA, steps=12, save_every=0, optimizer=AdamW(lr=1e-2), augment=Augment(shift=2), cosine=True)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.load().model.state_dict().items()}


def refused(attempt: Callable[[], object]) -> str:
    with pytest.raises(CrossguardError) as raised:
        attempt()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def started(recipe: Recipe, base: Fresh, folder: Path, data: Blots | None = None) -> Run:
    """A run that has not taken a step."""
    return Run(recipe, base, data or Blots(), folder, {"recipe": "", "model": "", "data": ""}, ALONE)


def gradients(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-5) -> bool:
    assert left.keys() == right.keys() and left
    return all(torch.allclose(left[name], right[name], atol=tolerance, rtol=1e-3) for name in left)


# --- The terms ---


@pytest.mark.parametrize("case", ["shared", "distinct", "unowned", "coinciding"])
def test_unique_texts_with_counts_are_the_duplicated_batch(case: str) -> None:
    own = torch.tensor({"distinct": [2, 0, 1, 3]}.get(case, [0, 2, 2, 0, 1, 2]))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(len(own), 5, generator=generator, dtype=torch.float64).requires_grad_(True)
    rows = torch.randn(5 if case == "unowned" else int(own.max()) + 1, 5, generator=generator, dtype=torch.float64)
    if case == "coinciding":
        rows[1] = rows[0]  # two clean texts became the same adversarial one
    texts = rows.clone().requires_grad_(True)
    found = in_batch(7.0 * images @ texts.T, own).mean()
    found_gradients = torch.autograd.grad(found, (images, texts))
    naive = 7.0 * images @ texts[own].T  # one column per image, and the identity as target
    target = torch.arange(len(own))
    expected = F.cross_entropy(naive, target) + F.cross_entropy(naive.T, target)
    assert torch.allclose(found, expected, atol=1e-10)
    for left, right in zip(found_gradients, torch.autograd.grad(expected, (images, texts)), strict=True):
        assert torch.allclose(left, right, atol=1e-10)


def seen() -> Seen:
    generator = torch.Generator().manual_seed(0)
    found: dict[Need, Tensor] = {}
    for view in ("clean", "adversarial"):
        found[Need("image", view)] = torch.randn(6, 4, generator=generator)
        found |= {Need("text", view, over=over): torch.randn(3, 4, generator=generator) for over in (CLASSES, BATCH)}
    places = {CLASSES: torch.tensor([0, 1, 2, 0, 0, 1]), BATCH: torch.tensor([2, 1, 0, 2, 2, 1])}
    return Seen(found, {"student": lambda image, text: 5.0 * image @ text.T}, places)


def test_terms_look_at_the_views_they_name() -> None:
    step = seen()
    for image in ("clean", "adversarial"):
        for text in ("clean", "adversarial"):
            for over, place in step.places.items():
                logits = 5.0 * step.found[Need("image", image)] @ step.found[Need("text", text, over=over)].T
                assert torch.allclose(OverClasses(image, text, over).value(step), F.cross_entropy(logits, place))
            assert torch.allclose(InBatch(image, text).value(step), in_batch(logits, step.own).mean())
    summed = OverClasses(reduce="sum").value(step)
    assert torch.allclose(summed, 6 * OverClasses().value(step)) and float(summed) > 1.0
    assert "cannot see images in a view 'dirty'" in refused(lambda: FTStandard().stage(InBatch("dirty")))
    texts = Adversary(Signed(), Words(1), DRIFTED)
    said = refused(lambda: FTStandard().stage(InBatch("clean", "adversarial"), adversaries=(texts,)))
    assert "InBatch cannot see texts over 'batch' in a view 'adversarial'" in said
    assert "labels of images that have none" in refused(lambda: OverClasses().each(replace(step, places={})))
    assert "which its needs() do not name" in refused(lambda: step.patches())


def test_recipes_are_the_terms_of_their_papers() -> None:
    (mmcoa,), (other,), (tecoa,) = MMCoA().stages(), MMCoA(alpha=0.2, beta=0.7, one_way=True).stages(), TeCoA().stages()
    assert mmcoa.terms == (
        InBatch("adversarial", "clean", weight=0.5),
        InBatch("clean", "adversarial", weight=0.5),
    )
    assert other.terms == (
        OverClasses("adversarial", "clean", weight=0.2),
        OverClasses("clean", "adversarial", weight=0.7),
    )
    for stage in (mmcoa, other, tecoa):
        assert stage.adversaries[0].climbs == OverClasses("adversarial", "clean")
    assert [one.climbs.needs()[0].over for one in (mmcoa.adversaries[1], other.adversaries[1])] == [BATCH, CLASSES]
    assert tecoa.terms == (OverClasses("adversarial", "clean"),) and TeCoA().trains == Towers(("image",))
    (clean,), (pairs,) = FTStandard().stages(), FTStandard(in_batch=True).stages()
    assert clean.terms == (OverClasses("clean", "clean"),) and clean.adversaries == ()
    assert pairs.terms == (InBatch("clean", "clean"),)
    assert Contrastive().captions and Contrastive().stages()[0].terms == (InBatch("clean", "clean", weight=0.5),)


# --- What is trained ---


def test_towers_and_last_layers_train_and_the_rest_stays(base: Fresh, tmp_path: Path) -> None:
    before = weights(base)
    image, text, head = "vis", "text", "logit_"
    cases: list[tuple[Towers, tuple[str, ...]]] = [
        (Towers(("image",)), (image,)),
        (Towers(("text",)), (text,)),
        (Towers(("head",)), (head,)),
        (Towers(), (image, text, head)),
        (Towers(("image", "text"), last=1), ("visual_projection.", "text_projection.")),
        (Towers(("text",), last=2), ("text_projection.", "text_model.pooler.dense.")),
    ]
    for number, (part, parts) in enumerate(cases):
        recipe = FTStandard(steps=2, batch=8, optimizer=SGD(lr=0.5), trains=part)
        after = weights(recipe.fit(base, Blots(), tmp_path / str(number)))
        expected = {name for name, tensor in before.items() if name.startswith(parts) and tensor.is_floating_point()}
        assert expected and changed(before, after) == expected, part


def test_tecoa_trains_the_image_tower_only(base: Fresh, tmp_path: Path) -> None:
    moved = changed(weights(base), weights(TECOA.fit(base, Blots(), tmp_path)))
    assert moved and all(name.startswith("vis") for name in moved)


def test_captions_need_captions_and_are_in_the_batch(base: Fresh, tmp_path: Path) -> None:
    run = started(Contrastive(steps=2, batch=8), base, tmp_path)
    first, second = (run.feed.batch(step).texts[BATCH] for step in range(2))
    for index, own in zip(run.feed.chosen(0), first.place.tolist(), strict=True):
        assert first.texts[own] in Blots().captions(index)
    assert first.texts != second.texts and len(set(first.texts)) == len(first.texts)


# --- The gradient of a step ---


def loss_of(network: TransformersEncoder, recipe: MMCoA, inputs: Inputs) -> Tensor:
    """MMCoA's loss with the batch written out: every image with its own copy of its text."""
    own = inputs.batch.texts[BATCH].place.tolist()
    total = torch.zeros(())
    for weight, image, text in ((recipe.alpha, "adversarial", "clean"), (recipe.beta, "clean", "adversarial")):
        texts = network.encode_text([inputs.texts[text, BATCH][i] for i in own])
        encoded = network.encode_image(inputs.images[image])
        logits = network.scale * F.normalize(encoded, dim=1) @ F.normalize(texts, dim=1).T
        target = torch.arange(len(own))
        total = total + weight * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
    return total


PROMPTS = [f"a photo of a {name}" for name in Blots().names]


@pytest.mark.parametrize("leaks", [False, True])
def test_a_step_of_mmcoa_is_the_loss_at_its_adversarial_inputs(base: Fresh, tmp_path: Path, leaks: bool) -> None:
    """The attack's gradients are no part of it, unless asked for: then exactly the sum of the losses along the way."""
    recipe = replace(MMCOA, accumulate_attack_gradients=leaks)
    run = started(recipe, base, tmp_path)
    before: Any = copy.deepcopy(run.learner.network)
    inputs = run.learner.views(0)
    assert not gradients(run.learner.network)
    clean, bad = inputs.images["clean"], inputs.images["adversarial"]
    assert torch.equal(clean, floats(torch.stack([Blots().image(index) for index in run.feed.chosen(0)])))
    texts = [inputs.texts[view, BATCH] for view in ("clean", "adversarial")]
    assert texts[0] == [PROMPTS[c] for c in sorted(set(Blots().labels()[run.feed.chosen(0)].tolist()))]
    assert all(new != old for old, new in zip(*texts, strict=True))
    size = (bad - clean).abs().flatten(1).amax(1)
    assert float(size.min()) > 0.03 and float(size.max()) <= 16 / 255 + 1e-6
    values = run.learner.take(0)
    loss = loss_of(before, recipe, inputs)
    assert values["loss"] == pytest.approx(float(loss.detach()), abs=1e-5) and values["texts changed"] == 1.0
    loss.backward()
    if leaks:
        ((_, path),) = inputs.paths
        assert len(path) == STRONG.steps
        for images in path:
            logits = before.logits(before.encode_image(images), before.encode_text(PROMPTS))
            F.cross_entropy(logits, Blots().labels()[run.feed.chosen(0)]).backward()
    assert close(gradients(run.learner.network), gradients(before))
    moved = {name: p.detach() for name, p in run.learner.network.named_parameters()}
    expected = {name: p.detach() - 0.1 * p.grad for name, p in before.named_parameters() if p.grad is not None}
    assert close(moved, expected)


def test_a_step_of_tecoa_is_cross_entropy_over_all_classes(base: Fresh, tmp_path: Path) -> None:
    run = started(replace(TECOA, clamp_scale=False), base, tmp_path)
    before: Any = copy.deepcopy(run.learner.network)
    inputs = run.learner.views(0)
    batch, bad = inputs.batch, inputs.images["adversarial"]
    values = run.learner.take(0)
    label = batch.texts[CLASSES].place
    assert "texts changed" not in values and batch.texts[CLASSES].texts == PROMPTS and label is not None
    assert torch.equal(label, Blots().labels()[run.feed.chosen(0)])
    texts = before.encode_text(PROMPTS).detach()
    expected = STRONG(
        lambda images: before.logits(before.encode_image(images), texts),
        batch.images, Untargeted(label), Linf(16 / 255), batch.seeds,
    )  # fmt: skip
    assert torch.equal(bad, expected)
    loss = F.cross_entropy(before.logits(before.encode_image(bad), before.encode_text(PROMPTS)), label)
    clean = F.cross_entropy(before.logits(before.encode_image(batch.images), before.encode_text(PROMPTS)), label)
    assert values["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)
    assert float(loss.detach()) > float(clean.detach()) + 1e-3
    loss.backward()
    assert close(gradients(run.learner.network), gradients(before))


def test_learning_rates_follow_warmup_and_cosine(base: Fresh, tmp_path: Path) -> None:
    run = started(replace(TECOA, steps=10, warmup=4, cosine=True), base, tmp_path)
    rates = [run.learner.rate(step) / 0.1 for step in range(10)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[7] == pytest.approx(0.5) and rates[4:] == sorted(rates[4:], reverse=True)
    assert started(replace(TECOA, steps=10, cosine=False), base, tmp_path).learner.rate(9) == 0.1


def test_the_scale_is_clamped_and_the_gradient_clipped(base: Fresh, tmp_path: Path) -> None:
    run = started(FTStandard(steps=1, batch=8, clamp_scale=True, optimizer=SGD(lr=1e-9)), base, tmp_path)
    with torch.no_grad():
        run.learner.network.model.logit_scale.fill_(5.0)
    run.learner.take(0)
    assert float(run.learner.network.scale.detach()) == pytest.approx(100.0, rel=1e-4)
    run = started(FTStandard(steps=1, batch=8, clip=0.01, optimizer=SGD(lr=0.1)), base, tmp_path)
    run.learner.take(0)
    norm = torch.cat([gradient.flatten() for gradient in gradients(run.learner.network).values()]).norm()
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


def test_optimizers_are_torch_s(base: Fresh) -> None:
    network = base.load()
    for word, kind in ((Adam(), torch.optim.Adam), (AdamW(), torch.optim.AdamW), (SGD(), torch.optim.SGD)):
        made = word.over(network.parameters())
        assert type(made) is kind and made.param_groups[0]["lr"] == word.lr
        assert made.param_groups[0]["weight_decay"] == word.weight_decay
    assert Adam().betas == (0.9, 0.98)
    for wrong in ({"lr": 0.0}, {"lr": -1.0}, {"lr": float("nan")}, {"weight_decay": -1.0}):
        refused(lambda wrong=wrong: Adam(**wrong))


# --- Subsets and augmentation ---


def test_few_shots_are_the_same_whatever_the_order(base: Fresh, tmp_path: Path) -> None:
    data = Blots()
    shuffled = Blots(order=tuple(torch.randperm(24, generator=torch.Generator().manual_seed(5)).tolist()))
    recipe = FTStandard(shots=3, batch=9, epochs=2.0)
    one, other = started(recipe, base, tmp_path, data), started(recipe, base, tmp_path, shuffled)
    chosen = [one.feed.chosen(epoch) for epoch in range(2)]
    ids = {data.id(index) for index in chosen[0]}
    assert len(chosen[0]) == len(ids) == 9 and ids == {shuffled.id(index) for index in other.feed.chosen(0)}
    assert torch.bincount(data.labels()[chosen[0]]).tolist() == [3, 3, 3]
    assert one.total == 2 and sorted(chosen[0]) == sorted(chosen[1]) and chosen[0] != chosen[1]
    assert ids != {data.id(i) for i in started(replace(recipe, seed=1), base, tmp_path, data).feed.chosen(0)}
    assert "fewer than 20 images; lower shots" in refused(
        lambda: replace(recipe, shots=20).fit(base, data, tmp_path / "x")
    )


def test_fresh_shots_are_others_in_every_epoch_and_start_over(base: Fresh, tmp_path: Path) -> None:
    recipe = FTStandard(shots=2, batch=6, epochs=3.0, fresh_shots=True)
    run = started(recipe, base, tmp_path, Blots())  # 10, 9 and 5 images of the classes
    epochs = [sorted(run.feed.chosen(step)) for step in range(3)]
    assert all(torch.bincount(Blots().labels()[epoch]).tolist() == [2, 2, 2] for epoch in epochs)
    assert not set(epochs[0]) & set(epochs[1]) and len(set(epochs[0]) & set(epochs[2])) == 1
    late = started(recipe, base, tmp_path, Blots())
    assert sorted(late.feed.chosen(2)) == epochs[2], "a continued run sees what it would have seen"
    assert "such as shots=16" in refused(lambda: FTStandard(fresh_shots=True))


def test_an_epoch_sees_every_image_once(base: Fresh, tmp_path: Path) -> None:
    run = started(FTStandard(batch=8, epochs=2.0), base, tmp_path)
    assert run.total == 6
    for epoch in range(2):
        seen = [index for step in range(3) for index in run.feed.chosen(3 * epoch + step)]
        assert sorted(seen) == list(range(24))


def test_augmentation_belongs_to_seed_and_sample() -> None:
    images, seeds = floats(pictures(16, 12, 18)), torch.arange(16)
    made = Augment()(images, seeds)
    assert made.shape == images.shape and torch.equal(made, Augment()(images, seeds))
    assert torch.equal(made[5:6], Augment()(images[5:6], seeds[5:6]))
    assert not torch.equal(made, Augment()(images, seeds + 100))
    assert torch.equal(Augment(flip=False, shift=0)(images, seeds), images)
    flipped = Augment(shift=0)(images, seeds)
    kinds = {
        "same" if torch.equal(new, old) else "flipped" if torch.equal(new, old.flip(2)) else "?"
        for new, old in zip(flipped, images, strict=True)
    }
    assert kinds == {"same", "flipped"}
    shifted = Augment(flip=False, shift=2)(images, seeds)
    inner = images[:, :, 4:8, 4:14]
    for new, old in zip(shifted, inner, strict=True):  # the middle is there, moved by two at most
        assert any(torch.equal(new[:, y : y + 4, x : x + 10], old) for y in range(2, 7) for x in range(2, 7))


# --- The result ---


def test_the_result_is_a_checkpoint_of_its_own(base: Fresh, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "mmcoa"
    model = MMCOA.fit(base, Blots(), out)
    assert model == HuggingFace(str(out))
    assert not equal(weights(base), weights(model))
    stock = transformers.AutoModel.from_pretrained(out)
    assert equal(dict(stock.state_dict()), weights(model))
    transformers.AutoTokenizer.from_pretrained(out)
    transformers.AutoImageProcessor.from_pretrained(out)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers") and "MMCoA(" in card and "Blots(" in card
    record = json.loads((out / "crossguard.json").read_text())
    assert record["steps"] == 2 and record["recipe"].startswith("MMCoA(") and "torch" in record["versions"]
    assert "step 2/2: loss" in (out / "log.txt").read_text()
    assert list((out / "tensorboard").glob("events*")) and not (out / "training.safetensors").exists()
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert MMCOA.fit(base, Blots(), out) == model  # finished: nothing is touched
    assert times == {path: path.stat().st_mtime_ns for path in times}
    for other in (lambda: TECOA.fit(base, Blots(), out), lambda: MMCOA.fit(base, Blots(count=20), out)):
        assert "holds a run of another recipe, model or data" in refused(other)
    (out / "crossguard.json").write_text("{")
    assert "is broken" in refused(lambda: MMCOA.fit(base, Blots(), out))


def test_a_recipe_takes_words_as_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken: list[Any] = []
    monkeypatch.setattr("crossguard.defenses.recipe.train", lambda *words: taken.append(words[1:3]) or words[1])
    MMCOA.fit("Tiny", "Scenes('object', 'train')", tmp_path)
    assert taken == [(Tiny(), Scenes("object", "train"))]
    assert "'Tny'; did you mean 'Tiny'" in refused(lambda: MMCOA.fit("Tny", Blots(), tmp_path))


def test_the_seed_decides(base: Fresh, tmp_path: Path) -> None:
    recipe = replace(MMCOA, augment=Augment(shift=2))
    state = torch.random.get_rng_state()
    one, two = (tensors(Path(recipe.fit(base, Blots(), tmp_path / name).path)) for name in "ab")
    assert equal(one, two) and torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(99)  # nothing is drawn from the global generator
    assert equal(one, tensors(Path(recipe.fit(base, Blots(), tmp_path / "c").path)))
    assert not equal(one, tensors(Path(replace(recipe, seed=1).fit(base, Blots(), tmp_path / "d").path)))


def test_training_leaves_the_shared_network_alone(base: Fresh, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in base.network.state_dict().items()}
    FTStandard(steps=1, batch=8, optimizer=SGD(lr=0.5)).fit(base, Blots(), tmp_path)
    assert equal(before, dict(base.network.state_dict()))


def test_half_precision_beside_full(base: Fresh, tmp_path: Path) -> None:
    recipe = replace(TECOA, steps=1, batch=2)
    full = recipe.fit(base, Blots(), tmp_path / "full")
    half = replace(recipe, bf16=True).fit(base, Blots(), tmp_path / "half")
    again = recipe.fit(base, Blots(), tmp_path / "again")
    exact, rough = weights(full), weights(half)
    assert equal(exact, weights(again)) and not equal(exact, rough)
    assert all(tensor.dtype == rough[name].dtype for name, tensor in exact.items())
    step, off = (
        torch.cat([(exact[name] - other[name]).float().flatten() for name in exact]) for other in (weights(base), rough)
    )
    assert 0.0 < float(off.norm()) < 0.2 * float(step.norm()), "half precision takes another step than full"


def test_a_fit_is_a_model_that_trains_when_asked(base: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSGUARD_FITS", str(tmp_path))
    word = Fit(FTStandard(steps=1, batch=8, optimizer=SGD(lr=0.5)), base, Blots())
    assert not list(tmp_path.iterdir())
    embeddings = word.encode_image(floats(pictures(2, 16, 16)))
    assert [path.name for path in tmp_path.iterdir()] == [word.folder.name]
    assert torch.equal(embeddings, HuggingFace(str(word.folder)).encode_image(floats(pictures(2, 16, 16))))


# --- Killed and started again ---


def test_a_killed_run_ends_in_the_same_weights(base: Fresh, tmp_path: Path, two: Path) -> None:
    out = tmp_path / "killed"
    shutil.copytree(two / "killed", out)
    assert (out / "training.safetensors").exists() and not (out / "crossguard.json").exists()

    damaged = tmp_path / "damaged"
    shutil.copytree(out, damaged)
    data = (damaged / "training.safetensors").read_bytes()
    for cut in (data[: len(data) // 2], b"", b"{" + data[1:]):
        (damaged / "training.safetensors").write_bytes(cut)
        assert "training.safetensors is damaged" in refused(lambda: LONG.fit(base, Blots(), damaged))
    shutil.copy(_stock(base, tmp_path / "stock") / "model.safetensors", damaged / "training.safetensors")
    assert "training.safetensors is damaged" in refused(lambda: LONG.fit(base, Blots(), damaged))
    assert "holds a run of another" in refused(lambda: TECOA.fit(base, Blots(), out))

    LONG.fit(base, Blots(), out)
    assert "continuing at step" in (out / "log.txt").read_text()
    LONG.fit(base, Blots(), tmp_path / "whole")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def _stock(base: Fresh, folder: Path) -> Path:
    base.load().save(folder)
    return folder


# --- Finished ---

SHORT = FTStandard(steps=3, batch=8, save_every=1000, optimizer=SGD(lr=0.1))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that were taken."""
    found, take = list[int](), Learner.take
    monkeypatch.setattr(Learner, "take", lambda self, step: (found.append(step), take(self, step))[1])
    return found


@pytest.mark.parametrize("state", [False, True])
def test_a_finished_training_is_whole_or_made_again(
    base: Fresh, tmp_path: Path, taken: list[int], capsys: pytest.CaptureFixture[str], state: bool
) -> None:
    out, saved = tmp_path / "out", tmp_path / "training.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crossguard.defenses.run._clean", lambda folder: shutil.copy(folder / saved.name, saved))
        SHORT.fit(base, Blots(), out)
    record, written = (json.loads((out / "crossguard.json").read_text()), (out / "model.safetensors").read_bytes())
    before = HuggingFace(str(out)).fingerprint
    stray = out / ".model.safetensors.00000000-1.00000000.tmp"
    stray.write_bytes(b"half")
    os.utime(stray, (0, 0))
    SHORT.fit(base, Blots(), out)
    assert taken == [0, 1, 2], "it was finished"
    assert not (out / "training.safetensors").exists() and not stray.exists(), "a kill had left them"
    assert HuggingFace(str(out)).fingerprint == before
    other = out / "tokenizer.json"
    for damage, said in (
        (b"", "empty"),
        (None, "missing"),
        (b"x" + written[1:], "another file"),
        (b"short", "another"),
    ):
        if state:
            shutil.copy(saved, out)
        path = out / "model.safetensors"
        path.unlink() if damage is None else path.write_bytes(damage)
        if state:
            SHORT.fit(base, Blots(), out)
            assert f"(model.safetensors is {said}" in capsys.readouterr().err
            assert path.read_bytes() == written and taken == [0, 1, 2], "no step was taken again"
            again = json.loads((out / "crossguard.json").read_text())
            assert again["loss"] == record["loss"] and again["weights"] == record["weights"]
            assert HuggingFace(str(out)).fingerprint == before
        else:
            told = refused(lambda: SHORT.fit(base, Blots(), out))
            assert f"(model.safetensors is {said}" in told and "delete the folder to train again" in told
        path.write_bytes(written)
    assert other.exists() and SHORT.fit(base, Blots(), out) == HuggingFace(str(out))
    (out / "crossguard.json").write_text(json.dumps(record | {"weights": {"model.safetensors": 3}}))
    assert "crossguard.json' is broken" in refused(lambda: SHORT.fit(base, Blots(), out))


def full(*_: Any, **__: Any) -> None:
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_full_disk_at_the_end_loses_no_step(base: Fresh, tmp_path: Path, taken: list[int]) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", full)
        assert "cannot be written: Error while serializing: I/O error: No space left" in refused(
            lambda: SHORT.fit(base, Blots(), out)
        )
    assert not any(path.suffix == ".tmp" or path.name.startswith("model") for path in out.iterdir())
    SHORT.fit(base, Blots(), out)
    assert taken == [0, 1, 2]
    with pytest.MonkeyPatch.context() as patch:  # no room for the state, which is larger than the model
        patch.setattr("safetensors.torch.save_file", full)
        SHORT.fit(base, Blots(), whole)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        patch.setattr("transformers.modeling_utils.safe_save_file", full)
        assert "training.safetensors cannot be written" in refused(lambda: SHORT.fit(base, Blots(), tmp_path / "none"))


def test_a_folder_that_is_removed_meanwhile_is_one_sentence(
    base: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, take = tmp_path / "out", Learner.take

    def removing(self: Learner, step: int) -> dict[str, float]:
        if step == 1:
            shutil.rmtree(out)
        return take(self, step)

    monkeypatch.setattr(Learner, "take", removing)
    assert refused(lambda: SHORT.fit(base, Blots(), out)).endswith("was removed while its training ran")
    assert not out.exists() and "Traceback" not in capsys.readouterr().err


def test_scalars_are_there_for_tensorboard(base: Fresh, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    SHORT.fit(base, Blots(), tmp_path)
    (file,) = (tmp_path / "tensorboard").iterdir()
    found = {
        (value.tag, event.step): value.tensor.float_val[0]
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    }
    assert {step for _, step in found} == {1, 2, 3}
    record = json.loads((tmp_path / "crossguard.json").read_text())
    assert found["loss", 3] == pytest.approx(record["loss"]) and found["loss", 1] > 0.0


# --- Stopped by a signal ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_and_saves_it(
    base: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    take, arrived = Learner.take, list[int]()

    def interrupted(self: Learner, step: int) -> dict[str, float]:
        if step == 2:
            signal.raise_signal(number)
        return take(self, step)

    recipe = replace(LONG, steps=4, save_every=1000)
    before = signal.signal(number, lambda number, frame: arrived.append(number))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Learner, "take", interrupted)
            with pytest.raises(KeyboardInterrupt):
                recipe.fit(base, Blots(), tmp_path / "out")
    finally:
        signal.signal(number, before)
    assert arrived == [number], "in the end it takes the way it would have taken"
    assert "stopped after step 3 of 4; the same training goes on from there" in capsys.readouterr().err
    recipe.fit(base, Blots(), tmp_path / "out")
    assert "continuing at step 3" in (tmp_path / "out" / "log.txt").read_text()
    recipe.fit(base, Blots(), tmp_path / "whole")
    assert equal(tensors(tmp_path / "out"), tensors(tmp_path / "whole"))


@pytest.mark.parametrize("moment", ["last step", "result"])
def test_a_signal_at_the_end_waits_for_the_result(
    base: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    take, save, arrived = Learner.take, TransformersEncoder.save, list[bool]()

    def interrupted(self: Learner, step: int) -> dict[str, float]:
        if step == 2 and moment == "last step":
            signal.raise_signal(signal.SIGTERM)
        return take(self, step)

    def saving(self: TransformersEncoder, folder: Path) -> None:
        if moment == "result":
            signal.raise_signal(signal.SIGTERM)
        save(self, folder)

    monkeypatch.setattr(Learner, "take", interrupted)
    monkeypatch.setattr(TransformersEncoder, "save", saving)
    before = signal.signal(signal.SIGTERM, lambda *_: arrived.append((tmp_path / "crossguard.json").exists()))
    try:
        SHORT.fit(base, Blots(), tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert arrived == [True], "it takes its usual way when all is written"
    assert not (tmp_path / "training.safetensors").exists()


@pytest.mark.parametrize(("seconds", "expected"), [(0, [1, 2, 3, 4]), (25, [3, 4]), (1000, [4])])
def test_a_training_is_saved_by_the_watch(
    base: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int, expected: list[int]
) -> None:
    """Steps of ten seconds; saving itself takes no time. The last step is saved whatever the watch says."""
    now, saved = [0.0], list[int]()
    take = Learner.take

    def slow(self: Learner, step: int) -> dict[str, float]:
        now[0] += 10.0
        return take(self, step)

    monkeypatch.setattr(Learner, "take", slow)
    monkeypatch.setattr("crossguard.defenses.run.time.monotonic", lambda: now[0])
    monkeypatch.setattr(Run, "save", lambda self, step: saved.append(step))
    FTStandard(steps=4, batch=4, save_every=seconds).fit(base, Blots(), tmp_path)
    assert saved == expected


# --- Two processes ---


@dataclass(frozen=True)
class Signed(TextAttack):
    """Says who attacked: ends each text in the number of the process."""

    def search(self, victim: TextVictim, clean: list[str], goal: Any, budget: Any, rivals: Any) -> list[str]:
        return [f"{text} {os.environ.get('RANK', '0')}" for text in clean]


@dataclass(frozen=True)
class Torn(Blots):
    """Blots of which the second process can read none."""

    def image(self, index: int) -> Tensor:
        if os.environ.get("RANK") == "1":
            raise CrossguardError("the disk is gone")
        return super().image(index)


ONE_STEP: dict[str, Recipe] = {
    "mmcoa": replace(MMCOA, steps=1, optimizer=SGD(lr=0.1, momentum=0.0)),
    "tecoa": replace(TECOA, steps=1, optimizer=SGD(lr=1.0, momentum=0.0)),
    "leaks": replace(MMCOA, steps=1, optimizer=SGD(lr=0.03, momentum=0.0), accumulate_attack_gradients=True),
}
# What is trained has equal shapes, so gradients that were averaged by mistake would not be noticed by torch.
ALONE_EACH: tuple[Recipe, Recipe] = (replace(ONE_STEP["tecoa"], seed=1), replace(ONE_STEP["tecoa"], seed=2))


def one_of_two(tokenizer: str, out: Path, threads: int) -> None:
    """What each of two processes does; the first ends in a training that goes on until it is killed."""
    torch.set_num_threads(1)
    group, base = joined(), small(Path(tokenizer))
    for name, recipe in ONE_STEP.items():
        recipe.fit(base, Blots(), out / name)
    assert ONE_STEP["mmcoa"].fit(base, Blots(), out / "mmcoa") == HuggingFace(str(out / "mmcoa"))
    said: dict[str, Any] = {}
    learner = Run(replace(MMCOA, text_attack=Signed()), base, Blots(), out, {}, group).learner
    said["texts"] = {view: texts for (view, over), texts in learner.views(0).texts.items() if over == BATCH}
    try:
        FTStandard(steps=1, batch=8).fit(base, Torn(), out / "torn")
    except CrossguardError as error:
        said["failure"] = str(error)
    Fit(ALONE_EACH[group.rank], base, Blots()).load()
    (out / f"said.{group.rank}").write_text(json.dumps(said))
    if group.first:
        torch.set_num_threads(threads)
        take = Learner.take
        Learner.take = lambda self, step: (time.sleep(0.1), take(self, step))[1]  # type: ignore[method-assign]
        LONG.fit(base, Blots(), out / "killed", processes=False)


@pytest.fixture(scope="module")
def two(base: Fresh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave in a folder, the first of which was killed in a training of its own."""
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys, test_recipe as t; t.one_of_two(sys.argv[1], t.Path(sys.argv[2]), int(sys.argv[3]))"
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    mine = {"OMP_NUM_THREADS": "1", "CROSSGUARD_FITS": str(out / "fits")}
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", code, base.tokenizer, str(out), str(torch.get_num_threads())],
            env=ENVIRONMENT | world | mine | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    )  # fmt: skip
    try:
        state, deadline = out / "killed" / "training.safetensors", time.monotonic() + 240
        while not state.exists() and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        first.send_signal(signal.SIGKILL)
        for child, expected in ((first, -signal.SIGKILL), (second, 0)):
            _, said = child.communicate(timeout=240)
            assert child.returncode == expected, said.decode()[-3000:]
    finally:
        first.kill()
        second.kill()
    return out


def test_two_processes_take_the_step_of_one(base: Fresh, tmp_path: Path, two: Path) -> None:
    before = weights(base)
    for name, recipe in ONE_STEP.items():
        one = weights(recipe.fit(base, Blots(), tmp_path / name))
        both = weights(HuggingFace(str(two / name)))
        assert max(float((one[k] - before[k]).abs().max()) for k in one if one[k].is_floating_point()) > 1e-2
        for key, tensor in one.items():
            assert torch.allclose(tensor, both[key], atol=1e-5), f"{name}: {key}"
        lines = [line for line in (two / name / "log.txt").read_text().splitlines() if "step 1/1" in line]
        own = [line for line in (tmp_path / name / "log.txt").read_text().splitlines() if "step 1/1" in line]
        assert len(lines) == 1 and lines[0].split("step 1/1")[1] == own[0].split("step 1/1")[1]
        record = json.loads((two / name / "crossguard.json").read_text())
        assert record["processes"] == 2 and len(list((two / name).glob("*.safetensors"))) == 1


def test_each_text_is_attacked_by_one_process_and_all_have_the_result(two: Path) -> None:
    """This attack ends otherwise on each process, as a tie may."""
    first, second = (json.loads((two / f"said.{rank}").read_text())["texts"] for rank in range(2))
    assert first == second and len(first["clean"]) > 1
    assert first["adversarial"] == [f"{text} {place % 2}" for place, text in enumerate(first["clean"])]


def test_a_process_that_fails_ends_all_in_a_sentence(two: Path) -> None:
    first, second = (json.loads((two / f"said.{rank}").read_text())["failure"] for rank in range(2))
    assert second == "the disk is gone" and first == "process 1 of 2 failed: the disk is gone"


def test_a_fit_under_torchrun_trains_alone(
    base: Fresh, tmp_path: Path, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSGUARD_FITS", str(two / "fits"))
    for number, recipe in enumerate(ALONE_EACH):
        folder = Fit(recipe, base, Blots()).folder
        assert json.loads((folder / "crossguard.json").read_text())["processes"] == 1
        recipe.fit(base, Blots(), tmp_path / str(number))
        assert close(tensors(folder), tensors(tmp_path / str(number)), 1e-6)
    assert not close(tensors(tmp_path / "0"), tensors(tmp_path / "1"), 1e-6), "the mistake would show"


# --- Files that change behind the words ---


@dataclass(frozen=True)
class Filed(Blots, Reads):
    """Blots that say what a file holds."""

    path: str = ""

    @property
    def fingerprint(self) -> str:
        return Path(self.path).read_text()


def retrained(base: Fresh, folder: Path, factor: float) -> HuggingFace:
    """The weights of a base, each times a factor, in a folder."""
    network: Any = base.load()
    with torch.no_grad():
        for parameter in network.model.parameters():
            parameter.mul_(factor)
    network.save(folder)
    return HuggingFace(str(folder))


STILL = FTStandard(steps=1, batch=4, optimizer=SGD(lr=1e-9))  # its result is its base


def test_a_retrained_base_has_another_child(base: Fresh, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    STILL.fit(retrained(base, tmp_path / "base", 1.0), Blots(), out)
    (out / "mine.txt").write_text("a note")
    old = tensors(out)
    new = STILL.fit(retrained(base, tmp_path / "base", 0.5), Blots(), out)
    assert new == HuggingFace(str(out)) and close(tensors(out), tensors(tmp_path / "base"), 1e-6)
    (aside,) = tmp_path.glob("out.old-*")
    assert equal(tensors(aside), old) and (aside / "mine.txt").exists() and not (out / "mine.txt").exists()
    said = capsys.readouterr().err
    assert f"what HuggingFace reads has changed since the training in {out}" in said and str(aside) in said
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    assert STILL.fit(HuggingFace(str(tmp_path / "base")), Blots(), out) == new
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp, "nothing has changed since"
    for factor in (1.0, 0.5):  # there and back: what was put aside is never written over
        STILL.fit(retrained(base, tmp_path / "base", factor), Blots(), out)
    assert len(list(tmp_path.glob("out.old-*"))) == 3


def test_a_training_begun_on_other_data_starts_anew(base: Fresh, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "list").write_text("first")
    data, out, take = Filed(path=str(tmp_path / "list")), tmp_path / "out", Learner.take

    def failing(self: Learner, step: int) -> dict[str, float]:
        if step == 2:
            raise CrossguardError("no power")
        return take(self, step)

    recipe = FTStandard(steps=3, batch=8, save_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "take", failing)
        assert refused(lambda: recipe.fit(base, data, out)) == "no power"
    assert (out / "training.safetensors").exists()
    (tmp_path / "list").write_text("second")
    recipe.fit(base, data, out)
    assert "continuing" not in (out / "log.txt").read_text()
    (aside,) = tmp_path.glob("out.old-*")
    assert (aside / "training.safetensors").exists()


def test_a_fit_is_named_by_what_its_words_read(base: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSGUARD_FITS", str(tmp_path / "fits"))
    (tmp_path / "list").write_text("first")
    word = Fit(STILL, retrained(base, tmp_path / "base", 1.0), Filed(path=str(tmp_path / "list")))
    first, told = word.folder, contents(word)
    assert f"Fit:{word.fingerprint}" in told and first.name == f"FTStandard-{word.fingerprint}"
    image = floats(pictures(2, 16, 16))
    before = word.encode_image(image)
    assert (word.folder, contents(word)) == (first, told), "the question is the same before and after the training"
    retrained(base, tmp_path / "base", 0.5)
    second = word.folder
    assert second != first and not torch.allclose(word.encode_image(image), before)
    (tmp_path / "list").write_text("second")
    assert word.folder not in (first, second)
    outer = Fit(STILL, word, Blots())
    name = outer.folder
    (tmp_path / "list").write_text("third")
    assert outer.folder != name, "a Fit of a Fit reads what the inner one reads"


def test_a_model_that_was_not_trained_here_is_not_written_over(base: Fresh, tmp_path: Path) -> None:
    word = retrained(base, tmp_path, 1.0)
    before = tensors(tmp_path)
    assert "holds a model that was not trained there" in refused(lambda: STILL.fit(word, Blots(), tmp_path))
    assert equal(tensors(tmp_path), before)


# --- Said before the first step ---


def notes(folder: Path, said: str) -> list[str]:
    """The notes of a finished training, which stand in its record, its card and its log, and were printed."""
    found = json.loads((folder / "crossguard.json").read_text())["notes"]
    card, log = (folder / "README.md").read_text(), (folder / "log.txt").read_text()
    assert all(note in log and f"crossguard: {note}\n" in said for note in found)
    assert all("* " + re.sub(r"'/[^']*/([^'/]+)'", r"'\1'", note) + "\n" in card for note in found), "no path there"
    return found


@pytest.mark.parametrize(("warmup", "peak"), [(5, None), (6, "0.1 of 0.1"), (60, "0.01 of 0.1")])
def test_a_warm_up_that_never_ends_is_said(
    base: Fresh, tmp_path: Path, capsys: pytest.CaptureFixture[str], warmup: int, peak: str | None
) -> None:
    FTStandard(steps=6, batch=4, warmup=warmup, optimizer=SGD(lr=0.1)).fit(base, Blots(), tmp_path)
    found = notes(tmp_path, capsys.readouterr().err)
    assert len(found) == (peak is not None)
    if peak:
        assert f"the warm-up of {warmup} steps" in found[0] and f"rises to {peak} at the last step" in found[0]
        assert "give a shorter one, such as warmup=1, or more steps" in found[0]


@dataclass(frozen=True)
class Named(Blots):
    """Blots under other names, labels and templates."""

    called: tuple[str, ...] = ("red circle", "green square", "blue star")
    template: str = "a photo of a {}"
    without: int = 0  # samples whose label is -1

    @property
    def names(self) -> tuple[str, ...]:
        return self.called

    @property
    def templates(self) -> tuple[str, ...]:
        return (self.template,)

    def labels(self) -> Labels:
        labels = super().labels()
        labels[: self.without] = -1
        return labels

    def captions(self, index: int) -> tuple[str, ...]:
        return Blots().captions(index)


@dataclass(frozen=True)
class Half(TextAttack):
    """Changes every second text."""

    def search(self, victim: TextVictim, clean: list[str], goal: Any, budget: Any, rivals: Any) -> list[str]:
        return [text if place % 2 else f"{text} disc" for place, text in enumerate(clean)]


def test_an_attack_without_words_for_the_data_is_said(
    base: Fresh, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Named(called=("xylograph red", "zygote green", "quetzal blue"), template="{} zwitterion")
    recipe = replace(MMCOA, steps=1)
    recipe.fit(base, data, tmp_path)
    assert any("does not know" in note for note in notes(tmp_path, capsys.readouterr().err))


def test_the_share_of_changed_texts_is_logged(base: Fresh, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = tuple(f"{one} {two}" for one in ("red", "green") for two in ("circle", "star"))
    recipe = replace(MMCOA, steps=1, one_way=True, text_attack=Half())  # one-way: all four texts are in each step
    run = started(recipe, base, tmp_path, Named(called=words))
    assert run.learner.take(0)["texts changed"] == 0.5
    assert "texts changed" not in started(TECOA, base, tmp_path).learner.take(0)
    idle = replace(recipe, text_attack=Still())
    idle.fit(base, Blots(), tmp_path / "idle")
    assert "changes none of the texts of step 1" in notes(tmp_path / "idle", capsys.readouterr().err)[0]
    assert "texts changed 0" in (tmp_path / "idle" / "log.txt").read_text()


@dataclass(frozen=True)
class Still(TextAttack):
    """Changes nothing."""

    def search(self, victim: TextVictim, clean: list[str], goal: Any, budget: Any, rivals: Any) -> list[str]:
        return clean


def test_texts_that_are_cut_are_said(base: Fresh, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = Named(called=("red circle", "green square " + "and " * 30, "blue star"))  # the tower reads 32 pieces
    FTStandard(steps=1, batch=8).fit(base, long, tmp_path)
    (note,) = notes(tmp_path, capsys.readouterr().err)
    assert note.startswith("1 of 3 class prompts (33%) are longer than Fresh(") and "tokenizer=" in note


def test_a_tokenizer_that_knows_no_word_is_refused(base: Fresh, tmp_path: Path) -> None:
    blind = Named(called=("hund", "katze", "maus"))  # each becomes [UNK]
    said = refused(lambda: FTStandard(steps=1, batch=8).fit(base, blind, tmp_path / "x"))
    assert "has one embedding for all class prompts, such as 'a photo of a hund' and 'a photo of a maus'" in said
    assert not (tmp_path / "x").exists()
    FTStandard(steps=1, batch=8).fit(base, replace(blind, called=("hund", "katze", "star")), tmp_path / "y")


def test_labels_that_are_no_class_are_refused(base: Fresh, tmp_path: Path) -> None:
    some, none = Named(without=5), Named(called=(), without=24)
    for recipe in (FTStandard(steps=1, batch=8), FTStandard(steps=1, batch=8, in_batch=True), TECOA):
        assert "5 of the 24 samples of" in (said := refused(lambda r=recipe: r.fit(base, some, tmp_path / "x")))
        assert "no class (such as -1; there are 3 classes)" in said
        said = refused(lambda r=recipe: r.fit(base, none, tmp_path / "x"))
        assert "has captions and no classes" in said and "give it captions=True" in said
    for data, count in ((some, 5), (none, 24)):
        said = refused(lambda d=data: Contrastive(steps=1, batch=8, shots=2).fit(base, d, tmp_path / "x"))
        assert "takes so many images of each class" in said and f"{count} of the 24 samples" in said
        Contrastive(steps=1, batch=8).fit(base, data, tmp_path / str(count))  # captions need no class


# --- Reading ahead ---


def test_images_are_read_once_and_ahead(base: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    image = Blots.image

    def noted(self: Blots, index: int) -> Tensor:
        read.append(index)
        return image(self, index)

    monkeypatch.setattr(Blots, "image", noted)
    run = started(FTStandard(batch=8, epochs=2.0), base, tmp_path)
    steps = [run.feed.chosen(step) for step in range(6)]
    for step, chosen in enumerate(steps):
        batch = run.feed.batch(step)
        assert torch.equal(batch.images, floats(torch.stack([image(Blots(), index) for index in chosen])))
        deadline = time.monotonic() + 20
        while len(read) < min(8 * step + 14, 48) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(read) >= min(8 * step + 14, 48), "nobody has asked for these yet"
    run.feed.close()
    assert sorted(read) == sorted(index for chosen in steps for index in chosen)


def test_an_epoch_is_shuffled_once(base: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shuffled, randperm = list[int](), torch.randperm

    def counted(count: int, **options: Any) -> Tensor:
        shuffled.append(count)
        return randperm(count, **options)

    monkeypatch.setattr(torch, "randperm", counted)
    run = started(FTStandard(batch=4, epochs=2.0), base, tmp_path)
    for step in range(12):
        run.feed.batch(step)
    run.feed.close()
    assert shuffled == [24, 24]


def test_frozen_texts_are_in_full_precision_beside_half_precision_images(base: Fresh, tmp_path: Path) -> None:
    run = started(replace(TECOA, bf16=True), base, tmp_path)
    network: Any = run.learner.network
    inputs = run.learner.views(0)
    with torch.no_grad():
        texts = network.encode_text(PROMPTS)
        with torch.autocast("cpu", torch.bfloat16):
            images, rough = network.encode_image(inputs.images["adversarial"]).float(), network.encode_text(PROMPTS)
        exact, other = (
            float(F.cross_entropy(network.logits(images, seen.float()), inputs.batch.texts[CLASSES].place))
            for seen in (texts, rough)
        )
    assert abs(exact - other) > 1e-5, "the mistake would show"
    assert run.learner.take(0)["loss"] == pytest.approx(exact, abs=1e-6)


# --- Mistakes ---


def test_a_training_that_is_refused_in_its_first_step_leaves_nothing(base: Fresh, tmp_path: Path) -> None:
    still, there = FARE(steps=2, batch=8, warmup=0, image_attack=STRONG, trains=Towers(("text",))), tmp_path / "there"
    there.mkdir()
    for folder in (tmp_path / "new", there):
        assert "FARE trains nothing" in refused(lambda out=folder: still.fit(base, Blots(), out))
    assert sorted(tmp_path.rglob("*")) == [there]
    (there / "log.txt").write_text("of a run before\n")
    refused(lambda: still.fit(base, Blots(), there))
    assert (there / "log.txt").read_text().startswith("of a run before\n")


def test_a_training_that_fails_later_keeps_its_log(base: Fresh, tmp_path: Path) -> None:
    wild = replace(TECOA, steps=50, optimizer=SGD(lr=1e30))
    refused(lambda: wild.fit(base, Blots(), tmp_path / "wild"))
    assert (tmp_path / "wild" / "log.txt").exists() and (tmp_path / "wild" / "tensorboard").is_dir()


def test_mistakes_are_one_sentence(base: Fresh, tmp_path: Path) -> None:
    fit = FTStandard(steps=1, batch=8).fit
    assert "has no network of its own to train" in refused(lambda: fit(BitDepth(base), Blots(), tmp_path / "x"))
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in refused(lambda: fit(base, Blots(), tmp_path / "file"))
    assert "cannot be written to" in refused(lambda: fit(base, Blots(), "/proc/none"))
    assert "1 training images; at least 2" in refused(lambda: fit(base, Blots(count=1), tmp_path / "x"))
    assert not (tmp_path / "x").exists(), "a refused training leaves nothing"
    for wrong in (
        {"steps": 0}, {"epochs": 0.0}, {"epochs": 1e300}, {"seed": -1}, {"batch": 1},
        {"shots": 0}, {"save_every": -1}, {"warmup": -1},
    ):  # fmt: skip
        refused(lambda wrong=wrong: FTStandard(**wrong))
    for part in ({"towers": ()}, {"last": 0}, {"towers": ("legs",)}):
        assert refused(lambda part=part: Towers(**part)).startswith("Towers(")
    assert "allows no change of pixels" in refused(lambda: TeCoA(budget=Words(1)))
    assert "allows no change of texts" in refused(lambda: MMCoA(budget=Linf(1 / 255)))


@pytest.mark.parametrize("recipe", [FTStandard(batch=8), TECOA, MMCOA], ids=["FTStandard", "TeCoA", "MMCoA"])
def test_a_loss_that_explodes_is_said(base: Fresh, tmp_path: Path, recipe: Recipe) -> None:
    said = refused(lambda: replace(recipe, steps=6, optimizer=SGD(lr=1e30)).fit(base, Blots(), tmp_path))
    assert "is not finite; lower the learning rate (now 1e+30)" in said
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "crossguard.json").exists()


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (FARE(trains=Towers(("text",))), "FARE trains nothing with .*text.*its loss sees the image embeddings of"),
        (FARE(trains=Context()), "FARE trains nothing with .*Context"),
        (AdvPT(trains=Towers(("image",))), "AdvPT trains nothing with .*its loss sees the text embeddings of"),
        (FARE(trains=Context(specific=True)), "this training reads no class prompts; give specific=False"),
        (
            DisentangledDistillation(trains=ClassFrames(pad=2)),
            "Matched compares embeddings, .*'start' have 12 and those of 'student' have 36 numbers",
        ),
        (AdvPT(trains=ClassFrames(pad=2)), "OfBank compares embeddings"),
        (DisentangledDistillation(teacher=Tiny()), "'adapted' have 64 and those of 'student' have 12"),
        (SelfTraining(shots=2), r"SelfTraining\(shots=2\) takes so many images of each class, .*leave shots out"),
    ],
)
def test_what_cannot_learn_is_refused_in_a_sentence(base: Fresh, tmp_path: Path, recipe: Recipe, says: str) -> None:
    with pytest.raises(CrossguardError, match=says):
        replace(recipe, steps=1, batch=6, warmup=0).fit(base, Blots(6), tmp_path / "out")


@pytest.mark.parametrize(
    ("word", "wrong"), [(SGD, "momentum=-1.0"), (SGD, "momentum=1.0"), (Adam, "eps=0.0"), (AdamW, "eps=-1.0")]
)
def test_what_an_optimizer_cannot_be_is_said(word: type[Optimizer], wrong: str) -> None:
    with pytest.raises(CrossguardError, match=f"{wrong}\\) is not possible; give"):
        build(f"{word.__name__}({wrong})")


@pytest.mark.parametrize("weights", ["alpha=-1.0", "beta=-0.1", "alpha=0.0, beta=0.0"])
def test_mmcoa_learns_at_least_one_of_its_halves(weights: str) -> None:
    with pytest.raises(CrossguardError):
        build(f"MMCoA({weights})")


@pytest.mark.parametrize("part", [Context(tokens=1, specific=True), ClassFrames(pad=2)])
def test_a_teacher_with_prompts_of_other_classes_is_refused(base: Fresh, tmp_path: Path, part: Trainable) -> None:
    proxy = FTStandard(trains=part, steps=1, batch=2).fit(Tiny(), Scenes("shape", count=4), tmp_path / "proxy")
    with pytest.raises(CrossguardError, match="about 3 classes, and the teacher 'proxy' about 12"):
        HPTGPD(proxy=proxy, steps=1, batch=6, warmup=0).fit(base, Blots(6), tmp_path / "out")


def test_captions_that_are_not_there_are_said(base: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Blots, "captions", lambda self, index: ())
    assert "has no caption" in refused(lambda: FTStandard(steps=1, batch=4, captions=True).fit(base, Blots(), tmp_path))


def test_a_finished_folder_is_not_taken_by_another_recipe(base: Fresh, tmp_path: Path) -> None:
    FTStandard(steps=1, batch=4).fit(base, Blots(), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    assert "another recipe" in refused(lambda: FTStandard(steps=2, batch=4).fit(base, Blots(), tmp_path))
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_images_of_several_sizes_are_said(base: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Blots, "image", lambda self, index: pictures(1, 16 + index % 2, 16)[0])
    message = refused(lambda: FTStandard(steps=1, batch=8).fit(base, Blots(), tmp_path))
    assert "have different sizes; give the dataset a size" in message


def test_a_training_says_how_far_it_is(
    base: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps of 40 seconds. To who waits for the folder, to who listens, and else in a line a minute."""
    now, doing, heard = [0.0], list[str](), list[str]()
    take = Learner.take

    def slow(self: Learner, step: int) -> dict[str, float]:
        now[0] += 40.0
        note = turns.worker(tmp_path / "a" / ".lock")
        doing.append("" if note is None else note.doing)
        return take(self, step)

    monkeypatch.setattr(Learner, "take", slow)
    monkeypatch.setattr("crossguard.defenses.run.time.monotonic", lambda: now[0])
    recipe = FTStandard(steps=5, batch=4, save_every=10**6)
    recipe.fit(base, Blots(), tmp_path / "a")
    assert doing[0] == "trains" and all(re.match(r"step \d of 5, loss ", one) for one in doing[1:])
    lines = [line for line in capsys.readouterr().err.splitlines() if "training: step" in line]
    assert [line.split("; ")[0] for line in lines] == [
        "crossguard: training: step 2 of 5 after 80 seconds, about 2 minutes left",
        "crossguard: training: step 4 of 5 after 3 minutes, about 40 seconds left",
    ]
    assert not [path.name for path in (tmp_path / "a").iterdir() if path.name.endswith(".who")]
    with listening(heard.append):
        recipe.fit(base, Blots(), tmp_path / "b")
    assert [one.split(", loss")[0] for one in heard] == [f"step {step} of 5 of the training" for step in range(1, 6)]
    assert "training: step" not in capsys.readouterr().err
