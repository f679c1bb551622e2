"""The MMCoA loss with distinct prompts and counts beside the same loss with one prompt per image, on the shipped model.

    python benchmarks/training.py

Both compute the symmetric in-batch loss and its gradient on a batch of CIFAR-10's kind (many images, ten classes); the
values and gradients are compared before anything is timed. The text attack is in both: once per distinct prompt against
once per image, as the released MMCoA code does it.
"""

from __future__ import annotations

import argparse
import json
import statistics

import torch
import torch.nn.functional as F
from attacks import paired

from crossguard import Scenes, Substitute, Tiny, Words
from crossguard.defenses.terms import in_batch


def main() -> None:
    parser = argparse.ArgumentParser(description="distinct prompts against duplicated prompts in one MMCoA step")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = Scenes("color", "train", count=options.batch)
    batch = next(data.batches(options.batch))
    prompts, labels = data.prompts().flat, batch.labels
    network = Tiny().load().requires_grad_(True)
    attack = Substitute()

    def attacked(texts: list[str]) -> list[str]:
        with torch.no_grad():
            return attack(network.encode_text, texts, None, Words(1))

    def distinct() -> torch.Tensor:
        present, own = torch.unique(labels, return_inverse=True)
        texts = [prompts[label] for label in present.tolist()]
        images = network.encode_image(batch.images)
        both = network.encode_text(texts + attacked(texts)).view(2, len(texts), -1)
        return sum((0.5 * in_batch(network.logits(images, part), own).mean() for part in both), torch.zeros(()))

    def duplicated() -> torch.Tensor:
        texts = [prompts[label] for label in labels.tolist()]
        changed = [attacked([text])[0] for text in texts]
        images = network.encode_image(batch.images)
        target = torch.arange(len(texts))
        total = torch.zeros(())
        for part in (network.encode_text(texts), network.encode_text(changed)):
            logits = network.logits(images, part)
            total = total + 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
        return total

    parameters = list(network.parameters())
    ours, theirs = (torch.autograd.grad(loss(), parameters, allow_unused=True) for loss in (distinct, duplicated))
    for left, right in zip(ours, theirs, strict=True):
        assert (left is None) == (right is None)
        assert left is None or right is None or torch.allclose(left, right, rtol=1e-3, atol=1e-4)
    assert torch.allclose(distinct(), duplicated(), rtol=1e-5)
    ratios = paired(lambda: duplicated().backward(), lambda: distinct().backward(), options.runs)
    print(
        f"one MMCoA loss and gradient on {options.batch} images of {len(set(labels.tolist()))} classes, "
        f"{options.runs} pairs"
    )
    print("ratio per pair: " + ", ".join(f"{ratio:.2f}" for ratio in ratios))
    print(json.dumps({"duplicated_over_distinct_prompts": round(statistics.median(ratios), 2)}))


if __name__ == "__main__":
    main()
