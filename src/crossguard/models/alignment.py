"""Tokens of the image tower that are learned for each image at test time, so that what the tower makes of an image has
the statistics of known ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from crossguard.answer import Answer, Said
from crossguard.errors import CrossguardError
from crossguard.files import digest, save_tensors
from crossguard.models.base import Checkpoint, DualEncoder, VisionLanguageModel, together
from crossguard.models.towers import ImageTower, States, Watched
from crossguard.models.tuning import descended, entropy_of_mean, surest
from crossguard.models.views import tpt_views
from crossguard.models.wrapper import Lent, Wrapper
from crossguard.seeds import derive, normal
from crossguard.shapes import Context, Images, PerImage
from crossguard.words import Reads

Moments = Float[Tensor, "layers places width"]

_FILE = "the file that crossguard.token_statistics(model, clean, adversarial, out) has written"
_STD = 0.02  # of the tokens before they are learned, as visual prompt tuning begins


@dataclass(frozen=True)
class TAPT(Wrapper, Reads):
    """Test-time adversarial prompt tuning in the manner of TAPT (Wang et al. 2025), for towers of image tokens: a few
    tokens more are given to the image tower and tuned for each image by one step, so that the surest tenth of 64 views
    are sure of the same, and the tokens of each layer have the means and variances, over these views, that they have
    over known images, clean and attacked. Then the image itself is answered.

    The loss and its numbers are those of the authors' code for tuning the image tower alone (ViT-B/32): the entropy of
    the mean, plus 100 times the mean over nine layers of the L1 distances of the statistics, half of them from those of
    attacked images. A reconstruction, since their tokens come from adversarial training and stand before each of nine
    layers, and here they begin as visual prompt tuning does, at random, and stand before the first alone.

    The statistics are of a model, its tokens and data, and are made once (`token_statistics`):

        token_statistics(model, clean, adversarial, "statistics.safetensors")
        TAPT(model, "statistics.safetensors")

    Args:
        statistics: the file.
        tokens: how many are given; with the seed those that the statistics were made with.
        mixed: whether AugMix is part of the views.
        keep: the share of views that tuning is about.
        align: the weight of the statistics.
        attacked: the share of attacked images in them.
        layers: how many, from the first on.
    """

    base: VisionLanguageModel
    statistics: str = ""
    tokens: int = 2
    views: int = 64
    mixed: bool = True
    keep: float = 0.1
    steps: int = 1
    lr: float = 5e-4
    decay: float = 0.01
    align: float = 100.0
    attacked: float = 0.5
    layers: int = 9
    seed: int = 0
    random = True
    masks = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("tokens", 1), ("views", 1), ("steps", 0), ("layers", 1)):
            if getattr(self, name) < least:
                raise CrossguardError(f"TAPT({name}={getattr(self, name)}) is not possible; give {least} or more")
        for name in ("keep", "attacked"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise CrossguardError(f"TAPT({name}={getattr(self, name)}) is no share; give 0 to 1")
        for name in ("lr", "decay", "align"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise CrossguardError(f"TAPT({name}={getattr(self, name)}) is not possible; give 0 or more")

    @property
    def fingerprint(self) -> str:
        path = Path(self.statistics)
        return digest([path]) if self.statistics and path.is_file() else ""

    def around(self, inner: Answer, live: Lent) -> Answer:
        live.texts(inner)
        tower = ImageTokens.of(live.network, self.tokens, self.seed)
        known = _Known.read(self.statistics, tower)

        def tuned(images: Images) -> Context:
            """The tokens of each image."""
            views = tpt_views(images, self.keys(len(images), "views"), self.views, self.mixed)
            count = len(images)
            with torch.no_grad(), tower.given(tower.start[None]):
                logits = inner.hard(views.flatten(0, 1).detach()).logits.unflatten(0, (count, self.views))
            sure = surest(logits, self.keep)
            chosen = views.detach()[torch.arange(count, device=views.device)[:, None], sure].flatten(0, 1)

            def loss(context: Context) -> PerImage:
                with tower.given(context, watch=True) as states:
                    said = inner.hard(chosen)
                agreed = entropy_of_mean(said.logits.unflatten(0, sure.shape))
                return agreed + self.align * self.distance(states.stacked(self.layers), count, known)

            return descended(tower.start, count, loss, self.steps, self.lr, self.decay)

        def with_tokens(ask: Callable[[Images], Any]) -> Callable[[Images], Any]:
            def answer(images: Images) -> Any:
                with tower.given(tuned(images)):
                    said = ask(images)
                    if isinstance(said, Said):
                        _ = said.logits  # which may be computed when first asked for
                return said

            return answer

        return replace(
            inner,
            hard=with_tokens(inner.hard),
            soft=None if inner.soft is None else with_tokens(inner.soft),
            gates={name: with_tokens(gate) for name, gate in inner.gates.items()},
        )

    def distance(self, states: States, count: int, known: _Known) -> PerImage:
        """How far the statistics of the views of each image are from the known ones, as a mean over the layers."""
        seen = states.unflatten(1, (count, -1))  # (layers, images, views, places, width)
        mean = seen.mean(2)
        spread = (seen - mean[:, :, None]).square().mean(2)

        def apart(means: Moments, variances: Moments) -> PerImage:
            layers = len(states)
            far = (mean - means[:layers, None]).abs() + (spread - variances[:layers, None]).abs()
            return 0.5 * far.mean((0, 2, 3))

        attacked, clean = apart(known.attacked_mean, known.attacked_var), apart(known.clean_mean, known.clean_var)
        return self.attacked * attacked + (1.0 - self.attacked) * clean


@dataclass(frozen=True)
class ImageTokens:
    """Tokens that are given to an image tower behind its own, one list for each image or one for all.

    Args:
        start: the tokens before they are learned.
    """

    tower: ImageTower
    start: Context
    seed: int

    @classmethod
    def of(cls, network: DualEncoder, tokens: int, seed: int) -> ImageTokens:
        """Of the network's image tower; raises where it has no tokens."""
        tower = ImageTower.of(network.stock, "TAPT")
        weight = next(tower.blocks.parameters())
        start = _STD * normal(torch.tensor([derive("TAPT", seed)]), (tokens, tower.width), weight.device)[0]
        return cls(tower, start, seed)

    @contextmanager
    def given(self, tokens: Context, watch: bool = False) -> Iterator[Watched]:
        """Inside, the tower of this thread has these tokens too (`ImageTower.given`), and all images go through it in
        one forward."""
        with together(), self.tower.given(tokens, watch=watch) as watched:
            yield watched


@dataclass(frozen=True)
class _Known:
    """The statistics of known images: mean and variance over images of each number of each token of each layer."""

    clean_mean: Moments
    clean_var: Moments
    attacked_mean: Moments
    attacked_var: Moments

    @classmethod
    def read(cls, path: str, tower: ImageTokens) -> _Known:
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise CrossguardError(f"there is no file {path!r} of statistics; TAPT needs {_FILE}")
        device, names = tower.start.device, ("clean_mean", "clean_var", "attacked_mean", "attacked_var")
        try:
            with safe_open(path, "pt") as file:
                made = dict(file.metadata() or {})
                found = [file.get_tensor(name).float().to(device) for name in names]
        except (SafetensorError, OSError) as error:
            raise CrossguardError(f"{path} holds no statistics of tokens; give {_FILE}") from error
        own = {"tokens": str(len(tower.start)), "seed": str(tower.seed)}
        layers, width = len(tower.tower.blocks), tower.start.shape[1]
        shapes = {one.shape[::2] for one in found if one.ndim == 3}
        if made != own or shapes != {(layers, width)} or len({one.shape for one in found}) > 1:
            raise CrossguardError(
                f"{path} has statistics of {made or 'another kind'} and shape {tuple(found[0].shape)}, and this model "
                f"has {own} and {layers} layers of width {width}; make them for this model"
            )
        return cls(*found)


def token_statistics(
    model: Checkpoint,
    clean: Iterable[Tensor],
    adversarial: Iterable[Tensor],
    out: str | Path,
    tokens: int = 2,
    seed: int = 0,
) -> Path:
    """Writes the statistics that `TAPT` aligns with: for each layer of the image tower, each token and each number of
    it, mean and variance over the images, clean and attacked.

    Args:
        clean, adversarial: batches of images of the size that will be asked about, in [0, 1]; adversarial ones for
            instance of `Kept`, which reads what `evaluate(..., keep=...)` has kept.
        out: a safetensors file.
        tokens, seed: those of `TAPT`.

    Raises:
        CrossguardError: There are fewer than two images of a kind, or the tower has no tokens.
    """
    tower, found = ImageTokens.of(model.network, tokens, seed), dict[str, Tensor]()
    for name, batches in (("clean", clean), ("attacked", adversarial)):
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        shift: Tensor | None = None
        for images in batches:
            with torch.no_grad(), tower.given(tower.start[None], watch=True) as watched:
                model.encode_image(images)
            states = watched.stacked(len(tower.tower.blocks)).double().cpu()
            shift = states[:, :1] if shift is None else shift  # so that squares do not swallow small variances
            away = states - shift
            count, total, squares = count + len(images), total + away.sum(1), squares + away.square().sum(1)
        if count < 2 or shift is None:
            raise CrossguardError(f"statistics need at least two {name} images, and there are {count}")
        mean = total / count
        found[f"{name}_mean"] = (shift[:, 0] + mean).float().contiguous()
        found[f"{name}_var"] = ((squares - count * mean.square()) / (count - 1)).clamp(min=0.0).float().contiguous()
    save_tensors(Path(out), found, {"tokens": str(tokens), "seed": str(seed)})
    return Path(out)
