"""Fine-tuning defenses as compositions of loss terms: FT-standard, TeCoA, MMCoA, and clean contrastive training."""

from __future__ import annotations

from dataclasses import dataclass

from crossguard.attacks.base import ImageAttack, TextAttack
from crossguard.attacks.gradient import PGD
from crossguard.attacks.text import Substitute
from crossguard.budgets import Both, Budget, Linf, Words
from crossguard.defenses.optimizers import SGD, Adam, AdamW, Optimizer
from crossguard.defenses.recipe import Recipe
from crossguard.defenses.terms import ADVERSARIAL, CLEAN, InBatch, OverClasses, Term

_INNER_PGD = PGD(steps=10, step=1.0, best=False, stop=False)


@dataclass(frozen=True, kw_only=True)
class Contrastive(Recipe):
    """Clean contrastive training of both towers on captions (CLIP, Radford et al. 2021): how a dual encoder is made."""

    optimizer: Optimizer = AdamW(lr=1e-3, weight_decay=0.05)
    warmup: int = 100
    cosine: bool = True
    captions: bool = True
    clamp_scale: bool = True

    def terms(self) -> tuple[Term, ...]:
        return (InBatch(CLEAN, CLEAN, 0.5),)


@dataclass(frozen=True, kw_only=True)
class FTStandard(Recipe):
    """Clean fine-tuning of both towers, the baseline of MMCoA's tables.

    A reconstruction: the paper gives no loss and the released branch does not compute one (it feeds image features to
    the cross-entropy). Here it is the cross-entropy over all class prompts, or with `in_batch=True` the symmetric loss
    of MMCoA.
    """

    in_batch: bool = False

    def terms(self) -> tuple[Term, ...]:
        return (InBatch(CLEAN, CLEAN) if self.in_batch else OverClasses(CLEAN, CLEAN),)


@dataclass(frozen=True, kw_only=True)
class TeCoA(Recipe):
    """Text-guided contrastive adversarial training (Mao et al. 2023): the image tower learns to match adversarial
    images with the clean prompts of all classes, against a PGD that climbs the same cross-entropy. The text tower stays
    as it is.

    Settings of the released code: SGD with momentum, warm-up 1000 and cosine decay, 2 steps of eps at 1/255 in its
    example. They are made for ImageNet: in a training of fewer than 1,000 steps, give a shorter warm-up. The copy of it
    in MMCoA's tables shares MMCoA's settings; there, use `optimizer=Adam()` and MMCoA's attack.
    """

    optimizer: Optimizer = SGD()
    towers: tuple[str, ...] = ("image",)
    warmup: int = 1000
    cosine: bool = True
    clamp_scale: bool = True
    image_attack: ImageAttack = PGD(steps=2, step=1.0, best=False, stop=False)
    budget: Budget = Linf(1 / 255)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.image_attack.spends(self.budget)

    def adversary(self) -> tuple[ImageAttack, None, Budget]:
        return self.image_attack, None, self.budget

    def terms(self) -> tuple[Term, ...]:
        return (OverClasses(ADVERSARIAL, CLEAN),)


@dataclass(frozen=True, kw_only=True)
class MMCoA(Recipe):
    """Multimodal contrastive adversarial training (Zhou et al. 2024, arXiv 2404.19287): adversarial images are matched
    with clean texts, clean images with adversarial texts, by the symmetric in-batch loss, weighted `alpha` and `beta`;
    both towers learn.

    From the paper: weights 0.5 and 0.5, Adam betas (0.9, 0.98), PGD, one substituted word of ten candidates. From the
    released code, because the paper's equations are lost or silent: the symmetric in-batch form (a sum of both
    directions), eps 1/255 with 10 steps of 1/255, learning rate 1e-6, plain Adam. Where code and paper differ, the
    paper is the default.

    The language model of the default attack knows the words of the generated scenes only; for other data give
    `text_attack=Substitute(source=MaskedLM(path))`.

    Args:
        alpha: weight of the adversarial images.
        beta: weight of the adversarial texts.
        one_way: the class-level loss of TeCoA instead of the symmetric in-batch one, which the paper's wording also
            allows.
        accumulate_attack_gradients: add the parameter gradients of every attack step to the update, as the released
            code does by accident (it clears gradients before the attack only). They outweigh the loss about 10 to 2.
    """

    optimizer: Optimizer = Adam()
    image_attack: ImageAttack = _INNER_PGD
    text_attack: TextAttack = Substitute()
    budget: Budget = Both(Linf(1 / 255), Words(1))
    alpha: float = 0.5
    beta: float = 0.5
    one_way: bool = False
    accumulate_attack_gradients: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.image_attack.spends(self.budget)
        self.text_attack.spends(self.budget)

    def adversary(self) -> tuple[ImageAttack, TextAttack, Budget]:
        return self.image_attack, self.text_attack, self.budget

    @property
    def leaks(self) -> bool:
        return self.accumulate_attack_gradients

    def terms(self) -> tuple[Term, ...]:
        term = OverClasses if self.one_way else InBatch
        return (term(ADVERSARIAL, CLEAN, self.alpha), term(CLEAN, ADVERSARIAL, self.beta))
