"""A few texts and one image that a checkpoint is asked before anybody believes it."""

from __future__ import annotations

from torch import Tensor

from crossguard.errors import CrossguardError

PROBES = ("a photo of a cat", "two dogs", "red", "a", "the sky over the sea at night")  # no two of them alike


def check_texts(found: Tensor, path: str) -> None:
    """Raises where the text tower does not answer the probes with numbers, or answers all of them alike."""
    _check_numbers(found, "text", path)
    if float((found - found[0]).abs().max()) <= 1e-6 * float(found.abs().max()):
        raise CrossguardError(
            f"the text tower of {path} gives all texts the same embedding, so it reads nothing; fetch the weights, the "
            "tokenizer and the configuration from one place"
        )


def check_images(found: Tensor, texts: Tensor, path: str) -> None:
    """Raises where the image tower does not answer with numbers, or not with as many as the text tower."""
    _check_numbers(found, "image", path)
    if found.shape[1] != texts.shape[1]:
        raise CrossguardError(
            f"the towers of {path} have embeddings of {found.shape[1]} and {texts.shape[1]} numbers, so images and "
            "texts cannot be compared; give a CLIP or SigLIP checkpoint"
        )


def _check_numbers(found: Tensor, tower: str, path: str) -> None:
    """Raises where a tower answers with no numbers: no attack could change such an answer."""
    if not bool(found.isfinite().all()):
        raise CrossguardError(f"the {tower} tower of {path} answers with NaN or infinity; fetch its files again")
