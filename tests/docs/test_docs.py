"""The documents are held to the code: snippets, commands, links; keys in test_reference.py."""

import doctest
import re
import shlex
from dataclasses import fields
from itertools import takewhile
from pathlib import Path

import pytest
import typer

from pitstop.cli import app
from pitstop.cli.launch.common import LaunchCommand, get_train
from pitstop.core.recipe import Recipe, bundled_recipes, load_recipe
from pitstop.core.timeline import Timeline
from pitstop.io.records import Row

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS, *sorted((ROOT / "src").rglob("*.md"))]

IMAGENET = 1_281_167

OPERATORS = {"|", "||", "&", "&&", ";", ">", ">>"}
"""What ends a command in a shell."""

QUOTE = re.compile(r'"([^"]+)"')


def blocks(page: Path, language: str) -> list[str]:
    """The page's code blocks in a language, without the indentation of their first line."""
    fence = rf"^( *)```{language}\n(.*?)^ *```$"
    found = re.findall(fence, page.read_text(), re.MULTILINE | re.DOTALL)
    return [code.removeprefix(indent).replace(f"\n{indent}", "\n") for indent, code in found]


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


def test_a_line_quoted_in_troubleshooting_is_one_that_pitstop_says():
    sources = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    said = re.sub(r'"\n\s*f?"', "", sources)  # literals that go on in the next line
    table = re.findall(
        r"^\| (.*?) \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE
    )
    quoted = [
        line for cell in table if not cell.startswith("torch's") for line in QUOTE.findall(cell)
    ]
    assert len(quoted) > 20
    assert [line for line in quoted if line not in said] == []


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
