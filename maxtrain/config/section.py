"""What all sections of a config share: strict types, immutability, and the types their fields are built from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator


def freeze(value: Any) -> Any:
    """Lists as tuples: YAML has no tuple, a hashable section needs one."""
    return tuple(freeze(item) for item in value) if isinstance(value, list) else value


class FrozenDict(dict):
    """A mapping that is hashed by its items, so that a section holding one stays hashable."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))

    def __reduce__(self) -> tuple:
        return FrozenDict, (dict(self),)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("a config mapping cannot be changed")


Strings = Annotated[tuple[str, ...], BeforeValidator(freeze)]
PositiveFloats = Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(freeze)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
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
