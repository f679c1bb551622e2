"""Adversarial fine-tuning towards a teacher: the model as it was (FARE, PMG-AFT) or another one (HPT-GPD)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from crossguard.attacks.base import ImageAttack
from crossguard.attacks.gradient import PGD
from crossguard.budgets import Budget, Linf
from crossguard.defenses.optimizers import SGD, AdamW, Optimizer
from crossguard.defenses.parts import Towers, Trainable
from crossguard.defenses.plan import EMA, PREVIOUS, VANILLA, Adversary, Stage
from crossguard.defenses.recipe import Recipe
from crossguard.defenses.terms import ADVERSARIAL, CLEAN, KL, START, STUDENT, Far, OverClasses
from crossguard.errors import CrossguardError
from crossguard.models.base import VisionLanguageModel

_TWO_STEPS = PGD(steps=2, step=1.0, best=False, stop=False)


@dataclass(frozen=True, kw_only=True)
class FARE(Recipe):
    """Unsupervised adversarial fine-tuning of the image tower (Schlarmann et al. 2024, arXiv 2402.12336): the raw
    embedding of the adversarial image stays where that of the clean image was before the training, by the squared
    distance summed over dimensions; the adversary climbs the same. It needs neither labels nor texts.

    Settings of the released code and its README: AdamW with PyTorch's betas, rate 1e-5, decay 1e-4, two epochs of
    ImageNet in batches of 128, 1,400 steps of warm-up and a cosine; ten steps of 1/255 at 4/255 (there are models for 1
    and 2/255 as well) from a random start. The momentum of its attack does nothing under Linf: the sign of 0.9 times a
    sign plus a sign is the latter, so plain PGD is the same attack.
    """

    optimizer: Optimizer = AdamW(lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4)
    trains: Trainable = Towers(("image",))
    epochs: float = 2.0
    warmup: int = 1400
    cosine: bool = True
    image_attack: ImageAttack = PGD(steps=10, step=0.25, best=False, stop=False)
    budget: Budget = Linf(4 / 255)

    def stages(self) -> tuple[Stage, ...]:
        loss = Far(ADVERSARIAL, to=(START, CLEAN))
        return (self.stage(loss, adversaries=(Adversary(self.image_attack, self.budget, loss),)),)


@dataclass(frozen=True, kw_only=True)
class PMGAFT(Recipe):
    """Pre-trained model guided adversarial fine-tuning of the image tower (Wang et al. 2024, arXiv 2401.04350): the
    cross-entropy of TeCoA, and the answer to the adversarial image is held near two others: that of the model as it was
    to the same image, and the student's own to the clean one, whose gradient flows as well.

    Settings of the released code: SGD at 5e-5 with 1,000 steps of warm-up and a cosine, ten epochs in batches of 256,
    two steps of 1/255 at 1/255; weights of one. The code sums the divergences over the batch (AGFT's authors read the
    paper as a mean) and normalizes embeddings twice, by which the scale of the logits is lost:
    `PMGAFT(reduce='sum', unscaled=True)`. It also prepares images with the mean and deviation of ImageNet, which
    belongs to the model word here.

    Args:
        guided: weight of the divergence from the model as it was.
        clean: weight of the divergence from the student's answer to the clean image.
        reduce: 'mean' or 'sum' of the divergences over the batch; the cross-entropy is a mean in both.
        unscaled: logits are bare cosines, in the loss and in the attack.
    """

    optimizer: Optimizer = SGD(lr=5e-5)
    trains: Trainable = Towers(("image",))
    epochs: float = 10.0
    batch: int = 256
    warmup: int = 1000
    cosine: bool = True
    clamp_scale: bool = True
    image_attack: ImageAttack = _TWO_STEPS
    budget: Budget = Linf(1 / 255)
    guided: float = 1.0
    clean: float = 1.0
    reduce: str = "mean"
    unscaled: bool = False

    def stages(self) -> tuple[Stage, ...]:
        scale = 1.0 if self.unscaled else None
        loss = OverClasses(ADVERSARIAL, scale=scale)
        guided = KL(ADVERSARIAL, to=(START, ADVERSARIAL), scale=scale, weight=self.guided, reduce=self.reduce)
        clean = KL(ADVERSARIAL, to=(STUDENT, CLEAN), scale=scale, weight=self.clean, reduce=self.reduce)
        return (self.stage(loss, guided, clean, adversaries=(Adversary(self.image_attack, self.budget, loss),)),)


@dataclass(frozen=True, kw_only=True)
class HPTGPD(Recipe):
    """Heterogeneous proxy transfer with generalization-pivot decoupling (Fu, Huang and Zhang 2026, arXiv 2601.12865):
    a model of another architecture that was never attacked in its life teaches what it answers to the student's
    adversarial images. In two stages, each of the given length:

    1. A warm-up at a low rate: the answer to the adversarial image nears the proxy's to the clean one. Its result is
       the average of the weights over its epochs, beginning with those of the model as it was.
    2. The transfer at a high rate, from the model as it was: the answer to the adversarial image nears the proxy's to
       the same image. Before every epoch but the first the weights go half of the way to the result of stage 1.

    Both are KL(student || proxy), a mean over images, as in the paper (Eqs. 5 to 10), which names SGD, the rates 5e-5
    and 5e-2, batches of 64, ten epochs (it does not say whether of each stage or of both; here, of each) and two steps
    of 1/255 at 1/255. Momentum, 1,000 steps of warm-up and the cosine are those of the released code, where the paper
    says nothing. That code differs in what its comments call the two stages, and does not run as it was published:
    `HPTGPD(proxy=..., forward=True, reduce='sum', anchor='start', optimizer=SGD(lr=5e-4), starts='previous',
    image_attack=PGD(steps=5, step=0.5, best=False, stop=False), budget=Linf(2/255))` are its settings.

    Args:
        proxy: the teacher, any model that reads the same class prompts; it never changes. Of a defended one the
            embeddings are asked for, and where its answers are not those of its embeddings, that is said.
        anchor: who teaches in stage 1: 'proxy', or 'start' for the model as it was.
        forward: KL(teacher || student) instead.
        reduce: 'mean' or 'sum' over the batch.
        anchoring: the optimizer of stage 1; `optimizer` is that of stage 2.
        decay: of the average in stage 1, at the end of each epoch.
        pull: which part of the way to the result of stage 1.
        starts: whether stage 2 begins with the model as it was ('vanilla') or with the result of stage 1 ('previous').
    """

    proxy: VisionLanguageModel
    optimizer: Optimizer = SGD(lr=5e-2)
    anchoring: Optimizer = SGD(lr=5e-5)
    trains: Trainable = Towers(("image", "text"))
    epochs: float = 10.0
    batch: int = 64
    warmup: int = 1000
    cosine: bool = True
    image_attack: ImageAttack = _TWO_STEPS
    budget: Budget = Linf(1 / 255)
    anchor: str = "proxy"
    forward: bool = False
    reduce: str = "mean"
    decay: float = 0.9
    pull: float = 0.5
    starts: str = VANILLA

    def __post_init__(self) -> None:
        if self.anchor not in ("proxy", START):
            raise CrossguardError(f"HPTGPD(anchor={self.anchor!r}) is not known; give 'proxy' or 'start'")
        if self.starts not in (VANILLA, PREVIOUS):
            raise CrossguardError(f"HPTGPD(starts={self.starts!r}) is not known; give 'vanilla' or 'previous'")
        super().__post_init__()

    def teachers(self) -> dict[str, VisionLanguageModel]:
        return {"proxy": self.proxy}

    def stages(self) -> tuple[Stage, ...]:
        attack = Adversary(self.image_attack, self.budget, OverClasses(ADVERSARIAL))
        anchored, pulled = (
            self.stage(KL(ADVERSARIAL, to=teacher, reverse=not self.forward, reduce=self.reduce), adversaries=(attack,))
            for teacher in ((self.anchor, CLEAN), ("proxy", ADVERSARIAL))
        )
        return (
            replace(anchored, optimizer=self.anchoring, average=EMA(self.decay, "epoch")),
            replace(pulled, pull=self.pull, starts=self.starts),
        )
