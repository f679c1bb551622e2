"""Stock dual encoders of `transformers`: CLIP, SigLIP, ALIGN, VisionTextDualEncoder and whatever else speaks
`get_image_features`; `families` has what they differ in."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossguard.checkpoints import check_weights, content, kind, located, quiet, weights
from crossguard.errors import CrossguardError
from crossguard.files import WriteError, reason, staging
from crossguard.limits import LARGEST, SIDE, shortly
from crossguard.models.base import Checkpoint, DualEncoder, Preprocess, constant, normalization
from crossguard.models.families import STRANGE, described, family
from crossguard.models.packing import PrefixPacking
from crossguard.models.probing import PROBES, check_images, check_texts
from crossguard.models.splicing import Splice
from crossguard.models.tokens import Tokens
from crossguard.pretrained import pretrained
from crossguard.shapes import Embeddings, Images, PatchTokens, Resized
from crossguard.words import Reads

_STRINGS = 256  # read at once: the states of many more fall out of the caches


@dataclass(frozen=True)
class HuggingFace(Checkpoint, Reads):
    """A dual encoder in `transformers` format: a local folder, or a hub id such as 'openai/clip-vit-base-patch32'.

    Weights are read from safetensors only, in float32. A hub id is looked up in the local cache first;
    `HF_HUB_OFFLINE` is respected.
    """

    path: str

    def load(self) -> DualEncoder:
        return _load(located(self.path))

    def content(self) -> str:
        return content(self.path)


class TransformersEncoder(DualEncoder):
    """A `transformers` dual encoder with its tokenizer and its image processor made differentiable.

    Args:
        model: any model with `get_image_features`, `get_text_features` and a scale.
        tokenizer: the family's tokenizer.
        processor: the family's image processor; only its numbers are used, and it is saved with the checkpoint.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, processor: Any) -> None:
        super().__init__()
        # In this layout convolutional towers are about a quarter faster on a CPU; others do not care.
        self.model: Any = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.tokenizer = tokenizer
        self.processor = processor
        self.preprocess = _preprocess(processor)
        self.family = family(model)
        self.padded = self.family.padded
        self.length = _context_length(model, tokenizer)
        rows = getattr(model.config.get_text_config(), "vocab_size", None)  # type: ignore[operator, union-attr]
        self.tokens = Tokens(tokenizer, self.length, self.padded, rows if isinstance(rows, int) else None)
        self.packing = PrefixPacking(model) if self.family.causal else None
        image = self.family.image
        self.first = next(name for name, _ in model.named_parameters() if name.startswith(image))  # of the image tower

    @property
    def stock(self) -> Any:
        return self.model

    def encode_image(self, images: Images) -> Embeddings:
        return self.encode_fitted(self.fitted(images))

    def fitted(self, images: Images) -> Resized:
        return self.preprocess.fitted(images)

    def encode_fitted(self, pixels: Resized) -> Embeddings:
        pixels = self.preprocess.normalized(pixels).to(self.model.get_parameter(self.first).dtype)
        return _features(self.model.get_image_features(pixel_values=pixels))

    def patches(self, images: Images) -> tuple[Embeddings, PatchTokens]:
        return self.patches_fitted(self.fitted(images))

    def patches_fitted(self, pixels: Resized, behind: int = 0) -> tuple[Embeddings, PatchTokens]:
        """Of a CLIP, and of a VisionTextDualEncoder with the image tower of a CLIP or a ViT: the tokens of the patches,
        normalized or pooled, and projected, as the class token is."""
        tower, project = getattr(self.model, "vision_model", None), getattr(self.model, "visual_projection", None)
        norm: Any = getattr(tower, "post_layernorm", None)
        pooler: Any = getattr(tower, "pooler", None)
        if project is None or (norm is None and not isinstance(getattr(pooler, "dense", None), nn.Linear)):
            return super().patches(pixels)
        pixels = self.preprocess.normalized(pixels).to(self.model.get_parameter(self.first).dtype)
        output = self.model.get_image_features(pixel_values=pixels)
        config = self.model.config.vision_config
        count = (pixels.shape[2] // config.patch_size) * (pixels.shape[3] // config.patch_size)
        end = output.last_hidden_state.shape[1] - behind
        tokens = output.last_hidden_state[:, end - count : end]  # in front is the class token, and DeiT's other one
        if norm is not None:
            return _features(output), project(norm(tokens))
        pooled = pooler(tokens.flatten(0, 1)[:, None])  # it takes the first of each row
        return _features(output), project(pooled).unflatten(0, tokens.shape[:2])

    def encode_text(self, texts: Sequence[str]) -> Embeddings:
        ids, mask = self.tokens(texts)
        if self.packing is not None and len(texts) > 1 and self.packing.usable():
            return self.packing(ids, mask)
        if len(texts) <= _STRINGS or self.padded or not bool(mask[:, 0].all()):  # some are padded on the left
            return self._text(ids, mask)
        lengths, order = mask.sum(1).sort(stable=True)  # like lengths waste no padding
        batches = zip(order.split(_STRINGS), lengths.split(_STRINGS), strict=True)
        found = [self._text(ids[rows, : held[-1]], mask[rows, : held[-1]]) for rows, held in batches]
        return torch.cat(found)[order.argsort()]

    def _text(self, ids: Tensor, mask: Tensor) -> Embeddings:
        # SigLIP was trained on texts padded to its full context, without a mask; the others mask their padding.
        device = self._factor.device
        seen = {} if self.padded else {"attention_mask": mask.to(device)}
        return _features(self.model.get_text_features(input_ids=ids.to(device), **seen))

    def splice(self, texts: Sequence[str], words: str, lists: Sequence[int] = ()) -> Splice:
        return Splice(self.model, self.tokens, self.packing, texts, words, lists)

    def cut(self, texts: Sequence[str]) -> int:
        return self.tokens.cut(texts)

    @property
    def _factor(self) -> nn.Parameter:
        return self.model.get_parameter(self.family.scale)

    @property
    def scale(self) -> Tensor:
        return self._factor.reciprocal() if self.family.divides else self._factor.exp()

    @property
    def bias(self) -> Tensor:
        bias, scale = getattr(self.model, "logit_bias", None), self._factor
        return constant((0.0,), scale.device, scale.dtype)[0] if bias is None else bias

    def towers(self) -> dict[str, dict[str, nn.Parameter]]:
        towers: dict[str, dict[str, nn.Parameter]] = {"image": {}, "text": {}, "head": {}}
        for name, parameter in self.model.named_parameters():
            head = name in (self.family.scale, "logit_bias")
            towers["head" if head else "image" if name.startswith(self.family.image) else "text"][name] = parameter
        return towers

    def save(self, folder: Path) -> None:
        """Writes the checkpoint, each file as a whole; weights of an earlier one that have other names go."""
        before = [*weights(folder), *folder.glob("*.safetensors.index.json")]
        # In a group of processes transformers writes nothing but on the first; here whoever is asked shall write.
        self.model.should_save_on_this_rank = lambda is_main_process: is_main_process
        try:
            with quiet(), staging(folder) as stage:
                self.model.save_pretrained(stage, safe_serialization=True)
                self.tokens.save(stage)
                self.processor.save_pretrained(stage)
                written = {file.name for file in stage.iterdir()}
        finally:
            del self.model.should_save_on_this_rank
        for file in before:
            if file.name not in written:
                try:
                    file.unlink()
                except OSError as error:
                    raise WriteError(f"{file} cannot be removed: {reason(error)}") from error


def _load(path: str, words: str = "") -> DualEncoder:
    """A checkpoint.

    Args:
        words: another, whose tokenizer and image processor are taken.
    """
    _check_source(path)
    with ExitStack() as held:
        source = held.enter_context(pretrained(path, images=not words, words=not words))
        other = held.enter_context(pretrained(words, weights=False, images=True)) if words else source
        config = source.config()
        _check_kind(config, path)
        model, info = source.model(config)
        if not isinstance(getattr(model, family(model).scale, None), nn.Parameter):
            raise CrossguardError(f"{path} holds {described(config.model_type)}, and no scale for cosines; {_GIVE}")
        missing = sorted(str(key) for key in info["missing_keys"])
        if missing:
            raise CrossguardError(
                f"the weights in {path} lack {len(missing)} tensors of its architecture, e.g. {missing[0]!r}"
            )
        tokenizer = other.tokenizer(None if words else config)
        processor = other.image_processor(config)
        with source.naming("preprocessor_config.json"):
            _check_preprocess(_preprocess(processor, f"{path}/preprocessor_config.json"), processor, path)
        with source.naming("network"):
            return checked(TransformersEncoder(model, tokenizer, processor), path)


def load_with_words(path: str, words: str) -> DualEncoder:
    """A checkpoint without a tokenizer and an image processor, with those of another."""
    return _load(path, words)


def checked(encoder: TransformersEncoder, path: str) -> TransformersEncoder:
    """The encoder in evaluation mode, after it was asked about a few texts and an image.

    Args:
        path: where it comes from, for errors.
    """
    with torch.no_grad():
        encoder.eval()
        _check_words(encoder, path)
        _check_reading(encoder, path)
        _check_seeing(encoder, path)
    return encoder


_GIVE = "give a dual encoder, such as a CLIP, SigLIP or ALIGN checkpoint"


def _check_kind(config: Any, path: str) -> None:
    """Raises where a configuration describes no dual encoder, before anything is built."""
    import transformers

    if config.model_type in STRANGE:
        raise CrossguardError(f"{path} holds {STRANGE[config.model_type]}; {_GIVE}")
    kind = transformers.MODEL_MAPPING.get(type(config), None)
    kinds = kind if isinstance(kind, list | tuple) else (kind,)
    if not any(hasattr(one, "get_image_features") and hasattr(one, "get_text_features") for one in kinds):
        raise CrossguardError(f"{path} holds {described(config.model_type)}, which is no dual encoder; {_GIVE}")


def _check_source(path: str) -> None:
    here = Path(path)
    if path.startswith("hf-hub:"):
        raise CrossguardError(f"{path!r} is the name of a checkpoint of open_clip; give OpenCLIP({path!r})")
    if not path.strip():
        raise CrossguardError("the path of the model is empty; give the folder of a checkpoint or a hub id")
    if here.is_file():
        raise CrossguardError(
            f"{path} is a file; give the folder of a transformers checkpoint (config.json, model.safetensors, "
            "tokenizer). Pickle files (.pt, .pth, .bin) are never read"
        )
    if here.is_dir():
        if not (here / "config.json").is_file():
            other = f"; it is one of open_clip: give OpenCLIP({path!r})" if kind(path) == "open_clip" else ""
            raise CrossguardError(f"{path} has no config.json, so it is no transformers checkpoint{other}")
        check_weights(here)
    elif path.startswith(("/", "./", "../", "~")) or path.count("/") > 1:
        raise CrossguardError(f"there is no folder {path!r}; give the folder of a checkpoint or a hub id")


def _features(output: Any) -> Embeddings:
    """Since transformers 5 `get_*_features` returns an output object whose pooled part holds the features; before, a
    tensor."""
    features = output if isinstance(output, Tensor) else output.pooler_output
    if features.ndim != 2:
        raise CrossguardError(
            f"this model has features of shape {tuple(features.shape[1:])} for an image or a text, one for each token; "
            "give a dual encoder with a single embedding of each, such as CLIP or SigLIP"
        )
    return features


def _check_reading(encoder: TransformersEncoder, path: str) -> None:
    """Raises where the tower does not hear its texts: with the tokenizer of another model it may pool a token that is
    never written, and then the first one, so that all texts are one."""
    ids, mask = encoder.tokens(PROBES)
    end = getattr(getattr(encoder.model, "text_model", None), "eos_token_id", None)
    legacy = end == 2 and encoder.family.highest
    if end is not None:
        heard = len(ids.max(1).values.unique()) == 1 if legacy else bool((ids == end).any(1).all())
        if not heard:
            token = "which is the one of the highest number" if legacy else f"token {end}"
            raise CrossguardError(
                f"the text tower of {path} is read at its end-of-text, {token}, and the tokenizer does not write it; "
                "fetch the tokenizer and config.json from one place"
            )
    check_texts(encoder._text(ids, mask), path)


def _check_words(encoder: TransformersEncoder, path: str) -> None:
    """Raises where the tokenizer writes words that the tower has no embedding for, as that of a larger model does.
    Tokens that were added to it may have none: texts seldom hold them, and `Tokens` looks."""
    rows, added = encoder.tokens.rows, encoder.tokenizer.get_added_vocab()
    words = {word: number for word, number in encoder.tokenizer.get_vocab().items() if word not in added}
    highest = max(words, key=words.__getitem__, default="")
    if highest and rows is not None and words[highest] >= rows:
        raise CrossguardError(
            f"the tokenizer of {path} writes {highest!r:.40} as number {words[highest]:,}, and its text tower has "
            f"{rows:,} embeddings; fetch the tokenizer and config.json from one place"
        )


def _check_seeing(encoder: TransformersEncoder, path: str) -> None:
    """Raises where the image tower cannot take what the image processor makes."""
    height, width = encoder.preprocess.height, encoder.preprocess.width
    try:
        found = encoder.encode_image(torch.full((1, 3, height, width), 0.5))
    except CrossguardError:
        raise
    except Exception as error:  # towers refuse images of another size in many ways
        size = getattr(getattr(encoder.model.config, "vision_config", None), "image_size", None)
        if size in (None, height, (height, width), [height, width]) or "allocate" in str(error):
            raise
        read = f"{size} x {size}" if isinstance(size, int) else " x ".join(map(str, size))
        raise CrossguardError(
            f"the image processor of {path} makes images of {height} x {width} pixels, and its image tower reads "
            f"{read}; fetch preprocessor_config.json and config.json from one place"
        ) from error
    check_images(found, encoder.encode_text(PROBES[:1]), path)


def _preprocess(processor: Any, name: str = "the image processor") -> Preprocess:
    size, crop = processor.size, getattr(processor, "crop_size", None)
    mean, std = _normalization(processor, name)
    modes = {2: "bilinear", 3: "bicubic"}
    resample = int(processor.resample)
    if resample not in modes:
        raise CrossguardError(
            f"{name} resizes with Pillow filter {resample}; only bilinear (2) and bicubic (3) are known"
        )
    short = size.get("shortest_edge")
    cropped = getattr(processor, "do_center_crop", short is not None) and crop is not None
    if short is not None:
        height, width = (
            _side(crop, side, name) if cropped else _side(size, "shortest_edge", name) for side in ("height", "width")
        )
        return Preprocess(height, width, _side(size, "shortest_edge", name), mean, std, modes[resample])
    height, width = _side(size, "height", name), _side(size, "width", name)
    if cropped and (high := _side(crop, "height", name), wide := _side(crop, "width", name)) != (height, width):
        if height != width:
            raise CrossguardError(f"{name} resizes to {height} x {width} and crops then; only squares are known")
        return Preprocess(high, wide, height, mean, std, modes[resample], fit="stretched")
    return Preprocess(height, width, None, mean, std, modes[resample])


def _normalization(processor: Any, name: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """The mean and deviation that take pixels of [0, 1] to where the processor's rescaling and normalizing takes those
    of 0 to 255. EfficientNet's, of ALIGN, may subtract 1 after rescaling and divide by the deviation once more."""
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if getattr(processor, "do_normalize", True) or getattr(processor, "include_top", False):
        mean, std = normalization(processor.image_mean, processor.image_std, name)
    if not getattr(processor, "do_normalize", True):
        mean = (0.0, 0.0, 0.0)
    factor = getattr(processor, "rescale_factor", 1 / 255)
    offset, twice = bool(getattr(processor, "rescale_offset", False)), bool(getattr(processor, "include_top", False))
    if factor == 1 / 255 and not offset and not twice:
        return mean, std
    if not isinstance(factor, float) or not factor > 0.0:
        raise CrossguardError(f"{name} has a rescale_factor of {shortly(factor)}; give a positive number")
    first = std if getattr(processor, "do_normalize", True) else (1.0, 1.0, 1.0)
    second = std if twice else (1.0, 1.0, 1.0)
    return normalization(
        [(offset + one) / (255.0 * factor) for one in mean],
        [one * other / (255.0 * factor) for one, other in zip(first, second, strict=True)],
        name,
    )


def _side(size: Any, part: str, name: str) -> int:
    side = size[part]
    if not isinstance(side, int | float) or not side >= 1:
        raise CrossguardError(f"{name} makes images with a {part} of {shortly(side)} pixels; give 1 or more")
    SIDE.check(int(min(side, LARGEST)), f"the {part} in {name}")
    return int(side)


def _check_preprocess(preprocess: Preprocess, processor: Any, path: str) -> None:
    """Raises where the image processor does more than is imitated here: some crop by a share, do not resize, or scale
    pixels otherwise. They are asked about a smooth image, on which ways to resize differ little."""
    down, across = torch.linspace(0.0, 1.0, 48)[:, None], torch.linspace(0.0, 1.0, 64)[None, :]
    image = torch.stack([(down * across), (1.0 - across).expand(48, 64), down.expand(48, 64)])
    pixels = (image * 255.0).round().to(torch.uint8)
    try:
        answer = processor(images=pixels.permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"]
    except Exception:  # what cannot be asked cannot be checked; some need a library that is not here
        return
    found = preprocess(pixels[None].float() / 255.0)
    if found.shape != answer.shape or float((found - answer).abs().max()) * min(preprocess.std) > 8.0 / 255.0:
        raise CrossguardError(
            f"the image processor of {path} ({type(processor).__name__}) prepares images in a way that is not known "
            "here; give one that resizes, crops the center (CLIP) or resizes to height and width (SigLIP), scales by "
            "1/255 and normalizes"
        )


def _context_length(model: Any, tokenizer: Any) -> int:
    """The longest text the tower can read: what the positions allow, or what the tokenizer says if that is less."""
    positions = int(getattr(model.config.text_config, "max_position_embeddings", 77))
    for name, module in model.named_modules():
        # RoBERTa counts positions from behind its padding token, so that some are never used.
        behind = getattr(module, "padding_idx", None) if name.endswith("position_embeddings") else None
        if behind is not None and not name.startswith("vis"):
            positions -= int(behind) + 1
    length = min(positions, int(tokenizer.model_max_length))
    if length < 1:
        raise CrossguardError(
            f"a text may have {length} tokens by config.json and the tokenizer's model_max_length; give at least 1"
        )
    return length
