"""What the dual encoders of `transformers` differ in, in one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """How the models of a type are asked.

    Args:
        scale: the parameter by whose exponential cosines are multiplied.
        divides: cosines are divided by that parameter itself.
        padded: texts were padded to the whole context in training, and are read without a mask.
        image: how the names of the parameters of the image tower begin.
        causal: the text tower sees no token behind the one it reads, and its positions can be given to it, so that
            texts which begin alike can share work (`PrefixPacking`).
        highest: where config.json says that texts end with token 2, as those of old checkpoints say wrongly, the token
            of the highest number is pooled.
    """

    scale: str = "logit_scale"
    divides: bool = False
    padded: bool = False
    image: str = "vis"
    causal: bool = False
    highest: bool = True


# By the model_type of config.json. All others that can be asked for features are taken for a plain `Family`: AltCLIP,
# BLIP, Chinese-CLIP, CLIPSeg, GroupViT, OWL-ViT, VisionTextDualEncoder.
_FAMILIES = {
    "aimv2": Family(highest=False),
    "align": Family(scale="temperature", divides=True),
    "clip": Family(causal=True),
    "metaclip_2": Family(causal=True, highest=False),
    "siglip": Family(padded=True),  # SigLIP 2 of a fixed size has this type too
}

# Two towers each, which are not read here, and why.
STRANGE = {
    "flava": "FLAVA, which has an embedding for every token and patch instead of one for each text and image",
    "owlv2": "OWLv2, whose images are set on a gray square before they are seen; OWL-ViT is read",
    "siglip2": "SigLIP 2 NaFlex, which cuts every image into patches by its own shape; its checkpoints of a fixed size "
    "(google/siglip2-base-patch16-224) are read",
    "xclip": "X-CLIP, whose images are videos",
}


def family(model: Any) -> Family:
    """The family of a model of `transformers`."""
    return _FAMILIES.get(getattr(model.config, "model_type", ""), Family())


def described(kind: str) -> str:
    """What a model of this type is that is no dual encoder, in a few words; its type, where nothing more is known."""
    from transformers.models.auto import modeling_auto

    if kind.endswith(("_vision_model", "_text_model")):
        whole, _, tower = kind.removesuffix("_model").rpartition("_")
        return f"the {'image' if tower == 'vision' else 'text'} tower of a {whole!r} model alone"
    for names, what in (
        ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "which writes text about images"),
        ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "a language model"),
        ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "a language model"),
        ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "which reads images alone"),
        ("MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES", "which hears sounds"),
    ):
        if kind in getattr(modeling_auto, names, {}):
            return f"a {kind!r} model, {what}"
    return f"a {kind!r} model"
