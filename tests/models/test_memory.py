"""What the compiler says about memory, without running anything: gradients of the adapters cost no copy of the backbone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from deep_backbone import BACKBONE

from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.models.decoder import Decoder, unembed
from pe_rlhf_jax.models.roles import Role


@pytest.mark.usefixtures("quick_compile")  # the same bytes as with the optimizer
def test_adapter_gradients_hold_no_buffer_as_large_as_the_backbones():
    """A step of clipped gradient descent (clipping reads every gradient before any is used) in float32 with full remat."""
    decoder = Decoder(BACKBONE, LoRAConfig(r=4), remat="full")
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    shapes = jax.eval_shape(decoder._init, jax.random.key(0))

    def temporary(role: Role) -> int:
        def loss(role, backbone, tokens):
            variables = role.variables(backbone)
            hidden, _ = decoder.apply(variables, tokens, jnp.ones_like(tokens, bool))
            logprobs = jax.nn.log_softmax(unembed(variables["params"], hidden[:, :-1]))
            return -jnp.mean(jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1))

        def step(role, backbone, tokens):
            gradients = jax.grad(loss)(role, backbone, tokens)
            norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradients)))
            return jax.tree.map(lambda w, g: w - 0.1 * g / jnp.maximum(norm, 1.0), role, gradients)

        compiled = jax.jit(step, donate_argnums=0).lower(role, shapes["params"], tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    adapters = temporary(Role(lora=shapes["lora"]))
    everything = temporary(Role(params=shapes["params"]))
    backbone = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes["params"]))
    assert adapters < backbone / 4
    # 0.95: the adapters' own gradients count on one side only, and XLA finds a place to reuse for the embedding's (2% here).
    assert everything - adapters >= 0.95 * backbone
