"""The documents are held to the code: keys, defaults, snippets, commands, links."""

import doctest
import re
import shlex
from dataclasses import fields
from itertools import takewhile
from pathlib import Path
from typing import get_type_hints

import pytest
import typer
import yaml
from pydantic import BaseModel, TypeAdapter

from pitstop.cli import app
from pitstop.cli.launch.common import LaunchCommand, get_train
from pitstop.core import recipe, schedule
from pitstop.core.recipe import Recipe, bundled_recipes, load_recipe
from pitstop.core.timeline import Timeline
from pitstop.io.records import Row

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS, *sorted((ROOT / "src").rglob("*.md"))]

IMAGENET = 1_281_167

OPERATORS = {"|", "||", "&", "&&", ";", ">", ">>"}
"""What ends a command in a shell."""

SECTIONS: dict[str, tuple[type[BaseModel], type[BaseModel]]] = {
    "The run": (recipe.Recipe, recipe.PhaseSettings),
    "Settings of a phase": (recipe.PhaseSettings, BaseModel),
    "Phases": (recipe.Phase, recipe.PhaseSettings),
    "`divergence`": (recipe.Divergence, BaseModel),
    "Schedules": (schedule.Schedule, BaseModel),
    "Warm-up": (schedule.Warmup, schedule.Schedule),
    "`constant`": (schedule.Constant, schedule.Warmup),
    "`linear`": (schedule.Linear, schedule.Warmup),
    "`cosine`": (schedule.Cosine, schedule.Warmup),
    "`step`": (schedule.Step, schedule.Warmup),
    "`onecycle`": (schedule.OneCycle, schedule.Schedule),
    "`keypoints`": (schedule.Keypoints, schedule.Schedule),
    "Values that vary": (schedule.Varying, BaseModel),
    "`crop`": (recipe.Crop, BaseModel),
    "`color_jitter`": (recipe.ColorJitter, BaseModel),
    "`rand_augment`": (recipe.RandAugment, BaseModel),
    "`trivial_augment_wide`": (recipe.TrivialAugmentWide, BaseModel),
    "`random_erasing`": (recipe.RandomErasing, BaseModel),
    "`mix`": (recipe.Mix, BaseModel),
    "`model`": (recipe.Model, BaseModel),
    "`optimizer`": (recipe.Optimizer, BaseModel),
    "`sgd`": (recipe.Sgd, recipe.Optimizer),
    "`rmsprop`": (recipe.RmsProp, recipe.Optimizer),
    "`adamw`": (recipe.AdamW, recipe.Optimizer),
    "`lamb`": (recipe.Lamb, recipe.Optimizer),
    "`ema`": (recipe.Ema, BaseModel),
    "`lr_finder`": (recipe.LrFinder, BaseModel),
    "`eval`": (recipe.Eval, recipe.Protocol),
    "Protocol": (recipe.Protocol, BaseModel),
    "`checkpoint`": (recipe.Checkpoint, BaseModel),
}
"""Headings of docs/recipes.md: whose fields the table below lists, and whose it leaves out."""


def blocks(page: Path, language: str) -> list[str]:
    """The page's code blocks in a language, without the indentation of their first line."""
    fence = rf"^( *)```{language}\n(.*?)^ *```$"
    found = re.findall(fence, page.read_text(), re.MULTILINE | re.DOTALL)
    return [code.removeprefix(indent).replace(f"\n{indent}", "\n") for indent, code in found]


def rows(heading: str) -> dict[str, str]:
    """The keys and defaults of the table in a section of docs/recipes.md."""
    text = (ROOT / "docs/recipes.md").read_text()
    sections = re.split(r"^#{2,3} (.*)\n", text, flags=re.MULTILINE)
    section = sections[sections.index(heading, 1) + 1]
    return dict(re.findall(r"^\| `(\w+)` \| .*? \| (.*?) \| .*\|$", section, re.MULTILINE))


def own_fields(model: type[BaseModel], base: type[BaseModel]) -> set[str]:
    """What a model adds to `base`, apart from the `name` by which a kind is chosen."""
    chooser = {"name"} if base is not recipe.PhaseSettings and model is not recipe.Model else set()
    return set(model.model_fields) - set(base.model_fields) - chooser


def test_every_model_of_a_recipe_has_its_section():
    models = {
        value
        for module in (recipe, schedule)
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, BaseModel)
        and value.__module__ == module.__name__
    }
    assert models == {model for model, _ in SECTIONS.values()}


@pytest.mark.parametrize("heading", SECTIONS)
def test_a_section_lists_the_models_fields_with_their_defaults(heading: str):
    model, base = SECTIONS[heading]
    documented = rows(heading)
    assert set(documented) == own_fields(model, base)
    types = get_type_hints(model, include_extras=True)
    for key, default in documented.items():
        stated = re.fullmatch(r"`([^`]*)`", default)
        if stated:
            value = TypeAdapter(types[key]).validate_python(yaml.safe_load(stated[1]))
            assert value == model.model_fields[key].get_default(call_default_factory=True), key
        elif default == "required":
            assert model.model_fields[key].is_required(), key


SNIPPETS = [
    pytest.param(block, id=f"{page.name}-{i}")
    for page in DOCS
    for i, block in enumerate(blocks(page, "yaml"))
    if block.startswith("# recipe")
]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_recipe_in_the_documents_loads_and_can_be_planned(snippet: str, tmp_path: Path):
    path = tmp_path / "snippet.yaml"
    path.write_text(snippet)
    assert Timeline.planned(load_recipe(str(path)), IMAGENET).last > 0


def test_every_recipe_has_its_row_among_those_to_choose_from():
    text = (ROOT / "docs/which-recipe.md").read_text()
    expectations = text[text.index("## What to expect") : text.index("## Time and money")]
    assert [name for name in bundled_recipes() if f"| `{name}` |" not in expectations] == []


def commands(page: Path) -> list[str]:
    """The lines of a page's console blocks that call pitstop, without their prompts."""
    text = "".join(blocks(page, "console")).replace("\\\n", " ")
    typed = [line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ ")]
    return [line for line in typed if "pitstop" in words(line)]


def words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)


@pytest.mark.parametrize(
    "line",
    [pytest.param(line, id=f"{page.name}: {line}") for page in PAGES for line in commands(page)],
)
def test_a_command_in_the_documents_has_verbs_and_options_that_exist(line: str):
    typed = words(line)
    arguments = list(takewhile(lambda w: w not in OPERATORS, typed[typed.index("pitstop") + 1 :]))
    command = typer.main.get_command(app)
    for before, word in zip(["", *arguments], arguments, strict=False):
        if word.startswith("--"):
            passed_on = get_train().params if isinstance(command, LaunchCommand) else []
            known = {o for p in (*command.params, *passed_on) for o in (*p.opts, *p.secondary_opts)}
            assert word.partition("=")[0] in known | {"--help"}
        elif before == "--set":
            assert re.split(r"[.=]", word)[0] in Recipe.model_fields
        elif isinstance(verbs := getattr(command, "commands", None), dict):
            command = verbs[word]


def test_the_examples_in_python_say_what_the_code_does():
    for page in DOCS:
        text = "\n".join(blocks(page, "python"))
        example = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
        assert doctest.DocTestRunner(verbose=False).run(example).failed == 0


def test_the_columns_of_the_training_log_are_named():
    text = (ROOT / "docs/run-directory.md").read_text()
    assert [field.name for field in fields(Row) if f"| `{field.name}` |" not in text] == []


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(
        r"^ *```.*?^ *```$|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL
    )


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_leads_somewhere(page: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link
