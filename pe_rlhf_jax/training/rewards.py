"""What RL maximises: a weighted sum of reward models and plain functions, with its penalties, scale and clip. Letter: B episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pe_rlhf_jax.config import RLConfig
from pe_rlhf_jax.data import PromptExample, fill
from pe_rlhf_jax.hosts import fetch
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.rollout.score import response_scores
from pe_rlhf_jax.sharding import row_groups
from pe_rlhf_jax.training.context import Context
from pe_rlhf_jax.training.functions import TextFunction, call_function, column_names, columns_of, load_function
from pe_rlhf_jax.training.images import ImageEncoder
from pe_rlhf_jax.training.micro_batches import in_micro_batches
from pe_rlhf_jax.training.rollouts import texts
from pe_rlhf_jax.training.shared_rows import answers_in_a_row
from pe_rlhf_jax.types import PyTree, Rollout


class RewardModel(NamedTuple):
    """A reward model ready to score: this run's on the shared backbone, or one with a backbone of its own."""

    decoder: Decoder
    backbone: PyTree
    role: Role
    encoder: ImageEncoder | None = None
    """Where it sees pictures otherwise than the policy, whose features it cannot use then."""


class RewardStatistics(flax.struct.PyTreeNode):
    """Running mean and variance of all scores so far (Welford's, in the batched form of Chan et al. 1979)."""

    count: Float[Array, ""]
    mean: Float[Array, ""]
    squares: Float[Array, ""]
    """Sum of squared deviations from the mean."""

    @classmethod
    def new(cls) -> RewardStatistics:
        zeros = jnp.zeros((3, 1), jnp.float32)
        return cls(zeros[0][0], zeros[1][0], zeros[2][0])

    def with_batch(self, scores: Float[Array, " B"]) -> RewardStatistics:
        """The statistics after another batch; a batch with a number that is not finite leaves them as they are."""
        n = self.count + len(scores)
        mean = jnp.mean(scores)
        delta = mean - self.mean
        squares = self.squares + jnp.sum(jnp.square(scores - mean)) + delta**2 * self.count * len(scores) / n
        found = RewardStatistics(n, self.mean + delta * len(scores) / n, squares)
        return jax.tree.map(lambda new, old: jnp.where(jnp.isfinite(squares), new, old), found, self)

    def scaled(self, scores: Float[Array, " B"]) -> Float[Array, " B"]:
        """Scores minus the mean, over the standard deviation; scores that never varied only lose their mean."""
        variance = self.squares / jnp.maximum(self.count, 1.0)
        varied = variance > 1e-12 * (variance + jnp.square(self.mean))  # more than the mean was rounded by
        return (scores - self.mean) * jnp.where(varied, jax.lax.rsqrt(variance), 1.0)


class Scores(NamedTuple):
    """What a rollout earned."""

    total: Float[np.ndarray, " B"]
    """The weighted sum, with penalties."""
    terms: dict[str, Float[np.ndarray, " B"]]
    """Each reward by its name, as it came and before its weight."""


class Rewards:
    """Scores rollouts by `rl.rewards`.

    Args:
        models: the reward models by what `rl.rewards[i].model` says.

    Raises:
        ConfigError: a function cannot be imported.
    """

    def __init__(self, context: Context, models: Mapping[str, RewardModel]):
        self.context, self.config, self.models = context, context.config.rl, dict(models)
        self.functions: dict[str, TextFunction] = {
            term.function: load_function(term.function) for term in self.config.rewards if term.function is not None
        }
        self.columns = column_names(context.data.prompts) if self.functions else []

    def __call__(self, rollout: Rollout, prompts: Sequence[PromptExample], group: int = 1, at_once: int | None = None) -> Scores:
        """Scores the responses to `prompts`, one for each row that is asked about; further rows of the rollout are fillers.

        Args:
            group: so many neighbouring rows answer one prompt.
            at_once: rows that a reward model computes at once, of which there are a multiple; null for all.

        Raises:
            FunctionError: a function failed, or did not return one finite number for each completion; the message names it.
        """
        count = len(prompts)
        # Models first, and nobody waits for them: the devices work while texts are decoded and functions called.
        models = [term for term in self.config.rewards if term.function is None]
        scored = {term.name: self._model(str(term.model), rollout, prompts, group, at_once) for term in models}
        completions = texts(self.context, rollout)[:count] if self.functions else []
        asked, columns = [prompt.text for prompt in prompts], columns_of(prompts, self.columns)
        found: dict[str, Any] = {
            term.name: call_function(term.function, self.functions[term.function], asked, completions, columns)
            for term in self.config.rewards
            if term.function is not None
        }
        found |= {name: fetch(scores)[:count] for name, scores in scored.items()}
        terms = {term.name: np.asarray(found[term.name], np.float32) for term in self.config.rewards}
        with np.errstate(over="ignore", invalid="ignore"):  # `not_finite` names it
            total = sum(
                (np.float32(term.weight) * terms[term.name] for term in self.config.rewards if term.weight), np.zeros(count, np.float32)
            )
            return Scores(penalised(self.config, total, rollout), terms)

    def _model(self, name: str, rollout: Rollout, prompts: Sequence[PromptExample], group: int, at_once: int | None) -> Float[Array, " B"]:
        model = self.models[name]
        if model.encoder is not None:
            rollout = rollout.replace(images=self.context.rows(model.encoder(fill(prompts, len(rollout.prompt)))))
        return _score(model.decoder, group, at_once, model.role, model.backbone, rollout)


def not_finite(config: RLConfig, scores: Scores) -> tuple[int, str]:
    """Of how many responses a reward that is trained on, or their sum, is not a finite number, and a sentence that names these rewards.

    A reward may be so where the total is not: the bound on responses without an end takes the place of NaN.
    """
    terms = {f"the reward {term.name!r}": ~np.isfinite(scores.terms[term.name]) for term in config.rewards if term.weight}
    bad = {name: rows for name, rows in terms.items() if np.any(rows)} or {"the sum of the rewards": ~np.isfinite(scores.total)}
    said = [f"{name} is not a finite number for {np.sum(rows)} of {len(rows)} responses" for name, rows in bad.items()]
    return int(np.sum(np.any(list(bad.values()), axis=0))), ", ".join(said)


def penalised(config: RLConfig, total: Float[np.ndarray, " B"], rollout: Rollout) -> Float[np.ndarray, " B"]:
    """At most `missing_eos_penalty` where a response has no end, and the length penalty off every score."""
    count = len(total)
    if config.missing_eos_penalty is not None:
        total = np.where(fetch(rollout.ended)[:count], total, np.fmin(total, np.float32(config.missing_eos_penalty)))
    if config.length_penalty:
        lengths = np.sum(fetch(rollout.response_mask)[:count], axis=1)
        total = total - np.float32(config.length_penalty) * np.maximum(lengths - config.length_target, 0).astype(np.float32)
    return total


def for_learning(config: RLConfig, total: Float[Array, " B"], statistics: RewardStatistics) -> tuple[Float[Array, " B"], RewardStatistics]:
    """Scores as learning sees them, scaled and clipped as configured, and the statistics after this batch."""
    if config.normalize_rewards:
        statistics = statistics.with_batch(total)
        total = statistics.scaled(total)
    if config.reward_clip is not None:
        total = jnp.clip(total, -config.reward_clip, config.reward_clip)
    return total, statistics


@jax.jit(static_argnums=(0, 1, 2))
def _score(decoder: Decoder, group: int, at_once: int | None, role: Role, backbone: PyTree, rollout: Rollout) -> Float[Array, " B"]:
    """The score head at each response's last token: the logit, never a probability."""

    def forward(part: Rollout) -> Float[Array, " B"]:
        answers = answers_in_a_row(decoder.config, part, group, row_groups())
        return response_scores(decoder, backbone, role, part, answers)

    return in_micro_batches(forward, rollout, at_once)
