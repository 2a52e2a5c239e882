"""The loop that supervised fine-tuning and reward modelling share: batch, update, metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from pe_rlhf_jax import hosts
from pe_rlhf_jax.config import RewardConfig, SFTConfig
from pe_rlhf_jax.data import BatchOrder, FamilyOrder, as_read, families
from pe_rlhf_jax.training.context import Context, peak_memory_gib
from pe_rlhf_jax.training.optimizer import learning_rate, make_optimizer
from pe_rlhf_jax.training.step import Loss, applied, make_step, stop_if_not_finite
from pe_rlhf_jax.types import PyTree, TrainState

Metrics = dict[str, float]
SHARE = 0.25
"""Of the shorter of two texts, with how much of it both begin in a family: less would save little."""


def updates(
    context: Context,
    stage: str,
    config: SFTConfig | RewardConfig,
    state: TrainState,
    frozen: PyTree,
    examples: Sequence[Any],
    collate: Callable[[list[Any]], PyTree],
    loss: Loss,
    total: Callable[[PyTree], Array],
    evaluate: Callable[[TrainState], Metrics],
) -> Iterator[tuple[TrainState, Metrics]]:
    """Yields the state and its metrics after each update, from where `state` stands; every `evaluate_every` with held-out figures.

    What happens at a step depends on the seed and the step alone, so that a run continued from a checkpoint is the same run.
    `perf/peak_memory_gib` is the fullest host's: all tell theirs at the first step and with held-out figures. `lr` is what the optimizer
    takes, whose schedule does not count skipped updates.

    Raises:
        NonFiniteError: too many updates in a row were skipped; the last of them is yielded before.
    """
    optimizer = make_optimizer(config.optimizer, config.steps, config.tuning)
    step = make_step(loss, total, optimizer, config.micro_batch_size)
    rate = learning_rate(config.optimizer, config.steps)
    order, key = _order(context, config, examples), context.key(stage)

    def made(index: int) -> PyTree:
        """The batch of a step, on the host: the devices hold one at a time."""
        rows = [examples[i] for i in order(index)]
        return context.seen(collate(rows), rows)

    first, peak = int(state.step), 0.0
    stop_if_not_finite(state, context.config.run.max_nonfinite, stage)
    ahead: Any = made(first) if first < config.steps else None
    for index in range(first, config.steps):
        began = time.perf_counter()
        if isinstance(ahead, Exception):
            raise ahead
        batch, now_rate = ahead, float(rate(applied(state)))
        state, metrics = step(state, frozen, context.rows(batch), jax.random.fold_in(key, index))
        state = state.replace(step=state.step + 1)
        if index + 1 < config.steps:  # while the device computes
            try:
                ahead = made(index + 1)
            except Exception as error:  # such as a damaged picture: raised at its own step, when this one is saved
                if hosts.several():
                    raise  # the others wait for this one, now
                ahead = error
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        seconds = time.perf_counter() - began
        tokens = float(np.sum(batch.mask))
        values |= {"lr": now_rate, "time/step": seconds, "perf/tokens_per_s": tokens / seconds}
        ends = int(state.skipped_in_a_row) >= context.config.run.max_nonfinite  # with an error: not early, by what is held out
        evaluates = not ends and ((index + 1) % config.evaluate_every == 0 or index + 1 == config.steps)
        peak = max(peak, peak_memory_gib())
        if index == first or evaluates:  # asking the other hosts at every step would hold up short ones
            peak = hosts.largest(peak)
        values |= {"perf/padding": 1 - tokens / batch.mask.size, "perf/peak_memory_gib": peak}
        if evaluates:
            values |= {f"eval/{name}": value for name, value in evaluate(state).items()}
        yield state, values
        stop_if_not_finite(state, context.config.run.max_nonfinite, stage)  # now that the row is written


def _order(context: Context, config: SFTConfig | RewardConfig, examples: Sequence[Any]) -> BatchOrder | FamilyOrder:
    """Which examples make up the batch of a step."""
    data, seed, read = context.config.data, context.config.run.seed, as_read(examples)
    if data.group_by_prefix and isinstance(config, RewardConfig):
        return FamilyOrder(families([example.begins for example in read], SHARE, max(2, config.batch_size // 4)), config.batch_size, seed)
    return BatchOrder(len(read), config.batch_size, seed, [example.length for example in read] if data.group_by_length else None)
