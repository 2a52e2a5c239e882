"""What all tests share: the CPU as device, and tiny decoders."""

from __future__ import annotations

import dataclasses
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from tiny_decoder import TINY, Model, make_model

from pe_rlhf_jax.config import LoRAConfig


@pytest.fixture
def quick_compile():
    """Halves compile times by skipping XLA's optimizer; for tests that hold for any compilation and run hardly any arithmetic."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def tiny() -> Model:
    """Grouped-query attention, tied embeddings, adapters on every linear layer."""
    return make_model(TINY, LoRAConfig(r=3, lora_alpha=6.0))


@pytest.fixture(scope="session")
def untied() -> Model:
    """The same with a head of its own, and adapters on attention only."""
    return make_model(dataclasses.replace(TINY, tie_word_embeddings=False), LoRAConfig(r=2, lora_alpha=4.0, target_modules="attention"))
