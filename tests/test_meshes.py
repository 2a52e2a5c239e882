"""Training does not depend on the mesh: every stage, on meshes of eight devices. In a process of its own: JAX fixes their number."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import same_on_eight_devices

BEGIN = """
import dataclasses, itertools, sys
sys.path[:0] = [{tests!r}, {tests!r} + "/training"]

import tiny_decoder
import jax
import numpy as np
from tiny_context import tiny_context

from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.training import reward, rl, sft
from pe_rlhf_jax.training.rewards import RewardModel, Rewards

assert jax.device_count() == 8
jax.config.update("jax_disable_most_optimizations", True)
# Adam divides by the size of a gradient; a large epsilon keeps it from blowing the rounding of the smallest ones up to whole steps.
SMOOTH = dict(learning_rate=1e-2, eps=1e-2)
SECTIONS = dict(
    run=dict(stages=["sft", "reward", "rl"]),
    sft=dict(steps=9, batch_size=8, optimizer=SMOOTH),
    reward=dict(steps=9, batch_size=8, optimizer=SMOOTH),
    rl=dict(steps=9, batch_size=8, num_ppo_epochs=1, optimizer=SMOOTH, sampling=dict(max_new_tokens=6), roles="separate"),
)


def model(**changes):
    return tiny_decoder.make_model(dataclasses.replace(tiny_decoder.TINY, **changes), LoRAConfig(r=3, lora_alpha=6.0))


def trained(tiny, devices, mesh, tuning="lora", stages=("sft", "reward", "rl"), steps=4):
    tuned = dict.fromkeys(("sft", "reward", "rl"), dict(tuning=tuning))
    sections = {{name: {{**fields, **tuned.get(name, {{}})}} for name, fields in SECTIONS.items()}}
    context = tiny_context(tiny, devices, mesh=mesh, **sections)
    # One device has all logits at once; eight have them in several chunks, of one or two tokens of each row.
    chunked = context.config.model.model_copy(update=dict(logprob_chunk=1024 if devices == 1 else 2))
    context = dataclasses.replace(context, config=context.config.model_copy(update=dict(model=chunked)))
    rows, states = [], {{}}

    def run(name, updates):
        for states[name], metrics in itertools.islice(updates, 2 if name == "rl" else steps):  # before the last one, which evaluates
            rows.append({{f"{{name}} {{k}}": v for k, v in metrics.items() if not k.startswith(("time/", "perf/"))}})

    with jax.set_mesh(context.mesh):
        reference, start = Role(), None
        if "sft" in stages:
            run("sft", sft.run(context, sft.init(context)))
            reference = states["sft"].trainable
        if "reward" in stages:
            run("reward", reward.run(context, reference, reward.init(context, reference)))
            start = reward.whole(context, reference, states["reward"].trainable)
        if "rl" in stages:
            rewards = Rewards(context, {{"run": RewardModel(context.decoder, context.backbone, start)}})
            run("rl", rl.run(context, reference, start, rewards, rl.init(context, reference, start)))
    return context, rows, states


def same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name in b:  # sums in another order
            np.testing.assert_allclose(a[name], b[name], rtol=2e-4, atol=1e-5, err_msg=name)
"""

MESHES = """
from pe_rlhf_jax.sharding import shardings

# A vocabulary of 32 is shared among the devices of `tensor`, one of 31 cannot be.
tiny = model(vocab_size={vocabulary})
_, expected, _ = trained(tiny, 1, dict(data=1), {tuning!r}, {stages!r})
losses = [row["sft loss"] for row in expected if "sft loss" in row]
assert losses[-1] < losses[0]
rewards = [row["reward loss"] for row in expected if "reward loss" in row]
assert abs(rewards[-1] - np.log(2)) > 0.01  # it learns
for mesh in (dict(data=8), dict(data=1, fsdp=8), dict(data=2, tensor=4)):
    context, found, states = trained(tiny, 8, mesh, {tuning!r}, {stages!r})
    same(found, expected)
    # Adapters or parameters, and Adam's moments, are after the updates where the rule says.
    state = states["sft"].trainable, states["sft"].opt_state
    same_places = jax.tree.map(lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim), state, shardings(state, context.mesh))
    assert all(jax.tree.leaves(same_places)), same_places
    for leaves in map(jax.tree.leaves, state):
        assert all(len(leaf.sharding.device_set) == 8 for leaf in leaves)
        assert any(not leaf.is_fully_replicated for leaf in leaves) or mesh == dict(data=8)
print("same")
"""

LONG = """
from pe_rlhf_jax.config import SamplingConfig
from pe_rlhf_jax.training.rollouts import respond
from pe_rlhf_jax.types import PromptBatch

for name in ("sft", "reward"):
    SECTIONS[name]["steps"] = 21
greedy = SamplingConfig(temperature=0.0, max_new_tokens=12)


def answered(devices, mesh):
    context, rows, states = trained(model(), devices, mesh, stages=("sft", "reward"), steps=20)
    tokens = np.random.default_rng(0).integers(2, tiny_decoder.TINY.vocab_size, (8, 5)).astype(np.int32)
    prompts = PromptBatch(tokens, np.ones_like(tokens, bool))
    with jax.set_mesh(context.mesh):
        rollout = respond(context, states["sft"].trainable, context.rows(prompts), jax.random.key(0), greedy)
    return rows, jax.device_get((rollout.response, rollout.response_mask))


expected, answers = answered(1, dict(data=1))
assert len(expected) == 40
losses = {name: [row[name] for row in expected if name in row] for name in ("sft loss", "reward loss")}
assert losses["sft loss"][-1] < 0.9 * losses["sft loss"][0]
assert abs(losses["reward loss"][-1] - np.log(2)) > 0.05  # a model that does not learn stays there
for mesh in (dict(data=8), dict(data=1, fsdp=8), dict(data=2, tensor=4)):
    found, given = answered(8, mesh)
    same(found, expected)
    jax.tree.map(np.testing.assert_array_equal, given, answers)
print("same")
"""

COMPILED = """
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
)
SECTIONS["data"] = dict(length_multiple=32)


def watched(updates):
    # Programs compiled in each of a stage's first steps; the last one of all evaluates and is left out.
    counts = []
    while len(counts) < 4:
        compiled.clear()
        state, _ = next(updates)
        counts.append(len(compiled))
    return counts


context = tiny_context(model(), 8, mesh={mesh!r}, **SECTIONS)
with jax.set_mesh(context.mesh):
    whole = reward.whole(context, Role(), reward.init(context, Role()).trainable)
    rewards = Rewards(context, dict(run=RewardModel(context.decoder, context.backbone, whole)))
    counts = dict(
        sft=watched(sft.run(context, sft.init(context))),
        reward=watched(reward.run(context, Role(), reward.init(context, Role()))),
        rl=watched(rl.run(context, Role(), whole, rewards, rl.init(context, Role(), whole))),
    )
print(counts)
assert all(first > 0 and not any(rest) for first, *rest in counts.values()), counts
print("same")
"""

PORTIONS = """
from pe_rlhf_jax.sharding import row_groups

# Two micro-batches, to which each of two devices gives half of its rows, in RL a group of two responses.
SECTIONS["sft"]["micro_batch_size"] = 4
SECTIONS["rl"] |= dict(algorithm="grpo", group_size=2, num_mini_batches=1, micro_batch_size=4)
for more in (dict(), dict(algorithm="ppo", num_ppo_epochs=1)):  # the latter's values are said in parts, and learned from as a whole
    SECTIONS["rl"] |= more
    _, expected, _ = trained(model(), 1, dict(data=1))
    context, found, _ = trained(model(), 2, dict(data=1, fsdp=2))
    with jax.set_mesh(context.mesh):
        assert row_groups(4) == 2
    same(found, expected)
assert context.config.rl.values_while_learning
print("same")
"""

PACKED = """
# Two rows hold a batch of one device; here each of four groups of devices has one of its own.
# What the head is fitted to before the first update, and what is judged, is packed as well.
SECTIONS["reward"]["linear_probe"] = 10
context, expected, states = trained(model(), 1, dict(data=1), stages=("sft", "reward"))
assert "reward eval/accuracy" in expected[4]


def scores(context, states):
    # Of rows that begin alike, fewer than the devices have places for, and not in the order in which they are packed.
    role = reward.whole(context, states["sft"].trainable, states["reward"].trainable)
    pairs = [dataclasses.replace(pair, rejected=pair.chosen[:3]) for pair in context.data.preference.train] * 2
    with jax.set_mesh(context.mesh):
        return np.stack(reward.kind_of(context.config.reward).scores(context, role, pairs[:11]))


expected_scores = scores(context, states)
SECTIONS["data"] = dict(length_multiple=32, packing=True)
for devices, mesh in ((1, dict(data=1)), (8, dict(data=2, fsdp=2, tensor=2))):
    context, found, states = trained(model(), devices, mesh, stages=("sft", "reward"))
    same(found, expected)
    np.testing.assert_allclose(scores(context, states), expected_scores, rtol=2e-4, atol=1e-5)
print("same")
"""

KEPT = """
import re
from pe_rlhf_jax.rollout.score import token_logprobs

# What the layers keep for the backward pass, [L, rows, T, D] on a chip, is a quarter of every row there; of 30 tokens it cannot be.
# Logits have a quarter of the 44 columns there, in the backward pass too.
tiny = model(vocab_size=44)
decoder = dataclasses.replace(tiny.decoder, remat="full")
context = tiny_context(tiny, 8, mesh=dict(data=1, fsdp=2, tensor=4), **SECTIONS)
layers, width = tiny.config.num_layers, tiny.config.hidden_size

@jax.jit
def gradient(lora, tokens):
    variables = dict(params=tiny.params, lora=lora)

    def loss(lora):
        hidden, _ = decoder.apply(dict(variables, lora=lora), tokens, tokens >= 0)
        logprobs, entropy = token_logprobs(hidden, tokens, lambda x: decoder.unembed(tiny.params, x), 1.0, 8)
        return (logprobs + entropy).sum()

    return jax.grad(loss)(lora)

with jax.set_mesh(context.mesh):
    for length, kept, never in ((32, 8, 32), (30, 30, 0)):
        text = gradient.lower(tiny.lora, np.ones((4, length), np.int32)).compile().as_text()
        assert f"f32[{layers},2,{kept},{width}]" in text and f"f32[{layers},2,{never},{width}]" not in text, (length, kept)
        columns = re.findall(r"f32\\[(?:\\d+,)+(11|44)\\]", text)
        assert set(columns) == {"11"}, columns
print("same")
"""

TAKEN = """
from pe_rlhf_jax.sharding import ROWS, make_mesh, place_rows
from pe_rlhf_jax.config import MeshConfig
from jax.sharding import NamedSharding

# A mini-batch lies where its batch does: each group of devices has its rows.
for axes in (dict(data=8), dict(data=2, fsdp=2, tensor=2)):
    mesh, order = make_mesh(MeshConfig(**axes)), np.arange(16)[::-1].astype(np.int32)
    with jax.set_mesh(mesh):
        batch = dict(scores=np.arange(32.0), tokens=np.arange(64).reshape(32, 2))
        taken = rl._take(place_rows(batch, mesh), order)
        for name, x in taken.items():
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, ROWS), x.ndim), x.sharding
            np.testing.assert_array_equal(x, batch[name][order])
print("same")
"""

EXPANDED = """
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from pe_rlhf_jax.config import MeshConfig
from pe_rlhf_jax.models.quantization import QuantizedMatrix, quantize
from pe_rlhf_jax.sharding import make_mesh

# Each device expands its own columns.
mesh = make_mesh(MeshConfig(tensor=8))
for how in ("int8", "int4", "nf4"):
    stored = quantize(jnp.asarray(np.random.default_rng(0).normal(size=(128, 64)), jnp.float32), how)
    there = jax.device_put(stored, NamedSharding(mesh, P(None, "tensor")))
    expand = jax.jit(lambda x: x.expand(jnp.float32), out_shardings=NamedSharding(mesh, P(None, "tensor")))
    assert "all-gather" not in expand.lower(there).compile().as_text(), how
    np.testing.assert_array_equal(expand(there), stored.expand(jnp.float32))
print("same")
"""

FEW_BITS = """
import jax.numpy as jnp
from pe_rlhf_jax.config import LoRAConfig, MeshConfig
from pe_rlhf_jax.models.lora import Linear
from pe_rlhf_jax.plan.hlo import communication
from pe_rlhf_jax.sharding import make_mesh, place, place_rows

# A matrix that is sharded over `fsdp` is sent as it is stored, forward and backward, whichever way it lies.
mesh, x = make_mesh(MeshConfig(data=2, fsdp=4)), np.random.default_rng(0).normal(size=(8, 16, 512)).astype(np.float32)
for how, bits in (("int8", 8), ("int4", 4), ("nf4", 4)):
    for name in ("up_proj", "down_proj"):
        layer = Linear(256, LoRAConfig(r=2), jnp.float32, jnp.float32, quantization=how, name=name)
        params = layer.init(jax.random.key(0), x)["params"]

        def gradient(params, x):
            return jax.grad(lambda x: jnp.square(layer.apply(dict(params=params[name]), x)).sum())(x)

        alone = jax.jit(gradient)(dict({name: params}), x)
        with jax.set_mesh(mesh):
            placed, rows = place({name: params}, mesh), place_rows(x, mesh)
            program = jax.jit(gradient).lower(placed, rows).compile()
            np.testing.assert_allclose(program(placed, rows), alone, rtol=1e-5, atol=1e-4)
        stored = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        assert stored < 1.3 * 512 * 256 * bits / 8
        assert 0 < communication(program.as_text(), 8).bytes <= 2 * 0.75 * stored, (how, name)
print("same")
"""

HEADS = """
for changes in (dict(num_kv_heads=1), dict(num_heads=6, num_kv_heads=3), dict(num_heads=3, num_kv_heads=3, vocab_size=32)):
    tiny = model(**changes)
    _, expected, _ = trained(tiny, 1, dict(data=1), stages={stages!r})
    _, found, _ = trained(tiny, 8, dict(data=2, tensor=4), stages={stages!r})
    same(found, expected)
print("same")
"""

RESTORE = """
import tempfile
from pathlib import Path

from pe_rlhf_jax.checkpoint.store import Store
from pe_rlhf_jax.sharding import shardings

one, expected, _ = trained(model(), 1, dict(data=1), stages=("sft",))
with tempfile.TemporaryDirectory() as folder:
    store = Store(Path(folder))
    first = tiny_context(model(), 8, mesh=dict(data=1, fsdp=8), **SECTIONS)
    with jax.set_mesh(first.mesh):
        state, _ = next(sft.run(first, sft.init(first)))
        store.save("sft", 1, state, {{}})
        saved = jax.device_get(state)
    for mesh, devices in ((dict(data=2, tensor=4), 8), (dict(data=1), 1)):
        other = tiny_context(model(), devices, mesh=mesh, **SECTIONS)
        with jax.set_mesh(other.mesh):
            shapes = jax.eval_shape(lambda: sft.init(other))
            places = shardings(shapes, other.mesh)
            like = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, places)
            state, _ = store.restore("sft", like)
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), saved)
            assert len(jax.tree.leaves(state.trainable)[0].sharding.device_set) == devices
            rows = [metrics["loss"] for _, metrics in itertools.islice(sft.run(other, state), 3)]
        np.testing.assert_allclose(rows, [row["sft loss"] for row in expected[1:]], rtol=2e-4)
print("same")
"""

RESTORE_RL = """
import tempfile
from pathlib import Path

from pe_rlhf_jax.checkpoint.store import Store
from pe_rlhf_jax.sharding import placed_shapes

# All that RL keeps between batches is in its state: the adaptive coefficient and the running statistics of rewards too.
SECTIONS["rl"] |= dict(steps=5, kl_target=0.01, normalize_rewards=True)


def learning(context):
    start = reward.whole(context, Role(), reward.init(context, Role()).trainable)
    rewards = Rewards(context, dict(run=RewardModel(context.decoder, context.backbone, start)))
    return lambda: rl.init(context, Role(), start), lambda state: rl.run(context, Role(), start, rewards, state)


def rows(updates, steps):
    found = [metrics for _, metrics in itertools.islice(updates, steps)]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in found]


context = tiny_context(model(), 1, mesh=dict(data=1), **SECTIONS)
with jax.set_mesh(context.mesh):
    init, run = learning(context)
    expected = rows(run(init()), 4)
coefficients = [row["objective/kl_coef"] for row in expected]
assert len(set(coefficients)) > 1, coefficients
with tempfile.TemporaryDirectory() as folder:
    store = Store(Path(folder))
    context = tiny_context(model(), 8, mesh=dict(data=1, fsdp=8), **SECTIONS)
    with jax.set_mesh(context.mesh):
        init, run = learning(context)
        *_, (state, _) = itertools.islice(run(init()), 2)
        store.save("rl", 2, state, {})
        saved = jax.device_get(state)
    for mesh, devices in ((dict(data=2, tensor=4), 8), (dict(data=1), 1)):
        other = tiny_context(model(), devices, mesh=mesh, **SECTIONS)
        with jax.set_mesh(other.mesh):
            init, run = learning(other)
            state, _ = store.restore("rl", placed_shapes(jax.eval_shape(init), other.mesh))
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), saved)
            assert len(jax.tree.leaves(state.train.trainable)[0].sharding.device_set) == devices
            same(rows(run(state), 2), expected[2:])
print("same")
"""


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(MESHES.format(tuning="lora", stages=("sft", "reward", "rl"), vocabulary=32), id="lora"),
        pytest.param(MESHES.format(tuning="full", stages=("sft", "reward"), vocabulary=31), id="full"),
        pytest.param(LONG, id="twenty-steps", marks=pytest.mark.slow),
        pytest.param(PORTIONS, id="micro-batches"),
        pytest.param(PACKED, id="packed"),
        pytest.param(TAKEN, id="mini-batches"),
        pytest.param(EXPANDED, id="quantized"),
        pytest.param(FEW_BITS, id="quantized, sent"),
        pytest.param(HEADS.format(stages=("reward",)), id="heads"),
        pytest.param(HEADS.format(stages=("reward", "rl")), id="heads-in-rl", marks=pytest.mark.slow),
        pytest.param(KEPT, id="kept-in-stretches"),
        pytest.param(RESTORE.replace("{{}}", "{}"), id="restored"),
        pytest.param(RESTORE_RL, id="rl-restored", marks=pytest.mark.slow),
        pytest.param(COMPILED.replace("{mesh!r}", "dict(data=2, fsdp=2, tensor=2)"), id="compiled-once"),
    ],
)
def test_eight_devices_do_what_one_does(script):
    begin = BEGIN.format(tests=str(Path(__file__).parent))
    same_on_eight_devices(begin + script)
