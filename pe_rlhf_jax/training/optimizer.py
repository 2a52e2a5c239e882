"""Optimizers in which everything that is not trained is frozen by construction."""

from __future__ import annotations

import jax
import optax

from pe_rlhf_jax.config import OptimizerConfig
from pe_rlhf_jax.models.roles import Tuning
from pe_rlhf_jax.types import PyTree


def learning_rate(config: OptimizerConfig, updates: int) -> optax.Schedule:
    """Linear warm-up from 0, then constant, linear or cosine to 0 over `updates` in all."""
    warmup = round(config.warmup_ratio * updates)
    rest = max(updates - warmup, 1)
    decay = {
        "constant": optax.constant_schedule(config.learning_rate),
        "linear": optax.linear_schedule(config.learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, rest),
    }[config.schedule]
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), decay], [warmup])


def make_optimizer(config: OptimizerConfig, updates: int, tuning: Tuning) -> optax.GradientTransformation:
    """The update rule for adapters and heads (or parameters and heads), and zero for every other leaf.

    Gradients are only ever taken of what is trained; the partition is the guard behind that: a frozen leaf that reaches the optimizer
    gets no state and a zero update. (`optax.masked` alone would pass its gradient through as an update.)
    """
    schedule = learning_rate(config, updates)
    if config.name == "adamw":
        decays = {"b1": config.b1, "b2": config.b2, "weight_decay": config.weight_decay}
        rule = optax.adamw(schedule, eps=config.eps, mu_dtype=config.mu_dtype, mask=_decays, **decays)
    else:
        # Not in proportion to a parameter's size: what starts at 0, a factor of every adapter and some heads, would hardly ever move.
        # The rate comes last, for the decay as well: optax.adafactor's own does not multiply it.
        rule = optax.chain(
            optax.adafactor(
                None, multiply_by_parameter_scale=False, weight_decay_rate=config.weight_decay or None, weight_decay_mask=_decays
            ),
            optax.scale_by_learning_rate(schedule, flip_sign=False),
        )
    if config.head_learning_rate is not None:
        rule = optax.chain(rule, _scale_head(config.head_learning_rate / config.learning_rate))
    if config.max_grad_norm is not None:
        rule = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), rule)
    return optax.partition({"train": rule, "freeze": optax.set_to_zero()}, lambda tree: labels(tree, tuning))


def _decays(tree: PyTree) -> PyTree:
    """Whether a leaf decays: matrices and tables do, biases and the scales of norms do not (as in transformers' Trainer)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not str(getattr(path[-1], "key", "")).endswith(("bias", "scale")), tree)


def _scale_head(factor: float) -> optax.GradientTransformation:
    def scaled(updates: PyTree, _: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, x: factor * x if "head" in _names(path) else x, updates)

    return optax.stateless(scaled)


def labels(tree: PyTree, tuning: Tuning) -> PyTree:
    """`train` or `freeze` for every leaf, by the collection it lies in: `head` always trains, then `lora` or `params`."""
    trained = {"head", "lora" if tuning == "lora" else "params"}

    def label(path: tuple, _: jax.Array) -> str:
        return "train" if _names(path) & trained else "freeze"

    return jax.tree_util.tree_map_with_path(label, tree)


def _names(path: tuple) -> set[str]:
    return {str(getattr(key, "key", getattr(key, "name", ""))) for key in path}
