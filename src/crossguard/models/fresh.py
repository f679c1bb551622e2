"""Small dual encoders with random weights: the starting points for training from scratch by the ordinary recipes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from crossguard.checkpoints import located, parts
from crossguard.errors import CrossguardError
from crossguard.files import digest
from crossguard.models.base import Checkpoint, DualEncoder
from crossguard.models.huggingface import TransformersEncoder
from crossguard.pretrained import pretrained

VOCABULARY = Path(__file__).parent.parent / "assets" / "masked_lm"


class FromScratch(Checkpoint, ABC):
    """An image tower of any architecture and a small BERT text tower in a stock `VisionTextDualEncoderModel`.

    Args:
        tokenizer: folder of a tokenizer; the vocabulary of the generated scenes by default.
        size: the side of the square images the network works on; others are resized.
        text_width, text_layers: of the text tower; 32 tokens at most.
        dimensions: of the shared embedding space.
        seed: of the random weights.
    """

    tokenizer: str
    size: int
    text_width: int
    text_layers: int
    dimensions: int
    seed: int

    @abstractmethod
    def image_config(self) -> Any:
        """The `transformers` configuration of the image tower; its `hidden_size` is the width of what it pools."""

    def prepare(self, model: Any) -> None:
        """Does what the image tower needs before its first step, under the seed; nothing by default.

        Args:
            model: the `VisionTextDualEncoderModel`.
        """
        del model

    def __post_init__(self) -> None:
        name = type(self).__name__
        if min(self.size, self.text_width, self.text_layers, self.dimensions, *self._sizes()) < 1:
            raise CrossguardError(f"every size of {name} must be 1 or more")
        if self.seed < 0:
            raise CrossguardError(f"{name}(seed={self.seed}) is not possible; give 0 or more")
        if self.text_width % 32:
            raise CrossguardError(f"{name}(text_width={self.text_width}) is not possible; give a multiple of 32")

    @abstractmethod
    def _sizes(self) -> tuple[int, ...]:
        """The whole numbers of the image tower that must be positive."""

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
            self.image_config(), text, projection_dim=self.dimensions
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = transformers.VisionTextDualEncoderModel(config)
            self.prepare(model)
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": self.size},
            crop_size={"height": self.size, "width": self.size},
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.25, 0.25, 0.25],
        )
        return TransformersEncoder(model, tokenizer, processor).eval()


@dataclass(frozen=True)
class Fresh(FromScratch):
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
        super().__post_init__()
        smallest = self.patch * 2 ** (len(self.widths) - 1)  # each stage after the first halves the image
        if self.size < smallest:
            raise CrossguardError(
                f"Fresh(size={self.size}) is not possible; {len(self.widths)} stages on patches of {self.patch} need "
                f"at least {smallest} pixels"
            )

    def _sizes(self) -> tuple[int, ...]:
        return (self.patch, *self.widths, *self.depths)

    def image_config(self) -> Any:
        import transformers

        image = transformers.ConvNextConfig(
            patch_size=self.patch,
            hidden_sizes=list(self.widths),
            depths=list(self.depths),
            num_stages=len(self.widths),
            image_size=self.size,
            layer_scale_init_value=0.0,
        )
        image.hidden_size = self.widths[-1]  # VisionTextDualEncoder asks its image tower for it
        return image


@dataclass(frozen=True)
class FreshViT(FromScratch):
    """A vision transformer (Dosovitskiy et al. 2021) beside the text tower of `Fresh`: attention over all patches, and
    no convolution but the one that cuts the image into them.

    Args:
        tokenizer: folder of a tokenizer; the vocabulary of the generated scenes by default.
        size: the side of the square images the network works on; others are resized.
        patch: the side of a patch, a divisor of `size`.
        width, depth: of the transformer; it has a head for every 32 numbers of its width.
        text_width, text_layers: of the text tower; 32 tokens at most.
        dimensions: of the shared embedding space.
        seed: of the random weights.
    """

    tokenizer: str = "embedded"
    size: int = 32
    patch: int = 4
    width: int = 96
    depth: int = 4
    text_width: int = 96
    text_layers: int = 2
    dimensions: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % self.patch:
            raise CrossguardError(
                f"FreshViT(size={self.size}, patch={self.patch}) is not possible; give a patch that divides the size"
            )
        if self.width % 32:
            raise CrossguardError(f"FreshViT(width={self.width}) is not possible; give a multiple of 32")

    def _sizes(self) -> tuple[int, ...]:
        return (self.patch, self.width, self.depth)

    def image_config(self) -> Any:
        import transformers

        return transformers.ViTConfig(
            image_size=self.size,
            patch_size=self.patch,
            hidden_size=self.width,
            num_hidden_layers=self.depth,
            num_attention_heads=self.width // 32,
            intermediate_size=2 * self.width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=self.width**-0.5,  # as for the texts: the usual 0.02 is for widths of 768
        )


@dataclass(frozen=True)
class FreshCNN(FromScratch):
    """EfficientNet (Tan and Le 2019), made small, beside the text tower of `Fresh`: convolutions of each channel alone
    and across channels, batch norm and the gates of squeeze-and-excitation, without layer norm or attention.

    Networks are trained in evaluation mode here, where batch norm uses the statistics that it has. So these are
    measured once, on 256 images of smooth noise, and stay: from there on batch norm is a learned scale and shift of
    each channel. The projection starts without what the features of all these images have in common.

    It is short and halves the images three times. MobileNet (27 layers, five halvings) named no more shapes of the
    generated scenes after 150 steps than chance does, in either mode of batch norm, and MobileNetV2 (53 layers, three
    halvings, batch norm as here) no more after 100; networks like this one named half of them after 150.

    Args:
        tokenizer: folder of a tokenizer; the vocabulary of the generated scenes by default.
        size: the side of the square images the network works on; others are resized.
        widths, depths: channels and blocks of each stage. The stem halves the image, and so does each stage but the
            first.
        kernel: the side of the convolutions inside of the blocks, an odd number.
        text_width, text_layers: of the text tower; 32 tokens at most.
        dimensions: of the shared embedding space.
        seed: of the random weights.
    """

    tokenizer: str = "embedded"
    size: int = 32
    widths: tuple[int, ...] = (24, 40, 80)
    depths: tuple[int, ...] = (1, 2, 2)
    kernel: int = 5
    text_width: int = 96
    text_layers: int = 2
    dimensions: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.depths) or not self.widths:
            raise CrossguardError(f"FreshCNN needs one depth for each width, not {self.widths} and {self.depths}")
        super().__post_init__()
        if any(width % 8 for width in self.widths):
            raise CrossguardError(f"FreshCNN(widths={self.widths}) is not possible; give multiples of 8")
        if not self.kernel % 2 or self.kernel < 3:
            raise CrossguardError(f"FreshCNN(kernel={self.kernel}) is not possible; give an odd number, 3 or more")
        smallest = 2 ** len(self.widths)
        if self.size < smallest:
            raise CrossguardError(
                f"FreshCNN(size={self.size}) is not possible; {len(self.widths)} stages need at least {smallest} pixels"
            )

    def _sizes(self) -> tuple[int, ...]:
        return (self.kernel, *self.widths, *self.depths)

    def image_config(self) -> Any:
        import transformers

        stages, stem, top = len(self.widths), 32, 1280  # the published stem and last layer, which have no setting
        image = transformers.EfficientNetConfig(
            image_size=self.size,
            width_coefficient=1.0,
            depth_coefficient=1.0,
            kernel_sizes=[self.kernel] * stages,
            in_channels=[stem, *self.widths[:-1]],
            out_channels=list(self.widths),
            strides=[1] + [2] * (stages - 1),
            num_block_repeats=list(self.depths),
            expand_ratios=[1] + [4] * (stages - 1),
            hidden_dim=top,
            dropout_rate=0.0,
            drop_connect_rate=0.0,
        )
        image.hidden_size = top  # VisionTextDualEncoder asks its image tower for it
        return image

    def prepare(self, model: Any) -> None:
        tower, projection = model.vision_model, model.visual_projection
        norms = [module for module in tower.modules() if isinstance(module, nn.BatchNorm2d)]
        for module in tower.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        for norm in norms:
            nn.init.ones_(norm.weight)  # `transformers` draws it around zero, for weights that are loaded afterwards
        noise = torch.rand(256, 3, 4, 4)
        images = F.interpolate(noise, (self.size, self.size), mode="bicubic", align_corners=False).clamp(0.0, 1.0)
        images = (images - 0.5) / 0.25
        with torch.no_grad():
            with _measuring(norms):
                tower(images)
            # What is pooled is positive, so all images have much in common. Did the projection see that, they would be
            # so alike that texts learn to be alike sooner than images learn to differ.
            common = F.normalize(tower(images).pooler_output.mean(0), dim=0)
            projection.weight -= torch.outer(projection.weight @ common, common)


@contextmanager
def _measuring(norms: list[nn.BatchNorm2d]) -> Iterator[None]:
    """Inside, each batch norm takes over the statistics of the batch that it sees."""
    before = [(norm, norm.momentum) for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    try:
        yield
    finally:
        for norm, momentum in before:
            norm.eval().momentum = momentum
