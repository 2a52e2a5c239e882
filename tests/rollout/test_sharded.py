"""Eight devices compute what one does, and share the work. In a process of its own: JAX fixes the number of CPU devices at its start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})

import re
import conftest
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from pe_rlhf_jax.config import LoRAConfig, SamplingConfig
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.rollout.decode import Sampler
from pe_rlhf_jax.rollout.generate import generate
from pe_rlhf_jax.rollout.score import response_logprobs, token_logprobs
from pe_rlhf_jax.types import PromptBatch

assert jax.device_count() == 8
jax.config.update("jax_disable_most_optimizations", True)
model = conftest.make_model(conftest.TINY, LoRAConfig(r=3, lora_alpha=6.0))
lengths = np.arange(8) % 3 + 2
prompts = PromptBatch(jnp.arange(32).reshape(8, 4) % 29, jnp.arange(4) >= 4 - lengths[:, None])
everywhere = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), P())
by_row = NamedSharding(everywhere.mesh, P("data"))


@jax.jit
def rollout_and_gradient(params, role, prompts, key):
    out = generate(Sampler(model.decoder, SamplingConfig(max_new_tokens=5), (0, 1, 2), 30), role.variables(params), prompts, key)

    def loss(role):
        logprobs, entropy = response_logprobs(model.decoder, params, role, out, 1.0, 16)
        return jnp.sum(jnp.where(out.response_mask, logprobs + entropy, 0.0))

    return out, jax.grad(loss)(role)


arguments = model.params, Role(lora=model.lora), prompts, jax.random.key(0)
one, one_gradient = rollout_and_gradient(*arguments)
many, many_gradient = rollout_and_gradient(*jax.device_put(arguments, (everywhere, everywhere, by_row, everywhere)))
assert len(one.response.sharding.device_set) == 1 and len(many.response.sharding.device_set) == 8
assert one.response_mask.sum() > 16 and len(set(map(tuple, np.asarray(one.response)))) > 6
for name in ("response", "response_mask", "ended"):
    np.testing.assert_array_equal(getattr(one, name), getattr(many, name))
np.testing.assert_allclose(one.logprobs, many.logprobs, atol=1e-5)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), one_gradient, many_gradient)

# Chunks of logits stay where their rows are: no device gathers hidden states, each multiplies its 2 rows' share of a chunk.
jax.config.update("jax_disable_most_optimizations", False)
shapes = (jax.ShapeDtypeStruct((16, 32, 64), jnp.float32, sharding=by_row), jax.ShapeDtypeStruct((16, 32), jnp.int32, sharding=by_row))
head = jnp.ones((64, 128))
text = jax.jit(jax.grad(lambda h, t: token_logprobs(h, t, lambda x: x @ head, 1.0, 64)[0].sum())).lower(*shapes).compile().as_text()
assert "all-gather" not in text
assert set(re.findall(r"f32\\[(\\d+),128\\][^=]* dot\\(", text)) == {{"8"}}
print("same")
"""


def test_eight_devices_give_the_results_of_one():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.endswith("same\n"), done.stderr[-4000:]
