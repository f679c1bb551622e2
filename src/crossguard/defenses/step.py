"""One step of a training: adversaries make views of the batch, all who are asked embed them, the loss descends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from crossguard.attacks.base import ImageAttack, ImageVictim, TextAttack
from crossguard.defenses import recall
from crossguard.defenses.feed import Batch, Feed, Texts
from crossguard.defenses.plan import VANILLA, Adversary, Plan, Stage
from crossguard.defenses.recall import Recall
from crossguard.defenses.terms import CLEAN, IMAGE, PATCHES, SELF, START, STUDENT, TEXT, Head, Need, Seen, Spot
from crossguard.errors import CrossguardError
from crossguard.models.base import Checkpoint, DualEncoder, VisionLanguageModel, frozen
from crossguard.processes import Processes
from crossguard.seeds import derive, drawing, fold
from crossguard.shapes import Images, TextEmbeddings
from crossguard.words import show

_REMEMBERED = 64  # lists of texts whose embeddings are kept, where nobody changes them


@dataclass(frozen=True)
class Inputs:
    """What a step embeds: the images of this process and the texts of all, each clean and as adversaries made them.

    Args:
        batches: the clean batch of each feed.
        images: by the name of the view.
        texts: by the name of the view and by what they are over.
        paths: the images along the way of each attack whose gradients leak.
        known: what teachers have already said to these images.
        once: these images are asked about once in the training, and nothing of them is kept for later epochs.
    """

    batches: dict[str, Batch]
    images: dict[str, Images]
    texts: dict[tuple[str, str], list[str]]
    paths: list[tuple[Adversary, list[Images]]] = field(default_factory=list)
    known: dict[Need, Tensor] = field(default_factory=dict)
    once: bool = False

    @property
    def batch(self) -> Batch:
        """The batch of the feed that the recipe is fitted on."""
        return self.batches[""]


class Learner:
    """A network while it trains, what moves it, and who teaches it. Under several processes each has its part of the
    images and all have the same texts; loss and gradient are those of one process with the whole batch."""

    def __init__(self, recipe: Plan, model: Checkpoint, feeds: Mapping[str, Feed], group: Processes) -> None:
        self.recipe, self.feeds, self.group = recipe, feeds, group
        self.stages = recipe.stages()
        main = feeds[""]
        lengths = [main.length(stage.epochs, stage.steps) for stage in self.stages]
        self.ends = [sum(lengths[: number + 1]) for number in range(len(lengths))]
        for feed in feeds.values():
            feed.total = self.total
        network = model.load().to(main.device).requires_grad_(False).eval()
        self.network = recipe.trains.attach(network, main.prompts, recipe.seed).to(main.device).eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(recipe.seed, "modules"))
            self.modules = nn.ModuleDict(recipe.modules(partial(_width, self.network))).to(main.device)
        self.whole = nn.ModuleDict({"network": self.network, "beside": self.modules})
        self.trained = {name: one for name, one in self.whole.named_parameters() if one.requires_grad}
        if not self.trained:
            raise CrossguardError(f"nothing is left to train with trains={show(recipe.trains, short=True)}")
        self.teachers: dict[str, DualEncoder | VisionLanguageModel] = dict(recipe.teachers())
        if any(need.who == START for stage in self.stages for need in stage.everything):
            self.teachers[START] = model.load().to(main.device).requires_grad_(False).eval()
        self._check_widths()
        self._trains_texts = any(one.requires_grad for one in self.network.towers()["text"].values())
        self._remembered: dict[tuple[str, tuple[str, ...]], TextEmbeddings] = {}
        self.vanilla = self._copy() if any(stage.pull or stage.starts == VANILLA for stage in self.stages) else None
        self.handed = self.vanilla
        self.average: dict[str, Tensor] | None = None
        self.best: dict[str, Tensor] | None = None
        self._banks: dict[Adversary, dict[int, dict[Need, Tensor]]] = {}
        self._recalls: dict[tuple[Need, ...], Recall] = {}
        self.begin(0)

    def _check_widths(self) -> None:
        """Raises where a term compares embeddings of other numbers of dimensions."""
        for stage in self.stages:
            listed = [(STUDENT, term) for term in stage.terms] + [(one.on, one.climbs) for one in stage.adversaries]
            for on, term in listed:
                known = {need.by(on).who for need in term.needs()} if term.compares else set[str]()
                widths = {who: _width(self._encoder(who)) for who in sorted(known)}
                if len(set(widths.values())) > 1:
                    told = " and ".join(f"those of {who!r} have {width}" for who, width in widths.items())
                    raise CrossguardError(
                        f"{type(term).__name__} compares embeddings, and {told} numbers; give a teacher whose "
                        "embeddings are as wide, and train a part that keeps their width, which ClassFrames does not"
                    )

    @property
    def total(self) -> int:
        """Steps in all."""
        return self.ends[-1]

    def place(self, step: int) -> tuple[int, int]:
        """The stage of a step, and its number in there; behind the last step, that of the last stage."""
        number = next((number for number, end in enumerate(self.ends) if step < end), len(self.ends) - 1)
        return number, step - self.first(number)

    def first(self, number: int) -> int:
        """The steps before a stage."""
        return self.ends[number - 1] if number else 0

    def length(self, number: int) -> int:
        """The steps of a stage."""
        return self.ends[number] - self.first(number)

    def begin(self, number: int) -> None:
        """The beginning of a stage: its weights, an optimizer that knows nothing yet, a new average."""
        stage = self.stages[number]
        if number:
            found = self.vanilla if stage.starts == VANILLA else self.handed
            assert found is not None
            self.put(found)
        self.prepare(number)

    def prepare(self, number: int) -> None:
        """What a stage moves the weights with."""
        stage = self.stages[number]
        self.optimizer = stage.optimizer.over(self._ordered)
        self.average = None if stage.average is None else self._copy()

    def rate(self, step: int) -> float:
        """The learning rate of a step: a linear warm-up, then constant or a half cosine down to zero."""
        number, place = self.place(step)
        stage, rate = self.stages[number], self.stages[number].optimizer.lr
        if place < stage.warmup:
            return rate * (place + 1) / stage.warmup
        if stage.cosine:
            done = (place - stage.warmup) / max(1, self.length(number) - stage.warmup)
            return rate * 0.5 * (1.0 + math.cos(math.pi * done))
        return rate

    def views(self, step: int) -> Inputs:
        """The batches of a step and what the adversaries make of them. Leaves nothing in any gradient.

        Each process attacks its images and its share of the texts; the attacked texts are the same on every process.
        """
        stage = self.stages[self.place(step)[0]]
        with self.group.together():
            batches = {name: feed.batch(step) for name, feed in self.feeds.items()}
        images = {f"{name}:{CLEAN}" if name else CLEAN: batch.images for name, batch in batches.items()}
        texts = {(CLEAN, over): found.texts for over, found in batches[""].texts.items()}
        inputs = Inputs(batches, images, texts)
        for one in stage.adversaries:
            if one.once:
                with self.group.together():
                    inputs.known.update(self._banked(one, stage, step, inputs))
                continue
            if isinstance(one.attack, ImageAttack):
                with self.group.together():
                    try:
                        inputs.images[one.makes] = self._attacked_images(one, inputs)
                    except CrossguardError as error:
                        if not self._alive(inputs.batch):
                            raise self._diverged(step) from error
                        raise
                continue
            over = one.spots[0].over
            with self.group.together():
                share = self._attacked_texts(one, inputs, over, step)
            inputs.texts[one.makes, over] = self._whole(inputs.texts[one.of, over], self.group.gather(share))
        return inputs

    def loss(self, step: int, inputs: Inputs) -> tuple[Tensor, Seen]:
        """What the student descends in this step, the weighted sum of the terms, and what they saw."""
        stage = self.stages[self.place(step)[0]]
        seen = self._seen(stage.needs, inputs, learns=True)
        values = [term.weight * term.value(seen) for term in stage.terms]
        return torch.stack(values).sum(), seen

    def idle(self, step: int) -> list[TextAttack]:
        """The attacks on texts that change none of the texts of a step, of those of this process."""
        found: list[TextAttack] = []
        feed = self.feeds[""]
        listed = feed.texts(step)
        batch = Batch(torch.empty(0, 3, 1, 1), torch.empty(0, dtype=torch.int64), [], listed)
        inputs = Inputs({"": batch}, {}, {(CLEAN, over): one.texts for over, one in listed.items()})
        for one in self.stages[self.place(step)[0]].adversaries:
            if isinstance(one.attack, TextAttack) and one.of == CLEAN:
                over = one.spots[0].over
                if self._attacked_texts(one, inputs, over, step) == self.group.share(listed[over].texts):
                    found.append(one.attack)
        return found

    def counts(self) -> bool:
        """Whether any image counts in the first stage. Where a loss leaves some out by what others say of the clean
        images, these are looked at, without augmentation, until one counts."""
        terms, feed = self.stages[0].terms, self.feeds[""]
        needs = dict.fromkeys(need for term in terms for need in term.sieve())
        if not all(term.sieve() for term in terms) or any(need.view != CLEAN for need in needs):
            return True
        texts = {(CLEAN, over): one.texts for over, one in feed.texts(0).items()}
        groups = (Inputs({"": batch}, {CLEAN: batch.images}, texts, once=True) for batch in feed.still(0))
        seen = (self._seen(needs, inputs) for inputs in groups)
        return any(bool(term.counted(one).any()) for one in seen for term in terms)

    def take(self, step: int) -> dict[str, float]:
        """Takes a step and says how it went: loss, accuracy on the batch where a term tells texts apart, learning rate,
        the share of the images that count where a term leaves some out, and the share of the texts that an attack
        changed, where one attacks texts."""
        recipe = self.recipe
        number, place = self.place(step)
        stage = self.stages[number]
        if number and place == 0:
            self.begin(number)
        if stage.pull and place and place % self.feeds[""].per_epoch == 0:
            self._pull(stage.pull)
        inputs = self.views(step)
        self.optimizer.zero_grad(set_to_none=True)
        self._accumulate(inputs)
        total, seen = self.loss(step, inputs)
        if not total.requires_grad:
            sees = sorted({need.tower for need in stage.needs if need.who == STUDENT})
            raise CrossguardError(
                f"{type(recipe).__name__} trains nothing with trains={show(recipe.trains, short=True)}: its loss sees "
                f"the {' and the '.join(sees)} embeddings of the student alone, which do not depend on that; give a "
                "part that changes them"
            )
        shares = _accuracy(stage, seen) | _counted(stage, seen)
        told = torch.stack([total.detach(), *shares.values()]).tolist()  # the device is waited for once
        if not math.isfinite(told[0]):
            raise self._diverged(step)
        total.backward()
        self._share_gradients()
        rate = self.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(self._ordered, recipe.clip)
        self.optimizer.step()
        if recipe.clamp_scale:
            _clamp_scale(self.network)
        self._after(step, number)
        said = dict(zip(["loss", *shares], told, strict=True)) | {"learning rate": rate}
        changed = [
            new != old
            for one in stage.adversaries if isinstance(one.attack, TextAttack)
            for view, over in inputs.texts if view == one.makes
            for new, old in zip(inputs.texts[view, over], inputs.texts[one.of, over], strict=True)
        ]  # fmt: skip
        return said | ({"texts changed": sum(changed) / len(changed)} if changed else {})

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch of its stage, or the stage, ends with this step."""
        return step + 1 in self.ends or (self.place(step)[1] + 1) % self.feeds[""].per_epoch == 0

    @contextmanager
    def handing(self) -> Iterator[DualEncoder]:
        """Inside, the network has the weights that would be handed on now: the average, where one is taken."""
        if self.average is None:
            yield self.network
            return
        weights = self._copy()
        self.put(self.average)
        try:
            yield self.network
        finally:
            self.put(weights)

    def keep(self) -> None:
        """Remembers what the network holds now as the best so far."""
        self.best = self._copy()

    # What is kept of a running training

    def state(self) -> dict[str, Tensor]:
        """All that a later process needs to go on, beside the number of steps."""
        tensors: dict[str, Tensor] = {f"weights.{name}": one for name, one in self.trained.items()}
        for kind, kept in (("average", self.average), ("handed", self.handed), ("best", self.best)):
            if kept is not None and kept is not self.vanilla:
                tensors.update({f"{kind}.{name}": tensor for name, tensor in kept.items()})
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors.update(
                {f"optimizer.{number}.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
            )
        return tensors

    def restore(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from the state after so many steps.

        Raises:
            RuntimeError, ValueError, KeyError: it is not the state of this training.
        """
        kinds: dict[str, dict[str, Tensor]] = {"weights": {}, "average": {}, "handed": {}, "best": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            kinds[kind][rest] = tensor
        for kind in ("weights", "average", "handed", "best"):
            shapes = {name: tensor.shape for name, tensor in kinds[kind].items()}
            if (kind == "weights" or shapes) and shapes != {name: one.shape for name, one in self.trained.items()}:
                raise ValueError(f"its {kind} are of another model")
        number, place = self.place(step)
        self.put(kinds["weights"])
        self.handed, self.best = kinds["handed"] or self.vanilla, kinds["best"] or None
        if not place:
            return
        self.prepare(number)
        if self.average is not None:
            self.average = {name: kinds["average"][name] for name in self.average}
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in kinds["optimizer"].items():
            row, _, part = name.partition(".")
            state.setdefault(int(row), {})[part] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Gives what is trained these weights."""
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(weights[name])

    def _copy(self) -> dict[str, Tensor]:
        return {name: one.detach().clone() for name, one in self.trained.items()}

    @cached_property
    def _ordered(self) -> list[nn.Parameter]:
        """What is trained, tower by tower, then what is in no tower."""
        towers = [one for named in self.network.towers().values() for one in named.values() if one.requires_grad]
        listed = {id(one) for one in towers}
        return towers + [one for one in self.trained.values() if id(one) not in listed]

    def _pull(self, part: float) -> None:
        """This part of the way to what the stage before handed on."""
        assert self.handed is not None
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.lerp_(self.handed[name], part)

    def _after(self, step: int, number: int) -> None:
        """What happens behind a step: the average takes it in, and the last one of a stage hands on."""
        stage, last = self.stages[number], step + 1 == self.ends[number]
        due = stage.average is not None and (stage.average.per == "step" or self.ends_epoch(step))
        if stage.average is not None and self.average is not None and due:
            for name, one in self.trained.items():
                self.average[name].lerp_(one.detach(), 1.0 - stage.average.decay)
        if last and number + 1 < len(self.stages):
            self.handed = self._copy() if self.average is None else self.average
        elif last and self.average is not None:
            self.put(self.average)

    # Who sees what

    def _seen(self, needs: Iterable[Need], inputs: Inputs, learns: bool = False, student: str = STUDENT) -> Seen:
        """What there is to see of these inputs: of the whole batch with the student's gradients where it `learns`, and
        otherwise of the images of this process, without any."""
        needs = tuple(needs)
        context = nullcontext() if learns else torch.no_grad()
        with context, self._autocast(learns):
            found = self._embedded(tuple(need for need in needs if need.who == STUDENT), inputs)
        with torch.no_grad():
            for who in sorted({need.who for need in needs} - {STUDENT, SELF}):
                new = tuple(need for need in needs if need.who == who and need not in inputs.known)
                inputs.known.update(self._taught(new, inputs))
            found |= {need: inputs.known[need] for need in needs if need in inputs.known}
            mine = [need for need in needs if need.who == SELF]
            same = {need: Need(need.tower, need.view, STUDENT, need.over) for need in mine}
            found |= {need: found[same[need]].detach() for need in mine if same[need] in found}
            with self._autocast(learns):
                found |= self._embedded(tuple(need for need in mine if need not in found), inputs)
        if learns:
            found = {need: one if need.tower == TEXT else self._gathered(one) for need, one in found.items()}
        texts = inputs.batch.texts.items()
        places = {over: one.whole if learns else one.place for over, one in texts}
        known = {over: place for over, place in places.items() if place is not None}
        return Seen(found, self._heads, known, dict(self.modules.items()), student)

    def _taught(self, needs: Sequence[Need], inputs: Inputs) -> dict[Need, Tensor]:
        """What a teacher says of the views. What it says of clean images is kept where they come again."""
        found: dict[Need, Tensor] = {}
        shown = [need for need in needs if need.tower != TEXT and need.view.rpartition(":")[2] == CLEAN]
        for view in dict.fromkeys(need.view for need in ([] if inputs.once else shown)):
            mine = tuple(need for need in shown if need.view == view)
            if mine not in self._recalls:
                room = recall.ROOM - sum(one.size for one in self._recalls.values())
                self._recalls[mine] = Recall(self.feeds[mine[0].feed], room)

            def ask(images: Images, mine: tuple[Need, ...] = mine) -> dict[Need, Tensor]:
                return self._embedded(mine, replace(inputs, images={mine[0].view: images}))

            found |= self._recalls[mine](inputs.batches[mine[0].feed], ask)
        return found | self._embedded(tuple(need for need in needs if need not in found), inputs)

    def _embedded(self, needs: Sequence[Need], inputs: Inputs) -> dict[Need, Tensor]:
        """What one of those who encode makes of the views. All views of one size go through a tower in one forward."""
        found: dict[Need, Tensor] = {}
        if not needs:
            return found
        who, batches = needs[0].who, inputs.batches
        views = sorted({need.view for need in needs if need.tower != TEXT})
        patches = {need.view for need in needs if need.tower == PATCHES}
        for size in dict.fromkeys(inputs.images[view].shape[-2:] for view in views):
            together = [view for view in views if inputs.images[view].shape[-2:] == size]
            counts = [len(inputs.images[view]) for view in together]
            images = torch.cat([inputs.images[view] for view in together])
            seeds = torch.cat(
                [fold(batches[Need(IMAGE, view).feed].seeds, derive("teacher", view)) for view in together]
            )
            with drawing(seeds):
                parts = self._images(who, images, bool(patches & set(together)))
            for tower, part in parts.items():
                for view, one in zip(together, part.split(counts), strict=True):
                    found[Need(tower, view, who)] = one
        keys = sorted({(need.view, need.over) for need in needs if need.tower == TEXT})
        if who in (STUDENT, SELF) and self._trains_texts:
            if keys:
                texts = self.network.encode_text([text for key in keys for text in inputs.texts[key]]).float()
                parts = texts.split([len(inputs.texts[key]) for key in keys])
                found |= {Need(TEXT, *_of(key, who)): part for key, part in zip(keys, parts, strict=True)}
        else:
            found |= {Need(TEXT, *_of(key, who)): self._still(who, inputs.texts[key]) for key in keys}
        return found

    def _images(self, who: str, images: Images, patches: bool) -> dict[str, Tensor]:
        """The embeddings of images, and their patch tokens if they are asked for."""
        encoder = self._encoder(who)
        if not patches:
            return {IMAGE: encoder.encode_image(images).float()}
        if not isinstance(encoder, DualEncoder):
            raise CrossguardError(
                f"the teacher {who!r} has no patch tokens to show; give 'start', or a loss without them"
            )
        embeddings, tokens = encoder.patches(images)
        return {IMAGE: embeddings.float(), PATCHES: tokens.float()}

    def _still(self, who: str, texts: list[str]) -> TextEmbeddings:
        """The texts in float32, of a tower that stays as it is: asked once and remembered."""
        key = (who, tuple(texts))
        if key not in self._remembered:
            if len(self._remembered) > _REMEMBERED:
                self._remembered.clear()
            with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
                self._remembered[key] = self._encoder(who).encode_text(texts).float()
        return self._remembered[key]

    def _encoder(self, who: str) -> DualEncoder | VisionLanguageModel:
        return self.network if who in (STUDENT, SELF) else self.teachers[who]

    @property
    def _heads(self) -> dict[str, Head]:
        return {who: self._encoder(who).logits for who in (STUDENT, SELF, *self.teachers)}

    @property
    def _device(self) -> torch.device:
        return self.feeds[""].device

    def _autocast(self, learns: bool) -> AbstractContextManager[object]:
        """Half precision, where the recipe learns in it; attacks and teachers stay in float32."""
        return torch.autocast(self._device.type, torch.bfloat16, enabled=learns and self.recipe.bf16)

    # Adversaries

    def _attacked_images(self, one: Adversary, inputs: Inputs) -> Images:
        pixels, _ = one.attack.spends(one.budget)
        assert pixels is not None and isinstance(one.attack, ImageAttack)
        batch, spot, path = inputs.batches[Need(IMAGE, one.makes).feed], Spot(one.spots), list[Images]()
        with frozen(self.whole):
            held = tuple(need for need in one.needs if need not in one.spots)
            rest = self._seen(held, inputs, student=one.on)
            asked: Images | None = None  # before, if what is trained is to climb

            def answer(images: Images) -> Tensor:
                nonlocal rest, asked
                if one.ascends and torch.is_grad_enabled():
                    if asked is not None:
                        self._ascend(one, inputs, asked)
                        rest = self._seen(held, inputs, student=one.on)
                    asked = images.detach()
                if one.leaks and torch.is_grad_enabled():
                    path.append(images.detach())
                found: dict[Need, Tensor] = {}
                for who in dict.fromkeys(need.who for need in one.spots):
                    parts = self._images(who, images, any(need.tower == PATCHES for need in one.spots))
                    found |= {Need(tower, one.makes, who): part for tower, part in parts.items()}
                return one.climbs.outputs(rest.replaced(found), spot)

            goal = one.climbs.goal(rest, spot)
            weights = self._copy() if one.ascends else {}
            made = one.attack(ImageVictim(answer), inputs.images[one.of], goal, pixels, batch.seeds)
            if one.ascends:
                self.put(weights)
        if one.leaks:
            inputs.paths.append((one, path))
        return made

    def _banked(self, one: Adversary, stage: Stage, step: int, inputs: Inputs) -> dict[Need, Tensor]:
        """What those who do not learn say of images that are attacked once, remembered for each image."""
        feed = self.feeds[Need(IMAGE, one.makes).feed]
        asked = [*stage.needs, *(need for other in stage.adversaries if other is not one for need in other.needs)]
        needs = [need for need in dict.fromkeys(asked) if need.view == one.makes and need.tower != TEXT]
        bank = self._banks.setdefault(one, {})
        indices = inputs.batches[Need(IMAGE, one.makes).feed].indices
        for batch in feed.still(step, set(indices) - bank.keys()):
            batches = {**inputs.batches, Need(IMAGE, one.makes).feed: batch}
            alone = Inputs(batches, {one.of: batch.images}, {}, once=True)
            alone.images[one.makes] = self._attacked_images(one, alone)
            with torch.no_grad():
                found = {need: self._embedded((need,), alone)[need] for need in needs}
            for row, index in enumerate(batch.indices):
                bank[index] = {need: said[row] for need, said in found.items()}
        return {need: torch.stack([bank[index][need] for index in indices]) for need in needs}

    def _attacked_texts(self, one: Adversary, inputs: Inputs, over: str, step: int) -> list[str]:
        """This process's share of the distinct texts, attacked."""
        assert isinstance(one.attack, TextAttack)
        found: Texts = inputs.batch.texts[over]
        share = {key: self.group.share(texts) for key, texts in inputs.texts.items() if key[1] == over}
        mine = Inputs(inputs.batches, {}, share)
        spot = Spot(one.spots)
        with frozen(self.whole), torch.no_grad():
            rest = self._seen((need for need in one.needs if need not in one.spots), mine, student=one.on)

            def encode(texts: Sequence[str]) -> TextEmbeddings:
                encoded = {need: self._encoder(need.who).encode_text(texts).float() for need in spot.needs}
                return one.climbs.outputs(rest.replaced(encoded), spot)

            goal = one.climbs.goal(rest, spot)
            attack = one.attack.redrawn(derive(self.recipe.seed, step))
            return attack.rewrite(encode, share[one.of, over], one.budget, self.group.share(found.rivals), goal)

    def _whole(self, texts: Sequence[str], parts: Sequence[Sequence[str]]) -> list[str]:
        """The texts of all processes in their order: each had every `world`-th of them."""
        whole = list(texts)
        for rank, part in enumerate(parts):
            whole[rank :: self.group.world] = part
        return whole

    def _ascend(self, one: Adversary, inputs: Inputs, images: Images) -> None:
        """A plain gradient step of what is trained up what an adversary climbs at these images, the mean over the
        batch."""
        for parameter in self._ordered:
            parameter.requires_grad_(True)
        try:
            with torch.enable_grad():
                value = one.climbs.value(self._along(one, inputs, images))
                found = torch.autograd.grad(value, self._ordered, allow_unused=True, materialize_grads=True)
        finally:
            for parameter in self._ordered:
                parameter.requires_grad_(False)
        self._share(list(found))
        with torch.no_grad():
            for parameter, gradient in zip(self._ordered, found, strict=True):
                parameter.add_(gradient, alpha=one.ascends)

    def _along(self, one: Adversary, inputs: Inputs, images: Images) -> Seen:
        """What there is to see of images on the way of an attack, with gradients."""
        along = Inputs(inputs.batches, inputs.images | {one.makes: images}, inputs.texts)
        places = {over: texts.place for over, texts in inputs.batch.texts.items() if texts.place is not None}
        return Seen(self._embedded(one.needs, along), self._heads, places)

    def _accumulate(self, inputs: Inputs) -> None:
        """The released MMCoA code clears gradients before its attack and not after it, so every attack step's mean
        class-level cross-entropy adds its parameter gradient at full weight. Same sum, one step at a time."""
        for one, path in inputs.paths:
            for images in path:
                one.climbs.value(self._along(one, inputs, images)).backward()

    # Several processes

    def _gathered(self, embeddings: Tensor) -> Tensor:
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
            own.register_hook(lambda gradient: None if gradient is None else gradient * world)  # None: nobody uses it
        parts[self.group.rank] = own
        return torch.cat(parts)

    def _share_gradients(self) -> None:
        """The gradients become the mean over the processes."""
        self._share([one.grad for one in self._ordered if one.grad is not None])

    def _share(self, gradients: Sequence[Tensor]) -> None:
        """These become the mean over the processes, all in one message."""
        world = self.group.world
        if world == 1 or not gradients:
            return
        message = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(message)
        parts = message.div_(world).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    # Divergence

    def _alive(self, batch: Batch) -> bool:
        """Whether the network still answers the clean batch with finite numbers."""
        with torch.no_grad():
            found = [self.network.encode_image(batch.images)]
            found += [self.network.encode_text(one.texts) for one in batch.texts.values()]
        return all(bool(torch.isfinite(one).all()) for one in found) and bool(torch.isfinite(self.network.scale))

    def _diverged(self, step: int) -> CrossguardError:
        return CrossguardError(
            f"the loss of step {step + 1} is not finite; lower the learning rate (now "
            f"{self.stages[self.place(step)[0]].optimizer.lr:g}) or set clip=1, and train into another folder"
        )


def _of(key: tuple[str, str], who: str) -> tuple[str, str, str]:
    """A list of texts as the rest of a need."""
    view, over = key
    return view, who, over


def _width(network: DualEncoder | VisionLanguageModel) -> int:
    """The number of dimensions of an embedding."""
    with torch.no_grad():
        return network.encode_text(["a"]).shape[1]


def _accuracy(stage: Stage, seen: Seen) -> dict[str, Tensor]:
    """The share of the batch that is answered rightly, by the first term that tells texts apart."""
    with torch.no_grad():
        for term in stage.terms:
            found = term.answers(seen)
            if found is not None:
                logits, right = found
                clean = all(need.view == CLEAN for need in term.needs() if need.tower == IMAGE and need.who == STUDENT)
                name = "batch accuracy" if clean else "robust batch accuracy"
                return {name: (logits.argmax(1) == right).float().mean()}
    return {}


def _counted(stage: Stage, seen: Seen) -> dict[str, Tensor]:
    """The share of the images that count in the first term that leaves some out."""
    with torch.no_grad():
        found = (term.counted(seen) for term in stage.terms if term.sieve())
        return next(({"images counted": mask.float().mean()} for mask in found), {})


def _clamp_scale(network: DualEncoder) -> None:
    """Keeps the logit scale between 1 and 100."""
    with torch.no_grad():
        for name, parameter in network.towers()["head"].items():
            if name.endswith("logit_scale"):
                parameter.clamp_(0.0, math.log(100.0))
