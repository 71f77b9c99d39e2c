"""Lengths of training as a recipe writes them: `8ep` (epochs) or `30%` (of the epochs)."""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

_PATTERN = re.compile(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*(ep|%)")


@dataclass(frozen=True)
class Length:
    """An amount of epochs, or a percentage of the epochs of what it is measured in."""

    amount: float
    unit: Literal["ep", "%"]

    def epochs(self, of: float) -> float:
        """Returns the length in epochs, where 100% is `of` epochs."""
        return self.amount if self.unit == "ep" else self.amount / 100 * of

    def __str__(self) -> str:
        return repr(self.amount).removesuffix(".0") + self.unit

    @classmethod
    def parse(cls, text: object) -> "Length":
        """Returns the length that `8ep`, `30%` or a bare 0 stands for.

        Raises:
            ValueError: anything else.
        """
        if isinstance(text, Length):
            return text
        if isinstance(text, int | float) and text == 0:
            return cls(0.0, "ep")
        match = _PATTERN.fullmatch(str(text).strip())
        if match is None:
            raise ValueError(f"{text!r} is not a length: write epochs as '8ep' or a share as '30%'")
        if not math.isfinite(float(match[1])):
            raise ValueError(f"{text!r} is longer than any run")
        return cls(float(match[1]), "%" if match[2] == "%" else "ep")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.to_string_ser_schema()
        )
