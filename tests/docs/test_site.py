"""mkdocs.yml holds every page, and every recipe has its page. CI builds the site itself."""

from pathlib import Path

import pytest
import yaml

from pitstop.core.recipe import bundled_recipes

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GENERATED = {"cli.md"}
"""By docs/hooks.py."""


def pages(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    inside = nav.values() if isinstance(nav, dict) else nav
    return [page for each in inside for page in pages(each)]  # pyright: ignore


def test_every_page_is_in_the_navigation_once():
    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    there = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert sorted(listed) == sorted(there | GENERATED)


@pytest.mark.parametrize("name", bundled_recipes())
def test_every_recipe_has_a_page_that_says_why_it_works(name: str):
    text = (DOCS / "strategies" / f"{name}.md").read_text()
    assert text.startswith(f"# {name}\n")
    assert "**Why it works" in text


def test_no_page_is_left_of_a_recipe_that_is_gone():
    assert {path.stem for path in (DOCS / "strategies").glob("*.md")} == set(bundled_recipes())
