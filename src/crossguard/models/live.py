"""Models that live in memory: objects of `transformers` or open_clip, or two functions."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossguard.checkpoints import add_weights
from crossguard.errors import CrossguardError
from crossguard.files import save_tensors, staging
from crossguard.models.base import Checkpoint, DualEncoder, constant
from crossguard.models.huggingface import TransformersEncoder, checked
from crossguard.models.openclip import OpenCLIPEncoder, preprocessing
from crossguard.models.probing import PROBES, check_images, check_texts
from crossguard.shapes import Embeddings, Images

_SHOWN = "the model in memory"  # what errors call it


@dataclass(frozen=True, init=False)
class Live(Checkpoint):
    """A model in memory, to evaluate and to train in Python.

    `Live(model, processor, tokenizer)` is of an object of `transformers` or open_clip, `Live(images=..., texts=...)` of
    two functions.

    It means the model as it is when this is written: nothing that is done here touches the object, since a copy is
    asked and trained, and a model that was trained on meanwhile is refused; write `Live(...)` again for it. In a
    question and a report it is the hash of its weights, and of how it reads images and texts. No model can be built of
    that text: an experiment file or the command line needs a folder (`model.save_pretrained`, and
    HuggingFace('folder')).

    A recipe that trains it gives back another one: `recipe.fit(live, data, folder).model` is the trained network. The
    folder holds a whole checkpoint if the object is of `transformers`, else the weights.

    Args:
        model: a dual encoder of `transformers`, or a model of open_clip.
        processor: the image processor of `transformers`, or a processor that holds it and the tokenizer. Of open_clip
            it is not needed: its models say how their images are prepared.
        tokenizer: of the same.
        images: a function (or a module, or a method of one) from pixels in [0, 1], shape (n, 3, h, w) at any size, to
            embeddings, shape (n, d). It resizes and normalizes by itself, differentiably, so that it can be attacked.
        texts: one from a list of n strings to embeddings.
        scale: what cosines are multiplied by, for two functions.
        bias: what is added then.
    """

    weights: str  # the hash

    def __init__(
        self,
        model: Any = None,
        processor: Any = None,
        tokenizer: Any = None,
        *,
        images: Callable[[Images], Embeddings] | None = None,
        texts: Callable[[Sequence[str]], Embeddings] | None = None,
        scale: float = 100.0,
        bias: float = 0.0,
        weights: str = "",
    ) -> None:
        if model is None and images is None and texts is None:
            told = f"Live(weights={weights!r}) is" if weights else "Live is of"
            raise CrossguardError(
                f"{told} a model that lives in the memory of a Python program, and cannot be built of a text; save it, "
                "and give HuggingFace('folder') or OpenCLIP('folder')"
            )
        if (model is None) == (images is None) or (images is None) != (texts is None):
            raise CrossguardError(
                "Live is made of a model, its processor and its tokenizer, or of two functions as Live(images=..., "
                "texts=...)"
            )
        parts = (model, processor, tokenizer) if model is not None else (images, texts, scale, bias)
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "weights", _identity(self._encoder()))

    @property
    def model(self) -> Any:
        """The object that this was made of; the pair of functions, if it was made of two."""
        parts = self._parts
        return parts[0] if len(parts) == 3 else parts[:2]

    @property
    def _parts(self) -> tuple[Any, ...]:
        return self.__dict__["parts"]

    def load(self) -> DualEncoder:
        encoder = self._encoder()
        if _identity(encoder) != self.weights:
            raise CrossguardError(
                "the model in memory has changed since Live(...) was made of it; make it again for the model as it is"
            )
        return encoder

    def saved(self, folder: Path) -> Checkpoint:
        """This model with the weights that were saved there, in memory again."""
        from safetensors.torch import load_file

        parts = copy.deepcopy(self._parts)
        if len(parts) == 3 and not _of_open_clip(parts[0]):
            from crossguard.models.huggingface import HuggingFace

            encoder = HuggingFace(str(folder)).load()
            assert isinstance(encoder, TransformersEncoder)
            return Live(encoder.model, *parts[1:])
        _modules(parts).load_state_dict(load_file(folder / "model.safetensors"))
        if len(parts) == 3:
            return Live(*parts)
        return Live(images=parts[0], texts=parts[1], scale=parts[2], bias=parts[3])

    def _encoder(self) -> DualEncoder:
        """A copy of the network, in float32 on the CPU and in evaluation mode, after it was asked a little."""
        with torch.inference_mode(False):
            parts = copy.deepcopy(self._parts)
            _modules(parts).float().cpu().eval().requires_grad_(True)
            if len(parts) == 4:
                return _asked(Functions(*parts), (224, 224))
            return _encoder(*parts)


def _encoder(model: Any, processor: Any, tokenizer: Any) -> DualEncoder:
    """An object of `transformers` or open_clip as a network."""
    if isinstance(model, nn.Module) and _of_open_clip(model):
        if not callable(tokenizer):
            raise CrossguardError("a model of open_clip needs its tokenizer: open_clip.get_tokenizer('name')")
        settings, visual = getattr(model.visual, "preprocess_cfg", None) or {}, model.visual
        ready = preprocessing(settings, visual.image_size, _SHOWN)  # type: ignore[arg-type, union-attr]
        return _asked(_InMemory(model, tokenizer, ready, None), (ready.height, ready.width))
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise CrossguardError(
            f"Live cannot read a {type(model).__name__}; give a dual encoder of transformers or open_clip, or two "
            "functions as Live(images=..., texts=...)"
        )
    image = getattr(processor, "image_processor", processor)
    words = tokenizer or getattr(processor, "tokenizer", None)
    if not hasattr(image, "size") or words is None:
        given = ", ".join("nothing" if one is None else f"a {type(one).__name__}" for one in (processor, tokenizer))
        raise CrossguardError(
            f"a {type(model).__name__} needs its image processor and its tokenizer, as in Live(model, "
            f"AutoProcessor.from_pretrained(...)); given were {given}"
        )
    return checked(TransformersEncoder(model, words, image), _SHOWN)


class Functions(DualEncoder):
    """Two functions as a dual encoder; what they have of parameters can be trained.

    Args:
        images: from pixels to embeddings.
        texts: from strings to embeddings.
        scale, bias: of the logits.
    """

    def __init__(self, images: Any, texts: Any, scale: float, bias: float) -> None:
        super().__init__()
        self.images, self.texts, self.held = [images], [texts], _modules((images, texts))
        self.numbers = (float(scale), float(bias))

    @property
    def first(self) -> nn.Parameter | None:
        """A parameter, which says where the network is and in which precision; None where there are none."""
        return next(iter(self.held.parameters()), None)

    def encode_image(self, images: Images) -> Embeddings:
        return self.images[0](images if self.first is None else images.to(self.first.dtype))

    def encode_text(self, texts: Sequence[str]) -> Embeddings:
        return self.texts[0](list(texts))

    @property
    def scale(self) -> Tensor:
        return self._number(0)

    @property
    def bias(self) -> Tensor:
        return self._number(1)

    def _number(self, which: int) -> Tensor:
        device = torch.device("cpu") if self.first is None else self.first.device
        return constant(self.numbers[which : which + 1], device, torch.float32)[0]

    def towers(self) -> dict[str, dict[str, nn.Parameter]]:
        """What the function of images holds is the image tower. Where one module holds both, names that begin with
        'vis' or 'image' are."""
        image, text = (_module(one) for one in (self.images[0], self.texts[0]))
        towers: dict[str, dict[str, nn.Parameter]] = {"image": {}, "text": {}, "head": {}}
        if image is not None and image is text:
            for name, parameter in image.named_parameters():
                towers["image" if name.startswith(("vis", "image")) else "text"][name] = parameter
            return towers
        for tower, module in (("image", image), ("text", text)):
            towers[tower] = {} if module is None else dict(module.named_parameters())
        return towers

    def save(self, folder: Path) -> None:
        _save(self.held, folder)


class _InMemory(OpenCLIPEncoder):
    """A model of open_clip without a record."""

    def save(self, folder: Path) -> None:
        _save(nn.ModuleList([self.model]), folder)


def _save(modules: nn.Module, folder: Path) -> None:
    held = {name: value.detach().cpu().clone().contiguous() for name, value in modules.state_dict().items()}
    with staging(folder) as stage:
        save_tensors(stage / "model.safetensors", held, {"format": "pt"})


def _of_open_clip(model: Any) -> bool:
    return any(kind.__module__.split(".")[0] == "open_clip" for kind in type(model).__mro__)


def _module(part: Any) -> nn.Module | None:
    """The module that a function is, or is a method of."""
    owner = part if isinstance(part, nn.Module) else getattr(part, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def _modules(parts: Sequence[Any]) -> nn.ModuleList:
    """All modules among the parts of a model, each once."""
    found = [_module(part) for part in parts]
    return nn.ModuleList(dict.fromkeys(module for module in found if module is not None))


def _asked(encoder: DualEncoder, size: tuple[int, int]) -> DualEncoder:
    """The same, after it was asked about a few texts and an image of this size."""
    with torch.no_grad():
        encoder.eval()
        texts = encoder.encode_text(PROBES)
        check_texts(texts, _SHOWN)
        check_images(encoder.encode_image(torch.full((1, 3, *size), 0.5)), texts, _SHOWN)
    return encoder


def _identity(encoder: DualEncoder) -> str:
    """A hash of the weights, in float32, and of how images and texts are read. Functions that hold no weights are known
    by what they answer."""
    whole = hashlib.sha256()
    add_weights(whole, encoder)
    if isinstance(encoder, TransformersEncoder | OpenCLIPEncoder):
        whole.update(f"{type(encoder.model).__name__}\0{encoder.preprocess}".encode())
        whole.update(encoder.tokens(PROBES)[0].numpy().tobytes())
    elif isinstance(encoder, Functions):
        whole.update(f"{encoder.numbers}".encode())
        if encoder.first is None:
            with torch.no_grad():
                answers = (encoder.encode_text(PROBES), encoder.encode_image(torch.full((1, 3, 224, 224), 0.5)))
            for answer in answers:
                whole.update(answer.detach().float().cpu().numpy().round(4).tobytes())
    return whole.hexdigest()[:12]
