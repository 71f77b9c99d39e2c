"""docs/recipes.md has a table of each model that a recipe holds, and the models give it."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from pydantic import BaseModel, TypeAdapter

PLACE = Path(__file__).parents[2] / "docs/reference.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", PLACE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load()
MODELS: dict[str, type[BaseModel]] = reference.models()
CELLS = [
    pytest.param(model, key, id=f"{name}.{key}")
    for name, model in MODELS.items()
    for key in reference.keys(model)
]


def test_every_model_of_a_recipe_has_its_table():
    marks = re.findall(r"^<!-- keys of (\w+) -->$", reference.PAGE.read_text(), re.MULTILINE)
    assert sorted(marks) == sorted(MODELS)


def test_every_key_of_a_recipe_says_what_it_means():
    silent = [
        f"{name}.{key}: put a docstring below the field"
        for name, model in MODELS.items()
        for key in reference.keys(model)
        if key not in reference.meanings(model)
    ]
    assert silent == []


def test_the_page_is_what_the_models_give():
    page = reference.PAGE.read_text()
    assert reference.rewritten(page) == page, "run `python docs/reference.py`"


@pytest.mark.parametrize(("model", "key"), CELLS)
def test_a_default_is_yaml_for_what_the_key_is_without_it(model: type[BaseModel], key: str):
    stated = re.fullmatch(r"`(.*)`", reference.default(model, key))
    if stated is None:
        assert model.model_fields[key].is_required() or (model, key) in reference.FILLED_IN
    else:
        field = model.model_fields[key]
        hint = model.__annotations__[key]
        value = TypeAdapter(hint).validate_python(yaml.safe_load(stated[1]))
        assert value == field.get_default(call_default_factory=True)


@pytest.mark.parametrize(
    ("model", "key", "words"),
    [
        ("Recipe", "seed", "integer from 0"),
        ("Recipe", "compile", "`true`, `false`, `auto`, `default`, "),
        ("Recipe", "phases", "list of [phases](#phases)"),
        ("PhaseSettings", "lr", "number above 0 or `auto`"),
        ("PhaseSettings", "resolution", "integer or 2 integers"),
        ("Sgd", "momentum", "number from 0 to below 1 or [varying](#varying)"),
        ("ColorJitter", "hue", "number from 0 to 0.5 or [varying](#varying)"),
        ("Varying", "keypoints", "list of ([duration](#durations), number)"),
    ],
)
def test_a_type_is_told_in_a_readers_words(model: str, key: str, words: str):
    row = rf"^<!-- keys of {model} -->$.*?^\| `{key}` \| (.*?) \|"
    found = re.search(row, reference.PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    assert found[1].startswith(words)
