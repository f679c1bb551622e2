"""Defenses that move the embedding of an image, and leave its pixels alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from crossguard.answer import Answer
from crossguard.errors import CrossguardError
from crossguard.models.base import VisionLanguageModel
from crossguard.models.kinds import Latent
from crossguard.models.wrapper import Lent
from crossguard.shapes import Embeddings, TextEmbeddings

BLANK = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)  # the seven of CLIP's 80 templates for ImageNet that its authors single out


@dataclass(frozen=True)
class CLIPure(Latent):
    """CLIPure-Cos (Zhang et al., ICLR 2025): the embedding climbs its cosine with the embedding of a blank text, the
    mean over templates with nothing in the place of the class.

    With u = e / |e|, each step is u + step * g / |g|, g the gradient of the cosine, put back to length 1; then e = |e|
    u. Step and number of steps are those of the authors' code, which takes all 80 templates of ImageNet; here they are
    seven of these.

    With these numbers it does nothing. A step turns u by the angle whose tangent is the step, 88 degrees for 30, in the
    plane of u and the blank text, and the text is nearer than that: each step overshoots to the other side, two come
    back, and ten return the embedding that was given. What the published numbers measure is in the gradient: the code
    computes g without a graph, so that attacks see the steps as constants, and ten divisions by thirty leave nothing
    (`constant_steps=True`). Here the gradient is the true one unless that is asked for. An image costs 1 forward.

    Args:
        templates: of the blank text, each with {} in the place of the class.
        whole_batch: |g| of all images together, as in the code, where answers hang on the batch; False: of each image.
        constant_steps: take each g for a constant when the gradient is computed, as the code does.
    """

    base: VisionLanguageModel
    step: float = 30.0
    steps: int = 10
    templates: tuple[str, ...] = BLANK
    whole_batch: bool = False
    constant_steps: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.step < float("inf"):
            raise CrossguardError(f"CLIPure(step={self.step}) does not climb; give a positive number")
        if self.steps < 1:
            raise CrossguardError(f"CLIPure(steps={self.steps}) does nothing; give 1 or more")
        wrong = [template for template in self.templates if template.count("{}") != 1]
        if wrong or not self.templates:
            raise CrossguardError(
                f"CLIPure(templates={self.templates}) makes no blank text; give some, each with {{}} exactly once"
            )

    def anchors(self, inner: Answer, live: Lent) -> TextEmbeddings:
        del inner
        blank = live.anchors([template.replace("{}", "") for template in self.templates])
        return F.normalize(F.normalize(blank, dim=1).mean(0, keepdim=True), dim=1)

    def move(self, embeddings: Embeddings, anchors: TextEmbeddings) -> Embeddings:
        size = embeddings.norm(dim=1, keepdim=True)
        unit = embeddings / size
        for _ in range(self.steps):
            climb = anchors - (unit * anchors).sum(1, keepdim=True) * unit  # of the cosine, times |e|
            length = climb.norm() if self.whole_batch else climb.norm(dim=1, keepdim=True)
            way = climb / length.clamp_min(torch.finfo(climb.dtype).tiny)
            unit = F.normalize(unit + self.step * (way.detach() if self.constant_steps else way), dim=1)
        return size * unit


@dataclass(frozen=True)
class COLA(Latent):
    """The projection of COLA (Zhu et al., NeurIPS 2025): of an embedding only that part is kept which the texts of the
    classes can tell, their first `rank` singular directions.

    The rank is that of the paper. The rest of the paper is not here, because it needs 50 descriptions of each class by
    a language model: five views, entropy weights and an optimal transport between views and descriptions. So this is
    one of its two parts, a reconstruction. What this part does alone follows from its formula: as long as the rank is
    not below that of the texts, each image's cosines with all texts grow by one common factor, so its answer stays as
    it was and only becomes surer; it can change an answer only where it leaves directions of the texts out. An image
    costs 1 forward.

    Args:
        rank: how many directions stay; as many as there are, where there are fewer.
    """

    base: VisionLanguageModel
    rank: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise CrossguardError(f"COLA(rank={self.rank}) leaves nothing of an embedding; give 1 or more")

    def anchors(self, inner: Answer, live: Lent) -> TextEmbeddings:
        """Orthonormal directions, the most telling one first: of all prompts of all classes."""
        texts = live.texts(inner)
        if live.prompts is not None:
            texts = live.anchors(live.prompts.flat)
        _, sizes, ways = torch.linalg.svd(F.normalize(texts.float(), dim=1), full_matrices=False)
        telling = int((sizes > 1e-5 * sizes[0]).sum())
        return ways[: min(self.rank, telling)]

    def move(self, embeddings: Embeddings, anchors: TextEmbeddings) -> Embeddings:
        return (embeddings @ anchors.T) @ anchors
