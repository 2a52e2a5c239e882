"""A context around the tiny decoder."""

from __future__ import annotations

import functools

import pytest
from tiny_context import tiny_context


@pytest.fixture
def make_context(tiny):
    """make_context(section={...}) -> Context over the tiny decoder, with changed configuration."""
    return functools.partial(tiny_context, tiny)
