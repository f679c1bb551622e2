"""Robust encoders that their authors publish, each in the layout that it is published in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from crossguard import records
from crossguard.checkpoints import check_file, check_finite, content, kind, located
from crossguard.errors import CrossguardError
from crossguard.files import digest
from crossguard.models.base import Checkpoint, DualEncoder
from crossguard.models.huggingface import HuggingFace, TransformersEncoder, load_with_words
from crossguard.models.openclip import OpenCLIP, OpenCLIPEncoder
from crossguard.models.probing import PROBES, check_images
from crossguard.pretrained import shapes_in
from crossguard.records import layout
from crossguard.words import Reads

Layout = Literal["tower", "open_clip", "transformers"]
Method = Literal["FARE", "TeCoA", "Sim-CLIP", "QT-AFT", "Delta-CLIP", "LEAF"]

# What each is published as: an image tower alone, a checkpoint of open_clip, or one of `transformers` without words.
PUBLISHED: dict[str, tuple[Layout, ...]] = {
    "FARE": ("tower", "open_clip"),
    "TeCoA": ("tower", "open_clip"),
    "Sim-CLIP": ("tower",),
    "QT-AFT": ("tower",),
    "Delta-CLIP": ("open_clip",),
    "LEAF": ("transformers", "open_clip"),
}

_TOLD = {
    "tower": "an image tower alone (a file in safetensors, made with 'crossguard convert')",
    "open_clip": "a checkpoint of open_clip (a folder, or 'hf-hub:owner/name')",
    "transformers": "a CLIP of transformers (a folder or a hub id)",
}


@dataclass(frozen=True)
class RobustEncoder(Checkpoint, Reads):
    """A robust encoder as its authors publish it.

    * FARE (Schlarmann et al. 2024) and TeCoA (as trained for it), of chs20/RobustVLM: `.pt` files with the image tower
      of a ViT-L/14 of OpenAI, in open_clip's names; the same on the hub as checkpoints of open_clip
      ('hf-hub:chs20/fare2-clip'). Files of TeCoA's own authors hold the tower beside learned prompts.
    * Sim-CLIP (Hossain and Imteaj 2024): simclip4.pt, an image tower again, by a fork of that code.
    * QT-AFT (Waseda et al. 2025): the tower of a ViT-B/16 or L/14 of OpenAI under `vision_encoder_state_dict`; for B/16
      give `base=HuggingFace('openai/clip-vit-base-patch16')`.
    * Delta-CLIP (Wang et al. 2025): checkpoints of open_clip ('hf-hub:zw123/delta_clip_h14_336').
    * LEAF (Abad Rocamora et al. 2025): CLIPs of `transformers` with a robust text tower, published without tokenizer
      and image processor; those are the base's. Names that begin with OpenCLIP- are checkpoints of open_clip.

    The layouts are known from the authors' code and read-me files, and were tried on small fakes of them; none of the
    published files was at hand. `.pt` files are converted first: `crossguard convert fare_eps_2.pt fare2.safetensors`.

    Args:
        method: how it was made, which says in which layouts it is published.
        weights: a file with an image tower, or the folder or hub id of a whole checkpoint.
        base: the model whose image tower is replaced, or whose words are used; it must be the one that was
            trained from, down to its activation (OpenAI's have QuickGELU).
    """

    method: Method
    weights: str
    base: HuggingFace | OpenCLIP = HuggingFace("openai/clip-vit-large-patch14")

    def __post_init__(self) -> None:
        if self.method not in PUBLISHED:
            raise CrossguardError(f"RobustEncoder knows {', '.join(PUBLISHED)}, and not {self.method!r}")

    @property
    def layout(self) -> Layout:
        """How these weights are laid out, by their place alone."""
        if self.weights.startswith("hf-hub:"):
            return "open_clip"
        found = kind(self.weights)
        if found in ("weights", "pickle"):
            return "tower"
        if found == "open_clip":
            return "open_clip"
        return "transformers" if found == "transformers" else PUBLISHED[self.method][0]

    def load(self) -> DualEncoder:
        found, shown = self.layout, located(self.weights)
        if kind(self.weights) == "pickle":
            raise CrossguardError(
                f"{shown} is a pickle file, which is never read; convert it first: 'crossguard convert {shown} "
                f"{Path(shown).with_suffix('.safetensors').name}'"
            )
        if found not in PUBLISHED[self.method]:
            raise CrossguardError(
                f"{shown} is {_TOLD[found]}, and {self.method} is published as "
                f"{' or '.join(_TOLD[one] for one in PUBLISHED[self.method])}"
            )
        if found == "open_clip":
            return OpenCLIP(self.weights).load()
        if found == "transformers":
            if not isinstance(self.base, HuggingFace):
                raise CrossguardError(
                    f"the words of {self.method} are those of a HuggingFace(...); give one as its base"
                )
            return load_with_words(shown, located(self.base.path))
        if not Path(shown).is_file():
            raise CrossguardError(f"there is no file {shown!r}; {self.method} is {_TOLD['tower']}")
        return self._grafted(Path(shown))

    def content(self) -> str:
        if self.layout == "open_clip":
            return records.content(self.weights, "")
        file = Path(located(self.weights))
        return digest([file]) if file.is_file() else content(self.weights)

    def saved(self, folder: Path) -> Checkpoint | None:
        found = {"open_clip": OpenCLIP(self.weights), "tower": self.base, "transformers": None}[self.layout]
        return None if found is None else found.saved(folder)

    def _grafted(self, file: Path) -> DualEncoder:
        """The base with this image tower."""
        check_file(file)
        names = shapes_in(file, str(file))
        held = _tower(names, records.load(file), f"{file}", self.method)
        network = self.base.load()
        if isinstance(network, OpenCLIPEncoder):
            place, prefix = network.model.visual, ""
        else:
            assert isinstance(network, TransformersEncoder)
            place, prefix = network.model, "vision_model."
            held = _transformed(held)
        own = {name: value for name, value in place.state_dict().items() if _of_tower(name, prefix)}
        _check_fit(own, held, str(file), self.base)
        place.load_state_dict(held, strict=False)
        check_finite(network, str(file))
        with torch.no_grad():
            pixels = torch.full((1, 3, network.preprocess.height, network.preprocess.width), 0.5)
            check_images(network.encode_image(pixels), network.encode_text(PROBES[:1]), str(file))
        return network


def _of_tower(name: str, prefix: str) -> bool:
    """Whether this is a weight of the image tower, in a model of `transformers` if there is a prefix."""
    return not prefix or (name.startswith((prefix, "visual_projection.")) and not name.endswith("position_ids"))


def _tower(names: Any, held: dict[str, Tensor], shown: str, method: str) -> dict[str, Tensor]:
    """The tensors of an image tower in the names of OpenAI and open_clip; raises where they are of something else."""
    if names and all(name.startswith("visual.") for name in names):
        return {name.removeprefix("visual."): value for name, value in held.items()}
    if "conv1.weight" not in names:
        what = layout(names) or f"tensors such as {sorted(names)[0]!r}" if names else "nothing"
        raise CrossguardError(f"{shown} holds {what}; {method} is published as {_TOLD['tower']}")
    return held


def _transformed(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """An image tower of OpenAI under the names of `transformers`: queries, keys and values stand in one matrix there
    and in three here, and the last matrix is the other way round."""
    found = dict[str, Tensor]()
    plain = {
        "conv1.": "embeddings.patch_embedding.", "ln_pre.": "pre_layrnorm.", "ln_post.": "post_layernorm.",
        "ln_1.": "layer_norm1.", "ln_2.": "layer_norm2.", "mlp.c_fc.": "mlp.fc1.", "mlp.c_proj.": "mlp.fc2.",
        "attn.out_proj.": "self_attn.out_proj.",
    }  # fmt: skip
    for name, value in held.items():
        inside, place = name, "vision_model."
        if name.startswith("transformer.resblocks."):
            number, _, inside = name.removeprefix("transformer.resblocks.").partition(".")
            place = f"vision_model.encoder.layers.{number}."
        if inside == "proj":
            found["visual_projection.weight"] = value.T.contiguous()
        elif inside == "class_embedding":
            found["vision_model.embeddings.class_embedding"] = value
        elif inside == "positional_embedding":
            found["vision_model.embeddings.position_embedding.weight"] = value
        elif inside.startswith("attn.in_proj_"):
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                found[f"{place}self_attn.{part}_proj.{inside.removeprefix('attn.in_proj_')}"] = rows.contiguous()
        else:
            start = next((start for start in plain if inside.startswith(start)), "")
            found[f"{place}{plain[start]}{inside.removeprefix(start)}" if start else name] = value
    return found


def _check_fit(own: dict[str, Tensor], held: dict[str, Tensor], shown: str, base: Checkpoint) -> None:
    for what, names in (("lacks", own.keys() - held.keys()), ("has no place in that of", held.keys() - own.keys())):
        if names:
            one = sorted(names)[0]
            raise CrossguardError(
                f"the image tower in {shown} {what} {base}: {one!r:.80} and {len(names) - 1} more; give the base that "
                "it was trained from"
            )
    for name, value in own.items():
        if held[name].shape != value.shape:
            raise CrossguardError(
                f"{name!r} in {shown} has the shape {tuple(held[name].shape)}, and in {base} {tuple(value.shape)}; "
                "give the base that it was trained from"
            )
