"""What all sections of a config share: strict types, immutability, and the types their fields are built from."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

MAX_INT = 2**31 - 1  # what an int32 on a device holds: steps, token ids, sizes of arrays
MAX_FLOAT = 3.4e38  # what a float32 holds


def freeze(value: Any) -> Any:
    """Lists as tuples: YAML has no tuple, a hashable section needs one."""
    return tuple(freeze(item) for item in value) if isinstance(value, list) else value


class FrozenDict(dict):
    """A mapping that cannot be changed and is hashed by its items, so that a section holding one stays hashable."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple:
        return FrozenDict, (dict(self),)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a config mapping cannot be changed")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse  # type: ignore[assignment]


def _check_path(path: str) -> str:
    if not path or "\0" in path:
        raise ValueError("a path has no character NUL" if path else "the path is empty: write a path, or remove the key")
    return path


Strings = Annotated[tuple[str, ...], BeforeValidator(freeze)]
Path = Annotated[str, AfterValidator(_check_path)]
"""A path as it was written; `paths.expand` gives the one that can be opened."""
PositiveInt = Annotated[int, Field(ge=1, le=MAX_INT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_INT)]
NumBytes = Annotated[int, Field(ge=1, lt=2**63)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Number = Annotated[float, Field(ge=-MAX_FLOAT, le=MAX_FLOAT)]
PositiveFloat = Annotated[float, Field(gt=0, le=MAX_FLOAT)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=MAX_FLOAT)]
PositiveFloats = Annotated[tuple[PositiveFloat, ...], BeforeValidator(freeze)]
MomentDecay = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """Common behaviour of all sections: strict types, unknown keys refused, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="after")
    @classmethod
    def _freeze(cls, value: Any) -> Any:
        return FrozenDict(value) if isinstance(value, dict) else value

    @property
    def changed(self) -> set[str]:
        """Names of the fields that differ from their defaults; a resolved file sets all fields, so being set says nothing."""
        return {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
