"""The model card of a trained model: README.md with the metadata that the Hugging Face hub reads, for whoever gets the
folder. What it was made of stands there without the paths of this machine; crossguard.json has the exact words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

from crossguard import hub
from crossguard.checkpoints import RECORD, located
from crossguard.defenses.plan import Plan
from crossguard.defenses.validation import CLEAN, ROBUST
from crossguard.errors import CrossguardError
from crossguard.limits import SETTINGS
from crossguard.models.base import Checkpoint, VisionLanguageModel
from crossguard.models.huggingface import HuggingFace
from crossguard.models.live import Live
from crossguard.models.openclip import OpenCLIP
from crossguard.models.prompted import PromptTuned
from crossguard.reading import content
from crossguard.words import show, within

_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_TASK = "zero-shot-image-classification"  # the name that the hub has for it


@dataclass(frozen=True)
class Trained:
    """What a card tells of a training.

    Args:
        recipe, model, data: the words.
        folder: where the result is.
        contents: the hashes of the files that the words read; empty, if none.
        steps: that were taken.
        last: the step behind which the last stage began.
        size: images of the data.
        seconds: that it took.
        notes: what is to be feared.
        history: what was measured at the end of each epoch.
    """

    recipe: Plan
    model: Checkpoint
    data: object
    folder: Path
    contents: str
    steps: int
    last: int
    size: int
    seconds: float
    notes: Sequence[str]
    history: Sequence[Mapping[str, float]]

    @property
    def kept(self) -> Mapping[str, float] | None:
        """What was measured of the weights that are the result; None, where nothing was."""
        if not self.history or self.recipe.validate is None:
            return None
        late = [one for one in self.history if one["step"] > self.last]
        return max(late, key=lambda one: one[ROBUST]) if self.recipe.best else self.history[-1]  # the first of equals


def card(made: Trained) -> str:
    """The text of README.md."""
    recipe = type(made.recipe).__name__
    base = _described(made.model) or f"`{show(made.model)}`"
    title = _described(made.model) or show(made.model, short=True)
    notes = "".join(f"* {note}\n" for note in made.notes) or "Nothing was noted.\n"
    teachers = ", ".join(f"{name}: `{show(one)}`" for name, one in made.recipe.teachers().items())
    head = "\n".join(_metadata(made))
    body = f"""# {recipe} of {title}

A dual encoder trained with [Crossguard](https://pypi.org/project/crossguard/), which reads it as {_read_as(made)}.{_stock(made)}

| | |
|---|---|
| recipe | `{show(made.recipe)}` |
| what is trained | `{show(made.recipe.trains)}` |
| teachers | {teachers or "none but the model itself"} |
| base | {base} |
| data | `{show(made.data)}` |
| files read | {made.contents or "none"} |
| steps | {made.steps} of {made.size} images |
| seconds | {made.seconds:.0f} |

## What is to be known of the training

{notes}
{_seen(made)}## What it is worth

A robust accuracy of this model means nothing without its attack, budget and number of images; measure it with

{_measured_with(made)}
"""  # noqa: E501
    return f"---\n{head}\n---\n\n{_without_places(body, made)}"


def _metadata(made: Trained) -> Iterator[str]:
    """The lines of the YAML in front of the card. Texts in quotes are JSON, which YAML reads."""
    if (made.folder / RECORD).is_file():
        yield "library_name: open_clip"
    else:
        yield f"library_name: {'transformers' if _is_stock(made) else 'crossguard'}"
    yield f"pipeline_tag: {_TASK}"
    if base := _hub_id(made.model):
        yield f"base_model: {base}"
    yield from _license(made.model)
    yield "tags: [clip, adversarial-robustness, crossguard]"
    kept, validate = made.kept, made.recipe.validate
    if kept is None or validate is None:
        return
    attacks = [one for one in (validate.image_attack, validate.text_attack) if one is not None]
    budget = show(validate.budget, short=True)

    def told(name: str) -> str:
        if name == CLEAN:
            return name
        return f"{name} under {show(attacks[0 if name == ROBUST else -1], short=True)} in {budget}"

    data = _without_places(show(validate.data, short=True), made)
    yield "model-index:"
    yield f"- name: {json.dumps(made.folder.resolve().name)}"
    yield "  results:"
    yield f"  - task: {{type: {_TASK}}}"
    yield f"    dataset: {{type: {type(validate.data).__name__}, name: {json.dumps(data)}}}"
    yield "    metrics:"
    for name, value in kept.items():
        if name != "step":
            named = json.dumps(_without_places(told(name), made))
            yield f"    - {{type: accuracy, name: {named}, value: {round(value, 4)}}}"


def _hub_id(model: VisionLanguageModel) -> str:
    """The id on the hub of a model; empty where it is no model of the hub."""
    if isinstance(model, PromptTuned):
        return _hub_id(model.base)
    name = ""
    if isinstance(model, HuggingFace):
        name = model.path
    elif isinstance(model, OpenCLIP) and not model.pretrained and model.name.startswith("hf-hub:"):
        name = model.name.removeprefix("hf-hub:")
    return name if _HUB.fullmatch(name) and not Path(name).exists() else ""


def _license(model: VisionLanguageModel) -> Iterator[str]:
    """The license as the card of the base has it; nothing, where that is not at hand or says none."""
    if isinstance(model, PromptTuned):
        yield from _license(model.base)
        return
    name = model.path if isinstance(model, HuggingFace) else model.name if isinstance(model, OpenCLIP) else ""
    place = hub.cached(_hub_id(model), "README.md") if _hub_id(model) else Path(located(name)) / "README.md"
    try:
        found = content(place, "", SETTINGS).decode("utf-8", "replace") if name and place is not None else ""
    except CrossguardError:  # a card is no part of a model
        return
    head = re.match(r"---\r?\n(.*?)\n---", found, re.DOTALL)
    if head:
        yield from re.findall(r"^license(?:_name)?: *[\w.+-]+(?=\s*$)", head[1], re.MULTILINE)


def _described(model: Checkpoint) -> str:
    """A model that has no name but in a running program, in words; empty for others."""
    if not isinstance(model, Live):
        return ""
    what = "two functions" if isinstance(model.model, tuple) else f"a {type(model.model).__name__}"
    return f"{what} in the memory of a Python program (weights {model.weights})"


def _is_stock(made: Trained) -> bool:
    return (made.folder / "config.json").is_file()


def _word(made: Trained) -> str:
    """The word that reads the result from its folder; empty where only a program with the object can."""
    if next(within(made.model, Live), None) is None:
        return show(made.recipe.trains.word(made.model, made.folder), short=True)
    return show(HuggingFace(str(made.folder)), short=True) if _is_stock(made) else ""


def _read_as(made: Trained) -> str:
    return f"`{_word(made)}`" if _word(made) else "`Live(...)` of the same object with the weights that lie here"


def _stock(made: Trained) -> str:
    """Who else reads the result."""
    return "\n`transformers.AutoModel` loads it without Crossguard." if _is_stock(made) else ""


def _measured_with(made: Trained) -> str:
    if _word(made):
        return f'```\ncrossguard eval --model "{_word(made)}" --task ... --attack ... --budget ...\n```'
    return "```python\nevaluate(task, Live(...), attack, budget)\n```"


def _seen(made: Trained) -> str:
    """What the training saw of accuracy, as a table; nothing, where it did not look."""
    if not made.history or made.recipe.validate is None:
        return ""
    names = [name for name in made.history[-1] if name != "step"]
    rows = [f"| {one['step']:.0f} | {' | '.join(f'{one[name]:.1%}' for name in names)} |" for one in made.history]
    head = [f"| step | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    best = ", of which the weights are those with the highest robust accuracy" if made.recipe.best else ""
    table = "\n".join([*head, *rows])
    return f"## What it saw\n\nBy `{show(made.recipe.validate)}`{best}:\n\n{table}\n\n"


def _without_places(text: str, made: Trained) -> str:
    """The same text, in which a path that begins at the root or at somebody's home is its last part."""
    places = {str(made.folder), *_texts((made.recipe, made.model, made.data))}
    whole = {one for one in places if one[:1] == "~" or Path(one).is_absolute()}
    for place in sorted({form for one in whole for form in (one, located(one))}, key=len, reverse=True):
        if name := Path(place).name:
            text = re.sub(rf"(?<![\w.~/-]){re.escape(place)}", lambda _, name=name: name, text)
    return text


def _texts(part: object) -> Iterator[str]:
    """All texts that a word holds."""
    if isinstance(part, str):
        yield part
    held = part if isinstance(part, tuple) else ()
    if is_dataclass(part):
        held = tuple(getattr(part, field.name) for field in fields(part))
    for one in held:
        yield from _texts(one)
