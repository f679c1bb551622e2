"""The training loop against brute force: its losses, its gradients, what it trains, and what survives a kill."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from crossguard.attacks.gradient import PGD
from crossguard.budgets import Both, Linf, Words
from crossguard.defenses.finetuning import Contrastive, FTStandard, MMCoA, TeCoA
from crossguard.defenses.fit import Fit
from crossguard.defenses.optimizers import SGD, Adam, AdamW
from crossguard.defenses.plan import Augment
from crossguard.defenses.recipe import Recipe
from crossguard.defenses.run import Run
from crossguard.defenses.step import Inputs
from crossguard.defenses.terms import InBatch, OverClasses, Views, in_batch
from crossguard.errors import CrossguardError
from crossguard.goals import Untargeted
from crossguard.models.fresh import Fresh
from crossguard.models.huggingface import HuggingFace, TransformersEncoder
from crossguard.models.wrapper import BitDepth
from crossguard.processes import ALONE
from fixtures import Blots, changed, equal, floats, pictures, save_tokenizer, small, tensors

ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
}
STRONG = PGD(steps=3, step=0.5, best=False, stop=False)
BUDGET = Both(Linf(16 / 255), Words(1))
MMCOA = MMCoA(steps=2, batch=8, optimizer=SGD(lr=0.1), image_attack=STRONG, budget=BUDGET)
TECOA = TeCoA(steps=2, batch=8, optimizer=SGD(lr=0.1), warmup=0, image_attack=STRONG, budget=Linf(16 / 255))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    folder = tmp_path_factory.mktemp("base") / "tokenizer"
    save_tokenizer(folder)
    return small(folder)


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
    found = in_batch(7.0 * images @ texts.T, own)
    found_gradients = torch.autograd.grad(found, (images, texts))
    naive = 7.0 * images @ texts[own].T  # one column per image, and the identity as target
    target = torch.arange(len(own))
    expected = F.cross_entropy(naive, target) + F.cross_entropy(naive.T, target)
    assert torch.allclose(found, expected, atol=1e-10)
    for left, right in zip(found_gradients, torch.autograd.grad(expected, (images, texts)), strict=True):
        assert torch.allclose(left, right, atol=1e-10)


def views() -> Views:
    generator = torch.Generator().manual_seed(0)
    images = {name: torch.randn(6, 4, generator=generator) for name in ("clean", "adversarial")}
    texts = {name: torch.randn(3, 4, generator=generator) for name in ("clean", "adversarial")}
    return Views(images, texts, torch.tensor([0, 1, 2, 0, 0, 1]), lambda image, text: 5.0 * image @ text.T)


def test_terms_look_at_the_views_they_name() -> None:
    seen = views()
    for image in ("clean", "adversarial"):
        for text in ("clean", "adversarial"):
            logits = seen.logits(seen.images[image], seen.texts[text])
            assert torch.allclose(OverClasses(image, text)(seen), F.cross_entropy(logits, seen.own))
            assert torch.allclose(InBatch(image, text)(seen), in_batch(logits, seen.own))
    assert "cannot see a view 'dirty'" in refused(lambda: InBatch("dirty"))


def test_recipes_are_the_terms_of_their_papers() -> None:
    assert MMCoA().terms() == (InBatch("adversarial", "clean", 0.5), InBatch("clean", "adversarial", 0.5))
    assert MMCoA(alpha=0.2, beta=0.7, one_way=True).terms() == (
        OverClasses("adversarial", "clean", 0.2),
        OverClasses("clean", "adversarial", 0.7),
    )
    assert TeCoA().terms() == (OverClasses("adversarial", "clean"),) and TeCoA().towers == ("image",)
    assert FTStandard().terms() == (OverClasses("clean", "clean"),) and FTStandard().adversary() == (None,) * 3
    assert FTStandard(in_batch=True).terms() == (InBatch("clean", "clean"),)
    assert Contrastive().captions and Contrastive().terms() == (InBatch("clean", "clean", 0.5),)


# --- What is trained ---


def test_towers_and_last_layers_train_and_the_rest_stays(base: Fresh, tmp_path: Path) -> None:
    before = weights(base)
    image, text, head = "vis", "text", "logit_"
    cases: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"towers": ("image",)}, (image,)),
        ({"towers": ("text",)}, (text,)),
        ({"towers": ("head",)}, (head,)),
        ({}, (image, text, head)),
        ({"towers": ("image", "text"), "last": 1}, ("visual_projection.", "text_projection.")),
        ({"towers": ("text",), "last": 2}, ("text_projection.", "text_model.pooler.dense.")),
    ]
    for number, (options, parts) in enumerate(cases):
        recipe = FTStandard(steps=2, batch=8, optimizer=SGD(lr=0.5), **options)
        after = weights(recipe.fit(base, Blots(), tmp_path / str(number)))
        expected = {name for name, tensor in before.items() if name.startswith(parts) and tensor.is_floating_point()}
        assert expected and changed(before, after) == expected, options


def test_tecoa_trains_the_image_tower_only(base: Fresh, tmp_path: Path) -> None:
    moved = changed(weights(base), weights(TECOA.fit(base, Blots(), tmp_path)))
    assert moved and all(name.startswith("vis") for name in moved)


def test_captions_need_captions_and_are_in_the_batch(base: Fresh, tmp_path: Path) -> None:
    run = started(Contrastive(steps=1, batch=8), base, tmp_path)
    first, second = run.feed.batch(0), run.feed.batch(1)
    for index, own in zip(run.feed.chosen(0), first.own.tolist(), strict=True):
        assert first.texts[own] in Blots().captions(index)
    assert first.texts != second.texts and len(set(first.texts)) == len(first.texts)


# --- The gradient of a step ---


def loss_of(network: TransformersEncoder, recipe: MMCoA, inputs: Inputs) -> Tensor:
    """MMCoA's loss with the batch written out: every image with its own copy of its text."""
    own = inputs.batch.own.tolist()
    total = torch.zeros(())
    for weight, image, text in ((recipe.alpha, "adversarial", "clean"), (recipe.beta, "clean", "adversarial")):
        texts = network.encode_text([inputs.texts[text][i] for i in own])
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
    assert inputs.texts["clean"] == [PROMPTS[c] for c in sorted(set(Blots().labels()[run.feed.chosen(0)].tolist()))]
    assert all(new != old for old, new in zip(*inputs.texts.values(), strict=True))
    size = (bad - clean).abs().flatten(1).amax(1)
    assert float(size.min()) > 0.03 and float(size.max()) <= 16 / 255 + 1e-6
    values = run.learner.take(0)
    loss = loss_of(before, recipe, inputs)
    assert values["loss"] == pytest.approx(float(loss.detach()), abs=1e-5) and values["texts changed"] == 1.0
    loss.backward()
    if leaks:
        assert len(inputs.path) == STRONG.steps
        for images in inputs.path:
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
    assert "texts changed" not in values and batch.texts == PROMPTS
    assert torch.equal(batch.label, Blots().labels()[run.feed.chosen(0)])
    texts = before.encode_text(PROMPTS).detach()
    expected = STRONG(
        lambda images: before.logits(before.encode_image(images), texts),
        batch.images, Untargeted(batch.label), Linf(16 / 255), batch.seeds,
    )  # fmt: skip
    assert torch.equal(bad, expected)
    loss = F.cross_entropy(before.logits(before.encode_image(bad), before.encode_text(PROMPTS)), batch.label)
    clean = F.cross_entropy(before.logits(before.encode_image(batch.images), before.encode_text(PROMPTS)), batch.label)
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
    assert "is damaged" in refused(lambda: MMCOA.fit(base, Blots(), out))


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

KILLED = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
import fixtures, test_recipe
image = fixtures.Blots.image
fixtures.Blots.image = lambda self, index: (time.sleep(0.005), image(self, index))[1]
test_recipe.LONG.fit(fixtures.small(sys.argv[2]), fixtures.Blots(), sys.argv[3])
"""
LONG = replace(MMCOA, steps=12, save_every=0, optimizer=AdamW(lr=1e-2), augment=Augment(shift=2), cosine=True)


def test_a_killed_run_ends_in_the_same_weights(base: Fresh, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(torch.get_num_threads()), base.tokenizer, str(out)],
        env=ENVIRONMENT, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (out / "training.safetensors").exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    _, said = child.communicate()
    assert child.returncode == -signal.SIGKILL, said.decode()
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


# --- Two processes ---

SHARED = """
import sys, torch
torch.set_num_threads(1)
import fixtures, test_recipe
for name, recipe in test_recipe.ONE_STEP.items():
    recipe.fit(fixtures.small(sys.argv[1]), fixtures.Blots(), sys.argv[2] + "/" + name)
"""
ONE_STEP: dict[str, Recipe] = {
    "mmcoa": replace(MMCOA, steps=1, optimizer=SGD(lr=1.0, momentum=0.0)),
    "tecoa": replace(TECOA, steps=1, optimizer=SGD(lr=1.0, momentum=0.0)),
    "leaks": replace(MMCOA, steps=1, optimizer=SGD(lr=1.0, momentum=0.0), accumulate_attack_gradients=True),
}


def test_two_processes_take_the_step_of_one(base: Fresh, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SHARED)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script),
         base.tokenizer, str(tmp_path / "two")],
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    before = weights(base)
    for name, recipe in ONE_STEP.items():
        one = weights(recipe.fit(base, Blots(), tmp_path / "one" / name))
        two = weights(HuggingFace(str(tmp_path / "two" / name)))
        assert max(float((one[k] - before[k]).abs().max()) for k in one if one[k].is_floating_point()) > 1e-2
        for key, tensor in one.items():
            assert torch.allclose(tensor, two[key], atol=1e-5), f"{name}: {key}"
        lines = [line for line in (tmp_path / "two" / name / "log.txt").read_text().splitlines() if "step 1/1" in line]
        own = [line for line in (tmp_path / "one" / name / "log.txt").read_text().splitlines() if "step 1/1" in line]
        assert len(lines) == 1 and lines[0].split("step 1/1")[1] == own[0].split("step 1/1")[1]
        record = json.loads((tmp_path / "two" / name / "crossguard.json").read_text())
        assert record["processes"] == 2 and len(list((tmp_path / "two" / name).glob("*.safetensors"))) == 1


# --- Mistakes ---


def test_mistakes_are_one_sentence(base: Fresh, tmp_path: Path) -> None:
    fit = FTStandard(steps=1, batch=8).fit
    assert "has no network of its own to train" in refused(lambda: fit(BitDepth(base), Blots(), tmp_path / "x"))
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in refused(lambda: fit(base, Blots(), tmp_path / "file"))
    assert "cannot be written to" in refused(lambda: fit(base, Blots(), "/proc/none"))
    assert "1 training images; at least 2" in refused(lambda: fit(base, Blots(count=1), tmp_path / "x"))
    assert not (tmp_path / "x").exists(), "a refused training leaves nothing"
    for wrong in (
        {"steps": 0}, {"epochs": 0.0}, {"epochs": 1e300}, {"seed": -1}, {"batch": 1}, {"towers": ()}, {"last": 0},
        {"towers": ("legs",)}, {"shots": 0}, {"save_every": -1},
    ):  # fmt: skip
        refused(lambda wrong=wrong: FTStandard(**wrong))
    assert "allows no change of pixels" in refused(lambda: TeCoA(budget=Words(1)))
    assert "allows no change of texts" in refused(lambda: MMCoA(budget=Linf(1 / 255)))


@pytest.mark.parametrize("recipe", [FTStandard(batch=8), TECOA, MMCOA], ids=["FTStandard", "TeCoA", "MMCoA"])
def test_a_loss_that_explodes_is_said(base: Fresh, tmp_path: Path, recipe: Recipe) -> None:
    said = refused(lambda: replace(recipe, steps=6, optimizer=SGD(lr=1e30)).fit(base, Blots(), tmp_path))
    assert "is not finite; lower the learning rate (now 1e+30)" in said
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "crossguard.json").exists()


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
