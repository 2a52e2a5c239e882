"""Eight devices compute what one does, and share the work. In a process of its own: JAX fixes the number of CPU devices at its start."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import same_on_eight_devices

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})

import re
import tiny_decoder
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from pe_rlhf_jax.config import LoRAConfig, MeshConfig, SamplingConfig
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.rollout.decode import Sampler
from pe_rlhf_jax.rollout.generate import generate
from pe_rlhf_jax.rollout.score import response_logprobs, token_logprobs
from pe_rlhf_jax.sharding import ROWS, make_mesh, with_places
from pe_rlhf_jax.types import PromptBatch

assert jax.device_count() == 8
jax.config.update("jax_disable_most_optimizations", True)
model = tiny_decoder.make_model(tiny_decoder.TINY, LoRAConfig(r=3, lora_alpha=6.0))
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

# Chunks of logits stay where their rows are: no device gathers hidden states, each multiplies as many tokens of its 2 rows as a chunk has.
jax.config.update("jax_disable_most_optimizations", False)
mesh, head = make_mesh(MeshConfig(data=8)), jnp.ones((64, 128))
shapes = jax.ShapeDtypeStruct((16, 32, 64), jnp.float32), jax.ShapeDtypeStruct((16, 32), jnp.int32)
shapes = with_places(shapes, (NamedSharding(mesh, ROWS), NamedSharding(mesh, ROWS)))
with jax.set_mesh(mesh):
    text = jax.jit(jax.grad(lambda h, t: token_logprobs(h, t, lambda x: x @ head, 1.0, 8)[0].sum())).lower(*shapes).compile().as_text()
assert "all-gather" not in text
assert set(re.findall(r"f32\\[(\\d+),128\\][^=]* dot\\(", text)) == {{"8"}}
print("same")
"""

REFILL = """
import sys
sys.path.insert(0, {tests!r})

import dataclasses, re
import tiny_decoder
import jax
import numpy as np

from pe_rlhf_jax.config import LoRAConfig, MeshConfig, SamplingConfig
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.rollout.decode import Sampler
from pe_rlhf_jax.rollout.generate import generate
from pe_rlhf_jax.sharding import make_mesh, place, place_rows
from pe_rlhf_jax.types import PromptBatch

model = tiny_decoder.make_model(dataclasses.replace(tiny_decoder.TINY, vocab_size=44), LoRAConfig(r=3, lora_alpha=6.0))
lengths = np.arange(32) % 3 + 2
prompts = PromptBatch(np.arange(128).reshape(32, 4) % 29, np.arange(4) >= 4 - lengths[:, None])


def sampled(rows, variables, prompts):
    sampler = Sampler(model.decoder, SamplingConfig(max_new_tokens=11, max_num_seqs=rows), (0, 1, 2), 30)
    lowered = jax.jit(lambda v, p, k: generate(sampler, v, p, k)).lower(variables, prompts, jax.random.key(0))
    compiled = lowered.compile()
    return compiled(variables, prompts, jax.random.key(0)), compiled.as_text()


jax.config.update("jax_disable_most_optimizations", True)
one, _ = sampled(None, model.variables, prompts)
assert len(set(np.asarray(one.response_mask).sum(1))) > 4
for axes in (dict(data=8), dict(data=2, fsdp=2, tensor=2)):
    mesh = make_mesh(MeshConfig(**axes))
    jax.config.update("jax_disable_most_optimizations", axes != dict(data=8))
    with jax.set_mesh(mesh):
        many, text = sampled(16, place(model.variables, mesh), place_rows(prompts, mesh))
    assert many.response.sharding.shard_shape(many.response.shape)[0] == 32 // (8 if axes == dict(data=8) else 4)
    for name in ("response", "response_mask", "ended"):
        np.testing.assert_array_equal(getattr(one, name), getattr(many, name))
    np.testing.assert_allclose(one.logprobs, many.logprobs, atol=1e-5)
    if axes == dict(data=8):
        # Every device reads its own prompts and fills its own rows: what travels is how many rows have ended, and whether all have.
        sent = re.findall(r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\\(", text)
        assert sent and not any(re.search(r"\\[\\d", shape) for shape in sent), sent
        # The cache is never copied but for its beginning: 2 layers, 2 rows of a device, 15 slots, 2 heads of 4.
        copies = re.findall(r"= f32\\[2,(?:1,)?2,15,2,4\\]\\S* (?:copy|transpose)\\(", text)
        assert len(copies) <= 1, copies
    else:
        # Logits of a device: four rows, and half of the columns.
        products = set(re.findall(r"f32\\[4,(\\d+)\\][^=]* dot\\(", text))
        assert "22" in products and "44" not in products, products
        # Heads that `tensor` does not divide are whole on every device; layers, rows, heads, slots, width.
        for heads, found in ((2, 1), (4, 2), (3, 3)):
            decoder = Decoder(dataclasses.replace(tiny_decoder.TINY, num_heads=12, num_kv_heads=heads))
            with jax.set_mesh(mesh):
                cache = jax.jit(lambda: decoder.new_cache(8, 6))()
            for leaf in jax.tree.leaves(cache):
                assert leaf.sharding.shard_shape(leaf.shape) == (2, 2, found, 6, 4), (heads, leaf.sharding)
print("same")
"""

GATHERED = """
import sys
sys.path.insert(0, {tests!r})

import dataclasses
import tiny_decoder
import jax
import numpy as np

from pe_rlhf_jax.config import LoRAConfig, MeshConfig, SamplingConfig
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.plan import hlo
from pe_rlhf_jax.rollout.decode import Sampler
from pe_rlhf_jax.sharding import make_mesh, place, place_rows
from pe_rlhf_jax.training.rollouts import _respond
from pe_rlhf_jax.types import PromptBatch

model = tiny_decoder.make_model(tiny_decoder.TINY, LoRAConfig(r=3, lora_alpha=6.0))
prompts = PromptBatch(np.arange(32).reshape(8, 4) % 29, np.ones((8, 4), bool))
blocks = 4  # of 6 tokens, at most
ROLES = dict(lora=Role(lora=model.lora), full=Role(params=jax.tree.map(np.copy, model.params)))


def sampled(role, mesh, **sampling):
    sampler = Sampler(model.decoder, SamplingConfig(max_new_tokens=24, **sampling), (), 30)
    with jax.set_mesh(mesh):
        arguments = place(role, mesh), place(model.params, mesh), place_rows(prompts, mesh), jax.random.key(0)
        compiled = _respond.lower(sampler, *arguments).compile()
        return np.asarray(compiled(*arguments).response), hlo.communication(compiled.as_text(), mesh.size, (blocks,))


def weights(sent):
    return sum(one.bytes for one in sent.collectives if one.kind == "all-gather")


for role in ROLES.values():
    one, _ = sampled(role, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    assert one.shape == (8, 24) and len(set(map(tuple, one))) > 6
    for axes in (dict(data=1, fsdp=8), dict(data=2, fsdp=2, tensor=2)):
        mesh = make_mesh(MeshConfig(**axes))
        each, each_sent = sampled(role, mesh)
        once, once_sent = sampled(role, mesh, gather_weights=True)
        np.testing.assert_array_equal(each, one)
        np.testing.assert_array_equal(once, one)
        # 24 tokens and the prompt: 25 times the weights, or once; what is sent over `tensor` stays.
        assert 15 < weights(each_sent) / weights(once_sent) < 30, (axes, each_sent, once_sent)
print("same")
"""


@pytest.mark.parametrize("script", [SCRIPT, REFILL, GATHERED], ids=["batch", "refill", "gathered"])
def test_eight_devices_give_the_results_of_one(script):
    script = script.format(tests=str(Path(__file__).parents[1]))
    same_on_eight_devices(script)
