"""What every section of a configuration is."""

from __future__ import annotations

import pydantic


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says where, what was found and what was expected."""


class Section(pydantic.BaseModel):
    """Base of every section: no unknown keys, no silent conversions except from int to float, no NaN, immutable."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False)
