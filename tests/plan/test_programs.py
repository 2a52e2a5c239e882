"""What is planned is what is run: the same functions with the same shapes, caught in a real step of every stage."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_context import tiny_context
from tiny_pictures import new_encoder, prompt, seeing_context
from tiny_vision import TinyVision

from pe_rlhf_jax.config import ConfigError
from pe_rlhf_jax.data import PreferenceExample, PromptExample, SFTExample, Split
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.plan import programs
from pe_rlhf_jax.plan.programs import Call, abstract_context, stage_calls
from pe_rlhf_jax.plan.suggest import changed
from pe_rlhf_jax.training import context as training_context
from pe_rlhf_jax.training import evaluate, images, loop, reward_batches, reward_kinds, rewards, rl, rollouts, sft
from pe_rlhf_jax.training import reward as reward_stage

FIELDS = {
    "data": {"max_prompt_length": 8, "max_response_length": 8, "length_multiple": 8},
    "rl": {"steps": 1, "batch_size": 4, "num_mini_batches": 2, "sampling": {"max_new_tokens": 6}},
    "run": {"stages": ["sft", "reward", "rl"]},
    "sft": {"steps": 1, "batch_size": 4, "evaluate_every": 9},
    "reward": {"steps": 1, "batch_size": 4, "evaluate_every": 9},
}


def signature(tree) -> list[str]:
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return [f"{jax.tree_util.keystr(path)} {np.shape(x)} {jnp.result_type(x) if not hasattr(x, 'dtype') else x.dtype}" for path, x in flat]


def run_context(tiny, **changes):
    """Rows of the longest lengths that the configuration allows, as the plan assumes."""
    context = tiny_context(tiny, **{name: FIELDS.get(name, {}) | changes.get(name, {}) for name in FIELDS | changes})
    words = np.arange(2, 10, dtype=np.int32)
    asked = [np.roll(words, i) for i in range(8)]  # which packed rows have nothing of in common
    pairs = [PreferenceExample(np.append(prompt, words), np.append(prompt, words[::-1]), 0.0) for prompt in asked]
    prompt = PromptExample(words, "text", {})
    data = dataclasses.replace(
        context.data,
        sft=Split([SFTExample(words, words)] * 8, [SFTExample(words, words)] * 2),
        preference=Split(pairs, pairs[:2]),
        prompts=Split([prompt] * 8, [prompt] * 2),
    )
    return dataclasses.replace(context, data=data)


def planned(context, stage: str) -> dict[str, list[str]]:
    """The calls' arguments, by what is called."""
    config = context.config
    abstract = abstract_context(config, context.decoder.config, jnp.dtype("float32"), jax.devices()[:1])
    calls: dict[str, list[str]] = {}

    def compile(call: Call):
        calls[call.name] = signature(list(call.arguments.values()))
        return jax.eval_shape(lambda *arguments: call.function(*call.static, *arguments), *call.arguments.values())

    stage_calls(abstract, stage, compile)
    return calls


@pytest.fixture
def caught(monkeypatch):
    """The arguments of the first call of each program."""
    calls: dict[str, list[str]] = {}

    def catch(name, function, static):
        def called(*arguments, **named):
            assert not named
            calls.setdefault(name, signature(list(arguments[static:])))
            return function(*arguments)

        return called

    def make(make_step):
        return lambda *arguments: catch("update", make_step(*arguments), 0)

    monkeypatch.setattr(rollouts, "_respond", catch("rollout", rollouts._respond, 1))
    monkeypatch.setattr(rewards, "_score", catch("score", rewards._score, 3))
    monkeypatch.setattr(rl, "make_experience", catch("experience", rl.make_experience, 3))
    monkeypatch.setattr(rl, "_take", catch("mini-batch", rl._take, 0))
    monkeypatch.setattr(rl, "step_of", make(rl.step_of))
    monkeypatch.setattr(loop, "make_step", make(loop.make_step))
    return calls


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(("algorithm", "rows"), [("ppo", None), ("grpo", 3), ("reinforce", None)])
def test_rl_calls_what_was_planned(tiny, caught, algorithm, rows):
    sampling = FIELDS["rl"]["sampling"] | {"max_num_seqs": rows}
    context = run_context(tiny, rl=FIELDS["rl"] | {"algorithm": algorithm, "group_size": 2, "sampling": sampling})
    with jax.set_mesh(context.mesh):
        reference = sft.init(context).trainable
        model = reward_stage.init(context, reference).trainable
        given = rewards.Rewards(context, {"run": rewards.RewardModel(context.decoder, context.backbone, model)})
        next(rl.run(context, reference, model, given, rl.init(context, reference, model)))
    assert caught == planned(context, "rl")
    programs = {"rollout", "score", "experience", "update"}
    assert caught.keys() == programs | (set() if algorithm == "reinforce" else {"mini-batch"})


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(("tuning", "packing"), [("lora", False), ("full", False), ("lora", True)])
def test_sft_and_reward_call_what_was_planned(tiny, caught, tuning, packing):
    data = {"packing": packing}
    context = run_context(tiny, data=data, sft={"tuning": tuning}, reward={"tuning": tuning}, rl={"roles": "separate"})
    with jax.set_mesh(context.mesh):
        next(sft.run(context, sft.init(context)))
        assert caught == planned(context, "sft")
        caught.clear()
        reference = sft.init(context).trainable
        next(reward_stage.run(context, reference, reward_stage.init(context, reference)))
    assert caught == planned(context, "reward")


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(
    ("algorithm", "rows", "micro", "stages"), [("ppo", None, 1, ["reward", "rl"]), ("grpo", 2, None, ["sft", "reward", "rl"])]
)
def test_an_evaluation_calls_what_was_planned(tiny, caught, monkeypatch, algorithm, rows, micro, stages):
    """Of the policy, which is asked last; the reference without SFT has no adapter. Answers are computed as many at once as planned."""
    sampling = FIELDS["rl"]["sampling"] | {"max_num_seqs": rows}
    learning = FIELDS["rl"] | {"algorithm": algorithm, "group_size": 2, "micro_batch_size": micro, "sampling": sampling}
    context = run_context(tiny, rl=learning, evaluate={"batch_size": 2}, run={"stages": stages})
    seen: list[list[str]] = []

    def respond(*arguments, original=evaluate.respond):
        caught.clear()
        return original(*arguments)

    def log_ratio(*arguments, original=evaluate._log_ratio):
        seen.append(signature(list(arguments[4:])))
        assert arguments[3] == (micro or 2)
        return original(*arguments)

    def score(*arguments, original=rewards._score):
        assert arguments[2] == (micro or 2)
        return original(*arguments)

    def compiled(function, *arguments, original=Call):
        """Both programs are planned with as many at once."""
        assert function not in ("score", "log-ratio") or arguments[1][-1] == (micro or 2)
        return original(function, *arguments)

    monkeypatch.setattr(rewards, "_score", score)
    monkeypatch.setattr(programs, "Call", compiled)
    monkeypatch.setattr(evaluate, "_log_ratio", log_ratio)
    monkeypatch.setattr(evaluate, "respond", respond)
    with jax.set_mesh(context.mesh):
        reference = sft.init(context).trainable if "sft" in stages else Role()
        model = reward_stage.init(context, reference).trainable
        trained = rl.init(context, reference, model).train.trainable
        roles = {"reference": reference, "policy": rl.whole(context, reference, model, trained)["policy"]}
        given = rewards.Rewards(context, {"run": rewards.RewardModel(context.decoder, context.backbone, model)})
        list(evaluate.policy(context, roles, given))
    calls = planned(context, "evaluate")
    assert seen == [calls.pop("log-ratio")] and caught == calls
    assert calls.keys() == {"rollout", "score"}


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(("micro", "names"), [(None, {"update"}), (4, {"update"}), (2, {"update", "evaluation"})])
def test_held_out_pairs_are_planned_where_they_are_more_than_an_update_computes(tiny, monkeypatch, micro, names):
    """Four devices can split the four rows of two pairs; but of held-out pairs they are given four."""
    for module in (training_context, reward_batches, programs):
        monkeypatch.setattr(module, "row_multiple", lambda _: 4)
    context = run_context(tiny, reward=FIELDS["reward"] | {"batch_size": 8, "micro_batch_size": micro})
    calls = planned(context, "reward")
    assert calls.keys() == names
    if micro == 2:
        seen = []
        score = lambda _, *arguments: seen.append(signature(list(arguments))) or np.zeros((2, 4))  # noqa: E731
        monkeypatch.setattr(reward_kinds, "_score_pairs", score)
        role = reward_stage.init(context, Role()).trainable
        reward_kinds.Pairs().scores(context, role, context.data.preference.validation)
        assert seen == [calls["evaluation"]]


@pytest.mark.parametrize(
    ("rows", "answers", "loops"),
    [
        (None, 1, (4,)),  # blocks of 5 in 20 tokens
        (64, 1, (4,)),
        (16, 1, (32, 1)),  # 64 prompts, two read at once; 16 blocks in all
        (16, 4, (16, 1)),  # 16 prompts
        (8, 1, (64, 1)),
        (3, 1, (64, 2)),
        (3, 16, (4, 22)),  # 86 blocks in all
        (17, 2, (16, 1)),  # 32 prompts, two read at once
    ],
)
def test_rounds_of_a_rollouts_loops(tiny, rows, answers, loops):
    found = {}
    sampling = {"max_new_tokens": 20, "max_num_seqs": rows}
    algorithm = {"algorithm": "rloo", "group_size": answers} if answers > 1 else {}
    context = tiny_context(tiny, **FIELDS | {"rl": FIELDS["rl"] | algorithm | {"batch_size": 64, "sampling": sampling}})
    abstract = abstract_context(context.config, tiny.config, jnp.dtype("float32"), jax.devices()[:1])

    def compile(call: Call):
        found[call.name] = call.loops
        return jax.eval_shape(lambda *arguments: call.function(*call.static, *arguments), *call.arguments.values())

    stage_calls(abstract, "rl", compile)
    assert found["rollout"] == loops and not any(found[name] for name in found if name != "rollout")


def test_separate_roles_keep_a_backbone_more(tiny):
    """Of the reward model, its adapter merged in; with full tuning policy, value and reference have theirs too."""
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(tiny.params))

    def kept(**changes) -> float:
        fields = {name: FIELDS[name] | changes.get(name, {}) for name in FIELDS}
        context = tiny_context(tiny, **fields)
        abstract = abstract_context(context.config, tiny.config, jnp.dtype("float32"), jax.devices()[:1])
        returned = lambda call: jax.eval_shape(lambda *a: call.function(*call.static, *a), *call.arguments.values())  # noqa: E731
        leaves = jax.tree.leaves(stage_calls(abstract, "rl", returned))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / size

    separate, full = {"roles": "separate"}, {"tuning": "full"}
    shared = kept()
    assert kept(rl=FIELDS["rl"] | separate) == pytest.approx(shared + 1, abs=0.1)
    twin = kept(rl=FIELDS["rl"] | separate | full, sft=full, reward=full)
    # Backbone, reference and reward model; policy and value with Adam's two moments each.
    assert twin == pytest.approx(3 + 2 * 3, abs=0.05)


@pytest.mark.parametrize(
    ("quantization", "roles", "models", "backbones"),
    [
        (None, "separate", ["run"], 1),
        (None, "separate", ["runs/a"], 1),
        (None, "separate", ["run", "runs/a", "runs/b"], 3),
        (None, "shared", ["run", "runs/a"], 0),  # which runs with another backbone refuse
        ("nf4", "separate", ["run"], 0),
        ("nf4", "separate", ["runs/a"], 1),
        ("nf4", "separate", ["run", "runs/a", "runs/b"], 2),
        ("nf4", "shared", ["run", "runs/a"], 0),
    ],
)
def test_reward_models_of_other_runs_keep_backbones_in_floating_point(tiny, quantization, roles, models, backbones):
    """Of which nothing may be known; this run's own is merged into one, or shares the quantized one."""
    rewards = [{"model": name} for name in models]
    fields = {"rl": FIELDS["rl"] | {"roles": roles, "rewards": rewards, "value_init": "zero"}, "run": {"stages": ["rl"]}}
    config = changed(tiny_context(tiny, **fields).config, (f"model.quantization={quantization or 'null'}",))
    scored = []

    def compile(call: Call):
        if call.name == "score":
            scored.append(signature(call.arguments["backbone"]))
        return jax.eval_shape(lambda *arguments: call.function(*call.static, *arguments), *call.arguments.values())

    abstract = abstract_context(config, tiny.config, jnp.dtype("float32"), jax.devices()[:1])
    kept = stage_calls(abstract, "rl", compile)
    whole = signature(tiny.params)
    own = [signature(tree) for name, tree in kept.items() if name.startswith("reward backbone")]
    assert own == [whole] * backbones and signature(kept["backbone"]) == signature(abstract.backbone)
    shared = [] if own == scored else [signature(abstract.backbone)] * (len(models) - backbones)
    assert sorted(scored) == sorted(own + shared)


def test_another_runs_reward_model_is_counted_once_where_this_runs_would_be_tuned_in_full(tiny):
    """There is none of this run's, so that nothing but an adapter and a head stand beside the other one's backbone."""
    one = FIELDS["rl"] | {"roles": "separate", "rewards": [{"model": "runs/a"}], "value_init": "zero"}
    context = tiny_context(tiny, rl=one, reward={"tuning": "full"}, run={"stages": ["rl"]})
    abstract = abstract_context(context.config, tiny.config, jnp.dtype("float32"), jax.devices()[:1])
    returned = lambda call: jax.eval_shape(lambda *a: call.function(*call.static, *a), *call.arguments.values())  # noqa: E731
    kept = stage_calls(abstract, "rl", returned)
    assert kept["reward model"].params is None and signature(kept["reward backbone 0"]) == signature(tiny.params)


def test_rows_that_the_mesh_does_not_divide_are_refused(tiny):
    context = tiny_context(tiny)
    context = dataclasses.replace(context, mesh=jax.sharding.AbstractMesh((4, 1, 2), ("data", "fsdp", "tensor")))
    with pytest.raises(ConfigError, match="6 rows cannot be split over mesh axes data and fsdp, together 4"):
        programs.rows(context, programs._ints(6, 3))


def test_roles_without_a_reward_stage_need_no_reward_model(tiny):
    fields = {"rl": {"rewards": [{"function": "math:sqrt"}], "value_init": "zero"}, "run": {"stages": ["rl"]}}
    context = tiny_context(tiny, **fields)
    abstract = abstract_context(context.config, tiny.config, jnp.dtype("float32"), jax.devices()[:1])
    assert jax.eval_shape(lambda params: programs.roles(abstract, params), abstract.backbone) == (Role(), None)
    assert "score" not in planned(context, "rl")
    named = {**fields["rl"], "rewards": [{"model": "runs/another"}], "algorithm": "grpo", "batch_size": 4, "group_size": 4}
    assert "score" in planned(tiny_context(tiny, **{**fields, "rl": named}), "rl")  # another run's model: planned in this one's shape


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("target", ["attention", r"(vision\.)?attention\..*"])
def test_with_pictures_stages_call_what_was_planned(caught, monkeypatch, target):
    """Rows of one picture and of the longest texts: encoded once by a frozen tower, or by each role where adapters change it."""
    adapted = "vision" in target

    def encode(decoder, *arguments, original=images._encode):
        caught.setdefault("encode", signature(list(arguments)))
        return original(decoder, *arguments)

    lengths = {"max_prompt_length": len(prompt(TinyVision("llava"), 1)), "max_response_length": 2, "length_multiple": 1}
    fields = FIELDS | {"data": lengths, "reward": FIELDS["reward"] | {"kind": "labels"}}
    context = seeing_context("llava", target_modules=target, **fields)
    with monkeypatch.context() as patch:
        patch.setattr(images, "_encode", encode)
        with jax.set_mesh(context.mesh):
            next(sft.run(context, sft.init(context)))
            assert caught == planned(context, "sft") and ("encode" in caught) == (not adapted)
            caught.clear()
            reference = sft.init(context).trainable
            context = dataclasses.replace(context, encoder=new_encoder(context))
            next(reward_stage.run(context, reference, reward_stage.init(context, reference)))
            assert caught == planned(context, "reward")
            caught.clear()
            context = dataclasses.replace(context, encoder=new_encoder(context))
            model = reward_stage.init(context, reference).trainable
            given = rewards.Rewards(context, {"run": rewards.RewardModel(context.decoder, context.backbone, model)})
            next(rl.run(context, reference, model, given, rl.init(context, reference, model)))
            assert caught == planned(context, "rl")
