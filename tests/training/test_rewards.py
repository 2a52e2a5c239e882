"""What a rollout earns: models, functions, weights, penalties, scale; and responses cut at stop strings."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pe_rlhf_jax.config import ConfigError
from pe_rlhf_jax.data import PromptExample, Split
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.training import rewards as module
from pe_rlhf_jax.training import rl
from pe_rlhf_jax.training.functions import FunctionError, call_function
from pe_rlhf_jax.training.rewards import RewardModel, Rewards, RewardStatistics, Scores, for_learning, not_finite, penalised
from pe_rlhf_jax.training.rollouts import cut_at_stop_strings
from pe_rlhf_jax.types import Rollout

PAD, END = 0, 1


def count_words(prompts, completions, **columns):
    return [len(text.split()) for text in completions]


def first_token(prompts, completions, **columns):
    return [float(text.split()[0]) / 10 for text in completions]


def raises(prompts, completions, **columns):
    raise KeyError("missing")


def not_a_number(prompts, completions, **columns):
    return [0.5] * (len(completions) - 1) + [float("nan")]


def too_large(prompts, completions, **columns):
    return [-1e39] * len(completions)


def beyond_floats(prompts, completions, **columns):
    return [10**400] * len(completions)


def empties(prompts, completions, answer, **columns):
    given = len(answer)
    answer.clear()
    return [given] * len(completions)


def length_of_answer(prompts, completions, answer, **columns):
    return [len(text or "") for text in answer]


def too_few(prompts, completions, **columns):
    return [0.5] * (len(completions) - 1)


def term(name: str, weight: float = 1.0) -> dict:
    return {"function": f"test_rewards:{name}", "weight": weight}


def rollout_of(*responses: list[int], width: int = 5) -> Rollout:
    mask = np.array([[i < len(row) for i in range(width)] for row in responses])
    tokens = np.array([row + [PAD] * (width - len(row)) for row in responses], np.int32)
    prompt = np.full((len(responses), 3), 4, np.int32)
    ended = np.array([END in row for row in responses])
    arrays = (prompt, prompt > 0, tokens, mask, np.where(mask, -1.5, 0.0).astype(np.float32), ended)
    return Rollout(*map(jnp.asarray, arrays))


def test_a_weighted_sum_of_a_model_and_functions(make_context):
    """A model that says 0.7 + 2 x 0.3 words - 0.25 x the first token over 10; a term of weight 0 only watches."""
    rewards = [{"model": "run", "weight": 1.0}, term("count_words", 0.3), term("first_token", 0.0)]
    context = make_context(rl={"rewards": rewards})
    head = {"kernel": jnp.zeros((context.decoder.config.hidden_size, 1)), "bias": jnp.array([0.7])}
    model = RewardModel(context.decoder, context.backbone, Role(head=head))
    rollout, prompts = rollout_of([5, 6, END], [7, 8, 9, 2]), context.data.prompts.train[:2]
    scores = Rewards(context, {"run": model})(rollout, prompts)
    np.testing.assert_allclose(scores.terms["model"], [0.7, 0.7], rtol=1e-6)
    np.testing.assert_array_equal(scores.terms["count_words"], [3, 4])
    np.testing.assert_allclose(scores.terms["first_token"], [0.5, 0.7], rtol=1e-6)
    np.testing.assert_allclose(scores.total, [0.7 + 0.9, 0.7 + 1.2], rtol=1e-6)
    assert scores.total.dtype == np.float32


def test_penalties(make_context):
    """No end token: the penalty instead of rewards, unless they say less. Each token beyond two costs 0.125, also then."""
    changes = {"missing_eos_penalty": -2.0, "length_penalty": 0.125, "length_target": 2}
    context = make_context(rl={"rewards": [term("first_token")], **changes})
    scores = Rewards(context, {})(rollout_of([5, END], [5, 6, END], [5, 6, 7, 8]), context.data.prompts.train[:3])
    np.testing.assert_allclose(scores.total, [0.5, 0.5 - 0.125, -2.0 - 0.25], rtol=1e-6)
    context = make_context(rl={"rewards": [term("first_token", weight=-10)], **changes})
    scores = Rewards(context, {})(rollout_of([5, 6, 7, 8]), context.data.prompts.train[:1])
    np.testing.assert_allclose(scores.total, [-5.0 - 0.25], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "said"),
    [("raises", "KeyError"), ("not_a_number", "nan"), ("too_large", "-1e.39"), ("beyond_floats", "10{400}"), ("too_few", "1 values for 2")],
)
def test_a_function_that_fails_is_named(make_context, name, said):
    context = make_context(rl={"rewards": [term(name)]})
    with pytest.raises(FunctionError, match=f"test_rewards:{name}.*{said}"):
        Rewards(context, {})(rollout_of([5, END], [6, END]), context.data.prompts.train[:2])


def test_a_function_that_is_not_there_is_named_before_anything_runs(make_context):
    with pytest.raises(ConfigError, match="test_rewards has no nothing"):
        Rewards(make_context(rl={"rewards": [{"function": "test_rewards:nothing"}]}), {})


def test_a_module_that_fails_while_it_is_imported_says_how(make_context, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, line, said in (
        ("one", "import math; math.nothing", "AttributeError: module 'math' has no attribute"),
        ("two", "1 / 0", "ZeroD"),
    ):
        (tmp_path / f"broken_{name}.py").write_text(line + "\n")
        with pytest.raises(ConfigError, match=f"broken_{name}:f: importing broken_{name} failed: {said}"):
            Rewards(make_context(rl={"rewards": [{"function": f"broken_{name}:f"}]}), {})


def test_a_function_gets_a_column_that_no_row_of_the_batch_has(make_context):
    context = make_context(rl={"rewards": [term("length_of_answer")]})
    rows = [PromptExample(row.tokens, row.text, {"answer": "six"} if i == 3 else {}) for i, row in enumerate(context.data.prompts.train)]
    context = dataclasses.replace(context, data=dataclasses.replace(context.data, prompts=Split(rows, [])))
    rewards, rollout = Rewards(context, {}), rollout_of([5, END], [6, END])
    assert [rewards(rollout, rows[at : at + 2]).total.tolist() for at in (0, 2)] == [[0.0, 0.0], [0.0, 3.0]]


def test_a_function_may_change_the_columns_that_it_is_given(make_context):
    columns = {"answer": ["a", "b"]}
    assert call_function("test:empties", empties, ["x"] * 2, ["y"] * 2, columns) == [2.0, 2.0]
    assert columns == {"answer": ["a", "b"]}


def test_functions_are_called_while_models_score(make_context, monkeypatch):
    """Every model is given its work before a text is decoded; nobody waits for a score before all functions have been called."""
    rewards = [term("count_words"), {"model": "run"}, {"model": "runs/other"}]
    context, happened = make_context(rl={"rewards": rewards, "roles": "separate"}), []

    def called(name, function):
        return lambda *arguments: happened.append(name) or function(*arguments)

    for name in ("_score", "texts", "call_function", "fetch"):
        monkeypatch.setattr(module, name, called(name, getattr(module, name)))
    head = {"kernel": jnp.zeros((context.decoder.config.hidden_size, 1)), "bias": jnp.array([0.7])}
    model = RewardModel(context.decoder, context.backbone, Role(head=head))
    scores = Rewards(context, {"run": model, "runs/other": model})(rollout_of([5, 6, END], [7, 8, 9, 2]), context.data.prompts.train[:2])
    assert happened[:6] == ["_score", "_score", "texts", "call_function", "fetch", "fetch"]
    assert list(scores.terms) == ["count_words", "model", "other"]
    np.testing.assert_allclose(scores.total, [3 + 1.4, 4 + 1.4], rtol=1e-6)


def test_rewards_that_are_no_numbers_are_named(make_context):
    """Where the bound on a response without an end hides it, too; a reward that is only watched does not count."""
    rewards = [{"model": "run", "weight": 2.0}, {"model": "runs/watched", "weight": 0.0}]
    config = make_context(rl={"rewards": rewards, "roles": "separate", "missing_eos_penalty": -1.0}).config.rl
    rollout = rollout_of([5, END], [5, 6, 7], [5, END])

    def named(model, watched=(0, 0, 0)):
        terms = {"model": np.float32(model), "watched": np.float32(watched)}
        with np.errstate(over="ignore"):
            return not_finite(config, Scores(penalised(config, 2 * terms["model"], rollout), terms))

    assert named([1, 2, 3], watched=[np.nan, 0, 0])[0] == 0
    assert named([1, np.nan, 3]) == (1, "the reward 'model' is not a finite number for 1 of 3 responses")
    assert named([np.nan, np.nan, np.inf]) == (3, "the reward 'model' is not a finite number for 3 of 3 responses")
    assert named([1, 2, 3e38]) == (1, "the sum of the rewards is not a finite number for 1 of 3 responses")


def test_end_tokens_are_not_stop_strings(make_context):
    context = make_context()
    cut = cut_at_stop_strings(context, rollout_of([5, 6, 7, 8], [6, 5, 7, END], [16, 8, 3]), ("6 7",))
    found = rl._of_responses(cut, context.end_tokens)
    assert (found["objective/ended"], found["val/num_eos_tokens"]) == (pytest.approx(2 / 3), 1.0)


def test_running_scale_equals_numpys(make_context):
    """Three batches of uneven spread, against mean and standard deviation of all scores so far in float64."""
    config = make_context(rl={"normalize_rewards": True, "reward_clip": 1.5}).config.rl
    batches = [np.random.default_rng(i).normal(3 * i, 1 + i, 16).astype(np.float32) for i in range(3)]
    statistics = RewardStatistics.new()
    for i, batch in enumerate(batches):
        used, statistics = for_learning(config, jnp.asarray(batch), statistics)
        seen = np.concatenate(batches[: i + 1]).astype(np.float64)
        np.testing.assert_allclose(used, np.clip((batch - seen.mean()) / seen.std(), -1.5, 1.5), rtol=1e-4, atol=1e-5)
    _, after = for_learning(config, jnp.array([1.0, jnp.nan]), statistics)
    assert after == statistics  # one bad batch is not remembered for ever
    for count, score in ((4, 2.5), (24, 0.1), (100, 0.1)):  # nothing ever varied but the rounding of the mean
        same, _ = for_learning(config, jnp.full(count, score), RewardStatistics.new())
        np.testing.assert_allclose(same, 0.0, atol=1e-6)


def test_scores_are_as_they_came_where_no_scale_is_asked_for(make_context):
    config = make_context().config.rl
    scores = jnp.array([0.7, -1.6])
    used, statistics = for_learning(config, scores, RewardStatistics.new())
    np.testing.assert_array_equal(used, scores)
    assert float(statistics.count) == 0


def test_a_response_ends_with_the_token_that_completes_a_stop_string(make_context):
    """Decoded, tokens are numbers between spaces: `6 7` spans two tokens; `2 9` is in no response."""
    context = make_context()
    rollout = rollout_of([5, 6, 7, 8], [6, 5, 7, END], [16, 7, 3])
    cut = cut_at_stop_strings(context, rollout, ("6 7", "2 9"))
    np.testing.assert_array_equal(cut.response, [[5, 6, 7, PAD, PAD], [6, 5, 7, END, PAD], [16, 7, PAD, PAD, PAD]])
    np.testing.assert_array_equal(cut.response_mask.sum(1), [3, 4, 2])
    np.testing.assert_array_equal(cut.ended, [True, True, True])
    np.testing.assert_array_equal(cut.logprobs[0], [-1.5, -1.5, -1.5, 0, 0])
    np.testing.assert_array_equal(rollout.ended, [False, True, False])


def test_learning_with_stop_strings_agrees_with_the_sampler(make_context):
    """A response that is cut is learned as the shorter one that it now is: log-probabilities still match."""
    changes = {"stop_strings": [" 7", " 9", " 3"], "max_new_tokens": 6}
    context = make_context(rl={"rewards": [term("count_words")], "value_init": "zero", "sampling": changes, "steps": 1, "batch_size": 8})
    _, metrics = next(rl.run(context, Role(), None, Rewards(context, {}), rl.init(context, Role(), None)))
    assert metrics["val/sampler_kl"] < 1e-6
    assert metrics["objective/ended"] > 0
    assert metrics["objective/length"] < 6


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce"])
def test_value_as_a_head_on_the_policy(make_context, algorithm):
    """The head's gradient reaches the policy's adapter, and no second adapter exists."""
    context = make_context(rl={"algorithm": algorithm, "value_model": "trunk", "value_init": "zero", "rewards": [term("count_words")]})
    state = rl.init(context, Role(), None)
    assert state.train.trainable["value"].lora is None
    before = np.array(state.train.trainable["value"].head["kernel"])
    *_, (state, metrics) = rl.run(context, Role(), None, Rewards(context, {}), state)
    assert np.any(np.asarray(state.train.trainable["value"].head["kernel"]) != before)
    assert np.isfinite(metrics["loss/value_avg"])


def test_value_tuning_of_its_own(make_context):
    changes = {"value_tuning": "full", "roles": "separate", "value_init": "zero", "rewards": [term("count_words")]}
    context = make_context(rl=changes)
    trainable = rl.init(context, Role(), None).train.trainable
    assert trainable["policy"].params is None and trainable["policy"].lora is not None
    assert trainable["value"].lora is None and trainable["value"].params is not None


def test_a_value_model_needs_its_reward_model(make_context):
    with pytest.raises(ConfigError, match="set it to zero"):
        rl.init(make_context(rl={"rewards": [term("count_words")]}), Role(), None)


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_a_group_shares_its_prompt_and_not_its_answers(make_context, monkeypatch, algorithm):
    context = make_context(rl={"algorithm": algorithm, "batch_size": 8, "group_size": 4, "rewards": [term("count_words")], "steps": 1})
    seen = []
    rewards = Rewards(context, {})
    scored = lambda rollout, prompts, *how: seen.append((rollout, prompts)) or rewards(rollout, prompts, *how)  # noqa: E731
    next(rl.run(context, Role(), None, scored, rl.init(context, Role(), None)))
    (rollout, prompts), *_ = seen
    asked = [prompt.text for prompt in prompts]
    assert asked == [asked[0]] * 4 + [asked[4]] * 4 and asked[0] != asked[4]
    np.testing.assert_array_equal(rollout.prompt[0], rollout.prompt[3])
    assert len({tuple(row) for row in np.asarray(rollout.response[:4]).tolist()}) > 1


def test_a_merged_reward_model_scores_as_its_adapter_does(make_context, tiny):
    """`rl.roles: separate` merges: the same scores to rounding, on parameters of its own."""
    from pe_rlhf_jax.outcomes import _merged

    context = make_context(rl={"roles": "separate"})
    head = {"kernel": jax.random.normal(jax.random.key(0), (context.decoder.config.hidden_size, 1)), "bias": jnp.zeros(1)}
    role = Role(lora=tiny.lora, head=head)
    rollout, prompts = rollout_of([5, 6, END], [7, 8, 9, 2]), context.data.prompts.train[:2]
    own, shared = _merged(context, role), RewardModel(context.decoder, context.backbone, role)
    a, b = (Rewards(context, {"run": model})(rollout, prompts).total for model in (own, shared))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert np.ptp(b) > 0.01
    kernel = own.backbone["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.unsafe_buffer_pointer() != context.backbone["layers"]["mlp"]["up_proj"]["kernel"].unsafe_buffer_pointer()
