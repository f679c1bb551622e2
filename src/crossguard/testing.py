"""The contract every attack, every model and every recipe must meet, ours and yours: `check_attack(mine)`,
`check_model(mine)`, `check_wrapper(mine)`, `check_recipe(mine)`.

Each check raises an AssertionError that says what was broken. They need no data, no network and a few seconds.
"""

from __future__ import annotations

import io
import math
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from crossguard import words
from crossguard.answer import Answer, Said
from crossguard.attacks.base import Attack, ImageAttack, ImageVictim, Queries, TextAttack
from crossguard.budgets import L1, L2, Characters, Linf, Words
from crossguard.data import Dataset, Prompts, in_floats
from crossguard.datasets.combined import Over
from crossguard.datasets.embedded import Scenes
from crossguard.defenses.optimizers import SGD
from crossguard.defenses.recipe import Recipe
from crossguard.defenses.run import Run, asked, written
from crossguard.defenses.step import Learner
from crossguard.defenses.terms import TEXT
from crossguard.device import choosing, exact
from crossguard.errors import CrossguardError
from crossguard.goals import Drift, Untargeted, margin
from crossguard.models.base import Checkpoint, DualEncoder, VisionLanguageModel
from crossguard.models.embedded import Tiny
from crossguard.models.wrapper import Lent, Wrapper, layers
from crossguard.processes import ALONE
from crossguard.seeds import drawing, replay
from crossguard.shapes import Embeddings, Images, Labels, Logits

PIXEL_BUDGETS: tuple[Linf | L2 | L1, ...] = (Linf(8 / 255), L2(0.5), L1(2.0))


def check_attack(attack: Attack, text_budgets: Sequence[Words | Characters] = (Words(1),)) -> None:
    """The contract of an attack: stays inside its budget, leaves its input, the parameters and their gradients alone,
    repeats under a seed, does not depend on the batch, hurts, and does nothing with a budget of zero.

    Args:
        text_budgets: which budgets an attack on texts is held to.
    """
    if type(attack).__name__ in words.names():
        assert words.build(words.show(attack)) == attack, f"{attack} does not survive being written and read"
    if isinstance(attack, ImageAttack):
        for budget in PIXEL_BUDGETS:
            if isinstance(budget, attack.norms):
                _check_image_attack(attack, budget)
    elif isinstance(attack, TextAttack):
        for words_or_characters in text_budgets:
            _check_text_attack(attack, words_or_characters)


@exact()
def check_model(model: VisionLanguageModel, size: int = 32) -> None:
    """The contract of a model or wrapper: pixels in [0, 1] in, finite embeddings out, a gradient to the pixels, a
    batch that equals its singles, and a classifier with one logit per class.

    A random model is lent a key for each image, as in an evaluation, and must answer the same under the same keys: it
    draws from `seeds.drawn`, not from torch's generator, and an image's noise doesn't depend on its batch.
    """
    if {type(part).__name__ for part in words.within(model, VisionLanguageModel)} <= set(words.names()):
        assert words.build(words.show(model)) == model, f"{model} does not survive being written and read"
    images, seeds = _pictures(3, size).to(model.device), torch.arange(3) + 100
    prompts = Prompts.of(("circle", "square", "star"), ("a photo of a {}", "a picture of a {}"))

    answer = model.answer(prompts)

    def encoded(rows: slice) -> Embeddings:
        with drawing(seeds[rows]):
            return answer.encode(images[rows])

    embeddings = encoded(slice(3))
    texts = model.encode_text(prompts.flat)
    assert embeddings.ndim == 2 and len(embeddings) == 3, f"embeddings of 3 images have shape {tuple(embeddings.shape)}"
    assert texts.shape == (6, embeddings.shape[1]), f"6 texts have shape {tuple(texts.shape)}"
    assert bool(torch.isfinite(embeddings).all() and torch.isfinite(texts).all()), "an embedding is not finite"
    assert torch.allclose(embeddings, encoded(slice(3)), rtol=1e-3, atol=1e-4), (
        "the same images under the same keys have other embeddings; draw noise from seeds.drawn"
    )
    singles = torch.cat([encoded(slice(i, i + 1)) for i in range(3)])
    assert torch.allclose(embeddings, singles, rtol=1e-3, atol=1e-4), "a batch of images does not equal its singles"
    single_texts = torch.cat([model.encode_text([text]) for text in prompts.flat])
    assert torch.allclose(texts, single_texts, rtol=1e-3, atol=1e-4), "a batch of texts does not equal its singles"
    other = answer.encode(_pictures(1, size + 8).to(model.device))
    assert other.shape == (1, embeddings.shape[1]), "an image of another size has embeddings of another shape"
    with drawing(seeds):
        logits = answer(images)
    assert logits.shape == (3, 3), f"the classifier of 3 classes gave {tuple(logits.shape)} for 3 images"
    victim = ImageVictim(answer, Queries.none(3, model.device), seeds)
    gradient, _, _ = victim.ascend(images, Untargeted(logits.argmax(1).detach()))
    assert bool(gradient.flatten(1).any(1).all()), "the gradient with respect to the pixels is zero"


@exact()
def check_wrapper(wrapper: Wrapper, size: int = 32) -> None:
    """The contract of a defense around a model: that of a model, what it declares, and what attacks need to know of it.

    It asks about images in [0, 1]; it draws noise only if it says so, and then each image its own; a smooth stand-in
    has a gradient; and a gate says in the same draw what the defense has done.
    """
    check_model(wrapper, size)
    images, seeds = _pictures(3, size).to(wrapper.device), torch.arange(3) + 100
    prompts = Prompts.of(("circle", "square", "star"), ("a photo of a {}",))
    asked = list[Tensor]()

    def heard(answer: Answer) -> Answer:
        def listening(images: Images) -> Said:
            asked.append(images.detach())
            return answer.hard(images)

        return replace(answer, hard=listening, inner=None if answer.inner is None else heard(answer.inner))

    inner = heard(wrapper.base.answer(prompts))  # of several layers any may be asked
    spied = wrapper.around(inner, Lent(wrapper, layers(wrapper)[-1], prompts))
    with drawing(seeds), torch.no_grad():
        spied.hard(images)
    assert asked, "the defense asks nothing of the model inside"
    low, high = min(float(one.min()) for one in asked), max(float(one.max()) for one in asked)
    assert low >= -1e-6 and high <= 1.0 + 1e-6, f"the model inside is asked about pixels from {low:.4g} to {high:.4g}"

    answer = wrapper.answer(prompts)
    assert answer.layers == len(layers(wrapper)) - 1
    with drawing(seeds) as lent, torch.no_grad():
        again = replay()
        said = answer.hard(images)
        gates = dict[str, Tensor]()
        for name, gate in answer.gates.items():
            with again():
                gates[name] = gate(images)
    assert answer.random or not lent.used, "it draws noise and does not say so: random = True"
    assert set(said.gates) == set(gates), f"the gates {sorted(gates)} are declared, and {sorted(said.gates)} were told"
    for name, gate in gates.items():
        assert gate.shape == (3,), f"the gate {name} of 3 images has shape {tuple(gate.shape)}"
        assert torch.allclose(gate, said.gates[name], rtol=1e-3, atol=1e-4), (
            f"the gate {name} of one answer has two values; let its noise come from self.normal or self.uniform, under "
            "the same use as where it acts"
        )
    if answer.soft is not None:
        goal = Untargeted(said.logits.argmax(1))
        with drawing(seeds):
            near = answer.soft(images.requires_grad_(True)).logits
            (gradient,) = torch.autograd.grad(goal.loss(near).sum(), images)
        assert bool(gradient.isfinite().all() and gradient.flatten(1).any(1).all()), (
            "the gradient through the smooth stand-in is zero or not finite"
        )


def check_recipe(
    recipe: Recipe, base: Checkpoint | None = None, data: Dataset | None = None, processes: bool = False
) -> None:
    """The contract of a recipe, tried in trainings of two steps a stage: each stage's loss falls along its gradient,
    nothing changes but what is trained, the same seed gives the same weights, also after a kill, the result answers as
    the trained network did, and data that cannot be trained on is refused in a sentence. All of it on the CPU: a GPU
    sums in an order of its own each time, so that the last bits of its weights are not the same again.

    Args:
        base: what is trained; the shipped model, if None.
        data: at least eight images, with whatever the recipe needs; eight generated scenes, if None.
        processes: two processes must take the steps of one, too. They are started anew, so the recipe, and what it
            holds, must be importable; in a script, below `if __name__ == "__main__"`.
    """
    base, data = base or Tiny(), data or Scenes("shape", count=8)
    if type(recipe).__name__ in words.names():
        assert words.build(words.show(recipe)) == recipe, f"{recipe} does not survive being written and read"
    short = replace(recipe, epochs=1.0, steps=2, batch=4, warmup=0, save_every=10**6)
    with TemporaryDirectory() as folder, redirect_stderr(io.StringIO()), choosing("cpu"):
        root = Path(folder)
        learner = _check_steps(short, base, data, root / "steps")
        word = short.fit(base, data, root / "whole", processes=False)
        _check_answer(learner.network, word, data)
        learned = _learned(root / "whole")
        short.fit(base, data, root / "again", processes=False)
        assert _equal(learned, _learned(root / "again")), "the same seed gave other weights"
        for step in sorted({1, *learner.ends[:-1]}):
            _check_kill(short, base, data, root, step, learned)
        _check_refusals(short, base, data, root / "refused")
        if processes:
            _check_processes(short, base, data, root)


class LinearVictim(nn.Module):
    """Logits linear in the pixels: the loss an attack can reach is known in closed form, so an attack can be measured
    exactly.

    For two classes the margin moves by `w . delta`, so within a ball of size eps (away from the box) the best loss is
    `margin - eps * dual_norm(w)`, and the distance to the boundary is `margin / dual_norm(w)`.
    """

    def __init__(self, classes: int = 2, size: int = 6, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, 3 * size * size, generator=generator))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, images: Images) -> Logits:
        # A matrix product rounds each row differently in batches of different sizes, which would decide ties between
        # equally good points; this sum does not.
        return (images.flatten(1)[:, None] * self.weight).sum(2) + self.bias


def _check_image_attack(attack: ImageAttack, budget: Linf | L2 | L1) -> None:
    victim = LinearVictim(4)
    images = _pictures(5, 6)
    labels = victim(images).argmax(1).detach()
    before = [images.clone(), *(parameter.detach().clone() for parameter in victim.parameters())]
    seeds = torch.arange(5) + 100
    queries = Queries.none(5)
    goal = Untargeted(labels)
    made = attack(ImageVictim(victim, queries), images, goal, budget, seeds)
    assert not made.requires_grad, "the adversarial images still ask for a gradient"
    budget.check(made, images)
    after = [images, *(parameter.detach() for parameter in victim.parameters())]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True)), (
        "the attack changed its input or the model"
    )
    assert all(parameter.grad is None for parameter in victim.parameters()), (
        "the attack left gradients in the parameters"
    )
    assert int((queries.forwards + queries.gradients).min()) > 0, "the attack asked nothing of its victim"
    assert torch.equal(made, attack(victim, images, goal, budget, seeds)), "the same seeds gave other images"
    singles = [
        attack(victim, images[i : i + 1], goal.at(torch.tensor([i])), budget, seeds[i : i + 1]) for i in range(5)
    ]
    assert torch.allclose(made, torch.cat(singles), atol=1e-5), "an image's perturbation depends on its batch"
    with torch.no_grad():
        worse = margin(victim(made), labels) < margin(victim(images), labels)
    assert bool(worse.all()), f"{attack} with {budget} did not lower the margin of every image"
    nothing = attack(victim, images, goal, replace(budget, eps=0.0), seeds)
    assert torch.equal(nothing, images), "a budget of zero changed the images"


def _check_text_attack(attack: TextAttack, budget: Words | Characters) -> None:
    texts = [
        "a photo of a red circle",
        "",
        "word",
        "a photo of a blue square 🎈",
        "the of a",
        "a  double  space",
    ]

    def victim(texts: Sequence[str]) -> Embeddings:
        return torch.stack([_bag(text) for text in texts])

    given = list(texts)
    made = attack(victim, texts, None, budget)
    assert texts == given, "the attack changed its input"
    budget.check(made, texts)
    assert made == attack(victim, texts, None, budget), "the same texts gave another answer"
    assert made == [attack(victim, [text], None, budget)[0] for text in texts], "a text's answer depends on its batch"
    assert attack(victim, texts, None, replace(budget, count=0)) == texts, "a budget of zero changed the texts"
    changed = [i for i, (new, old) in enumerate(zip(made, texts, strict=True)) if new != old]
    if changed:
        loss = Drift(victim(texts)).loss(victim(made))
        assert bool((loss[changed] > 0).all()), "a changed text did not drift from its clean embedding"


def _bag(text: str) -> Tensor:
    """A bag of words: each word has a direction of its own."""
    return torch.stack([torch.full((16,), 0.1), *(_direction(word) for word in text.split())]).sum(0)


@lru_cache(maxsize=65536)
def _direction(word: str) -> Tensor:
    from crossguard.seeds import derive, uniform

    return uniform(torch.tensor([derive(word)]), (16,))[0] - 0.5


def _pictures(count: int, size: int) -> Images:
    """Images away from the borders of the pixel range."""
    from crossguard.seeds import by_position, uniform

    return 0.3 + 0.4 * uniform(by_position(count), (3, size, size))


def _run(recipe: Recipe, base: Checkpoint, data: Dataset, folder: Path) -> Run:
    """A training that has not taken a step."""
    folder.mkdir()
    return Run(recipe, base, data, folder, asked(recipe, base, data), ALONE)


def _learned(folder: Path) -> dict[str, Tensor]:
    """What a training has written."""
    from safetensors.torch import load_file

    return {f"{file.name}/{name}": tensor for file in written(folder) for name, tensor in load_file(file).items()}


def _equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _check_steps(recipe: Recipe, base: Checkpoint, data: Dataset, folder: Path) -> Learner:
    """Descent in every stage, and what stays as it is."""
    run = _run(recipe, base, data, folder)
    learner = run.learner
    teachers = {who: one for who, one in learner.teachers.items() if isinstance(one, nn.Module)}
    teachers |= {
        f"{who} {number}": word.network
        for who, one in learner.teachers.items() if isinstance(one, VisionLanguageModel)
        for number, word in enumerate(words.within(one, Checkpoint))
    }  # fmt: skip
    still = {f"network {name}": one for name, one in learner.network.named_parameters() if not one.requires_grad}
    still |= {f"teacher {who} {name}": one for who, held in teachers.items() for name, one in held.named_parameters()}
    before = {name: one.detach().clone() for name, one in still.items()}
    trained = {name: one.detach().clone() for name, one in learner.trained.items()}
    for step in range(run.total):
        if learner.place(step)[1] == 0:
            if step:
                learner.begin(learner.place(step)[0])
            _check_descent(learner, step)
        values = learner.take(step)
        assert math.isfinite(values["loss"]), f"the loss of step {step + 1} is not finite"
    for feed in run.feeds.values():
        feed.close()
    moved = [name for name, one in still.items() if not torch.equal(one, before[name]) or one.grad is not None]
    assert not moved, f"{moved[0]} is not trained, and has changed or got a gradient"
    assert not _equal(trained, {name: one.detach() for name, one in learner.trained.items()}), "nothing was learned"
    return learner


def _check_descent(learner: Learner, step: int) -> None:
    """The loss of a batch that is repeated falls along its gradient."""
    inputs = learner.views(step)
    assert all(one.grad is None for one in learner.trained.values()) or step, "an adversary left gradients behind"
    loss, _ = learner.loss(step, inputs)
    gradients = torch.autograd.grad(loss, list(learner.trained.values()), allow_unused=True)
    found = {name: one for name, one in zip(learner.trained, gradients, strict=True) if one is not None}
    norm = math.sqrt(sum(float(one.square().sum()) for one in found.values()))
    assert norm > 0.0, "the gradient of the loss is zero"
    start = {name: one.detach().clone() for name, one in learner.trained.items()}
    for length in (1e-1, 1e-2, 1e-3, 1e-4):
        learner.put({name: one - length / norm * found[name] if name in found else one for name, one in start.items()})
        with torch.no_grad():
            lower = float(learner.loss(step, inputs)[0]) < float(loss.detach())
        learner.put(start)
        if lower:
            return
    raise AssertionError(f"the loss of step {step + 1} does not fall along its gradient")


def _check_answer(network: DualEncoder, word: Checkpoint, data: Dataset) -> None:
    """The result answers as the trained network."""
    images, texts = in_floats(torch.stack(data.load(range(4)))), ["a photo of a circle", "a red star"]
    with torch.no_grad():
        pairs = (
            ("images", network.encode_image(images), word.encode_image(images)),
            ("texts", network.encode_text(texts), word.encode_text(texts)),
        )
    for what, trained, loaded in pairs:
        assert torch.allclose(trained.float(), loaded, rtol=1e-3, atol=1e-4), (
            f"{words.show(word, short=True)} embeds {what} otherwise than the trained network"
        )


def _check_kill(
    recipe: Recipe, base: Checkpoint, data: Dataset, root: Path, step: int, learned: Mapping[str, Tensor]
) -> None:
    """A training that ends after a step, and is taken up again."""
    folder = root / f"killed after {step}"
    run = _run(recipe, base, data, folder)
    for taken in range(step):
        run.learner.take(taken)
    run.save(step)
    for feed in run.feeds.values():
        feed.close()
    recipe.fit(base, data, folder, processes=False)
    assert _equal(learned, _learned(folder)), f"killed after step {step}, the training ends in other weights"


@dataclass(frozen=True)
class _Sizes(Over):
    """Every second image is a row smaller."""

    data: Dataset

    def image(self, index: int) -> Tensor:
        image = self.data.image(index)
        return image[:, 1:] if index % 2 else image

    def stored(self, index: int) -> Tensor:
        return self.image(index)


@dataclass(frozen=True)
class _OneClass(Over):
    """All images are of the first class."""

    data: Dataset

    @property
    def names(self) -> tuple[str, ...]:
        return self.data.names[:1]

    def prompts(self, templates: Sequence[str] | None = None) -> Prompts:
        return Dataset.prompts(self, templates)

    def labels(self) -> Labels:
        return torch.zeros_like(self.data.labels())


def _check_refusals(recipe: Recipe, base: Checkpoint, data: Dataset, folder: Path) -> None:
    texts = any(need.tower == TEXT for stage in recipe.stages() for need in stage.everything) and not recipe.captions
    cases = ((_Sizes(data), "images of several sizes", True), (_OneClass(data), "a single class", texts))
    for wrong, what, must in cases:
        said = ""
        try:
            recipe.fit(base, wrong, folder / what, processes=False)
        except CrossguardError as error:
            said = str(error)
        assert said or not must, f"it trains on {what} without a word"
        assert "\n" not in said, f"what is said of {what} is more than a sentence: {said}"


def _check_processes(recipe: Recipe, base: Checkpoint, data: Dataset, root: Path) -> None:
    """Two processes take the steps of one, by plain SGD, in which a gradient that is twice as long would show."""
    plain = replace(recipe, optimizer=SGD(lr=1e-2, momentum=0.0))
    plain.fit(base, data, root / "one", processes=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_one_of_two, (port, plain, base, data, root / "two"), nprocs=2)
    one, two = _learned(root / "one"), _learned(root / "two")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], rtol=1e-3, atol=1e-5), f"two processes learn another {name} than one"


def _one_of_two(rank: int, port: int, recipe: Recipe, base: Checkpoint, data: Dataset, folder: Path) -> None:
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ.update(world, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with choosing("cpu"):
        recipe.fit(base, data, folder)
