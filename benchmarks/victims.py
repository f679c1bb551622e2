"""Classifiers that attacks are measured on: `resnet20` and `resnet56` on CIFAR-10 from weights in NumPy files;
`hardened`, a small convolutional network that is trained adversarially here, in about a minute on one core; and the
small CLIP of docs/results.md on the generated scenes: `tiny` as shipped, `tecoa` after TeCoA.

The files are those of ../shared/data: `cifar10_resnet20.npz`, `cifar10_test.parquet` and so on. Every network takes
pixels in [0, 1]; normalization is its own affair.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossguard import CIFAR10, PGD, Adam, Fit, Linf, Scenes, TeCoA, Tiny, ZeroShot
from crossguard.models.base import VisionLanguageModel
from crossguard.seeds import by_position, fold, uniform

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
KEPT = ROOT / "runs" / "benchmarks"
VICTIMS = ("resnet20", "resnet56", "hardened", "tiny", "tecoa")


class ResNet(nn.Module):
    """A ResNet for CIFAR-10 (He et al. 2016, section 4.2) with `blocks` blocks in each of its three stages."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16) for _ in range(blocks)))
        self.layer2 = nn.Sequential(*(Block(32 if block else 16, 32) for block in range(blocks)))
        self.layer3 = nn.Sequential(*(Block(64 if block else 32, 64) for block in range(blocks)))
        self.linear = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.bn1(self.conv1((images - self.mean) / self.deviation)))
        return self.linear(self.layer3(self.layer2(self.layer1(features))).mean((2, 3)))


class Block(nn.Module):
    """Two convolutions beside a shortcut without parameters: it takes every second pixel and pads the channels."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.stride, self.padding = after // before, (after - before) // 2
        self.conv1 = nn.Conv2d(before, after, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)

    def forward(self, features: Tensor) -> Tensor:
        shortcut = features
        if self.padding:
            shortcut = F.pad(features[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(features))))) + shortcut)


def resnet(depth: int = 20) -> nn.Module:
    """The ResNet of this depth (20 or 56), undefended: 91.7 % and 93.6 % on clean images."""
    network = ResNet((depth - 2) // 6)
    with np.load(DATA / f"cifar10_resnet{depth}.npz") as file:
        weights = {name: torch.from_numpy(file[name]) for name in file.files}
    missing, unexpected = network.load_state_dict(weights, strict=False)
    left = [name for name in missing if name not in ("mean", "deviation") and not name.endswith("num_batches_tracked")]
    if left or unexpected:
        raise ValueError(f"cifar10_resnet{depth}.npz does not fit: without {left}, with {unexpected}")
    return network.eval().requires_grad_(False)


def hardened(passes: int = 2, eps: float = 8 / 255) -> nn.Module:
    """A small network trained adversarially on CIFAR-10; trained when first asked for, then kept under runs/."""
    network = nn.Sequential(
        nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(2048, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip
    kept = KEPT / f"hardened_{passes}_{round(eps * 255)}.pt"
    if not kept.exists():
        train(network, *pictures("train", 50_000), eps, passes)
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), kept)
    network.load_state_dict(torch.load(kept, weights_only=True))
    return network.eval().requires_grad_(False)


def train(
    network: nn.Sequential, images: Tensor, labels: Tensor, eps: float, passes: int, batch: int = 64, rate: float = 0.03
) -> None:
    """FGSM from a random start as the only adversary, and a rate that rises and falls (Wong et al. 2020)."""
    steps = len(images) // batch
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for part in network:
            if isinstance(part, nn.Conv2d | nn.Linear):
                part.reset_parameters()
        order = torch.cat([torch.randperm(len(images))[: steps * batch] for _ in range(passes)])
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps * passes)
    for step, rows in enumerate(order.view(-1, batch)):
        clean, answers = images[rows], labels[rows]
        noise = 2.0 * uniform(fold(by_position(batch), step), (3, 32, 32)) - 1.0
        start = (clean + eps * noise).clamp(0.0, 1.0).requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(start), answers, reduction="sum"), start)
        moved = start.detach() + 1.25 * eps * gradient.sign()
        crafted = (clean + (moved - clean).clamp(-eps, eps)).clamp(0.0, 1.0)
        optimizer.zero_grad()
        F.cross_entropy(network(crafted), answers).backward()
        optimizer.step()
        schedule.step()


def pictures(split: str, count: int) -> tuple[Tensor, Tensor]:
    """Images and labels of CIFAR-10, spread over its classes."""
    data = CIFAR10(str(DATA), split)
    batches = list(data.batches(500, data.chosen(count)))
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])


class Counted(nn.Module):
    """A victim that counts, per image, how often it was asked with a gradient and without."""

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        # a parameter, because some libraries look for one to learn the device
        self.device = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.answer = answer
        self.gradients = self.forwards = 0

    def forward(self, images: Tensor) -> Tensor:
        if torch.is_grad_enabled() and images.requires_grad:
            self.gradients += len(images)
        else:
            self.forwards += len(images)
        return self.answer(images)


def answered(name: str, count: int) -> tuple[Counted, Tensor, Tensor]:
    """A victim and, of so many images, those that it answers rightly, with their labels."""
    if name in ("tiny", "tecoa"):
        task = ZeroShot(Scenes("object", "test"))
        batch = next(task.batches(count, task.chosen(count)))
        answer, images, labels = clip(name).classifier(task.data.prompts()), batch.images, batch.labels
    else:
        answer = hardened() if name == "hardened" else resnet(int(name[-2:]))
        images, labels = pictures("test", count)
    victim = Counted(answer).eval()
    with torch.no_grad():
        right = victim(images).argmax(1) == labels
    return victim, images[right], labels[right]


def clip(name: str) -> VisionLanguageModel:
    """The shipped model, or the one that TeCoA makes of it (see experiments/joint.toml)."""
    if name == "tiny":
        return Tiny()
    recipe = TeCoA(
        steps=200, batch=64, optimizer=Adam(lr=2e-3, weight_decay=0.0), warmup=10,
        image_attack=PGD(steps=3, step=0.5, best=False, stop=False), budget=Linf(5 / 255),
    )  # fmt: skip
    return Fit(recipe, Tiny(), Scenes("object", "train", count=6000))
