"""Toy images, victims, a model and its data for tests of attacks, and attacks with fewer steps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from crossguard.data import Dataset, Prompts
from crossguard.models.base import VisionLanguageModel, cosine
from crossguard.models.wrapper import Lent
from crossguard.seeds import by_position, drawing, normal, uniform
from crossguard.testing import LinearVictim
from crossguard.words import mapped


def middle(count: int, height: int = 6, width: int | None = None) -> Tensor:
    """Images far from the borders of the pixel range, so that the box never binds; square unless told otherwise."""
    return 0.4 + 0.2 * uniform(by_position(count), (3, height, width or height))


def templates(count: int, classes: int = 10, size: int = 12, start: int = 99991) -> tuple[Tensor, Tensor]:
    """Noisy images of one pattern for each class, and their labels; those from another `start` are others."""
    clean = 0.5 + 0.12 * normal(torch.arange(classes) + 1000, (3, size, size))
    labels = (torch.arange(count) * 7 + start) % classes
    noise = normal(by_position(count) + 5000 + start, (3, size, size))
    return (clean[labels] + 0.12 * noise).clamp(0, 1), labels


@functools.cache
def convnet(classes: int = 10, size: int = 12) -> torch.nn.Module:
    """A small network that tells noisy templates of 9 to 12 pixels apart, with boundaries some way off its data."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 12, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(12, 24, 3, 2, 1), torch.nn.ReLU(),
            torch.nn.Flatten(), torch.nn.Linear(216, 48), torch.nn.ReLU(), torch.nn.Linear(48, classes),
        )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for step in range(60):
        images, labels = templates(64, classes, size, 64 * step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def reach(victim: LinearVictim, images: Tensor, labels: Tensor) -> Tensor:
    """The exact Linf distance to the nearest boundary of a linear victim, away from the box."""
    logits, weight = victim(images).detach(), victim.weight.detach()
    gaps = logits.gather(1, labels[:, None]) - logits
    slopes = (weight[labels][:, None] - weight[None]).abs().sum(2)
    return (gaps / slopes).scatter(1, labels[:, None], torch.inf).amin(1)


def with_fields(word: Any, **values: Any) -> Any:
    """The word with these values wherever it or a word inside it has fields of these names."""

    def change(part: Any) -> Any:
        own = {field.name for field in dataclasses.fields(part)}
        return dataclasses.replace(part, **{name: value for name, value in values.items() if name in own})

    return mapped(word, change)


@functools.cache
def soft(seed: int = 0, classes: int = 50) -> torch.nn.Module:
    """A network of many classes that is sure of none: the cross-entropy of an image says little about who wins."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(108, 64), torch.nn.Tanh(), torch.nn.Linear(64, classes)
        )
    return net.eval().requires_grad_(False)


@dataclasses.dataclass(frozen=True)
class Toy(VisionLanguageModel):
    """A model that is read nowhere and answers in microseconds: a small random network embeds images at 6 x 6 pixels,
    and every text has a random direction of its own. It is sure of nothing, so that cross-entropy says little about
    who wins."""

    scale: float = 5.0

    def encode_image(self, images: Tensor) -> Tensor:
        return soft(0, 16)(torch.nn.functional.adaptive_avg_pool2d(images, 6))  # of that size: the images themselves

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return normal(torch.tensor([crc32(text.encode()) for text in texts]), (16,))

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        return self.scale * cosine(images, texts)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


def last_asked(model: Any, images: Tensor, seeds: Tensor, prompts: Prompts) -> Tensor:
    """The pixels that the model inside a defense is asked about in the end."""
    asked = list[Tensor]()
    inner = model.base.answer(prompts)

    def listening(images: Tensor) -> Any:
        asked.append(images.detach())
        return inner.hard(images)

    answer = model.around(dataclasses.replace(inner, hard=listening), Lent(model, model.base, prompts))
    with drawing(seeds), torch.no_grad():
        answer.hard(images)
    return asked[-1]


@dataclasses.dataclass(frozen=True)
class Dots(Dataset):
    """Random images of 6 x 6 pixels and 50 classes, of which each image has the one that `Toy` sees in it."""

    count: int = 64

    def __len__(self) -> int:
        return self.count

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"kind {number}" for number in range(50))

    def id(self, index: int) -> str:
        return f"dots-{index}"

    def image(self, index: int) -> Tensor:
        return (255 * (0.4 + 0.2 * uniform(torch.tensor([index]), (3, 6, 6)))[0]).round().to(torch.uint8)

    def labels(self) -> Tensor:
        images = torch.stack([self.image(index) for index in range(self.count)]).float() / 255
        return Toy().classifier(self.prompts())(images).argmax(1)
