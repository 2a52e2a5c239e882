"""The arrays that travel between the parts. Letters: B batch, T tokens, P prompt tokens (left-padded), R response tokens.

A mask is True where a position holds a real token. Token ids at masked positions are the pad id and never matter. What a batch says of
pictures is None for models of text.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
from jaxtyping import Bool, Float, Int

PyTree = Any


class Images(flax.struct.PyTreeNode):
    """Pictures of a batch's rows: features, or pixels where they cannot be encoded once for all roles. Letters as in `models.vlm`."""

    features: Float[jax.Array, "B M F E"] | None = None
    """What the frozen tower makes of them."""
    pixels: Float[jax.Array, "B M H W 3"] | None = None
    """Where adapters change the tower: each role encodes them itself."""


class Batch(flax.struct.PyTreeNode):
    """Rows for supervised fine-tuning, right-padded."""

    tokens: Int[jax.Array, "B T"]
    mask: Bool[jax.Array, "B T"]
    target_mask: Bool[jax.Array, "B T"]
    """True at tokens that are learned (the response and its end token)."""
    ends: Int[jax.Array, "B T"] | None = None
    """Where the examples of a row end, as `models.visibility` has it; None where each has a row of its own."""
    prompt_mask: Bool[jax.Array, "B T"] | None = None
    """True at the prompt's tokens, among which pictures have their places; for models that see."""
    images: Images | None = None
    """None where no row has a picture."""


class PreferenceBatch(flax.struct.PyTreeNode):
    """Preference pairs, right-padded; both sides end with the end token.

    A pair is n rows: one, in which each side goes on from the beginning that both share, or two, chosen and rejected. Or rows hold up to
    E pairs each: then n is 1, B counts rows, and `margin` and `weight` are of B and E.
    """

    tokens: Int[jax.Array, "B n T"]
    mask: Bool[jax.Array, "B n T"]
    last: Int[jax.Array, "B n 2E/n"]
    """Where in each row its sides end, chosen first."""
    ends: Int[jax.Array, "B n T"] | None
    """Where n is 1: how far each token's texts go, as `models.visibility` has it."""
    margin: Float[jax.Array, "B ..."]
    """How much better the chosen side was rated; 0 where unknown."""
    weight: Float[jax.Array, "B ..."]
    """1 for a real pair, 0 for one that only fills a row, or the last batch of an evaluation."""
    prompt_mask: Bool[jax.Array, "B n T"] | None = None
    """As in `Batch`: both sides have one prompt."""
    images: Images | None = None


class LabelBatch(flax.struct.PyTreeNode):
    """Responses with 0/1 labels, right-padded; each ends with the end token. With `ends` rows hold up to E of them."""

    tokens: Int[jax.Array, "B T"]
    mask: Bool[jax.Array, "B T"]
    last: Int[jax.Array, "B E"]
    """Where in each row its responses end; E is 1 without `ends`."""
    label: Float[jax.Array, "B ..."]
    """1 for a good response, 0 for a bad one."""
    weight: Float[jax.Array, "B ..."]
    """As in `PreferenceBatch`; in training it may hold class weights too."""
    ends: Int[jax.Array, "B T"] | None = None
    """As in `Batch`."""
    prompt_mask: Bool[jax.Array, "B T"] | None = None
    """As in `Batch`."""
    images: Images | None = None


class PromptBatch(flax.struct.PyTreeNode):
    """Prompts, left-padded."""

    tokens: Int[jax.Array, "B P"]
    mask: Bool[jax.Array, "B P"]
    images: Images | None = None


class Rollout(flax.struct.PyTreeNode):
    """Prompts and the responses sampled for them."""

    prompt: Int[jax.Array, "B P"]
    prompt_mask: Bool[jax.Array, "B P"]
    response: Int[jax.Array, "B R"]
    response_mask: Bool[jax.Array, "B R"]
    """True up to and including the first end token."""
    logprobs: Float[jax.Array, "B R"]
    """Log-probability of each response token under the sampler, at the sampling temperature; 0 where masked."""
    ended: Bool[jax.Array, " B"]
    """Whether the response holds an end token."""
    images: Images | None = None
    """Of the prompts: encoded for sampling, and used by every role and every epoch after it."""


class Estimates(flax.struct.PyTreeNode):
    """How much better than expected each token was. Without a value model `values` and `returns` are zeros."""

    values: Float[jax.Array, "B R"]
    advantages: Float[jax.Array, "B R"]
    returns: Float[jax.Array, "B R"]
    """What the value model is to say."""


class Experience(flax.struct.PyTreeNode):
    """A rollout with everything that learning needs; fixed while a batch is learned."""

    rollout: Rollout
    old_logprobs: Float[jax.Array, "B R"]
    ref_logprobs: Float[jax.Array, "B R"]
    rewards: Float[jax.Array, "B R"] | None
    """Of tokens, where the value model says its values only when it learns; estimates are made of both."""
    estimates: Estimates | None
    """None there."""


class TrainState(flax.struct.PyTreeNode):
    """What training changes, and nothing else."""

    step: Int[jax.Array, ""]
    trainable: PyTree
    """Adapters and heads, or with full tuning the parameters themselves."""
    opt_state: PyTree
    skipped: Int[jax.Array, ""]
    """Updates skipped because the loss, a gradient or, in RL, a score was not finite."""
    skipped_in_a_row: Int[jax.Array, ""]
