"""A pickle of plain tensors as safetensors: the one door through which a `.bin`, `.pt` or `.pth` comes in, and only
when somebody opens it by hand."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

from crossguard.checkpoints import OPEN_CLIP_WEIGHTS, RECORD, kind, parts
from crossguard.errors import CrossguardError
from crossguard.files import save_tensors, staging
from crossguard.limits import shortly
from crossguard.printing import one_line

# Where training code keeps the tensors of its model; the first that is there. Files of TeCoA's authors and of QT-AFT
# have learned prompts in "state_dict" and the tower in the first.
_PLACES = ("vision_encoder_state_dict", "state_dict", "model_state_dict", "model", "module")

# Of OpenAI's own files: numbers that their code once needed, and no part of the network.
_NOTES = ("input_resolution", "context_length", "vocab_size")


def convert(file: Path, out: Path, config: Path | None = None) -> list[str]:
    """Writes the tensors of a pickle as safetensors, and returns in sentences what was done.

    It is read with `torch.load(weights_only=True)`, which makes tensors, numbers, texts and containers of these and
    calls nothing else that the file names.

    Args:
        out: a file that ends in .safetensors; or a folder, where settings and words of the checkpoint are copied to.
        config: the folder that these are copied from; the folder of the file, if not given.

    Raises:
        CrossguardError: the file holds something else, or there is something in the way.
    """
    if not file.is_file():
        raise CrossguardError(f"there is no file {str(file)!r} to convert")
    if file.suffix == ".safetensors":
        raise CrossguardError(f"{file} is one of safetensors already; give it to OpenCLIP, or as part of its folder")
    single, source = out.suffix == ".safetensors", config or file.parent
    what = "" if single else kind(str(source))
    if not single and what not in ("transformers", "open_clip"):
        raise CrossguardError(
            f"{source} has neither a config.json of transformers nor an {RECORD}; give the folder that has one with "
            "--config, or an output that ends in .safetensors"
        )
    target = out if single else out / (OPEN_CLIP_WEIGHTS if what == "open_clip" else "model.safetensors")
    if target.exists():
        raise CrossguardError(f"{target} is there already; delete it, or give another output")
    held, done = _tensors(file)
    with staging(target.parent) as stage:
        save_tensors(stage / target.name, held, {"format": "pt"})
        if not single and source.resolve() != out.resolve():
            copied = [
                one for one in parts(source) if one.suffix != ".safetensors" and not one.name.endswith(".index.json")
            ]
            copied += [source / RECORD] if what == "open_clip" else []
            for one in sorted(set(copied)):
                shutil.copyfile(one, stage / one.name)
            done.append(f"copied {', '.join(sorted({one.name for one in copied}))} from {source}")
    numbers = sum(value.numel() for value in held.values())
    done.append(f"wrote {len(held):,} tensors of {numbers:,} numbers to {target}")
    if not single:
        done.append(f"now: --model \"{'OpenCLIP' if what == 'open_clip' else 'HuggingFace'}('{out}')\"")
    return done


def _tensors(file: Path) -> tuple[dict[str, Any], list[str]]:
    """The tensors of a model in a pickle under their names, and what was left out."""
    import torch

    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any("/code/" in f"/{name}" for name in archive.namelist()):
                raise CrossguardError(
                    f"{file} is a TorchScript archive, which holds code besides its tensors and is not read; fetch the "
                    "same model in safetensors (openai/clip-vit-base-patch32 and others on the hub)"
                )
    try:
        told = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has many kinds for files that are none, and for what may not be made of them
        first = one_line(str(error)).split(". ")[0]
        raise CrossguardError(
            f"{file} holds more than plain tensors, or is damaged, so it is not read: {first:.120}"
        ) from error
    done, place = list[str](), ""
    if isinstance(told, dict) and not any(isinstance(value, torch.Tensor) for value in told.values()):
        inside = [key for key, value in told.items() if _holds_tensors(value)]
        place = next((key for key in _PLACES if key in inside), inside[0] if len(inside) == 1 else "")
        if not place:
            raise CrossguardError(
                f"{file} holds {shortly(sorted(map(str, told)))}, and none of these is known as the tensors of a model"
            )
        others = sorted(str(key) for key in told if key != place)
        done.append(f"took {place!r}" + (f", and left out {', '.join(others)}" if others else ""))
        told = told[place]
    if not _holds_tensors(told):
        raise CrossguardError(
            f"{file} holds a {type(told).__name__} and no tensors by name, so there is nothing to write"
        )
    held = {str(name): value for name, value in told.items() if isinstance(value, torch.Tensor) and name not in _NOTES}
    lost = sorted(str(name) for name in told if str(name) not in held)
    if lost:
        done.append(f"left out {', '.join(lost)}, which are no tensors of a network")
    if held and all(name.startswith("module.") for name in held):
        done.append("took 'module.' off all names, which training on several devices puts there")
        held = {name.removeprefix("module."): value for name, value in held.items()}
    return {name: value.detach().clone().contiguous() for name, value in held.items()}, done


def _holds_tensors(value: Any) -> bool:
    import torch

    return isinstance(value, dict) and any(isinstance(one, torch.Tensor) for one in value.values())
