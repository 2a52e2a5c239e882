"""A decoder that says what is written down, for tests of generation that work out by hand what comes."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np

from pe_rlhf_jax.config import SamplingConfig
from pe_rlhf_jax.models.decoder import unembed
from pe_rlhf_jax.models.layers import KVCache
from pe_rlhf_jax.rollout.decode import Sampler
from pe_rlhf_jax.rollout.generate import BLOCK, generate
from pe_rlhf_jax.types import PromptBatch

PAD = 30
LENGTH = BLOCK + 3
"""Not a multiple of a block."""


@dataclasses.dataclass
class Script:
    """A decoder that says, after token n, token n + 1 (or whatever `logits` says), and counts, on the host, what it does."""

    vocabulary: int = 40
    logits: np.ndarray | None = None
    steps: int = 0
    """Of decoding."""
    read: int = 0
    """Rows of prompts."""
    dtype = jnp.float32

    @property
    def config(self):
        return types.SimpleNamespace(vision=None, hidden_size=self.vocabulary)

    def new_cache(self, batch, slots):
        zeros = jnp.zeros((1, batch, 1, slots, 1))
        return KVCache(zeros, zeros)

    def apply(self, variables, tokens, mask, positions=None, cache=None, start=0, features=None, prompt=None):
        jax.debug.callback(self._read if positions is None else self._step, rows=len(tokens))
        following = 50.0 * jax.nn.one_hot(tokens + 1, self.vocabulary) if self.logits is None else self.logits
        return jnp.broadcast_to(following, (*tokens.shape, self.vocabulary)), cache

    def unembed(self, params, hidden):
        return unembed(params, hidden)

    def _step(self, rows):
        self.steps += 1

    def _read(self, rows):
        self.read += rows

    def program(self, ends=(), answers=1, **sampling):
        """Compiled generation: f(last token of each prompt, seed)."""
        variables = {"params": {"embed": jnp.eye(self.vocabulary)}}
        config = SamplingConfig(**{"max_new_tokens": LENGTH, **sampling})
        compiled = jax.jit(lambda prompts, key: generate(Sampler(self, config, ends, PAD, answers), variables, prompts, key))

        def run(last_tokens, seed=0):
            tokens = jnp.asarray(last_tokens)[:, None]
            out = jax.block_until_ready(compiled(PromptBatch(tokens, jnp.ones_like(tokens, bool)), jax.random.key(seed)))
            jax.effects_barrier()
            return jax.tree.map(np.asarray, out)

        return run
