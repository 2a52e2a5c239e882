"""Several answers to one prompt: it is read once for all of them, and they are the answers that rows of their own would give."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_decoder
from processes import same_on_eight_devices
from scripted_decoder import Script
from tiny_context import tiny_context
from tiny_pictures import seeing_context

from pe_rlhf_jax.config import LoRAConfig, SamplingConfig
from pe_rlhf_jax.data import pad_prompts
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.rollout.decode import Sampler, read
from pe_rlhf_jax.rollout.generate import BLOCK, generate
from pe_rlhf_jax.training import rl, rollouts
from pe_rlhf_jax.training.rewards import Rewards
from pe_rlhf_jax.training.rollouts import respond
from pe_rlhf_jax.types import PromptBatch

COUNT, PROMPT, LENGTH = 20, 6, 2 * BLOCK + 3


def sampled(model, group, answers, rows=None):
    """Answers to groups of neighbours that have one prompt, which are read as `answers` says."""
    rng, count = np.random.default_rng(0), COUNT // group
    asked = rng.integers(3, 30, (count, PROMPT)), np.arange(PROMPT) >= rng.integers(0, PROMPT, (count, 1))
    prompts = PromptBatch(*(jnp.asarray(np.repeat(x, group, axis=0)) for x in asked))
    sampler = Sampler(model.decoder, SamplingConfig(max_new_tokens=LENGTH, max_num_seqs=rows), (0, 1, 2), 0, answers)
    return jax.jit(lambda variables, prompts, key: generate(sampler, variables, prompts, key))(model.variables, prompts, jax.random.key(1))


def assert_same(found, expected):
    for name in ("prompt", "prompt_mask", "response", "response_mask", "ended"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=2e-5)  # sums in another order
    assert len(set(map(tuple, np.asarray(found.response)))) == len(found.response), "answers of a group are different ones"


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(
    ("changes", "group", "rows"),
    [
        ({}, 4, None),
        ({}, 4, 6),  # rows of two groups at once
        ({"sliding_window": 4}, 4, 3),  # less than a group's, with places that go around the ring
        ({"learned_positions": True, "max_position_embeddings": PROMPT + LENGTH}, 2, 17),  # two prompts at once
    ],
    ids=["batch", "refill", "refill-windows", "refill-learned-positions"],
)
def test_samples_are_those_of_rows_that_each_read_their_prompt(changes, group, rows):
    model = tiny_decoder.make_model(dataclasses.replace(tiny_decoder.TINY, **changes), LoRAConfig(r=3, lora_alpha=6.0))
    expected = sampled(model, group, 1)
    lengths = np.asarray(expected.response_mask).sum(1)
    assert len(set(lengths)) > 2 and lengths.max() == LENGTH, f"rows that end together prove little: {lengths}"
    assert_same(sampled(model, group, group, rows), expected)


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("rows", [None, 5])
def test_pictures_go_with_their_prompts(rows):
    """Prompts of two pictures, of one and of none, read in blocks and through windows (Gemma 3), by an adapter on the tower too."""
    rl = {"sampling": {"max_new_tokens": 12, "max_num_seqs": rows}, "batch_size": 12}
    context = seeing_context("gemma3", pictures=2, rl=rl, target_modules=r"(vision\.)?attention\..*")
    asked = [prompt for prompt in context.data.prompts.train[:4] for _ in range(3)]
    batch = context.rows(pad_prompts(asked, 0, 1), asked)
    assert batch.images.pixels is not None
    role = Role(lora=jax.tree.map(lambda x: x + 0.1, context.decoder.init_lora(jax.random.key(0))))
    expected, found = (respond(context, role, batch, jax.random.key(0), answers=answers) for answers in (1, 3))
    assert_same(found, expected)
    np.testing.assert_array_equal(found.images.pixels, batch.images.pixels)


RNG, END = np.random.default_rng(0), 79


@pytest.mark.parametrize(
    ("answers", "rows", "read"),
    [
        (1, None, 24),
        (4, None, 6),
        (8, None, 3),
        (1, 5, 24),
        (4, 5, 6),
        (8, 5, 3),
        (3, 24 - 1, 8),
        (4, 17, 6),  # three answers at once, and so a prompt at once
        (2, 17, 12),  # two prompts at once
        (12, 1, 2),
    ],
)
def test_prompts_are_read_once(answers, rows, read):
    """Rows of prompts that were really read, counted on the host; and every answer goes on from its own prompt."""
    script = Script(vocabulary=END + 1)
    lengths = np.repeat(RNG.integers(1, 4 * BLOCK, 24 // answers), answers)
    out = script.program((END,), answers, temperature=0.0, max_new_tokens=4 * BLOCK, max_num_seqs=rows)(END - lengths)
    np.testing.assert_array_equal(out.response_mask.sum(1), lengths)
    np.testing.assert_array_equal(out.response[:, 0], END + 1 - lengths)
    assert out.ended.all() and script.read == read


def test_a_group_costs_one_prompt():
    """XLA's own count, which is exact for one layer: a program reads an nth of the prompts, and decodes the same."""
    config = dataclasses.replace(tiny_decoder.TINY, num_layers=1, hidden_size=64, intermediate_size=160, head_dim=16)
    model = tiny_decoder.make_model(config, LoRAConfig(r=3, lora_alpha=6.0))
    rows, length = 16, 48
    prompts = PromptBatch(jnp.ones((rows, length), jnp.int32), jnp.ones((rows, length), bool))

    def flops(f, *arguments):
        return jax.jit(f).lower(*arguments).cost_analysis()["flops"]

    def sampling(answers):
        sampler = Sampler(model.decoder, SamplingConfig(max_new_tokens=16), (0,), 0, answers)
        return flops(lambda v, p, k: generate(sampler, v, p, k), model.variables, prompts, jax.random.key(0))

    reads = flops(lambda v, p: read(Sampler(model.decoder, SamplingConfig(), (0,), 0), v, p, room=16), model.variables, prompts)
    alone = sampling(1)
    assert reads > 0.8 * alone, "the prompts must be most of it"
    for answers in (2, 16):
        # The cache that is read into has no room for responses, which attention of the prompts saves too: at most 3% of theirs.
        assert alone - sampling(answers) == pytest.approx((1 - 1 / answers) * reads, rel=0.04), answers


@pytest.mark.parametrize(("algorithm", "answers"), [("rloo", 4), ("ppo", 1)])
def test_rl_says_which_rows_have_one_prompt(tiny, monkeypatch, algorithm, answers):
    asked = []

    def stop(sampler, policy, backbone, prompts, key):
        asked.append((sampler.answers, np.asarray(prompts.tokens)))
        raise InterruptedError

    monkeypatch.setattr(rollouts, "_respond", stop)
    rewards = [{"function": "tiny_pictures:remainders"}]
    section = {"algorithm": algorithm, "batch_size": 8, "group_size": max(2, answers), "value_init": "zero", "rewards": rewards}
    context = tiny_context(tiny, rl=section)
    with pytest.raises(InterruptedError):
        next(rl.run(context, Role(), None, Rewards(context, {}), rl.init(context, Role(), None)))
    ((found, tokens),) = asked
    assert found == answers
    groups = tokens.reshape(-1, answers, tokens.shape[1])
    assert (groups == groups[:, :1]).all() and len(set(map(tuple, tokens))) == 8 // answers


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})

import re
import tiny_decoder
import jax
import numpy as np

from pe_rlhf_jax.config import LoRAConfig, MeshConfig, SamplingConfig
from pe_rlhf_jax.rollout.decode import Sampler
from pe_rlhf_jax.rollout.generate import generate
from pe_rlhf_jax.sharding import make_mesh, place, place_rows
from pe_rlhf_jax.types import PromptBatch

model = tiny_decoder.make_model(tiny_decoder.TINY, LoRAConfig(r=3, lora_alpha=6.0))
asked = np.random.default_rng(0).integers(3, 30, (4, 1, 4)), np.arange(4) >= np.arange(4)[:, None, None]
prompts = PromptBatch(*(np.broadcast_to(x, (4, 8, 4)).reshape(32, 4) for x in asked))


def sampled(answers, rows, variables, prompts):
    sampler = Sampler(model.decoder, SamplingConfig(max_new_tokens=11, max_num_seqs=rows), (0, 1, 2), 30, answers)
    compiled = jax.jit(lambda v, p, k: generate(sampler, v, p, k)).lower(variables, prompts, jax.random.key(0)).compile()
    return compiled(variables, prompts, jax.random.key(0)), compiled.as_text()


jax.config.update("jax_disable_most_optimizations", True)
one, _ = sampled(1, None, model.variables, prompts)
assert len(set(np.asarray(one.response_mask).sum(1))) > 4
SPREAD = dict(data=8)  # four rows on each device: half a group
WHOLE = dict(data=2, fsdp=2, tensor=2)  # a group on each pair of devices
for axes, rows in ((SPREAD, None), (SPREAD, 16), (WHOLE, 16)):
    mesh = make_mesh(MeshConfig(**axes))
    jax.config.update("jax_disable_most_optimizations", (axes, rows) != (SPREAD, 16))
    with jax.set_mesh(mesh):
        many, text = sampled(8, rows, place(model.variables, mesh), place_rows(prompts, mesh))
    assert many.response.sharding.shard_shape(many.response.shape)[0] == 32 // (8 if axes == SPREAD else 4)
    for name in ("response", "response_mask", "ended"):
        np.testing.assert_array_equal(getattr(one, name), getattr(many, name))
    np.testing.assert_allclose(one.logprobs, many.logprobs, atol=1e-5)
    if rows == 16 and axes == SPREAD:
        # Every device reads the prompt that its rows have: what travels is how many rows have ended, and whether all have.
        sent = re.findall(r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\\(", text)
        assert sent and not any(re.search(r"\\[\\d", shape) for shape in sent), sent
    if axes == SPREAD:
        # It reads one prompt of four tokens: that is what the widest product of an MLP has.
        tokens = [int(n) for n in re.findall(r"= f32\\[(\\d+),24\\]\\S* dot\\(", text)]
        assert tokens and max(tokens) == 4, tokens
print("same")
"""


def test_eight_devices_give_the_results_of_one():
    same_on_eight_devices(SCRIPT.format(tests=str(Path(__file__).parents[1])))
