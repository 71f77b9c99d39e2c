"""Writes the tables of docs/recipes.md anew, from the models: `python docs/reference.py`.

A table stands between `<!-- keys of Mix -->` and `<!-- end -->`. It has a row for each key that
the model adds to its base: type, default, and the docstring below the field. The heading above it
is where the types of other tables link to.
"""

import ast
import inspect
import re
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

from pitstop.core.length import Length
from pitstop.core.recipe import Phase, Protocol, Recipe
from pitstop.core.strict import Strict

PAGE = Path(__file__).with_name("recipes.md")

TABLE = re.compile(r"^<!-- keys of (\w+) -->$.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
PLACE = re.compile(
    r"^##+ ([^\n]*)$(?:(?!^##).)*?^<!-- keys of (\w+) -->$", re.MULTILINE | re.DOTALL
)
"""A heading and the model whose table is the first below it."""

WORDS: dict[Any, list[str]] = {
    NoneType: [],
    bool: ["`true`", "`false`"],
    str: ["text"],
    Any: ["anything"],
    Length: ["[duration](#durations)"],
}
NUMBERS = {int: "integer", float: "number"}

FILLED_IN = {
    (Recipe, "name"): "the file's name",
    (Recipe, "epochs"): "the phases' sum",
    (Recipe, "phases"): "one phase",
    (Phase, "name"): "phase 1, phase 2, ...",
    (Protocol, "resolution"): "the last phase's",
}
"""What loading takes where a key is left out, for people."""


def rewritten(page: str) -> str:
    """Returns the page with the tables that its models give."""
    known = models()
    links = {name: link(heading) for heading, name in PLACE.findall(page)}
    return TABLE.sub(lambda found: between_marks(known[found[1]], links), page)


def between_marks(model: type[BaseModel], links: dict[str, str]) -> str:
    """Returns a model's table, its marks included."""
    lines = "\n".join(table(model, links)) if keys(model) else "No keys of its own."
    return f"<!-- keys of {model.__name__} -->\n\n{lines}\n\n<!-- end -->"


def table(model: type[BaseModel], links: dict[str, str]) -> list[str]:
    """Returns the lines of a model's table."""
    meaning = meanings(model)
    rows = [
        f"| `{key}` | {kind(field.annotation, links, field.metadata)} | {default(model, key)} "
        f"| {linked(meaning[key])} |"
        for key, field in keys(model).items()
    ]
    return ["| key | type | default | meaning |", "|---|---|---|---|", *rows]


def link(heading: str) -> str:
    """Returns a link to a section of the page."""
    text = heading.strip("`").lower()
    return f"[{text}](#{text.replace(' ', '-')})"


def linked(meaning: str) -> str:
    """Returns a docstring as a cell: papers are links, and the last full stop goes."""
    papers = re.sub(r"arXiv (\d+\.\d+)", r"[arXiv \1](https://arxiv.org/abs/\1)", meaning)
    return papers.removesuffix(".")


# The models


def models() -> dict[str, type[BaseModel]]:
    """Returns the models that a recipe holds, and those that they build on, by name."""
    found: dict[str, type[BaseModel]] = {}
    ahead: list[type[BaseModel]] = [Recipe]
    while ahead:
        model = ahead.pop()
        if model.__name__ not in found:
            found[model.__name__] = model
            bases = [base for base in model.__bases__ if issubclass(base, Strict)]
            ahead += [base for base in bases if base is not Strict]
            for field in model.model_fields.values():
                ahead += held(field.annotation)
    return found


def held(hint: Any) -> list[type[BaseModel]]:
    """Returns the models in an annotation."""
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return [hint]
    return [model for inner in get_args(hint) for model in held(inner)]


def keys(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Returns the fields in a model's own body, less the `name` by which its kind is chosen."""
    own = inspect.get_annotations(model)
    fields = {name: field for name, field in model.model_fields.items() if name in own}
    return {name: field for name, field in fields.items() if not is_chooser(field)}


def is_chooser(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """Returns the docstrings below the fields in a model's own body, each on one line."""
    found: dict[str, str] = {}
    for definition in ast.parse(inspect.getsource(model)).body:
        assert isinstance(definition, ast.ClassDef)
        for pair in pairwise(definition.body):
            match pair:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[name] = " ".join(text.split())
                case _:
                    pass
    return found


def default(model: type[BaseModel], key: str) -> str:
    """Returns what a key is where it is left out: YAML in backticks, or words."""
    field = model.model_fields[key]
    if (model, key) in FILLED_IN:
        return FILLED_IN[model, key]
    if field.is_required():
        return "required"
    return f"`{as_yaml(field.get_default(call_default_factory=True))}`"


def as_yaml(value: Any) -> str:
    """Returns a default as a recipe would state it."""
    match value:
        case BaseModel():
            return next(
                (f.default for f in type(value).model_fields.values() if is_chooser(f)), "{}"
            )
        case Length():
            return str(value)
        case tuple():
            return f"[{', '.join(as_yaml(each) for each in value)}]"
        case _:
            text = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").rstrip()
            return text.replace("e-0", "e-")


# Types, for people


def kind(hint: Any, links: dict[str, str], limits: list[Any]) -> str:
    """Returns a type in a reader's words.

    Args:
        hint: a field's annotation.
        links: to the sections of models, by their names.
        limits: what stands beside the annotation, such as `Field(gt=0)`.
    """
    *others, last = alternatives(hint, links, limits)
    return f"{', '.join(others)} or {last}" if others else last


def alternatives(hint: Any, links: dict[str, str], limits: list[Any]) -> list[str]:
    """Returns what a value may be, each in a reader's words."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return alternatives(inside[0], links, [*limits, *inside[1:]])
    if origin in (Union, UnionType):
        return [word for each in inside for word in alternatives(each, links, limits)]
    if origin is Literal:
        return [f"`{each}`" for each in inside]
    if origin is tuple:
        return [several(inside, links)]
    if origin is dict:
        return [f"mapping of {kind(inside[0], links, [])} to {kind(inside[1], links, [])}"]
    if hint in NUMBERS:
        return [f"{NUMBERS[hint]}{bounds(limits)}"]
    return WORDS[hint] if hint in WORDS else [links[hint.__name__]]


def several(inside: tuple[Any, ...], links: dict[str, str]) -> str:
    """Returns what a tuple of these types is."""
    words = [kind(each, links, []) for each in inside if each is not ...]
    if ... in inside:
        return f"list of {words[0]}"
    if len(set(words)) == 1:
        return f"{len(words)} {words[0]}s"
    return f"({', '.join(words)})"


def bounds(limits: list[Any]) -> str:
    """Returns the bounds among what stands beside a number's annotation.

    Those of pydantic's `Field`, and those of `within` and `_up_to`, which are in their closures.
    """
    found: dict[str, float] = {}
    for limit in limits:
        for each in limit.metadata if isinstance(limit, FieldInfo) else [limit]:
            names = [name for name in ("ge", "gt", "le", "lt") if hasattr(each, name)]
            found |= {name: getattr(each, name) for name in names}
            if isinstance(each, AfterValidator):
                inner = inspect.getclosurevars(each.func).nonlocals
                lower = {"ge": inner["low"], "lt": inner["high"]} if "low" in inner else {}
                found |= lower or {"le": inner["high"]}
    words = {"ge": " from {:g}", "gt": " above {:g}", "le": " to {:g}", "lt": " to below {:g}"}
    return "".join(word.format(found[n]) for n, word in words.items() if found.get(n, MOST) < MOST)


MOST = 2**32
"""A bound that nobody meets is not told."""


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
