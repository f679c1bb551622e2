"""A small dual encoder with random weights: the starting point for training from scratch by the ordinary recipes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from crossguard.checkpoints import located, parts
from crossguard.errors import CrossguardError
from crossguard.files import digest
from crossguard.models.base import Checkpoint, DualEncoder
from crossguard.models.huggingface import TransformersEncoder
from crossguard.pretrained import pretrained

VOCABULARY = Path(__file__).parent.parent / "assets" / "masked_lm"


@dataclass(frozen=True)
class Fresh(Checkpoint):
    """A ConvNeXt image tower (Liu et al. 2022) and a two-layer BERT text tower in a stock `VisionTextDualEncoderModel`.

    Small convolutional towers learn far faster from few images than plain ViTs. Layer scale is off: it starts at 1e-6
    and would keep a short training from moving.

    Args:
        tokenizer: folder of a tokenizer; the vocabulary of the generated scenes by default.
        size: the side of the square images the network works on; others are resized.
        patch: the stem cuts the image into patches of this side.
        widths, depths: channels and blocks of each stage.
        text_width, text_layers: of the text tower; 32 tokens at most.
        dimensions: of the shared embedding space.
        seed: of the random weights.
    """

    tokenizer: str = "embedded"
    size: int = 32
    patch: int = 4
    widths: tuple[int, ...] = (48, 96, 192)
    depths: tuple[int, ...] = (1, 2, 1)
    text_width: int = 96
    text_layers: int = 2
    dimensions: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.depths) or not self.widths:
            raise CrossguardError(f"Fresh needs one depth for each width, not {self.widths} and {self.depths}")
        if (
            min(
                self.size,
                self.patch,
                *self.widths,
                *self.depths,
                self.text_width,
                self.text_layers,
                self.dimensions,
            )
            < 1
        ):
            raise CrossguardError("every size of Fresh must be 1 or more")
        smallest = self.patch * 2 ** (len(self.widths) - 1)  # each stage after the first halves the image
        if self.size < smallest:
            raise CrossguardError(
                f"Fresh(size={self.size}) is not possible; {len(self.widths)} stages on patches of {self.patch} need "
                f"at least {smallest} pixels"
            )
        if self.seed < 0:
            raise CrossguardError(f"Fresh(seed={self.seed}) is not possible; give 0 or more")
        if self.text_width % 32:
            raise CrossguardError(f"Fresh(text_width={self.text_width}) is not possible; give a multiple of 32")

    @property
    def _folder(self) -> Path:
        return VOCABULARY if self.tokenizer == "embedded" else Path(located(self.tokenizer))

    def content(self) -> str:
        return digest(file for file in parts(self._folder) if file.suffix != ".safetensors")  # its words alone are read

    def load(self) -> DualEncoder:
        import transformers
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        folder = self._folder
        if not folder.is_dir():
            raise CrossguardError(f"there is no tokenizer folder {str(folder)!r}")
        with pretrained(str(folder), weights=False) as source:
            tokenizer = source.tokenizer()
        image = transformers.ConvNextConfig(
            patch_size=self.patch,
            hidden_sizes=list(self.widths),
            depths=list(self.depths),
            num_stages=len(self.widths),
            image_size=self.size,
            layer_scale_init_value=0.0,
        )
        image.hidden_size = self.widths[-1]  # VisionTextDualEncoder asks its image tower for it
        text = transformers.BertConfig(
            vocab_size=max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1),
            hidden_size=self.text_width,
            num_hidden_layers=self.text_layers,
            num_attention_heads=self.text_width // 32,
            intermediate_size=2 * self.text_width,
            max_position_embeddings=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            # The usual 0.02 is for widths of 768; here it makes all texts alike (cosine 0.99999): learning starts late.
            initializer_range=self.text_width**-0.5,
        )
        config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
            image, text, projection_dim=self.dimensions
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = transformers.VisionTextDualEncoderModel(config)
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": self.size},
            crop_size={"height": self.size, "width": self.size},
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.25, 0.25, 0.25],
        )
        return TransformersEncoder(model, tokenizer, processor).eval()
