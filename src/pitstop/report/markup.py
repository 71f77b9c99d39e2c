"""HTML that cannot be broken by what it shows: text is escaped unless it is markup already."""

import json
from html import escape
from typing import Any

_EMPTY = ("img", "meta")
"""Elements without an end."""


class Markup(str):
    """Text that is HTML; any other is escaped where it is put into an element."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str) -> Markup:
    """Returns an element; `class_` is the attribute `class`."""
    shown = "".join(f' {key.rstrip("_")}="{escape(text)}"' for key, text in attributes.items())
    end = "" if name in _EMPTY else f"</{name}>"
    return Markup(f"<{name}{shown}>{joined(*children)}{end}")


def joined(*parts: str) -> Markup:
    """Returns parts one after the other."""
    return Markup("".join(p if isinstance(p, Markup) else escape(p) for p in parts))


def embedded_json(value: Any) -> Markup:
    """Returns JSON for inside of a `<script>`: with nothing in it that could end the element.

    Raises:
        ValueError: a number in it is not finite.
    """
    return Markup(json.dumps(value, allow_nan=False).replace("<", "\\u003c"))
