"""Rows that take the next prompts sample what a batch of all prompts samples, in fewer steps than batches of as many rows."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_decoder
from scripted_decoder import PAD, Script
from tiny_context import tiny_context
from tiny_pictures import seeing_context

from pe_rlhf_jax.config import LoRAConfig, SamplingConfig
from pe_rlhf_jax.data import pad_prompts
from pe_rlhf_jax.models.quantization import quantize_layers
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.rollout.decode import Sampler, advance, begin
from pe_rlhf_jax.rollout.generate import BLOCK, generate
from pe_rlhf_jax.training import rollouts
from pe_rlhf_jax.training.rollouts import cut_at_stop_strings, respond
from pe_rlhf_jax.types import PromptBatch

pytestmark = pytest.mark.usefixtures("quick_compile")

COUNT, PROMPT, LENGTH = 13, 6, 2 * BLOCK + 3
"""Not multiples of the rows, of each other or of a block."""

RNG = np.random.default_rng(0)
PROMPTS = PromptBatch(
    jnp.asarray(RNG.integers(3, 30, (COUNT, PROMPT))), jnp.arange(PROMPT) >= PROMPT - jnp.asarray(RNG.integers(1, PROMPT + 1, (COUNT, 1)))
)


def sampled(model, prompts, rows, temperature):
    ends = (0, 1) if temperature else tuple(range(9))
    sampler = Sampler(model.decoder, SamplingConfig(max_new_tokens=LENGTH, temperature=temperature, max_num_seqs=rows), ends, PAD)
    return jax.jit(lambda variables, prompts, key: generate(sampler, variables, prompts, key))(model.variables, prompts, jax.random.key(1))


def assert_same(found, expected):
    for name in ("prompt", "prompt_mask", "response", "response_mask", "ended"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    # Sums over the ring's slots are in another order.
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=2e-5)
    lengths = np.asarray(expected.response_mask).sum(1)
    assert len(set(lengths)) > 3 and lengths.max() == LENGTH, f"rows that end together prove little: {lengths}"


@pytest.mark.parametrize(
    ("changes", "temperature", "rows"),
    [
        ({}, 0.0, 4),
        ({"sliding_window": 4}, 1.0, 3),
        ({"sliding_window": 3, "windowed_layers": (1,), "quantization": "int8"}, 0.0, 1),
        ({"learned_positions": True, "max_position_embeddings": PROMPT + LENGTH}, 1.0, 3),
    ],
    ids=["greedy", "windows", "some-windows-int8", "learned-positions"],
)
def test_samples_do_not_depend_on_the_number_of_rows(changes, temperature, rows):
    """Of a backbone, quantized or not, under an adapter."""
    config = dataclasses.replace(tiny_decoder.TINY, **changes)
    model = tiny_decoder.make_model(dataclasses.replace(config, quantization=None), LoRAConfig(r=3, lora_alpha=6.0))
    if config.quantization:
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: quantize_layers(leaf, config.quantization) if path[-1].key == "kernel" else leaf, model.params
        )
        model = tiny_decoder.Model(dataclasses.replace(model.decoder, config=config), params, model.lora)
    assert_same(sampled(model, PROMPTS, rows, temperature), sampled(model, PROMPTS, None, temperature))


def test_pictures_go_with_their_prompts():
    """Prompts of two pictures, of one and of none, read in blocks and through windows (Gemma 3)."""
    found = {}
    for rows in (None, 3):
        sampling = {"max_new_tokens": 12, "max_num_seqs": rows}
        context = seeing_context("gemma3", pictures=2, rl={"sampling": sampling, "batch_size": 8})
        asked = context.data.prompts.train[:7]
        found[rows] = respond(context, Role(), context.rows(pad_prompts(asked, 0, 8), asked), jax.random.key(0))
    assert found[3].images is not None
    np.testing.assert_array_equal(found[3].response, found[None].response)
    np.testing.assert_allclose(found[3].logprobs, found[None].logprobs, atol=2e-5)
    assert len(set(map(tuple, np.asarray(found[3].response)))) == 7


def test_a_row_that_waits_stays_at_its_position():
    """Beyond a table of learned positions it would write what is not a number, which would reach the row's next prompt."""
    sampler = Sampler(Script(), SamplingConfig(max_new_tokens=3, temperature=0.0), (6,), PAD)
    variables, tokens = {"params": {"embed": jnp.eye(40)}}, jnp.array([[1, 2], [1, 4]])
    state = begin(sampler, variables, PromptBatch(tokens, jnp.ones_like(tokens, bool)), room=3)
    state = jax.jit(lambda state: advance(sampler, variables, jax.random.key(0), state, 9))(state)
    np.testing.assert_array_equal(state.position, [2 + 2, 2 + 1])  # of their last tokens
    np.testing.assert_array_equal(state.tokens, [[3, 4, 5], [5, 6, -1]])
    assert not state.alive.any() and state.slot == (2 + 9) % 5


END = 79
TAIL = np.array([5 * BLOCK, 3, 8, 7, 8, 5, 1])
"""Lengths, the longest one first."""


@pytest.mark.parametrize(
    ("lengths", "rows", "steps"),
    [
        (TAIL, 2, 6 * BLOCK),  # six short ones go through the second row, one a block, while the first is at its long one
        (TAIL[::-1], 2, 8 * BLOCK),  # five blocks behind the short ones, two of which go at once
        (TAIL, 7, 5 * BLOCK),
        (TAIL, 1, 11 * BLOCK),
        (np.full(7, 2), 4, 2 * BLOCK),
    ],
)
def test_decode_steps_and_order(lengths, rows, steps):
    """Steps that really ran, counted on the host. In fixed batches of two the first would have been 8 blocks."""
    script = Script(vocabulary=END + 1)
    out = script.program(ends=(END,), temperature=0.0, max_new_tokens=5 * BLOCK, max_num_seqs=rows)(END - lengths)
    np.testing.assert_array_equal(out.response_mask.sum(1), lengths)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(out.response[row, :length], END + 1 - length + np.arange(length))
    assert out.ended.all() and (out.response[~out.response_mask] == PAD).all()
    assert script.steps == steps


def test_short_responses_take_no_step_more():
    script = Script()
    out = script.program(max_new_tokens=3, max_num_seqs=2, temperature=0.0)([1, 2, 3, 4])
    assert out.response_mask.all() and script.steps == 2 * 3


def test_one_program_serves_every_call_and_stop_strings_cut_the_same(tiny):
    context = tiny_context(tiny)
    asked = context.data.prompts.train[:6]
    batch = context.rows(pad_prompts(asked, context.pad_token, 8))
    role, key = Role(lora=tiny.lora), jax.random.key(2)
    sampling = SamplingConfig(max_new_tokens=LENGTH)
    free = respond(context, role, batch, key, sampling)
    row = int(np.asarray(free.response_mask).sum(1).argmax())
    tokens = np.asarray(free.response)[row]
    sampling = sampling.model_copy(update={"max_num_seqs": 4, "stop_strings": (f"{tokens[5]} {tokens[6]}",)})
    before = rollouts._respond._cache_size()
    found = respond(context, role, batch, key, sampling)
    for seed in range(3):
        other = respond(context, Role(lora=jax.tree.map(lambda x: x * 0.5, tiny.lora)), batch, jax.random.key(seed), sampling)
    assert rollouts._respond._cache_size() == before + 1
    expected = cut_at_stop_strings(context, free, sampling.stop_strings)
    for name in ("response", "response_mask", "ended"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert np.asarray(found.response_mask)[row].sum() == 7
    assert not np.array_equal(found.response, other.response)


def test_weights_of_full_tuning_are_sampled_from_in_the_type_that_they_are_computed_in(tiny):
    """Float32 as the optimizer keeps them, every decode step would read twice the bytes."""
    context = tiny_context(tiny)
    decoder = dataclasses.replace(context.decoder, dtype=jnp.bfloat16)
    sampler = Sampler(decoder, SamplingConfig(max_new_tokens=LENGTH), (0,), PAD)
    policy = Role(params=jax.tree.map(lambda x: x.astype(jnp.float32), tiny.params))
    matrix = tiny.params["layers"]["mlp"]["up_proj"]["kernel"].shape
    jaxpr = jax.make_jaxpr(rollouts._respond, static_argnums=0)(sampler, policy, tiny.params, PROMPTS, jax.random.key(0))

    def loops(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "while":
                yield [variable.aval for variable in equation.invars]
            for value in equation.params.values():
                for inner in value if isinstance(value, (tuple, list)) else [value]:
                    if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                        yield from loops(inner)

    read = [aval for avals in loops(jaxpr.jaxpr) for aval in avals if aval.shape == matrix]
    assert read and {aval.dtype for aval in read} == {jnp.dtype(jnp.bfloat16)}
