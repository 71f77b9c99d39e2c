"""What the site has beside the pages in this folder; mkdocs calls the functions named `on_...`.

cli.md                  the reference of the command line, from the commands themselves
strategies/RECIPE.png   the plan of each bundled recipe, drawn as `pitstop plan --plot` does

A page strategies/RECIPE.md says why the strategy works; its picture and its file are put below.
Links to files of the repository that are not on the site become their paths.
"""

import posixpath
import re
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

import typer.cli
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from pitstop.cli import app
from pitstop.core.recipe import bundled_recipes, load_recipe
from pitstop.core.timeline import Timeline
from pitstop.plan.picture import draw

STRATEGIES = "strategies"

SAMPLES = {"demo": 1_438, "cifar": 50_000, "smoke": 128_116}
"""Training images that a recipe is planned for, where it is not for ImageNet's."""
IMAGENET = 1_281_167

OUTSIDE = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)\s]*)\)")
"""A link that begins by going up."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and pictures that are made."""
    files.append(File.generated(config, "cli.md", content=command_line()))
    for name in bundled_recipes():
        picture = plan_picture(name)
        files.append(File.generated(config, f"{STRATEGIES}/{name}.png", content=picture))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Adds its plan and its file to a strategy's page."""
    place = PurePosixPath(page.file.src_uri)
    text = OUTSIDE.sub(lambda link: stay_on_site(link, place), markdown)
    if str(place.parent) == STRATEGIES:
        text += plan_and_file(place.stem)
    return text


def command_line() -> str:
    """Returns the reference of all verbs, as Markdown."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="pitstop")
    return typer.cli.get_docs_for_click(
        obj=command, ctx=context, name="pitstop", title="The command line"
    )


def plan_picture(name: str) -> bytes:
    """Returns the plan of a bundled recipe as a PNG."""
    timeline = Timeline.planned(load_recipe(name), SAMPLES.get(name, IMAGENET))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.png"
        draw([timeline], path)
        return path.read_bytes()


def plan_and_file(name: str) -> str:
    """Returns the end of a strategy's page, as Markdown."""
    samples = SAMPLES.get(name, IMAGENET)
    return f"""

## The plan

![the plan of {name}]({name}.png)

*`pitstop plan {name} --samples {samples} --plot plan.png`*

## The recipe

```yaml
{bundled_recipes()[name].read_text().rstrip()}
```
"""


def stay_on_site(link: re.Match[str], page: PurePosixPath) -> str:
    """Returns a link of a page as it is, or its text and path if it leaves the site."""
    text, target = link.groups()
    path = posixpath.normpath(str(page.parent / target.partition("#")[0]))
    if not path.startswith(".."):
        return link[0]
    outside = path.removeprefix("../")
    return f"{text} (`{outside}`)"
