"""What only a GPU can show: attacks on its tensors, products in float32, networks in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from crossguard import (
    APGD,
    FAB,
    L2,
    PGD,
    TTC,
    AutoAttack,
    CarliniWagner,
    DeepFool,
    Gated,
    GaussianNoise,
    ImageAttack,
    ImageVictim,
    Linf,
    RayS,
    Scenes,
    Square,
    TeCoA,
    Tiny,
    TinyCNN,
    Untargeted,
    ZeroShot,
    device,
    evaluate,
)
from crossguard.goals import margin
from crossguard.seeds import by_position, drawing, drawn, normal, uniform
from crossguard.testing import LinearVictim, check_model, check_recipe, check_wrapper

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pytestmark = needs_gpu


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    with device.choosing("cuda"):
        yield


ATTACKS = [
    (PGD(), Linf(8 / 255)), (APGD(), L2(0.5)), (FAB(), Linf(8 / 255)), (Square(queries=200), Linf(8 / 255)),
    (DeepFool(), L2(0.5)), (CarliniWagner(steps=50), L2(0.5)), (RayS(queries=200), Linf(8 / 255)),
    (AutoAttack(), Linf(8 / 255)),
]  # fmt: skip


@pytest.mark.parametrize(("attack", "budget"), ATTACKS)
def test_attacks_find_on_a_gpu_what_they_find_on_a_cpu(attack: ImageAttack, budget: Linf | L2) -> None:
    victim, images = LinearVictim(4), 0.3 + 0.4 * uniform(by_position(6), (3, 6, 6))
    labels, seeds = victim(images).argmax(1).detach(), torch.arange(6) + 100
    here = attack(victim, images, Untargeted(labels), budget, seeds)
    there = attack(victim.cuda(), images.cuda(), Untargeted(labels.cuda()), budget, seeds)
    assert there.device.type == "cuda" and there.dtype == torch.float32
    budget.check(there, images.cuda())
    with torch.no_grad():
        margins = [margin(victim(made.cuda()), labels.cuda()).cpu() for made in (here, there)]
    assert torch.equal(margins[0] < 0, margins[1] < 0)


def test_noise_is_the_same_on_every_device() -> None:
    seeds = torch.arange(5) * 977
    assert torch.equal(uniform(seeds, (3, 4), torch.device("cuda")).cpu(), uniform(seeds, (3, 4)))
    assert torch.allclose(normal(seeds, (3, 4), torch.device("cuda")).cpu(), normal(seeds, (3, 4)), atol=1e-5)
    with drawing(seeds):
        here, views = drawn(5, "x"), drawn(10, "x")
    with drawing(seeds.cuda()):
        assert torch.equal(drawn(5, "x").cpu(), here) and torch.equal(drawn(10, "x").cpu(), views)


def test_convolutions_are_float32_unless_tf32_is_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    images, weights = torch.randn(4, 64, 16, 16, generator=generator), torch.randn(64, 64, 3, 3, generator=generator)
    expected = F.conv2d(images.double(), weights.double())

    def error() -> float:
        with device.exact():
            found = F.conv2d(images.cuda(), weights.cuda()).double().cpu()
        return float((found - expected).abs().max() / expected.abs().max())

    assert error() < 1e-5
    if torch.cuda.get_device_capability() >= (8, 0):
        with device.choosing("cuda", tf32=True):
            assert error() > 5e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_evaluation_on_a_gpu_is_that_on_a_cpu(dtype: str) -> None:
    task, attack, budget = ZeroShot(Scenes("shape")), PGD(steps=5), Linf(4 / 255)
    with device.choosing("cuda", dtype):
        there = evaluate(task, Tiny(), attack, budget, limit=64)
    assert there.versions["device"].startswith("cuda: ")
    assert ("bfloat16" in there.versions["device"]) == (dtype == "bfloat16") == ("precision" in there.question)
    with device.choosing("cpu"):
        here = evaluate(task, Tiny(), attack, budget, limit=64)
    slack = 1 if dtype == "float32" else 4
    assert abs(int((here.outcomes.clean != there.outcomes.clean).sum())) <= slack
    assert abs(here.robust_accuracy - there.robust_accuracy) <= slack / 64


def test_random_models_answer_alike_in_every_batch_on_a_gpu() -> None:
    model, images, seeds = GaussianNoise(Tiny()), uniform(by_position(4), (3, 32, 32)).cuda(), torch.arange(4)
    answer = ImageVictim(model.encode_image).drawing_from(seeds)
    whole = answer(images)
    alone = [ImageVictim(model.encode_image).drawing_from(seeds[i : i + 1])(images[i : i + 1]) for i in range(4)]
    assert whole.device.type == "cuda" and torch.allclose(whole, torch.cat(alone), atol=1e-3)


def test_the_contracts_are_kept_on_a_gpu_too() -> None:
    check_model(TinyCNN())
    check_wrapper(TTC(Tiny()))
    check_wrapper(Gated(GaussianNoise(Tiny())))
    check_recipe(TeCoA())
