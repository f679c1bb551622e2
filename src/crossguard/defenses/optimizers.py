"""Optimizers as words, so that a recipe says all its numbers in one line."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from crossguard.errors import CrossguardError
from crossguard.words import Word


class Optimizer(Word, ABC):
    """How parameters descend. `lr` is the peak rate; the recipe's warm-up and decay multiply it."""

    lr: float

    @abstractmethod
    def over(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The torch optimizer of these parameters."""


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam with the weight decay added to the gradient (L2), as MMCoA's released code has it, although its file says
    AdamW.

    The paper gives betas (0.9, 0.98), eps 1e-6 and decay 0.2; lr 1e-6 is the released configuration's, the paper's is
    unknown.
    """

    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.2

    def __post_init__(self) -> None:
        _check(self)

    def over(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        _check(self)

    def over(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum; the defaults are those of TeCoA's released code, except for the
    learning rate 1e-5, which is that of TGA-ZSR's runs of TeCoA (the released default of 1e-7 hardly moves)."""

    lr: float = 1e-5
    momentum: float = 0.9
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        _check(self)
        if self.nesterov and not self.momentum > 0:
            raise CrossguardError("SGD(nesterov=True) needs momentum; give a positive one, such as momentum=0.9")

    def over(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
        )


def _check(optimizer: Adam | AdamW | SGD) -> None:
    if not optimizer.lr > 0:
        raise CrossguardError(f"{type(optimizer).__name__}(lr={optimizer.lr}) does not learn; give a positive rate")
    if optimizer.weight_decay < 0:
        raise CrossguardError(
            f"{type(optimizer).__name__}(weight_decay={optimizer.weight_decay}) is not possible; give 0 or more"
        )
    momentum = getattr(optimizer, "momentum", 0.0)
    if not 0.0 <= momentum < 1.0:
        raise CrossguardError(f"SGD(momentum={momentum}) is not possible; give a number from 0 to below 1")
    eps = getattr(optimizer, "eps", 1.0)
    if not eps > 0:
        raise CrossguardError(f"{type(optimizer).__name__}(eps={eps}) is not possible; give a positive number")
    betas = getattr(optimizer, "betas", ())
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise CrossguardError(f"{type(optimizer).__name__}(betas={betas}) is not possible; give two from 0 to below 1")
