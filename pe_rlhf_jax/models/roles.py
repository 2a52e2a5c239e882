"""Roles: what turns the one backbone into a policy, a reference, a reward model or a value model."""

from __future__ import annotations

from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from pe_rlhf_jax.config import ConfigError, LoRAConfig
from pe_rlhf_jax.models.lora import merge
from pe_rlhf_jax.types import PyTree

Tuning = Literal["lora", "full"]


TOWER = "vision"


class Role(flax.struct.PyTreeNode):
    """An adapter or none, a head or none, and, after full tuning only, parameters of its own in place of the shared backbone's.

    A vision tower is no part of these: it stays the backbone's, frozen, so that pictures are encoded once for all roles.
    `Role()` is the backbone itself. A role is also the tree that gradients are taken of; `trained` leaves in it what is trained.
    """

    lora: PyTree | None = None
    head: PyTree | None = None
    params: PyTree | None = None

    def variables(self, backbone: PyTree) -> PyTree:
        """Variables for `Decoder.apply`."""
        variables = {"params": backbone if self.params is None else {**_tower(backbone), **self.params}}
        return variables if self.lora is None else {**variables, "lora": self.lora}

    def trained(self, tuning: Tuning) -> Role:
        """The part that is trained: adapter and head, or parameters and head."""
        return self.replace(params=None) if tuning == "lora" else self.replace(lora=None)

    def frozen(self, tuning: Tuning) -> Role:
        """The part that stays as it is when training starts from this role: parameters of its own under an adapter, or nothing."""
        return Role(params=self.params) if tuning == "lora" else Role()

    def join(self, other: Role) -> Role:
        """Both parts together again."""
        mine, theirs = (self.lora, self.head, self.params), (other.lora, other.head, other.params)
        return Role(*(a if a is not None else b for a, b in zip(mine, theirs, strict=True)))

    def tuned(self, tuning: Tuning, backbone: PyTree, fresh_lora: PyTree, config: LoRAConfig) -> Role:
        """A copy of this role as a start for training: with an adapter (its own or `fresh_lora`), or with merged float32 parameters.

        A role with a head predicts no tokens, so it has no copy of the matrix that does only that.

        Raises:
            ConfigError: full tuning leaves the vision tower as it is, so it cannot start from an adapter on it.
        """
        head = jax.tree.map(jnp.copy, self.head)
        if tuning == "lora":
            lora = jax.tree.map(jnp.copy, fresh_lora if self.lora is None else self.lora)
            return Role(lora=lora, head=head, params=self.params)
        if self.lora is not None and TOWER in self.lora:
            raise ConfigError("full tuning cannot start from an adapter on the vision tower: it is the backbone's; use tuning: lora")
        source = backbone if self.params is None else self.params
        left_out = {TOWER} if self.head is None else {TOWER, "lm_head"}
        tuned = {name: tree for name, tree in source.items() if name not in left_out}
        params = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), tuned)
        return Role(head=head, params=params if self.lora is None else merge(params, self.lora, config))


def _tower(backbone: PyTree) -> PyTree:
    return {name: tree for name, tree in backbone.items() if name == TOWER}
