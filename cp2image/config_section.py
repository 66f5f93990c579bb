"""What every section of a config is made of: its base and its kinds of numbers. Ground floor."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


Count = Annotated[int, Field(ge=0), BeforeValidator(_refuse_bool)]
Positive = Annotated[int, Field(gt=0), BeforeValidator(_refuse_bool)]
Amount = Annotated[float, Field(gt=0), BeforeValidator(_refuse_bool)]
NotNegative = Annotated[float, Field(ge=0), BeforeValidator(_refuse_bool)]
Share = Annotated[float, Field(ge=0, le=1), BeforeValidator(_refuse_bool)]
Name = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]


class Section(BaseModel):
    """A part of the config that refuses unknown keys and is never changed after reading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True
    )
