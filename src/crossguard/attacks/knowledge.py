"""What the adversary knows of a defense, as words around an attack. The attack as it is goes straight at the defense,
and around what has no gradient (BPDA)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from crossguard.answer import Answer
from crossguard.attacks.apgd import APGD
from crossguard.attacks.base import GRAY, WHITE, ImageAttack, ImageVictim, Made, MatchVictim
from crossguard.attacks.gradient import PGD
from crossguard.attacks.meta import EOT, PredictedLabel, Worst
from crossguard.attacks.query import Square
from crossguard.budgets import Budget, PixelBudget
from crossguard.errors import CrossguardError
from crossguard.goals import Goal, Untargeted
from crossguard.seeds import replay
from crossguard.shapes import Images, PerImage, Seeds
from crossguard.words import within


@dataclass(frozen=True)
class Blind(ImageAttack):
    """The attack on the undefended model: an adversary who does not know of the defense, which is the judge. The gray
    box in which most numbers of test-time defenses are published. Nobody leaves there, since who falls without the
    defense may stand with it. On a model without a defense it is the attack as it is.

    In a retrieval the gallery is that of the undefended model too; as a part of another attack (`Worst`, `Adaptive`) it
    shares the goal of all, which is about the defended one.

    Args:
        unknown: how many defenses, from the outside in, the adversary does not know of; all, if None.
    """

    attack: ImageAttack = field(default_factory=PGD)
    unknown: int | None = None

    def __post_init__(self) -> None:
        if self.unknown is not None and self.unknown < 1:
            raise CrossguardError(
                f"Blind(unknown={self.unknown}) knows all there is; leave out Blind, or give 1 or more defenses"
            )

    @property
    def knows(self) -> str:
        return GRAY

    def match(
        self, victim: MatchVictim, images: Images, texts: Sequence[str], budget: Budget, seeds: Seeds
    ) -> tuple[Images, list[str]]:
        return self.attack.match(victim.without(self.unknown), images, texts, budget, seeds)

    def search(self, victim: ImageVictim, clean: Images, goal: Goal, budget: PixelBudget, seeds: Seeds) -> Made:
        answer = victim.answer
        if not isinstance(answer, Answer) or answer.inner is None:
            return self.attack.craft(victim, clean, goal, budget, seeds)
        bare = replace(victim, answer=answer.without(self.unknown))
        # What it knows it knows of another model, so nothing is said of the images.
        return Made(self.attack.craft(bare, clean, goal.lasting(), budget, seeds).images)


@dataclass(frozen=True)
class Smooth(ImageAttack):
    """The attack through the smooth stand-in that a defense offers for its hard steps (a sign a tanh, a gate a
    sigmoid): gradients go through the defense instead of around it. Value and success are those of the true defense, in
    the same draw. On a model that masks nothing it is the attack as it is."""

    attack: ImageAttack = field(default_factory=PGD)

    @property
    def knows(self) -> str:
        return _white(self.attack, "smooth")

    def search(self, victim: ImageVictim, clean: Images, goal: Goal, budget: PixelBudget, seeds: Seeds) -> Made:
        answer = victim.answer
        if isinstance(answer, Answer):
            if answer.soft is None and answer.masks:
                raise CrossguardError(
                    "Smooth needs a defense that offers a smooth stand-in for its hard steps, and this one has none; "
                    "the attack as it is goes around them (BPDA)"
                )
            victim = replace(victim, answer=answer.straight)
        return self.attack.craft(victim, clean, goal, budget, seeds)


@dataclass(frozen=True)
class AtGate(ImageAttack):
    """The attack with a second aim: that the defense does nothing.

    Climbs the goal's loss minus `weight` times what is left above the gate, so the image slips below the threshold
    while it is turned (detector-aware attacks, Carlini and Wagner 2017; Tramer et al. 2020). Gate and answer are of one
    draw, and success is that of the answer alone. Holds attacks that climb a loss by gradients, such as PGD and APGD.

    Args:
        gate: which of the defense's gates, by its name; all of them, if empty.
    """

    attack: ImageAttack = field(default_factory=PGD)
    weight: float = 10.0
    gate: str = ""

    @property
    def knows(self) -> str:
        return _white(self.attack, "at the gate")

    def search(self, victim: ImageVictim, clean: Images, goal: Goal, budget: PixelBudget, seeds: Seeds) -> Made:
        answer = victim.answer
        gates = dict(answer.gates) if isinstance(answer, Answer) else {}
        if not gates:
            raise CrossguardError("AtGate needs a defense with a gate to aim at, and this model has none")
        if self.gate and self.gate not in gates:
            raise CrossguardError(
                f"AtGate(gate={self.gate!r}) aims at a gate that the model has not; its gates are {', '.join(gates)}"
            )
        aims = [gates[self.gate]] if self.gate else list(gates.values())
        return self.attack.craft(replace(victim, aside=self._below(aims, victim.aside)), clean, goal, budget, seeds)

    def _below(
        self, gates: list[Callable[[Images], Tensor]], before: Callable[[Images], PerImage] | None
    ) -> Callable[[Images], PerImage]:
        def aside(images: Images) -> PerImage:
            again, found = replay(), images.new_zeros(len(images))
            if before is not None:
                with again():
                    found = before(images)
            for gate in gates:
                with again():
                    found = found - self.weight * gate(images).clamp_min(0.0)
            return found

        return aside


def _white(attack: ImageAttack, way: str) -> str:
    """What an adversary knows who has gradients and another way to use them; one who has none has none here either."""
    return f"{attack.knows}, {way}" if attack.knows.startswith(WHITE) else attack.knows


@dataclass(frozen=True)
class Adaptive(ImageAttack):
    """The per-image worst case over every way in which a defense, by what it says of itself, can be attacked: an
    adversary who knows all of it. What Carlini et al. 2019, Tramer et al. 2020 and Croce et al. 2022 ask of who
    evaluates a defense, as one attack.

    The same attack is carried out on each of the models inside (`Blind`), straight at the defense (BPDA), through its
    smooth stand-in (`Smooth`), at each of its gates (`AtGate`), and with the model's own answer for a label
    (`PredictedLabel`); those that see the defense average over its noise where it draws some (`EOT`). `Square` asks it
    without gradients, where the budget allows. What they made is compared as in `Worst`: on a random defense by five
    draws that are the same for all. So by success it is never weaker than any of them, and a defense that it leaves
    standing may still fall to what nobody here has thought of.

    Args:
        samples: draws of `EOT`.
        queries: of `Square`; 0 leaves it out.
    """

    attack: ImageAttack = field(default_factory=APGD)
    samples: int = 8
    queries: int = 1000

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise CrossguardError(f"Adaptive(samples={self.samples}) averages over nothing; give 1 or more")
        if self.queries < 0:
            raise CrossguardError(f"Adaptive(queries={self.queries}) is not possible; give 0 or more")

    @property
    def draws(self) -> bool:
        return True  # Square and EOT do, whatever the attack does

    @property
    def knows(self) -> str:
        return _white(self.attack, "adaptive")

    def search(self, victim: ImageVictim, clean: Images, goal: Goal, budget: PixelBudget, seeds: Seeds) -> Made:
        answer = victim.answer if isinstance(victim.answer, Answer) else None
        return Worst(self.parts(answer, goal, budget)).search(victim, clean, goal, budget, seeds)

    def parts(self, answer: Answer | None, goal: Goal, budget: PixelBudget) -> tuple[ImageAttack, ...]:
        """The attacks that apply to a defense."""
        straight = self._averaged(self.attack, answer)
        found = [straight]
        if answer is not None:
            for unknown in range(answer.layers, 0, -1):
                found.append(Blind(self._averaged(self.attack, answer.without(unknown)), unknown))
            if answer.soft is not None:
                found.append(Smooth(straight))
            found += [AtGate(straight, gate=gate) for gate in answer.gates]
        if isinstance(goal, Untargeted):
            found.append(PredictedLabel(straight))
        if self.queries and isinstance(budget, Square.norms):
            found.append(Square(queries=self.queries))
        return tuple(found)

    def _averaged(self, attack: ImageAttack, answer: Answer | None) -> ImageAttack:
        """The attack over several draws, where the model draws any and the attack doesn't average by itself."""
        draws = answer is not None and answer.random and not any(within(attack, EOT))
        return EOT(attack, self.samples) if draws else attack
