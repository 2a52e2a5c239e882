"""Optimizer and learning-rate schedule."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pe_rlhf_jax.config.section import Section


class OptimizerConfig(Section):
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "adafactor"] = Field("adamw", description="Update rule.")
    learning_rate: float = Field(3e-4, gt=0, description="Peak learning rate; of RL, where none is named, 1e-4.")
    head_learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak rate of a score or value head; null: as the others. Hidden states are large and much alike, so a rate that suits "
        "adapters can be high for a head: the scores of all rows then swing together.",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="Decay to 0 over the stage's updates, or none.")
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="Share of the updates over which the rate rises linearly from 0.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay, times the learning rate; not of biases and norms.")
    b1: float = Field(0.9, ge=0, lt=1, description="AdamW's first-moment decay.")
    b2: float = Field(0.999, ge=0, lt=1, description="AdamW's second-moment decay.")
    eps: float = Field(1e-5, gt=0, description="AdamW's epsilon.")
    mu_dtype: Literal["float32", "bfloat16"] = Field("float32", description="Storage of AdamW's first moment; the second is float32.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Clip the global gradient norm to this; null for no clipping.")
