"""The training loop all training-time defenses share: the student descends what an inner adversary climbs.

A recipe says which views of images and texts its loss terms need; the loop makes them, steps, logs, saves and
resumes. All randomness is a function of (seed, step, sample), nothing is drawn from a global generator, so a run that
is killed and started again ends in the same weights, and so does the same run on several processes, up to the order
of sums.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn

from crossguard.attacks.base import ImageAttack, ImageVictim, TextAttack
from crossguard.budgets import Budget
from crossguard.checkpoints import check_finite
from crossguard.data import Dataset
from crossguard.defenses.optimizers import Adam, Optimizer
from crossguard.defenses.terms import ADVERSARIAL, CLEAN, OverClasses, Term, Views
from crossguard.device import chosen, exact
from crossguard.errors import CrossguardError
from crossguard.files import check_writable, write
from crossguard.goals import Untargeted
from crossguard.models.base import Checkpoint, DualEncoder, VisionLanguageModel, frozen
from crossguard.models.huggingface import HuggingFace
from crossguard.seeds import derive, keys, uniform
from crossguard.shapes import Embeddings, Images, Labels, Seeds, TextEmbeddings
from crossguard.words import show

TOWERS = ("image", "text", "head")


@dataclass(frozen=True)
class Augment:
    """Random flips and shifts (reflected at the border) of training images, drawn per sample and step."""

    flip: bool = True
    shift: int = 4

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise CrossguardError(f"Augment(shift={self.shift}) is not possible; give 0 or more pixels")

    def __call__(self, images: Images, seeds: Seeds) -> Images:
        if self.shift >= min(images.shape[-2:]):
            size = tuple(images.shape[-2:])
            raise CrossguardError(f"Augment(shift={self.shift}) is too far for images of {size} pixels; lower it")
        chance = uniform(seeds, (3,))
        if self.flip:
            images = torch.where((chance[:, 0] < 0.5).view(-1, 1, 1, 1), images.flip(3), images)
        if self.shift:
            height, width = images.shape[-2:]
            padded = F.pad(images, (self.shift,) * 4, mode="reflect")
            tops = (chance[:, 1] * (2 * self.shift + 1)).long()
            lefts = (chance[:, 2] * (2 * self.shift + 1)).long()
            images = torch.stack(
                [
                    image[:, top : top + height, left : left + width]
                    for image, top, left in zip(padded, tops.tolist(), lefts.tolist(), strict=True)
                ]
            )
        return images


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """(model, data) -> model. The options every recipe has.

    Args:
        epochs: passes over the data; `steps`, if given, counts instead.
        steps: optimizer steps.
        batch: images in a step, over all processes together.
        optimizer: an optimizer word.
        warmup: steps over which the learning rate rises linearly.
        cosine: the rate falls to zero along a half cosine afterwards; otherwise it stays.
        towers: what is trained, of 'image', 'text' and 'head' (the logit scale and bias).
        last: train only the last so many layers of each tower (a layer is a module that owns parameters); all, if None.
        shots: train on this many images of each class, the same ones in every epoch; all, if None.
        fresh_shots: other images of each class in every epoch, as the released code of MMCoA does: it reports "k-shot"
            runs that see k times epochs images of a class. Starts over when they run out (there, epochs become empty).
        captions: pair each image with one of its captions (drawn anew each step) instead of its class prompt.
        augment: random flips and shifts; none, if None.
        clamp_scale: keep the logit scale at most 100, as CLIP and TeCoA train.
        clip: largest norm of the gradient; not limited, if None.
        bf16: forward and backward in bfloat16 autocast; attacks stay in float32.
        save_every: steps between checkpoints of the running training.
        seed: of everything random.
    """

    epochs: float = 1.0
    steps: int | None = None
    batch: int = 128
    optimizer: Optimizer = Adam()
    warmup: int = 0
    cosine: bool = False
    towers: tuple[str, ...] = TOWERS
    last: int | None = None
    shots: int | None = None
    fresh_shots: bool = False
    captions: bool = False
    augment: Augment | None = None
    clamp_scale: bool = False
    clip: float | None = None
    bf16: bool = False
    save_every: int = 100
    seed: int = 0

    def adversary(self) -> tuple[ImageAttack | None, TextAttack | None, Budget | None]:
        """The inner adversary: what attacks the images and the texts of a batch, and how far; nothing by default."""
        return None, None, None

    @property
    def leaks(self) -> bool:
        """Whether the parameter gradients of the attack's steps are added to the update, a fault of released code."""
        return False

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.steps is not None and self.steps < 1:
            raise CrossguardError(f"{name}(steps={self.steps}) trains nothing; give 1 or more steps")
        if not 0 < self.epochs <= 1e6:
            raise CrossguardError(
                f"{name}(epochs={self.epochs}) is not possible; give a positive number of epochs, at most a million"
            )
        if self.seed < 0:
            raise CrossguardError(f"{name}(seed={self.seed}) is not possible; give 0 or more")
        if self.fresh_shots and self.shots is None:
            raise CrossguardError(f"{name}(fresh_shots=True) needs a number of shots, such as shots=16")
        if self.batch < 2:
            raise CrossguardError(
                f"{name}(batch={self.batch}) is not possible; a contrastive batch needs at least 2 images"
            )
        if not self.towers or set(self.towers) - set(TOWERS):
            raise CrossguardError(f"{name}(towers={self.towers}) is not possible; give some of {TOWERS}")
        for field in ("last", "shots", "save_every"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise CrossguardError(f"{name}({field}={value}) is not possible; give 1 or more")
        if self.warmup < 0:
            raise CrossguardError(f"{name}(warmup={self.warmup}) is not possible; give 0 or more steps")
        if self.clip is not None and not self.clip > 0:
            raise CrossguardError(f"{name}(clip={self.clip}) trains nothing; give a positive norm, or None")

    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """The weighted sum that the student descends."""

    def fit(self, model: VisionLanguageModel, data: Dataset, out: str | Path) -> Checkpoint:
        """Trains a copy of `model` on `data` and writes a checkpoint that `transformers` loads into the folder `out`.

        A run that was interrupted goes on where it last saved; a finished one is recognized and returned as it is.
        Under `torchrun` the batch is shared among the processes.
        """
        if not isinstance(model, Checkpoint):
            raise CrossguardError(
                f"{show(model, short=True)} has no network of its own to train; train its base and wrap the result"
            )
        folder = Path(out)
        question = {"recipe": show(self), "model": show(model), "data": show(data)}
        # A `Fit` may be asked for its network in the middle of an evaluation, where gradients are off.
        with _owned(folder), torch.enable_grad(), exact():
            if _finished(folder, question):
                return HuggingFace(str(folder))
            return _Run(self, model, data, folder, question).train()


@dataclass(frozen=True)
class _Batch:
    """The share of one step's batch that this process has. `texts` are distinct and the same on every process."""

    images: Images
    own: Labels  # of the local images, into texts
    all_own: Tensor  # of the images of all processes, in their order
    texts: list[str]
    rivals: list[frozenset[str]]
    classes: list[str]  # what the image attack tells the own text from
    label: Labels  # of the local images, into classes
    seeds: Seeds


class _Run:
    """One training run; everything that changes while it trains is here."""

    def __init__(
        self, recipe: Recipe, model: Checkpoint, data: Dataset, folder: Path, question: dict[str, str]
    ) -> None:
        from accelerate import Accelerator

        self.recipe, self.model, self.data, self.folder, self.question = recipe, model, data, folder, question
        # Precision is not accelerate's business here: it keeps one setting for the whole process, and runs differ.
        self.accelerator = Accelerator(cpu=chosen().device.type == "cpu", mixed_precision="no")
        self.indices, self.shown = _few_shot(data, recipe, 0), 0
        if len(self.indices) < 2:
            raise CrossguardError(
                f"{show(data, short=True)} has {len(self.indices)} training images; at least 2 are needed"
            )
        self.batch = min(recipe.batch, len(self.indices))
        if self.batch % self.accelerator.num_processes:
            raise CrossguardError(
                f"a batch of {self.batch} cannot be shared by {self.accelerator.num_processes} processes"
            )
        self.per_epoch = len(self.indices) // self.batch
        self.total = recipe.steps or max(1, round(recipe.epochs * self.per_epoch))
        self.labels = data.labels()
        self.prompts = None if recipe.captions else data.prompts()
        self.rivals = [] if self.prompts is None else self.prompts.rivals()
        self.network = model.load().to(self.accelerator.device)
        self.trained = _select(self.network, recipe)
        self.optimizer = recipe.optimizer.over(self.trained)
        self.frozen_texts: dict[tuple[str, ...], TextEmbeddings] | None = None
        if not any(parameter.requires_grad for parameter in self.network.towers()["text"].values()):
            self.frozen_texts = {}
        self.seconds = 0.0

    def train(self) -> Checkpoint:
        recipe, main = self.recipe, self.accelerator.is_main_process
        start = self._restore()
        student = self.accelerator.prepare(self.network) if self.accelerator.num_processes > 1 else self.network
        log = _logger(self.folder) if main else logging.getLogger("crossguard.silent")
        log.info(
            "%d steps, %s: %s",
            self.total,
            f"continuing at step {start}" if start else "from the start",
            self.question,
        )
        with _progress(main, self.total, start) as shown, _board(self.folder, main, start) as board:
            began = time.monotonic()
            for step in range(start, self.total):
                values = self._step(student, step)
                if main:
                    for name, value in values.items():
                        board.add_scalar(name, value, step + 1)
                    shown(step + 1, values)
                    if (step + 1) % 20 == 0 or step + 1 == self.total:
                        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
                        log.info("step %d/%d: %s", step + 1, self.total, text)
                    if (step + 1) % recipe.save_every == 0 and step + 1 < self.total:
                        self._save(step + 1, self.seconds + time.monotonic() - began)
            self.seconds += time.monotonic() - began
        if main:
            self._finish(log)
        self.accelerator.wait_for_everyone()
        return HuggingFace(str(self.folder))

    # One step

    def _step(self, student: nn.Module, step: int) -> dict[str, float]:
        recipe, terms = self.recipe, self.recipe.terms()
        batch = self._batch(step, any(isinstance(term, OverClasses) for term in terms))
        images, texts = {CLEAN: batch.images}, {CLEAN: batch.texts}
        self.optimizer.zero_grad(set_to_none=True)
        if any(term.image == ADVERSARIAL for term in terms):
            try:
                images[ADVERSARIAL], path = self._attacked_images(batch)
            except CrossguardError as error:
                if not self._alive(batch):
                    raise self._diverged(step) from error
                raise
            if recipe.leaks:
                self._accumulate(student, batch, path)
        if any(term.text == ADVERSARIAL for term in terms):
            texts[ADVERSARIAL] = self._attacked_texts(batch)
        # One forward of everything: distributed training synchronizes once, and each tower sees one large batch.
        image_views = sorted({term.image for term in terms})
        text_views = sorted({term.text for term in terms})
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=recipe.bf16):
            encoded_images, encoded_texts = self._forward(
                student,
                torch.cat([images[view] for view in image_views]),
                [text for view in text_views for text in texts[view]],
            )
        encoded_images = encoded_images.float().view(len(image_views), len(batch.images), -1)
        encoded_texts = encoded_texts.float().view(len(text_views), len(batch.texts), -1)
        views = Views(
            {view: _gathered(part) for view, part in zip(image_views, encoded_images, strict=True)},
            dict(zip(text_views, encoded_texts, strict=True)),
            batch.all_own.to(encoded_images.device),
            self.network.logits,
        )
        values = [term(views) for term in terms]
        loss = torch.stack([term.weight * value for term, value in zip(terms, values, strict=True)]).sum()
        if not bool(torch.isfinite(loss)):
            raise self._diverged(step)
        self.accelerator.backward(loss)
        rate = self._rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(self.trained, recipe.clip)
        self.optimizer.step()
        if recipe.clamp_scale:
            _clamp_scale(self.network)
        view = terms[0]
        with torch.no_grad():
            answers = views.logits(views.images[view.image], views.texts[view.text]).argmax(1)
        accuracy = float((answers == views.own).float().mean())
        return {
            "loss": float(loss.detach()),
            "robust batch accuracy" if view.image == ADVERSARIAL else "batch accuracy": accuracy,
            "learning rate": rate,
        }

    def _alive(self, batch: _Batch) -> bool:
        """Whether the student still answers the clean batch with finite numbers."""
        with torch.no_grad():
            logits = self.network.logits(
                self.network.encode_image(batch.images), self.network.encode_text(batch.classes)
            )
        return bool(torch.isfinite(logits).all())

    def _diverged(self, step: int) -> CrossguardError:
        return CrossguardError(
            f"the loss of step {step + 1} is not finite; lower the learning rate (now {self.recipe.optimizer.lr:g}) "
            f"or set clip=1, and train into another folder than {self.folder}"
        )

    def _forward(self, student: nn.Module, images: Images, texts: list[str]) -> tuple[Embeddings, TextEmbeddings]:
        if self.frozen_texts is None:
            return student(images, texts)
        known = tuple(texts)
        if known not in self.frozen_texts:
            if len(self.frozen_texts) > 64:
                self.frozen_texts.clear()
            with torch.no_grad():
                self.frozen_texts[known] = self.network.encode_text(texts).float()
        return student(images, None)[0], self.frozen_texts[known]

    def _attacked_images(self, batch: _Batch) -> tuple[Images, list[Images]]:
        """The inner adversary on images: class-level cross-entropy against the clean texts, as in TeCoA and MMCoA."""
        attack, _, budget = self.recipe.adversary()
        assert attack is not None and budget is not None
        pixels, _ = attack.spends(budget)
        assert pixels is not None
        path: list[Images] = []
        with frozen(self.network):
            with torch.no_grad():
                texts = self.network.encode_text(batch.classes).float()

            def answer(images: Images) -> Tensor:
                if self.recipe.leaks and torch.is_grad_enabled():
                    path.append(images.detach())
                return self.network.logits(self.network.encode_image(images), texts)

            goal = Untargeted(batch.label)
            adversarial = attack(ImageVictim(answer), batch.images, goal, pixels, batch.seeds)
        return adversarial, path

    def _accumulate(self, student: nn.Module, batch: _Batch, path: Sequence[Images]) -> None:
        """The released MMCoA code clears gradients before its attack and not after it, so every attack step's mean
        class-level cross-entropy adds its parameter gradient at full weight. Same sum, one step at a time."""
        for images in path:
            encoded, texts = student(images, batch.classes)
            self.accelerator.backward(F.cross_entropy(self.network.logits(encoded, texts), batch.label))

    def _attacked_texts(self, batch: _Batch) -> list[str]:
        _, attack, budget = self.recipe.adversary()
        assert attack is not None and budget is not None
        with frozen(self.network), torch.no_grad():
            return attack.rewrite(self.network.encode_text, batch.texts, budget, batch.rivals)

    def _rate(self, step: int) -> float:
        recipe, rate = self.recipe, self.recipe.optimizer.lr
        if step < recipe.warmup:
            return rate * (step + 1) / recipe.warmup
        if recipe.cosine:
            done = (step - recipe.warmup) / max(1, self.total - recipe.warmup)
            return rate * 0.5 * (1.0 + math.cos(math.pi * done))
        return rate

    # What a step trains on

    def _batch(self, step: int, all_classes: bool) -> _Batch:
        epoch, place = divmod(step, self.per_epoch)
        order = torch.randperm(len(self.indices), generator=_generator(self.recipe.seed, "order", epoch))
        if epoch and self.recipe.fresh_shots and self.shown != epoch:
            self.indices, self.shown = _few_shot(self.data, self.recipe, epoch), epoch
        chosen = [self.indices[i] for i in order[place * self.batch : (place + 1) * self.batch].tolist()]
        share = self.batch // self.accelerator.num_processes
        first = share * self.accelerator.process_index
        local = chosen[first : first + share]
        texts, own, rivals, classes, label = self._texts(step, chosen, all_classes)
        pictures = [self.data.image(index) for index in local]
        if len({picture.shape for picture in pictures}) > 1:
            raise CrossguardError(
                f"the images of {show(self.data, short=True)} have different sizes; "
                "give the dataset a size, such as size=224"
            )
        seeds = keys((self.data.id(index) for index in local), self.recipe.seed, step)
        images = torch.stack(pictures).to(torch.float32).div_(255.0)
        if self.recipe.augment is not None:
            images = self.recipe.augment(images, seeds)
        device = self.accelerator.device
        mine = slice(first, first + share)
        return _Batch(
            images.to(device),
            own[mine].to(device),
            own,
            texts,
            rivals,
            classes,
            label[mine].to(device),
            seeds,
        )

    def _texts(
        self, step: int, chosen: Sequence[int], all_classes: bool
    ) -> tuple[list[str], Labels, list[frozenset[str]], list[str], Labels]:
        """The distinct texts of the step, which of them each sample owns, and what the image attack confuses it
        with."""
        if self.prompts is None:
            captions = []
            for index in chosen:
                options = self.data.captions(index)
                if not options:
                    raise CrossguardError(
                        f"sample {self.data.id(index)!r} has no caption, and captions=True needs one each"
                    )
                captions.append(options[derive(self.recipe.seed, step, "caption", self.data.id(index)) % len(options)])
            texts = list(dict.fromkeys(captions))
            place = {text: row for row, text in enumerate(texts)}
            own = torch.tensor([place[caption] for caption in captions])
            return texts, own, [frozenset()] * len(texts), texts, own
        template = derive(self.recipe.seed, step, "template") % len(self.prompts.texts[0])
        classes = [texts[template] for texts in self.prompts.texts]
        rivals = self.rivals[template :: len(self.prompts.texts[0])]
        label = self.labels[list(chosen)]
        if all_classes:
            return classes, label, rivals, classes, label
        present, own = torch.unique(label, return_inverse=True)
        kept = present.tolist()
        return [classes[c] for c in kept], own, [rivals[c] for c in kept], classes, label

    # State on disk

    def _save(self, step: int, seconds: float) -> None:
        from safetensors.torch import save

        tensors = {f"model.{name}": tensor for name, tensor in self.network.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{number}.{name}"] = value
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        meta = {
            "step": str(step),
            "seconds": str(seconds),
            "question": json.dumps(self.question, sort_keys=True),
        }
        write(self.folder / "training.safetensors", save(tensors, meta))

    def _restore(self) -> int:
        from safetensors import safe_open

        path = self.folder / "training.safetensors"
        if not path.exists():
            return 0
        try:
            with safe_open(str(path), framework="pt", device=str(self.accelerator.device)) as file:
                meta = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            question, step, seconds = json.loads(meta["question"]), int(meta["step"]), float(meta["seconds"])
        except Exception as error:  # safetensors has one error for every kind of damage
            raise CrossguardError(f"{path} is damaged ({error}); delete it to start the training again") from error
        if question != self.question:
            raise CrossguardError(_other_run(self.folder))
        weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
        try:
            self.network.load_state_dict(weights)
        except RuntimeError as error:
            raise CrossguardError(f"{path} is not of this model; delete it to start the training again") from error
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, number, part = name.split(".", 2)
                state.setdefault(int(number), {})[part] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.seconds = seconds
        return step

    def _finish(self, log: logging.Logger) -> None:
        check_finite(self.network, "the trained model")
        self.network.save(self.folder)
        write(self.folder / "README.md", _card(self).encode())
        record = {
            **self.question,
            "steps": self.total,
            "seconds": round(self.seconds, 1),
            "processes": self.accelerator.num_processes,
            "versions": _versions(),
        }
        # Written last: this file says that everything else is there.
        write(self.folder / "crossguard.json", json.dumps(record, indent=1).encode())
        (self.folder / "training.safetensors").unlink(missing_ok=True)
        log.info("finished after %.1f seconds", self.seconds)


def _few_shot(data: Dataset, recipe: Recipe, epoch: int) -> list[int]:
    """The training indices: all, or a fixed random `shots` of each class that do not depend on the order of the
    data; with `fresh_shots` the next ones in each epoch."""
    if recipe.shots is None:
        return list(range(len(data)))
    by_class: dict[int, list[tuple[int, int]]] = {}
    for index, label in enumerate(data.labels().tolist()):
        by_class.setdefault(label, []).append((derive(recipe.seed, "shots", data.id(index)), index))
    short = [label for label, members in by_class.items() if len(members) < recipe.shots]
    if short:
        raise CrossguardError(f"class {data.names[short[0]]!r} has fewer than {recipe.shots} images; lower shots")
    first = epoch * recipe.shots if recipe.fresh_shots else 0
    return sorted(
        sorted(members)[(first + shot) % len(members)][1]
        for members in by_class.values()
        for shot in range(recipe.shots)
    )


def _select(network: DualEncoder, recipe: Recipe) -> list[nn.Parameter]:
    """Freezes all but what the recipe trains and returns the rest."""
    network.requires_grad_(False).eval()
    chosen: list[nn.Parameter] = []
    for tower, named in network.towers().items():
        if tower not in recipe.towers:
            continue
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in named))
        kept = set(layers if recipe.last is None or tower == "head" else layers[-recipe.last :])
        chosen += [parameter for name, parameter in named.items() if name.rpartition(".")[0] in kept]
    for parameter in chosen:
        parameter.requires_grad_(True)
    if not chosen:
        raise CrossguardError(f"nothing is left to train with towers={recipe.towers} and last={recipe.last}")
    return chosen


def _gathered(embeddings: Embeddings) -> Tensor:
    """The embeddings of all processes, in their order, with gradients to each: so the loss is that of the whole
    batch."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return embeddings
    if torch.distributed.get_world_size() == 1:
        return embeddings
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(embeddings.contiguous()))


def _clamp_scale(network: DualEncoder) -> None:
    """Keeps the logit scale between 1 and 100."""
    with torch.no_grad():
        for name, parameter in network.towers()["head"].items():
            if name.endswith("logit_scale"):
                parameter.clamp_(0.0, math.log(100.0))


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(derive(*parts))


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """One training run a folder at a time; a second process waits. Worker processes of one run share it."""
    made = not folder.exists()
    check_writable(folder)
    if int(os.environ.get("RANK", "0")) > 0:
        yield
        return
    try:
        with FileLock(folder / ".lock"):
            yield
    except CrossguardError:
        if made and {path.name for path in folder.iterdir()} <= {".lock", "log.txt"}:  # refused before the first step
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
        raise


def _finished(folder: Path, question: dict[str, str]) -> bool:
    path = folder / "crossguard.json"
    if not path.exists():
        return False
    try:
        record = json.loads(path.read_text())
        before = {name: record[name] for name in question}
    except (ValueError, KeyError, TypeError) as error:
        raise CrossguardError(f"{path} is damaged; delete the folder to train again") from error
    if before != question:
        raise CrossguardError(_other_run(folder))
    return True


def _other_run(folder: Path) -> str:
    return f"{folder} holds a run of another recipe, model or data; give another folder or delete this one"


def _logger(folder: Path) -> logging.Logger:
    log = logging.getLogger(f"crossguard.training.{folder.resolve()}")
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    handler = logging.FileHandler(folder / "log.txt")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    return log


@contextmanager
def _board(folder: Path, main: bool, start: int) -> Iterator[Any]:
    """A TensorBoard writer, where this process is the one that writes."""
    if not main:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None) as board:
        yield board


@contextmanager
def _progress(main: bool, total: int, start: int) -> Iterator[Any]:
    """A progress bar on the terminal with loss, accuracy and time left; silent where there is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[values]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not (main and console.is_terminal),
        transient=True,
    ) as bar:
        task = bar.add_task("training", total=total, completed=start, values="")

        def shown(step: int, values: dict[str, float]) -> None:
            text = ", ".join(f"{name} {value:.3g}" for name, value in values.items() if name != "learning rate")
            bar.update(task, completed=step, values=text)

        yield shown


def _versions() -> dict[str, str]:
    import transformers

    from crossguard import __version__

    return {
        "crossguard": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _card(run: _Run) -> str:
    return f"""---
library_name: transformers
tags: [clip, adversarial-robustness, crossguard]
---

# {type(run.recipe).__name__} of {show(run.model, short=True)}

A dual encoder trained with [Crossguard](https://pypi.org/project/crossguard/). `transformers.AutoModel` loads it
without Crossguard.

| | |
|---|---|
| recipe | `{run.question["recipe"]}` |
| base | `{run.question["model"]}` |
| data | `{run.question["data"]}` |
| steps | {run.total} of {run.batch} images |
| seconds | {run.seconds:.0f} |

A robust accuracy of this model means nothing without its attack, budget and number of images; measure it with

```
crossguard eval --model "HuggingFace('{run.folder}')" --task ... --attack ... --budget ...
```
"""
