"""Plain Python functions named in the configuration as `module:function`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pe_rlhf_jax.config import ConfigError
from pe_rlhf_jax.data import PromptExample, Split, as_read
from pe_rlhf_jax.hosts import once

_LARGEST = float(np.finfo(np.float32).max)


class FunctionError(RuntimeError):
    """A function of the user's failed, or returned something else than one finite number per completion; the message names it."""


TextFunction = Callable[..., Sequence[float]]
"""f(prompts, completions, **columns) -> one float per completion."""


def load_function(spec: str) -> TextFunction:
    """The function that `module:function` names. Raises ConfigError saying what is missing."""
    module, colon, name = spec.partition(":")
    if not colon or not module or not name:
        raise ConfigError(f"expected `module:function`, found {spec!r}")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{spec}: cannot import {module} ({error}); is its folder on PYTHONPATH?") from error
    except Exception as error:  # whatever the user's module does
        raise ConfigError(f"{spec}: importing {module} failed: {type(error).__name__}: {error}") from error
    function = getattr(found, name, None)
    if function is None:
        raise ConfigError(f"{spec}: the module {module} has no {name}")
    if not callable(function):
        raise ConfigError(f"{spec}: {name} is not a function")
    return function


def column_names(split: Split | None) -> list[str]:
    """The other keys that any of the prompts has: a function is called with all of them, whatever the rows of a batch have."""
    parts = [] if split is None else [split.train, split.validation]
    return sorted({name for part in parts for prompt in as_read(part) for name in prompt.columns})


def columns_of(prompts: Sequence[PromptExample], names: Sequence[str]) -> dict[str, list[Any]]:
    """The prompts' other keys as columns, None where a row has no such key."""
    return {name: [prompt.columns.get(name) for prompt in prompts] for name in names}


def call_function(
    spec: str,
    function: TextFunction,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> list[float]:
    """Calls it and checks the answer: one finite float per completion. Raises FunctionError that names the function.

    It is called once, on the first of several hosts: what it says may depend on the other completions, or on the call.
    """
    return once(lambda: _called(spec, function, prompts, completions, columns))


def _called(
    spec: str,
    function: TextFunction,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> list[float]:
    try:
        # Copies: a function may change what it is given.
        values = list(function(list(prompts), list(completions), **{name: list(column) for name, column in columns.items()}))
    except Exception as error:
        raise FunctionError(f"{spec} failed on {len(completions)} completions: {type(error).__name__}: {error}") from error
    if len(values) != len(completions):
        raise FunctionError(f"{spec} returned {len(values)} values for {len(completions)} completions")
    for index, value in enumerate(values):
        try:
            good = math.isfinite(value) and abs(value) <= _LARGEST
        except (TypeError, OverflowError):  # no number, or a whole one beyond any float
            good = False
        if not good:
            found = f"{spec} returned {value!r} for completion {index}: {completions[index][:80]!r}"
            raise FunctionError(f"{found}; expected a finite number (of float32)")
    return [float(value) for value in values]
