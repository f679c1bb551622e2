"""Where tokens go through a tower: what makes the first states of them, and the layers that follow."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crossguard.errors import CrossguardError
from crossguard.shapes import Context, Deeper

States = Float[Tensor, "layers rows places width"]  # what each layer makes of each token of an image


def blocks(tower: Any) -> nn.ModuleList | None:
    """The layers of a tower of tokens, from the first on; None where it has none that are known here."""
    within = getattr(tower, "encoder", tower)
    found = getattr(within, "layers", None)
    found = getattr(within, "layer", None) if found is None else found
    return found if isinstance(found, nn.ModuleList) else None


@contextmanager
def changing(layers: Iterable[nn.Module], change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Inside, each of these layers is given, in this thread, what `change` makes of its number and its states."""
    here, handles = threading.get_ident(), []

    def hook(layer: int) -> Callable[[nn.Module, Any], Any]:
        def changed(module: nn.Module, inputs: Any) -> Any:
            del module
            return None if threading.get_ident() != here else (change(layer, inputs[0]), *inputs[1:])

        return changed

    try:
        for number, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(hook(number)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Watched:
    """What the layers said of the tokens of the images in the last forward."""

    places: int = 0  # of an image, without those that are given
    states: list[Tensor] = field(default_factory=list)

    def stacked(self, layers: int) -> States:
        return torch.stack(self.states[:layers])[:, :, : self.places]


@dataclass(frozen=True)
class ImageTower:
    """An image tower of tokens, which can be given more of them, behind its own."""

    embeddings: nn.Module
    blocks: nn.ModuleList
    width: int

    @classmethod
    def of(cls, model: Any, who: str) -> ImageTower:
        """That of a model of `transformers`; raises where it has no tokens.

        Args:
            who: learns them, for the error.
        """
        tower = getattr(model, "vision_model", None)
        if getattr(tower, "embeddings", None) is None:
            tower = getattr(tower, "vision_model", None)
        embeddings, layers = getattr(tower, "embeddings", None), blocks(tower)
        known = any(hasattr(embeddings, name) for name in ("position_embedding", "position_embeddings"))
        if not known or not isinstance(embeddings, nn.Module) or layers is None:
            raise CrossguardError(
                f"{who} learns tokens of the image tower, and the tower of this model has none that are known here; "
                "give a CLIP or SigLIP with a vision transformer"
            )
        return cls(embeddings, layers, int(tower.config.hidden_size))  # type: ignore[union-attr]

    @contextmanager
    def given(self, tokens: Context, deeper: Deeper | None = None, watch: bool = False) -> Iterator[Watched]:
        """Inside, the tower of this thread has these tokens too. A forward of more images than lists is one of several
        views of each, in the order (image, view).

        Args:
            tokens: one list for each image, or a single one.
            deeper: tokens that take their places before the second layer, the third and so on, the same for all images.
            watch: keep what the layers say.
        """
        here, watched, count = threading.get_ident(), Watched(), tokens.shape[-2]

        def append(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            del module, inputs
            if threading.get_ident() != here:
                return None
            if len(output) % len(tokens):
                raise CrossguardError(f"{len(output)} images are no views of {len(tokens)}, which have learned tokens")
            watched.places, watched.states = output.shape[1], []
            own = tokens.to(output.dtype).repeat_interleave(len(output) // len(tokens), 0)
            return torch.cat([output, own], 1)

        def deepen(layer: int, states: Tensor) -> Tensor:
            assert deeper is not None
            own = deeper[layer].to(states.dtype).expand(len(states), -1, -1)
            first = watched.places
            return torch.cat([states[:, :first], own, states[:, first + count :]], 1)

        def listen(module: nn.Module, inputs: Any, output: Any) -> None:
            del module, inputs
            if threading.get_ident() == here:
                watched.states.append(output if isinstance(output, Tensor) else output[0])

        later = self.blocks[1 : 1 + (0 if deeper is None else len(deeper))]
        with changing(later, deepen):
            handles = [self.embeddings.register_forward_hook(append)]
            if watch:
                handles += [block.register_forward_hook(listen) for block in self.blocks]
            try:
                yield watched
            finally:
                for handle in handles:
                    handle.remove()
