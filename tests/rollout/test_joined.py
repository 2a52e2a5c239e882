"""Decoding with joined weights: the same responses as with the layers' own matrices."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_decoder
from jax.sharding import AbstractMesh

from pe_rlhf_jax import sharding
from pe_rlhf_jax.config import LoRAConfig, SamplingConfig
from pe_rlhf_jax.models.joined import join
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.rollout import decode
from pe_rlhf_jax.rollout.decode import Sampler
from pe_rlhf_jax.rollout.generate import generate
from pe_rlhf_jax.sharding import AXES
from pe_rlhf_jax.training import rollouts
from pe_rlhf_jax.types import PromptBatch

PROMPTS, PROMPT, LENGTH = 6, 5, 7


def sampled(model, decoder, **settings):
    rng = np.random.default_rng(0)
    mask = np.arange(PROMPT) >= rng.integers(0, PROMPT, (PROMPTS, 1))
    prompts = PromptBatch(jnp.asarray(rng.integers(3, 30, (PROMPTS, PROMPT))), jnp.asarray(mask))
    sampler = Sampler(decoder, SamplingConfig(max_new_tokens=LENGTH, **settings), (0,), 0)
    return jax.jit(lambda variables: generate(sampler, variables, prompts, jax.random.key(1)))(model.variables)


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(
    ("changes", "lora", "settings"),
    [
        ({}, {"r": 3, "lora_alpha": 7.0}, {}),
        ({"qkv_bias": True, "qk_norm": True}, {"target_modules": r"attention\.[qv]_proj|mlp\.up_proj"}, {"max_num_seqs": 4}),
        ({"gated_mlp": False, "o_bias": True, "mlp_bias": True, "sliding_window": 4}, {"use_rslora": True}, {}),
        ({"post_norms": True}, {"target_modules": r"mlp\.down_proj"}, {"temperature": 0.0}),
    ],
    ids=["all-linear", "some-biases-refill", "no-gate-windows", "down-only"],
)
def test_responses_are_those_of_the_layers_own_matrices(changes, lora, settings):
    model = tiny_decoder.make_model(dataclasses.replace(tiny_decoder.TINY, **changes), LoRAConfig(**lora))
    apart = sampled(model, model.decoder, join_weights=False, **settings)
    joined = sampled(model, model.decoder, join_weights=True, **settings)
    np.testing.assert_array_equal(joined.response, apart.response)
    np.testing.assert_allclose(joined.logprobs, apart.logprobs, atol=2e-5)  # sums in another order
    bare = sampled(dataclasses.replace(model, lora=jax.tree.map(jnp.zeros_like, model.lora)), model.decoder, join_weights=True, **settings)
    assert np.max(np.abs(bare.logprobs - joined.logprobs)) > 1e-3, "the adapter does something"


def test_a_layer_has_four_products_and_its_adapters_four_pairs(tiny):
    decoder, variables = join(tiny.decoder, tiny.variables)
    layers, adapters = variables["params"]["layers"], variables["lora"]["layers"]
    for tree in (layers, adapters):
        assert {name for part in ("attention", "mlp") for name in tree[part]} >= {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
        assert not {name for part in ("attention", "mlp") for name in tree[part]} & {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert adapters["attention"]["qkv_proj"]["a"].shape[-1] == 3 * tiny.decoder.lora.r
    assert decoder.joined and decoder.lora.scale == 1


def test_policies_of_full_tuning_are_joined_in_the_type_that_they_are_computed_in(tiny):
    decoder, policy = dataclasses.replace(tiny.decoder, dtype=jnp.bfloat16), Role(params=tiny.params)
    prompts = PromptBatch(jnp.full((2, PROMPT), 5), jnp.ones((2, PROMPT), bool))

    def dtypes(join_weights):
        sampler = Sampler(decoder, SamplingConfig(max_new_tokens=LENGTH, join_weights=join_weights), (0,), 0)
        jaxpr = jax.make_jaxpr(rollouts._respond, static_argnums=0)(sampler, policy, tiny.params, prompts, jax.random.key(0))
        shapes = {value.aval.shape: value.aval.dtype for value in matrices(jaxpr.jaxpr)}
        return shapes[(tiny.config.num_layers, 16, 48)]  # gate and up

    assert dtypes(True) == jnp.bfloat16
    with pytest.raises(KeyError):
        dtypes(False)


def matrices(jaxpr):
    """What the loops of a program read."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            yield from equation.invars
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from matrices(inner)


def test_quantized_matrices_stay_apart(tiny):
    quantized = dataclasses.replace(tiny.decoder, config=dataclasses.replace(tiny.decoder.config, quantization="int8"))
    with pytest.raises(ValueError, match="expected a backbone in floating point, found one in int8"):
        join(quantized, tiny.variables)


@pytest.mark.parametrize(
    ("nvidia", "wanted", "joined"), [(True, None, True), (False, None, False), (True, False, False), (False, True, True)]
)
def test_by_default_weights_are_joined_on_nvidia_gpus(monkeypatch, tiny, nvidia, wanted, joined):
    monkeypatch.setattr(decode, "is_nvidia", lambda: nvidia)
    sampler = Sampler(tiny.decoder, SamplingConfig(max_new_tokens=LENGTH, join_weights=wanted), (0,), 0)
    ready, variables = decode.for_decoding(sampler, tiny.variables)
    assert ready.decoder.joined == joined == ("qkv_proj" in variables["params"]["layers"]["attention"])


@pytest.mark.parametrize(
    ("sizes", "gathered", "joined"),
    [({"data": 8}, False, True), ({"fsdp": 8}, False, False), ({"fsdp": 8}, True, True), ({"fsdp": 4, "tensor": 2}, True, False)],
)
def test_weights_are_joined_where_each_device_holds_them_whole(monkeypatch, tiny, sizes, gathered, joined):
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)
    monkeypatch.setattr(sharding, "_mesh_in_use", lambda: mesh)
    sampling = SamplingConfig(max_new_tokens=LENGTH, join_weights=True, gather_weights=gathered)
    assert decode.for_decoding(Sampler(tiny.decoder, sampling, (0,), 0), tiny.variables)[0].decoder.joined == joined


@pytest.mark.parametrize(("nvidia", "quantization", "options"), [(True, None, True), (False, None, False), (True, "int8", False)])
def test_the_compiler_has_options_for_decoding_on_nvidia_gpus(monkeypatch, tiny, nvidia, quantization, options):
    monkeypatch.setattr(rollouts, "is_nvidia", lambda: nvidia)
    decoder = dataclasses.replace(tiny.decoder, config=dataclasses.replace(tiny.decoder.config, quantization=quantization))
    doubled = rollouts.Decoding(lambda sampler, x: 2 * x)
    assert doubled(Sampler(decoder, SamplingConfig(), (0,), 0), jnp.float32(2)) == 4
    assert (doubled._on_gpu._cache_size(), doubled._plain._cache_size()) == ((1, 0) if options else (0, 1))
    assert jax.eval_shape(lambda x: doubled(Sampler(decoder, SamplingConfig(), (0,), 0), x), 2.0).shape == ()  # where options are refused
