"""Toy images and victims for tests of attacks, and attacks with fewer steps."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from crossguard.seeds import by_position, normal, uniform
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


def with_fields(word: Any, **values: Any) -> Any:
    """The word with these values wherever it or a word inside it has fields of these names."""

    def change(part: Any) -> Any:
        own = {field.name for field in dataclasses.fields(part)}
        return dataclasses.replace(part, **{name: value for name, value in values.items() if name in own})

    return mapped(word, change)
