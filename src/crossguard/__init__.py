"""Crossguard attacks, defends and measures CLIP-like vision-language models.

Every public name is here, and every frozen dataclass of numbers, strings, tuples and words among them is a
word: of scripts, of the command line, of experiment files and of reports. To add one is to export it: a name
in `_EXPORTS` (and a line for type checkers). Names load when first used, so that importing the package loads
neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "errors": "CrossguardError",
    "words": "build show WordError",
    "budgets": "Linf L2 L1 Words WordShare Characters Both Budget PixelBudget TextBudget",
    "goals": "Untargeted Targeted ByWayOf Drift Mismatch CrossEntropy Margin DLR Goal Loss",
    "gallery": "Away Gallery",
    "data": "Prompts Labelled Pairs Dataset",
    "models.base": "VisionLanguageModel DualEncoder Checkpoint",
    "models.huggingface": "HuggingFace",
    "models.embedded": "Tiny",
    "models.fresh": "Fresh",
    "models.wrapper": "Wrapper BitDepth GaussianNoise Purifier Unrolled",
    "datasets.captions": "Captions",
    "datasets.embedded": "Scenes",
    "datasets.folders": "Images",
    "datasets.parquet": "Parquet",
    "datasets.shards": "Shards",
    "datasets.known": "CIFAR10 CIFAR100 STL10 ImageNet TinyImageNet Caltech101 Caltech256 SUN397 "
    "Food101 OxfordPets Flowers102 DTD EuroSAT FGVCAircraft Country211 StanfordCars",
    "datasets.kept": "Kept",
    "datasets.combined": "Concat Subset Prompted",
    "attacks.base": "Attack ImageAttack TextAttack ImageVictim PairVictim MatchVictim",
    "attacks.gradient": "PGD",
    "attacks.apgd": "APGD",
    "attacks.query": "Square RayS",
    "attacks.boundary": "FAB DeepFool CarliniWagner",
    "attacks.text": "Substitute TextFooler PWWS TextBugger Charmer",
    "attacks.candidates": "MaskedLM CandidateSource",
    "attacks.synonyms": "Synonyms CharacterEdits AnyOf",
    "attacks.meta": "Worst Restarts EachTarget EOT OwnAnswer AtGate BF16",
    "attacks.standard": "AutoAttack RobustCLIP",
    "attacks.joint": "Independent Joint SepAttack CoAttack SGA Alternating JointAttack",
    "defenses.recipe": "Recipe Augment",
    "defenses.finetuning": "FTStandard TeCoA MMCoA Contrastive",
    "defenses.optimizers": "Adam AdamW SGD Optimizer",
    "defenses.fit": "Fit",
    "tasks.base": "Task",
    "tasks.zero_shot": "ZeroShot",
    "tasks.retrieval": "Retrieval",
    "evaluate": "evaluate",
    "diagnose": "diagnose",
    "report": "Report Ranks",
    "experiment": "Experiment",
    "testing": "check_attack check_model",
}

VOCABULARY: dict[str, str] = {
    name: f"crossguard.{module}" for module, exported in _EXPORTS.items() for name in exported.split()
}

if TYPE_CHECKING:  # the same names, for type checkers and editors
    from crossguard.attacks.apgd import APGD as APGD
    from crossguard.attacks.base import Attack as Attack
    from crossguard.attacks.base import ImageAttack as ImageAttack
    from crossguard.attacks.base import ImageVictim as ImageVictim
    from crossguard.attacks.base import MatchVictim as MatchVictim
    from crossguard.attacks.base import PairVictim as PairVictim
    from crossguard.attacks.base import TextAttack as TextAttack
    from crossguard.attacks.boundary import FAB as FAB
    from crossguard.attacks.boundary import CarliniWagner as CarliniWagner
    from crossguard.attacks.boundary import DeepFool as DeepFool
    from crossguard.attacks.candidates import CandidateSource as CandidateSource
    from crossguard.attacks.candidates import MaskedLM as MaskedLM
    from crossguard.attacks.gradient import PGD as PGD
    from crossguard.attacks.joint import SGA as SGA
    from crossguard.attacks.joint import Alternating as Alternating
    from crossguard.attacks.joint import CoAttack as CoAttack
    from crossguard.attacks.joint import Independent as Independent
    from crossguard.attacks.joint import Joint as Joint
    from crossguard.attacks.joint import JointAttack as JointAttack
    from crossguard.attacks.joint import SepAttack as SepAttack
    from crossguard.attacks.meta import BF16 as BF16
    from crossguard.attacks.meta import EOT as EOT
    from crossguard.attacks.meta import AtGate as AtGate
    from crossguard.attacks.meta import EachTarget as EachTarget
    from crossguard.attacks.meta import OwnAnswer as OwnAnswer
    from crossguard.attacks.meta import Restarts as Restarts
    from crossguard.attacks.meta import Worst as Worst
    from crossguard.attacks.query import RayS as RayS
    from crossguard.attacks.query import Square as Square
    from crossguard.attacks.standard import AutoAttack as AutoAttack
    from crossguard.attacks.standard import RobustCLIP as RobustCLIP
    from crossguard.attacks.synonyms import AnyOf as AnyOf
    from crossguard.attacks.synonyms import CharacterEdits as CharacterEdits
    from crossguard.attacks.synonyms import Synonyms as Synonyms
    from crossguard.attacks.text import PWWS as PWWS
    from crossguard.attacks.text import Charmer as Charmer
    from crossguard.attacks.text import Substitute as Substitute
    from crossguard.attacks.text import TextBugger as TextBugger
    from crossguard.attacks.text import TextFooler as TextFooler
    from crossguard.budgets import L1 as L1
    from crossguard.budgets import L2 as L2
    from crossguard.budgets import Both as Both
    from crossguard.budgets import Budget as Budget
    from crossguard.budgets import Characters as Characters
    from crossguard.budgets import Linf as Linf
    from crossguard.budgets import PixelBudget as PixelBudget
    from crossguard.budgets import TextBudget as TextBudget
    from crossguard.budgets import Words as Words
    from crossguard.budgets import WordShare as WordShare
    from crossguard.data import Dataset as Dataset
    from crossguard.data import Labelled as Labelled
    from crossguard.data import Pairs as Pairs
    from crossguard.data import Prompts as Prompts
    from crossguard.datasets.captions import Captions as Captions
    from crossguard.datasets.combined import Concat as Concat
    from crossguard.datasets.combined import Prompted as Prompted
    from crossguard.datasets.combined import Subset as Subset
    from crossguard.datasets.embedded import Scenes as Scenes
    from crossguard.datasets.folders import Images as Images
    from crossguard.datasets.kept import Kept as Kept
    from crossguard.datasets.known import CIFAR10 as CIFAR10
    from crossguard.datasets.known import CIFAR100 as CIFAR100
    from crossguard.datasets.known import DTD as DTD
    from crossguard.datasets.known import STL10 as STL10
    from crossguard.datasets.known import SUN397 as SUN397
    from crossguard.datasets.known import Caltech101 as Caltech101
    from crossguard.datasets.known import Caltech256 as Caltech256
    from crossguard.datasets.known import Country211 as Country211
    from crossguard.datasets.known import EuroSAT as EuroSAT
    from crossguard.datasets.known import FGVCAircraft as FGVCAircraft
    from crossguard.datasets.known import Flowers102 as Flowers102
    from crossguard.datasets.known import Food101 as Food101
    from crossguard.datasets.known import ImageNet as ImageNet
    from crossguard.datasets.known import OxfordPets as OxfordPets
    from crossguard.datasets.known import StanfordCars as StanfordCars
    from crossguard.datasets.known import TinyImageNet as TinyImageNet
    from crossguard.datasets.parquet import Parquet as Parquet
    from crossguard.datasets.shards import Shards as Shards
    from crossguard.defenses.finetuning import Contrastive as Contrastive
    from crossguard.defenses.finetuning import FTStandard as FTStandard
    from crossguard.defenses.finetuning import MMCoA as MMCoA
    from crossguard.defenses.finetuning import TeCoA as TeCoA
    from crossguard.defenses.fit import Fit as Fit
    from crossguard.defenses.optimizers import SGD as SGD
    from crossguard.defenses.optimizers import Adam as Adam
    from crossguard.defenses.optimizers import AdamW as AdamW
    from crossguard.defenses.optimizers import Optimizer as Optimizer
    from crossguard.defenses.recipe import Augment as Augment
    from crossguard.defenses.recipe import Recipe as Recipe
    from crossguard.diagnose import diagnose as diagnose
    from crossguard.errors import CrossguardError as CrossguardError
    from crossguard.evaluate import evaluate as evaluate
    from crossguard.experiment import Experiment as Experiment
    from crossguard.gallery import Away as Away
    from crossguard.gallery import Gallery as Gallery
    from crossguard.goals import DLR as DLR
    from crossguard.goals import ByWayOf as ByWayOf
    from crossguard.goals import CrossEntropy as CrossEntropy
    from crossguard.goals import Drift as Drift
    from crossguard.goals import Goal as Goal
    from crossguard.goals import Loss as Loss
    from crossguard.goals import Margin as Margin
    from crossguard.goals import Mismatch as Mismatch
    from crossguard.goals import Targeted as Targeted
    from crossguard.goals import Untargeted as Untargeted
    from crossguard.models.base import Checkpoint as Checkpoint
    from crossguard.models.base import DualEncoder as DualEncoder
    from crossguard.models.base import VisionLanguageModel as VisionLanguageModel
    from crossguard.models.embedded import Tiny as Tiny
    from crossguard.models.fresh import Fresh as Fresh
    from crossguard.models.huggingface import HuggingFace as HuggingFace
    from crossguard.models.wrapper import BitDepth as BitDepth
    from crossguard.models.wrapper import GaussianNoise as GaussianNoise
    from crossguard.models.wrapper import Purifier as Purifier
    from crossguard.models.wrapper import Unrolled as Unrolled
    from crossguard.models.wrapper import Wrapper as Wrapper
    from crossguard.report import Ranks as Ranks
    from crossguard.report import Report as Report
    from crossguard.tasks.base import Task as Task
    from crossguard.tasks.retrieval import Retrieval as Retrieval
    from crossguard.tasks.zero_shot import ZeroShot as ZeroShot
    from crossguard.testing import check_attack as check_attack
    from crossguard.testing import check_model as check_model
    from crossguard.words import WordError as WordError
    from crossguard.words import build as build
    from crossguard.words import show as show

__all__ = ["VOCABULARY", "__version__", *sorted(VOCABULARY)]  # pyright: ignore[reportUnsupportedDunderAll]


def plugins() -> dict[str, Any]:
    """The entry points of the group `crossguard` of installed packages: word -> entry point, unloaded."""
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group="crossguard")}


def __getattr__(name: str) -> Any:
    if name in VOCABULARY:
        value = getattr(importlib.import_module(VOCABULARY[name]), name)
    elif not name.startswith("_") and name in (found := plugins()):
        value = found[name].load()
    else:
        raise AttributeError(f"module 'crossguard' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *VOCABULARY})


class _Package(ModuleType):
    """Importing the module `crossguard.evaluate` would hide the function of that name; the function wins."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and value.__name__ == VOCABULARY.get(name)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
