"""One step of a training: the inner adversary makes views of the batch, both towers embed them, the loss descends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossguard.attacks.base import ImageVictim
from crossguard.defenses.feed import Batch, Feed
from crossguard.defenses.plan import Plan
from crossguard.defenses.terms import ADVERSARIAL, CLEAN, Views
from crossguard.errors import CrossguardError
from crossguard.goals import Untargeted
from crossguard.models.base import DualEncoder, frozen
from crossguard.processes import Processes
from crossguard.shapes import Embeddings, Images, TextEmbeddings


@dataclass(frozen=True)
class Inputs:
    """What a step embeds: the images of this process and the texts of all, each clean and, where a term asks for it,
    adversarial.

    Args:
        batch: the clean batch.
        images: by the name of the view.
        texts: by the name of the view, one for each of `batch.texts`.
        path: the images along the way of the attack, where its gradients leak.
    """

    batch: Batch
    images: dict[str, Images]
    texts: dict[str, list[str]]
    path: list[Images] = field(default_factory=list)


class Learner:
    """A network while it trains, and what moves it. Under several processes each has its part of the images and all
    have the same texts; loss and gradient are those of one process with the whole batch."""

    def __init__(self, recipe: Plan, network: DualEncoder, feed: Feed, group: Processes) -> None:
        self.recipe, self.network, self.feed, self.group = recipe, network, feed, group
        self.trained = _select(network, recipe)
        self.optimizer = recipe.optimizer.over(self.trained)
        self.student: nn.Module = network
        trains_texts = any(parameter.requires_grad for parameter in network.towers()["text"].values())
        self._frozen_texts: dict[tuple[str, ...], TextEmbeddings] | None = None if trains_texts else {}

    def join(self) -> None:
        """From here on the processes average their gradients; all of them must call it."""
        if self.group.world == 1:
            return
        device = self.feed.device
        self.student = nn.parallel.DistributedDataParallel(
            self.network, device_ids=[device] if device.type == "cuda" else None
        )

    def rate(self, step: int) -> float:
        """The learning rate of a step: a linear warm-up, then constant or a half cosine down to zero."""
        recipe, rate = self.recipe, self.recipe.optimizer.lr
        if step < recipe.warmup:
            return rate * (step + 1) / recipe.warmup
        if recipe.cosine:
            done = (step - recipe.warmup) / max(1, self.feed.total - recipe.warmup)
            return rate * 0.5 * (1.0 + math.cos(math.pi * done))
        return rate

    def views(self, step: int) -> Inputs:
        """The batch of a step and what the inner adversary makes of it. Leaves nothing in any gradient.

        Each process attacks its images and its share of the texts; the attacked texts are the same on every process.
        """
        terms = self.recipe.terms()
        with self.group.together():
            batch = self.feed.batch(step)
            images, texts, path = {CLEAN: batch.images}, {CLEAN: batch.texts}, list[Images]()
            if any(term.image == ADVERSARIAL for term in terms):
                try:
                    images[ADVERSARIAL], path = self._attacked_images(batch)
                except CrossguardError as error:
                    if not self._alive(batch):
                        raise self._diverged(step) from error
                    raise
            attacks_texts = any(term.text == ADVERSARIAL for term in terms)
            share = self._attacked_texts(batch) if attacks_texts else []
        if attacks_texts:
            texts[ADVERSARIAL] = self._whole(batch.texts, self.group.gather(share))
        return Inputs(batch, images, texts, path)

    def take(self, step: int) -> dict[str, float]:
        """Takes a step and says how it went: loss, accuracy on the batch, learning rate, and the share of the texts
        that the attack changed, where it attacks texts."""
        recipe, terms = self.recipe, self.recipe.terms()
        inputs = self.views(step)
        batch = inputs.batch
        self.optimizer.zero_grad(set_to_none=True)
        self._accumulate(inputs)
        # One forward of everything: distributed training synchronizes once, and each tower sees one large batch.
        image_views = sorted({term.image for term in terms})
        text_views = sorted({term.text for term in terms})
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=recipe.bf16):
            encoded_images, encoded_texts = self._forward(
                torch.cat([inputs.images[view] for view in image_views]),
                [text for view in text_views for text in inputs.texts[view]],
            )
        encoded_images = encoded_images.float().view(len(image_views), len(batch.images), -1)
        encoded_texts = encoded_texts.float().view(len(text_views), len(batch.texts), -1)
        views = Views(
            {view: self._gathered(part) for view, part in zip(image_views, encoded_images, strict=True)},
            dict(zip(text_views, encoded_texts, strict=True)),
            batch.all_own.to(encoded_images.device),
            self.network.logits,
        )
        values = [term(views) for term in terms]
        total = torch.stack([term.weight * value for term, value in zip(terms, values, strict=True)]).sum()
        seen = terms[0]
        with torch.no_grad():
            answers = views.logits(views.images[seen.image], views.texts[seen.text]).argmax(1)
            right = (answers == views.own).float().mean()
        loss, accuracy = torch.stack([total.detach(), right]).tolist()  # the device is waited for once
        if not math.isfinite(loss):
            raise self._diverged(step)
        total.backward()
        rate = self.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(self.trained, recipe.clip)
        self.optimizer.step()
        if recipe.clamp_scale:
            _clamp_scale(self.network)
        said = {
            "loss": loss,
            "robust batch accuracy" if seen.image == ADVERSARIAL else "batch accuracy": accuracy,
            "learning rate": rate,
        }
        if ADVERSARIAL in inputs.texts:
            pairs = zip(inputs.texts[CLEAN], inputs.texts[ADVERSARIAL], strict=True)
            said["texts changed"] = sum(new != old for old, new in pairs) / len(batch.texts)
        return said

    def _attacked_images(self, batch: Batch) -> tuple[Images, list[Images]]:
        """The inner adversary on images: class-level cross-entropy against the clean texts, as in TeCoA and MMCoA."""
        attack, _, budget = self.recipe.adversary()
        assert attack is not None and budget is not None
        pixels, _ = attack.spends(budget)
        assert pixels is not None
        path: list[Images] = []
        with frozen(self.network):
            with torch.no_grad():
                texts = self._embedded(batch.classes)

            def answer(images: Images) -> Tensor:
                if self.recipe.leaks and torch.is_grad_enabled():
                    path.append(images.detach())
                return self.network.logits(self.network.encode_image(images), texts)

            goal = Untargeted(batch.label)
            adversarial = attack(ImageVictim(answer), batch.images, goal, pixels, batch.seeds)
        return adversarial, path

    def _attacked_texts(self, batch: Batch) -> list[str]:
        """This process's share of the distinct texts, attacked."""
        _, attack, budget = self.recipe.adversary()
        assert attack is not None and budget is not None
        with frozen(self.network), torch.no_grad():
            return attack.rewrite(
                self.network.encode_text, self.group.share(batch.texts), budget, self.group.share(batch.rivals)
            )

    def _whole(self, texts: Sequence[str], parts: Sequence[Sequence[str]]) -> list[str]:
        """The texts of all processes in their order: each had every `world`-th of them."""
        whole = list(texts)
        for rank, part in enumerate(parts):
            whole[rank :: self.group.world] = part
        return whole

    def _accumulate(self, inputs: Inputs) -> None:
        """The released MMCoA code clears gradients before its attack and not after it, so every attack step's mean
        class-level cross-entropy adds its parameter gradient at full weight. Same sum, one step at a time."""
        for images in inputs.path:
            encoded, texts = self.student(images, inputs.batch.classes)
            F.cross_entropy(self.network.logits(encoded, texts), inputs.batch.label).backward()

    def _forward(self, images: Images, texts: list[str]) -> tuple[Embeddings, TextEmbeddings]:
        if self._frozen_texts is None:
            return self.student(images, texts)
        return self.student(images, None)[0], self._embedded(texts)

    def _embedded(self, texts: list[str]) -> TextEmbeddings:
        """The texts in float32: asked once and remembered, where the text tower stays as it is."""
        if self._frozen_texts is None:
            return self.network.encode_text(texts).float()
        known = tuple(texts)
        if known not in self._frozen_texts:
            if len(self._frozen_texts) > 64:
                self._frozen_texts.clear()
            with torch.no_grad(), torch.autocast(self.feed.device.type, enabled=False):
                self._frozen_texts[known] = self.network.encode_text(texts).float()
        return self._frozen_texts[known]

    def _gathered(self, embeddings: Embeddings) -> Tensor:
        """The embeddings of all processes, in their order: so the loss is that of the whole batch, on every process.

        Each sends the gradient to its own images only. That is multiplied by the number of processes, because the
        gradients of the parameters will be averaged over them and not summed.
        """
        world = self.group.world
        if world == 1:
            return embeddings
        own = embeddings.contiguous()
        parts = [torch.empty_like(own) for _ in range(world)]
        torch.distributed.all_gather(parts, own.detach())
        if own.requires_grad:
            own.register_hook(lambda gradient: gradient * world)
        parts[self.group.rank] = own
        return torch.cat(parts)

    def _alive(self, batch: Batch) -> bool:
        """Whether the network still answers the clean batch with finite numbers."""
        with torch.no_grad():
            logits = self.network.logits(
                self.network.encode_image(batch.images), self.network.encode_text(batch.classes)
            )
        return bool(torch.isfinite(logits).all())

    def _diverged(self, step: int) -> CrossguardError:
        return CrossguardError(
            f"the loss of step {step + 1} is not finite; lower the learning rate (now {self.recipe.optimizer.lr:g}) "
            "or set clip=1, and train into another folder"
        )


def _select(network: DualEncoder, recipe: Plan) -> list[nn.Parameter]:
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


def _clamp_scale(network: DualEncoder) -> None:
    """Keeps the logit scale between 1 and 100."""
    with torch.no_grad():
        for name, parameter in network.towers()["head"].items():
            if name.endswith("logit_scale"):
                parameter.clamp_(0.0, math.log(100.0))
