"""The model card of a training: what the hub reads of it, what people read, and what it keeps to itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from crossguard import (
    PGD,
    FTStandard,
    HuggingFace,
    Images,
    Linf,
    Live,
    OpenCLIP,
    PromptTuned,
    Scenes,
    Tiny,
    Validation,
    checkpoints,
)
from crossguard.defenses.card import Trained, card

HISTORY = (
    {"step": 4.0, "clean accuracy": 0.5, "robust accuracy": 0.9},  # of the first stage
    {"step": 8.0, "clean accuracy": 0.61234, "robust accuracy": 0.3},
    {"step": 12.0, "clean accuracy": 0.7, "robust accuracy": 0.2},
)


def made(folder: Path, **changes: Any) -> Trained:
    facts = Trained(
        FTStandard(steps=12), HuggingFace("owner/name"), Scenes("object"), folder, "", 12, 4, 40, 3.0, (), ()
    )  # fmt: skip
    (folder / "config.json").write_text("{}")
    return replace(facts, **changes)


def head(told: Trained) -> dict[str, Any]:
    """The metadata as the hub understands it."""
    return ModelCard(card(told)).data.to_dict()


@pytest.mark.parametrize(
    "model",
    [
        HuggingFace("owner/name"),
        OpenCLIP("hf-hub:owner/name"),
        PromptTuned(HuggingFace("owner/name"), "prompts"),
    ],
)
def test_a_base_of_the_hub_is_named(model: Any, tmp_path: Path) -> None:
    found = head(made(tmp_path, model=model))
    assert found["base_model"] == "owner/name" and "license" not in found and "model-index" not in found
    assert found["pipeline_tag"] == "zero-shot-image-classification"


def test_a_folder_is_no_base_of_the_hub_and_lends_its_license(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base, out = Path("owner/name"), tmp_path / "out"
    base.mkdir(parents=True)
    out.mkdir()
    assert "license" not in head(made(out))
    told = "---\ntags: [a]\nlicense: other\nlicense_name: open-rail+m\n---\n# A model\n\n---\nlicense: mit\n---\n"
    (base / "README.md").write_text(told)
    found = head(made(out))
    assert "base_model" not in found
    assert (found["license"], found["license_name"]) == ("other", "open-rail+m")
    assert "license" not in head(made(out, model=Tiny()))
    (base / "README.md").write_text("license: mit\n")
    assert "license" not in head(made(out)), "this is no metadata"


def test_the_library_is_the_one_that_loads_it(tmp_path: Path) -> None:
    told = made(tmp_path)
    assert head(told)["library_name"] == "transformers"
    (tmp_path / checkpoints.RECORD).write_text("{}")
    assert head(told)["library_name"] == "open_clip"
    (tmp_path / checkpoints.RECORD).unlink()
    (tmp_path / "config.json").unlink()
    assert head(told)["library_name"] == "crossguard"


@pytest.mark.parametrize(("best", "clean", "robust"), [(False, 0.7, 0.2), (True, 0.6123, 0.3)])
def test_what_was_measured_of_the_result_is_its_metrics(
    best: bool, clean: float, robust: float, tmp_path: Path
) -> None:
    look = Validation(Images("/private/held out"), PGD(steps=3), Linf(2 / 255))
    (result,) = ModelCard(
        card(made(tmp_path, recipe=FTStandard(validate=look, best=best), history=HISTORY))
    ).data.eval_results[:1]  # fmt: skip
    assert result.dataset_name == "Images('held out')" and result.dataset_type == "Images"
    found = head(made(tmp_path, recipe=FTStandard(validate=look, best=best), history=HISTORY))
    (index,) = found["model-index"]
    assert index["name"] == tmp_path.name
    values = {one["name"]: one["value"] for one in index["results"][0]["metrics"]}
    assert values == {"clean accuracy": clean, "robust accuracy under PGD(steps=3) in Linf(2/255)": robust}


def test_no_path_of_this_machine_stands_in_it(tmp_path: Path) -> None:
    held = Validation(Images("/private/held out"))
    text = card(
        made(
            tmp_path, recipe=FTStandard(validate=held), model=HuggingFace("/home/me/clip"), data=Images("~/pictures"),
            notes=("x of HuggingFace('/home/me/clip') in /private/held out/a.png, and of ours/home/me/clip",),
            history=HISTORY,
        )
    )  # fmt: skip
    for kept in (str(tmp_path), "/private", "~/", str(Path.home())):
        assert kept not in text
    assert "'clip'" in text and "'pictures'" in text and "'held out'" in text
    assert "x of HuggingFace('clip') in held out/a.png, and of ours/home/me/clip" in text
    relative = card(made(tmp_path, model=HuggingFace("runs/base"), data=Images("data/pictures")))
    assert "'runs/base'" in relative and "'data/pictures'" in relative


def test_a_model_in_memory_is_described(tmp_path: Path) -> None:
    model = Tiny().load().stock
    live = Live(model, Tiny().load().processor, Tiny().load().tokenizer)
    text = card(made(tmp_path, model=live))
    told = f"a {type(model).__name__} in the memory of a Python program (weights {live.weights})"
    assert f"# FTStandard of {told}\n" in text and f"| base | {told} |" in text
    assert f"reads it as `HuggingFace('{tmp_path.name}')`" in text and "Live(" not in text
