"""The base of every model in a recipe: frozen, and no key that nobody reads."""

from difflib import get_close_matches
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, model_validator


def did_you_mean(word: str, known: "list[str] | tuple[str, ...]") -> str:
    """Returns "; did you mean 'x'?" for the known word closest to `word`, or ""."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


class Strict(BaseModel):
    """A frozen model that refuses unknown keys and says what was probably meant."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys_only(cls, data: Any) -> Any:
        if isinstance(data, dict):
            cls.check_keys(cast("dict[Any, Any]", data))
        return cast("Any", data)

    @classmethod
    def check_keys(cls, data: dict[Any, Any]) -> None:
        """Raises ValueError for the first key that is none of the model's."""
        known = list(cls.model_fields)
        for key in data:
            if key not in known:
                hint = did_you_mean(str(key), known) or "; known: " + ", ".join(known)
                raise ValueError(f"unknown key {key!r}{hint}")
