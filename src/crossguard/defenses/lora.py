"""Low-rank changes of weights as what a recipe trains."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossguard.data import Prompts
from crossguard.defenses.parts import Trainable
from crossguard.errors import CrossguardError
from crossguard.files import save_tensors, write
from crossguard.models.base import Checkpoint, DualEncoder
from crossguard.models.huggingface import HuggingFace
from crossguard.seeds import derive

ADAPTER = "adapter"  # the folder beside the merged weights


@dataclass(frozen=True)
class LoRA(Trainable):
    """Low-rank adaptation (Hu et al. 2021): every linear layer W becomes W + alpha / rank B A, where A and B are thin
    and learned, and B begins at zero. It needs the package `peft` (`pip install 'crossguard[lora]'`).

    At the end the changes are merged into the weights: what comes out is a checkpoint of its own that `transformers`
    loads and that costs nothing more. The thin matrices are kept in the folder `adapter` beside it, in peft's format.

    Args:
        rank: of the change of each layer.
        alpha: the factor on the change, times the rank; twice the rank, if None.
        towers: whose layers are changed, of 'image' and 'text'.
        layers: names of the layers, or the ends of them, such as ('q_proj', 'v_proj'); all linear layers and all
            convolutions of single pixels, if empty.
    """

    rank: int = 8
    alpha: float | None = None
    towers: tuple[str, ...] = ("image", "text")
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise CrossguardError(f"LoRA(rank={self.rank}) is not possible; give 1 or more")
        if self.alpha is not None and not 0.0 < self.alpha < float("inf"):
            raise CrossguardError(f"LoRA(alpha={self.alpha}) changes nothing; give a positive number")
        if not self.towers or set(self.towers) - {"image", "text"}:
            raise CrossguardError(f"LoRA(towers={self.towers}) is not possible; give 'image', 'text' or both")

    def attach(self, network: DualEncoder, prompts: Prompts | None, seed: int) -> DualEncoder:
        del prompts
        peft, model = _peft(), network.stock
        if model is None:
            raise CrossguardError(
                f"LoRA changes the layers of a model of transformers, and a {type(network).__name__} is none; give a "
                "CLIP or SigLIP model"
            )
        chosen = [name for name in _linear(model, self.towers) if not self.layers or self._named(name)]
        if not chosen:
            told = ", ".join(sorted({name.rpartition(".")[2] for name in _linear(model, self.towers)}))
            raise CrossguardError(f"no linear layer is called {' or '.join(self.layers)}; there are {told or 'none'}")
        name, sides = max(((name, _sides(model.get_submodule(name))) for name in chosen), key=lambda one: min(one[1]))
        if self.rank > min(sides):
            raise CrossguardError(
                f"LoRA(rank={self.rank}) is low for no layer: the largest, {name}, is {sides[0]} by {sides[1]}, and a "
                f"change of rank {min(sides)} is any change of it; give a rank far below, such as "
                f"rank={max(1, min(sides) // 8)}, or train all weights with Towers()"
            )
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            target_modules=chosen,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive("LoRA", seed))
            peft.inject_adapter_in_model(config, model)
        return network.eval()

    def doubts(self, network: DualEncoder) -> list[str]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        sides = {
            name: _sides(layer.get_base_layer())
            for name, layer in network.stock.named_modules()
            if isinstance(layer, BaseTunerLayer)
        }
        high = [name for name, both in sides.items() if self.rank > min(both)]
        if not high:
            return []
        least = min(high, key=lambda name: min(sides[name]))
        return [
            f"LoRA(rank={self.rank}) is not low for {len(high)} of its {len(sides)} layers, and has more numbers there "
            f"than it needs: {least} is {sides[least][0]} by {sides[least][1]}; give rank={min(sides[least])} or less, "
            "or name larger layers"
        ]

    def save(self, network: DualEncoder, folder: Path) -> None:
        peft, model = _peft(), network.stock
        thin = peft.get_peft_model_state_dict(model)
        named = {f"base_model.model.{name}": one.detach().cpu().contiguous() for name, one in thin.items()}
        save_tensors(folder / ADAPTER / "adapter_model.safetensors", named)
        write(folder / ADAPTER / "adapter_config.json", _json(model.peft_config["default"]))
        merged = copy.deepcopy(network)
        _merge(merged.stock)
        merged.save(folder)

    def word(self, base: Checkpoint, folder: Path) -> Checkpoint:
        return base.saved(folder) or HuggingFace(str(folder))

    def _named(self, name: str) -> bool:
        return any(name == end or name.endswith(f".{end}") for end in self.layers)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise CrossguardError("LoRA needs the package peft; install it with: pip install 'crossguard[lora]'") from error
    return peft


def _linear(model: nn.Module, towers: tuple[str, ...]) -> Iterator[str]:
    """The names of the layers that are matrices, tower by tower. The projection inside of torch's own attention is read
    by its weight alone, so that a change beside it would not be heard."""
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0])
        dense = isinstance(module, nn.Linear) and not isinstance(parent, nn.MultiheadAttention)
        single = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
        if (dense or single) and ("image" if name.startswith("vis") else "text") in towers:
            yield name


def _sides(layer: nn.Module) -> tuple[int, int]:
    """The outputs and inputs of a layer that is a matrix."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight.shape[1]


def _merge(model: nn.Module) -> None:
    """Puts the changes into the weights, and the layers back where they were."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()  # type: ignore[call-arg]
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    del model.peft_config


def _json(config: Any) -> str:
    """The configuration as peft writes it."""
    told = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    return json.dumps(told | {"inference_mode": True}, indent=1)
