"""Fine-tuning defenses as compositions of loss terms: FT-standard, TeCoA, MMCoA, and clean contrastive training."""

from __future__ import annotations

from dataclasses import dataclass, replace

from crossguard.attacks.base import ImageAttack, TextAttack
from crossguard.attacks.gradient import PGD
from crossguard.attacks.text import Substitute
from crossguard.budgets import Both, Budget, Linf, Words
from crossguard.defenses.optimizers import SGD, Adam, AdamW, Optimizer
from crossguard.defenses.parts import Towers, Trainable
from crossguard.defenses.plan import Adversary, Stage
from crossguard.defenses.recipe import Recipe
from crossguard.defenses.terms import ADVERSARIAL, BATCH, CLASSES, CLEAN, DRIFTED, InBatch, OverClasses
from crossguard.errors import CrossguardError

_INNER_PGD = PGD(steps=10, step=1.0, best=False, stop=False)


@dataclass(frozen=True, kw_only=True)
class Contrastive(Recipe):
    """Clean contrastive training of both towers on captions (CLIP, Radford et al. 2021): how a dual encoder is made."""

    optimizer: Optimizer = AdamW(lr=1e-3, weight_decay=0.05)
    warmup: int = 100
    cosine: bool = True
    captions: bool = True
    clamp_scale: bool = True

    def stages(self) -> tuple[Stage, ...]:
        return (self.stage(InBatch(CLEAN, CLEAN, weight=0.5)),)


@dataclass(frozen=True, kw_only=True)
class FTStandard(Recipe):
    """Clean fine-tuning of both towers, the baseline of MMCoA's tables.

    A reconstruction: the paper gives no loss and the released branch does not compute one (it feeds image features to
    the cross-entropy). Here it is the cross-entropy over all class prompts, or with `in_batch=True` the symmetric loss
    of MMCoA.
    """

    in_batch: bool = False

    def stages(self) -> tuple[Stage, ...]:
        return (self.stage(InBatch(CLEAN, CLEAN) if self.in_batch else OverClasses(CLEAN, CLEAN)),)


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
    trains: Trainable = Towers(("image",))
    warmup: int = 1000
    cosine: bool = True
    clamp_scale: bool = True
    image_attack: ImageAttack = PGD(steps=2, step=1.0, best=False, stop=False)
    budget: Budget = Linf(1 / 255)

    def stages(self) -> tuple[Stage, ...]:
        loss = OverClasses(ADVERSARIAL, CLEAN)
        return (self.stage(loss, adversaries=(Adversary(self.image_attack, self.budget, loss),)),)


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
        alpha: weight of the adversarial images; with 0 no image is attacked.
        beta: weight of the adversarial texts; with 0 no text is attacked.
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
        if not (self.alpha >= 0.0 and self.beta >= 0.0 and self.alpha + self.beta > 0.0):
            raise CrossguardError(
                f"MMCoA(alpha={self.alpha}, beta={self.beta}) does not learn what it attacks; give weights of 0 or "
                "more, and not both 0"
            )

    def stages(self) -> tuple[Stage, ...]:
        term, leaks = OverClasses if self.one_way else InBatch, self.accumulate_attack_gradients
        images = Adversary(self.image_attack, self.budget, OverClasses(ADVERSARIAL, CLEAN), leaks=leaks)
        texts = Adversary(self.text_attack, self.budget, replace(DRIFTED, over=CLASSES if self.one_way else BATCH))
        pairs = (
            (term(ADVERSARIAL, CLEAN, weight=self.alpha), images),
            (term(CLEAN, ADVERSARIAL, weight=self.beta), texts),
        )
        asked = [pair for pair in pairs if pair[0].weight]
        return (self.stage(*(loss for loss, _ in asked), adversaries=tuple(one for _, one in asked)),)
