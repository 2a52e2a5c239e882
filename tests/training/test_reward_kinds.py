"""Reward models of labels, their loss and figures; what both kinds have in common."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pe_rlhf_jax.algorithms.reward import logistic
from pe_rlhf_jax.config import ConfigError
from pe_rlhf_jax.data import LabelExample, PreferenceExample, Split
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.training import reward
from pe_rlhf_jax.training.reward_kinds import KINDS, Labels
from pe_rlhf_jax.training.statistics import accuracy_by, area_under_curve, bootstrap_auc_ci, bootstrap_pairs_auc_ci, label_calibration

END = 1


def rows(count: int, positive_every: int) -> list[LabelExample]:
    """Positive rows hold token 7, negative ones token 9."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        label = float(i % positive_every == 0)
        words = np.append(rng.integers(10, 31, 2 + i % 3), [7 if label else 9, END]).astype(np.int32)
        found.append(LabelExample(words, label))
    return found


@pytest.fixture
def labelled(make_context):
    def make(positive_every: int = 2, **fields):
        context = make_context(reward={"kind": "labels", **fields}, rl={"roles": "separate"})
        examples = rows(24, positive_every)
        return dataclasses.replace(context, data=dataclasses.replace(context.data, label=Split(examples, examples)))

    return make


def test_logistic_by_hand():
    scores, labels = jnp.array([0.0, 2.0, -1.0]), jnp.array([1.0, 0.0, 0.0])
    loss, statistics = logistic(scores, labels)
    expected = (np.log(2) + np.log1p(np.exp(2)) + np.log1p(np.exp(-1))) / 3
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert float(statistics["accuracy"]) == pytest.approx((0.5 + 0 + 1) / 3)
    weighted, _ = logistic(scores, labels, weight=jnp.array([3.0, 0.0, 1.0]))
    assert float(weighted) == pytest.approx((3 * np.log(2) + np.log1p(np.exp(-1))) / 2, rel=1e-6)
    junk, _ = logistic(jnp.array([0.0, np.nan, -1.0]), labels, weight=jnp.array([3.0, 0.0, 1.0]))
    assert float(junk) == float(weighted)


def test_logistic_of_large_scores_keeps_its_slope():
    """At 60 a probability is 1 to the last bit; the loss of a wrong label is still 60, and no NaN appears."""
    loss, _ = logistic(jnp.array([60.0]), jnp.array([0.0]))
    assert float(loss) == pytest.approx(60.0)
    loss, _ = logistic(jnp.array([-200.0]), jnp.array([0.0]))
    assert float(loss) == pytest.approx(0.0, abs=1e-30)


def test_micro_batches_of_labels_add_up():
    scores, labels, weight = (jnp.asarray(x) for x in np.random.default_rng(1).uniform(0.1, 1, (3, 8)).astype(np.float32))
    labels = jnp.round(labels)
    whole, _ = logistic(scores, labels, weight=weight)
    parts = [logistic(scores[i : i + 4], labels[i : i + 4], weight=weight[i : i + 4], total=8)[0] for i in (0, 4)]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)


def test_area_under_curve_counts_pairs():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 6, 40), rng.integers(0, 2, 40)  # integers: many ties
    positive, negative = scores[labels == 1], scores[labels == 0]
    wins = np.mean([(p > n) + 0.5 * (p == n) for p in positive for n in negative])
    assert area_under_curve(scores, labels) == pytest.approx(wins)
    assert area_under_curve(np.array([1.0, 2.0, 3.0]), np.array([0, 0, 1])) == 1.0
    assert area_under_curve(np.array([1.0, 2.0]), np.array([1, 1])) == 0.5
    assert np.isnan(area_under_curve(np.array([np.nan, 2.0, 1.0]), np.array([1, 1, 0])))  # not the best checkpoint
    low, high = bootstrap_auc_ci(scores.astype(float), labels, 400)
    assert low < wins < high and 0.05 < high - low < 0.5


def test_the_interval_of_pairs_goes_by_pair():
    """Where a pair's sides differ by as much as prompts do not, resampling them apart would see a spread that is not there."""
    rng = np.random.default_rng(0)
    rejected = rng.normal(size=200)
    low, high = bootstrap_pairs_auc_ci(rejected + 0.5, rejected, 400)
    area = area_under_curve(np.concatenate([rejected + 0.5, rejected]), np.repeat([1, 0], 200))
    assert low <= area <= high and high - low < 0.04
    wide = bootstrap_auc_ci(np.concatenate([rejected + 0.5, rejected]), np.repeat([1, 0], 200), 400)
    assert wide[1] - wide[0] > 2 * (high - low)


def test_bins_of_calibration_and_accuracy():
    labels = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    logits = np.array([-2.0, -2, -2, -2, 2, 2, 2, 2])
    first, second = label_calibration(logits, labels, bins=2)
    assert first == {"predicted": pytest.approx(1 / (1 + np.exp(2))), "observed": 0.25, "count": 4}
    assert second["observed"] == 1.0
    short, long = accuracy_by(np.array([5, 1, 7, 2]), np.array([1, 0, 1, 0.5]), bins=2)
    assert short == {"low": 1.0, "high": 2.0, "accuracy": 0.25, "count": 2}
    assert long == {"low": 5.0, "high": 7.0, "accuracy": 1.0, "count": 2}


@pytest.mark.parametrize("kind", ["pairs", "labels", "pairs-as-labels"])
def test_intervals_draw_rows_of_a_group_together(labelled, kind):
    """Copies of rows in their groups leave intervals as they are."""
    words, rng = np.array([5, END], np.int32), np.random.default_rng(0)
    sides = 1 if kind == "labels" else 2
    scores = rng.normal(size=(sides, 20)).astype(np.float32)
    make = (lambda i: LabelExample(words, float(i % 2))) if kind == "labels" else (lambda i: PreferenceExample(words, words[::-1]))
    rows = [dataclasses.replace(make(i), group=f"prompt {i}") for i in range(20)]
    context = labelled()
    one, many = (KINDS[kind].figures(context, rows * copies, *np.tile(scores, copies)) for copies in (1, 5))
    assert one["groups"] == many["groups"] == 20
    for name in ("ci",) if kind == "pairs" else ("ci", "auc_ci"):
        assert many[name] == pytest.approx(one[name]) and one[name][0] < one[name][1]


def test_rows_that_chose_the_checkpoint_are_counted(labelled):
    """With one evaluation there was nothing to choose."""
    for fields, chose in (({"evaluate_every": 20}, 10), ({"evaluate_every": 39}, 10), ({"evaluate_every": 40}, 0)):
        context = labelled(steps=40, evaluation_pairs=10, **fields)
        role = stirred(reward.init(context, Role()).trainable)
        assert reward.evaluate(context, role)["selected_on"] == chose
    context = labelled(steps=40, evaluation_pairs=10, evaluate_every=40, linear_probe=20)  # the fitted head is another
    assert reward.evaluate(context, role)["selected_on"] == 10
    fewer = context.config.model_copy(update={"reward": context.config.reward.model_copy(update={"evaluate_every": 20})})
    fewer = fewer.model_copy(update={"evaluate": fewer.evaluate.model_copy(update={"pairs": 6})})
    assert reward.evaluate(dataclasses.replace(context, config=fewer), role)["selected_on"] == 6


def test_held_out_rows_of_one_label_are_not_judged(labelled):
    """Every model would have an area of a half."""
    context = labelled(positive_every=12)
    rows = sorted(context.data.label.train, key=lambda row: row.label)
    config = context.config.model_copy(update={"evaluate": context.config.evaluate.model_copy(update={"pairs": 6})})
    context = dataclasses.replace(context, config=config, data=dataclasses.replace(context.data, label=Split(rows, rows)))
    with pytest.raises(ConfigError, match=r"evaluate\.pairs: the first 6 held-out rows have one label only"):
        reward.evaluate(context, stirred(reward.init(context, Role()).trainable))


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_model_of_labels_learns_them(labelled, tuning):
    context = labelled(tuning=tuning, steps=40, batch_size=8, evaluate_every=40, optimizer={"learning_rate": 1e-2})
    *_, (state, metrics) = reward.run(context, Role(), reward.init(context, Role()))
    assert metrics["eval/auc"] > 0.99
    trained, figures = reward.finish(context, Role(), state)
    np.testing.assert_array_equal(trained.head["bias"], state.trainable.head["bias"])  # its 0 is the boundary between the classes
    assert "bias" not in figures
    found = reward.evaluate(context, reward.whole(context, Role(), trained))
    assert found["auc_ci"][0] <= found["auc"] <= found["auc_ci"][1]
    assert found["rows"] == 24 and found["positive_share"] == 0.5


def stirred(role):
    """The role with noise on every leaf: a fresh head for labels and half of a fresh adapter are 0, and so are scores and gradients."""
    leaves, tree = jax.tree.flatten(role)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    return tree.unflatten([leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)])


def test_pairs_as_labels_have_the_loss_and_figures_of_their_sides(labelled):
    """The same rows as pairs, in one row each, and one by one as labels."""
    context = labelled(batch_size=4)
    rng = np.random.default_rng(3)
    pairs = []
    for _ in range(6):
        prompt = rng.integers(10, 31, 4)
        pairs.append(PreferenceExample(*(np.append(prompt, [*rng.integers(10, 31, 2), END]).astype(np.int32) for _ in range(2))))
    sides = [LabelExample(pair.chosen, 1.0) for pair in pairs] + [LabelExample(pair.rejected, 0.0) for pair in pairs]
    role, config = stirred(reward.init(context, Role()).trainable), context.config.reward
    found = []
    for kind, rows in ((KINDS["pairs-as-labels"], pairs), (KINDS["labels"], sides)):
        batch = context.rows(kind.collator(context)(rows))

        def loss(role, kind=kind, batch=batch):
            return kind.loss(config, context.decoder, role, context.backbone, batch, reward._examples(batch), None)

        figures = kind.figures(context, rows, *kind.scores(context, role, rows))
        shown = {key: figures[key] for key in ("accuracy", "auc", "rows", "loss", "calibration")}
        found.append((jax.value_and_grad(loss, has_aux=True)(role), shown))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *found)
    assert found[0][1]["rows"] == 12 and 0 < found[0][1]["auc"] < 1
    assert min(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(found[0][0][1])) > 1e-5, "what is compared is 0"


def test_a_model_of_pairs_as_labels_learns_them_and_keeps_its_zero(labelled):
    context = labelled(steps=40, batch_size=4, evaluate_every=40, optimizer={"learning_rate": 1e-2})
    good, bad = ([row for row in context.data.label.train if row.label == label] for label in (1.0, 0.0))
    pairs = [PreferenceExample(a.tokens, b.tokens) for a, b in zip(good, bad, strict=True)]
    config = context.config.model_copy(update={"reward": context.config.reward.model_copy(update={"kind": "pairs-as-labels"})})
    context = dataclasses.replace(context, config=config, data=dataclasses.replace(context.data, preference=Split(pairs, pairs)))
    *_, (state, metrics) = reward.run(context, Role(), reward.init(context, Role()))
    assert metrics["eval/auc"] > 0.99
    trained, _ = reward.finish(context, Role(), state)
    np.testing.assert_array_equal(trained.head["bias"], state.trainable.head["bias"])
    assert reward.evaluate(context, reward.whole(context, Role(), trained))["accuracy"] > 0.95


def test_balanced_classes_weigh_alike(labelled):
    context = labelled(positive_every=6, balance_classes=True)
    batch = Labels().collator(context)(context.data.label.train)
    label, weight = np.asarray(batch.label), np.asarray(batch.weight)
    assert label.sum() == 4
    assert weight[label == 1].sum() == pytest.approx(weight[label == 0].sum()) == pytest.approx(12)
    role, loss = stirred(reward.init(context, Role()).trainable), reward._loss(context, Labels())
    rows = sorted(context.data.label.train, key=lambda row: row.label)

    def lost(part):
        batch = Labels().collator(context)(part)
        return float(loss(role, (context.backbone, Role()), batch, reward._examples(batch), jax.random.key(0))[0])

    # Also where batches hold one class each.
    assert np.mean([lost(rows[i : i + 4]) for i in range(0, 24, 4)]) == pytest.approx(lost(rows), rel=1e-5)
    plain = Labels().collator(labelled(positive_every=6))(context.data.label.train)
    np.testing.assert_array_equal(plain.weight, 1.0)


def test_label_scores_do_not_depend_on_padding_or_batch(labelled):
    context = labelled()
    role = stirred(reward.init(context, Role()).trainable)
    one = Labels().scores(context, role, context.data.label.train)[0]
    alone = np.concatenate([Labels().scores(context, role, [row])[0] for row in context.data.label.train[:5]])
    np.testing.assert_allclose(one[:5], alone, rtol=1e-5, atol=1e-6)
    assert np.std(one) > 0.01


@pytest.mark.parametrize("balanced", [False, True])
def test_guessing_and_calibration_of_labels_go_by_their_share(labelled, balanced):
    """The logits of balanced classes lack the share of good rows; all that knows only this share is as good as guessing."""
    context = labelled(positive_every=4, balance_classes=balanced)
    rows = context.data.label.validation
    labels = np.array([row.label for row in rows])
    share = float(np.mean([row.label for row in context.data.label.train]))
    odds = np.log(share / (1 - share))
    figures = KINDS["labels"].figures(context, rows, np.full(len(rows), 0.0 if balanced else odds, np.float32))
    weights = np.where(labels == 1, 0.5 / share, 0.5 / (1 - share)) if balanced else np.ones(len(rows))
    chance = np.full(len(rows), 0.5) if balanced else np.where(labels == 1, share, 1 - share)
    assert figures["loss"] == pytest.approx(-np.mean(weights * np.log(chance)), rel=1e-5)
    assert figures["guessing"] == {"loss": pytest.approx(figures["loss"]), "accuracy": pytest.approx(1 - np.mean(labels))}
    assert [point["predicted"] for point in figures["calibration"]] == pytest.approx([share] * len(figures["calibration"]))
    assert share < 0.3  # so that a half would be another figure
    scores = np.linspace(-1, 2, len(rows), dtype=np.float32)
    losses = weights * np.log1p(np.exp(np.where(labels == 1, -scores, scores)))
    assert KINDS["labels"].quick(context, rows, scores)["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_held_out_loss_of_pairs_is_the_one_that_is_trained(labelled):
    """With its margins and its centering."""
    context = labelled()
    reward_config = context.config.reward.model_copy(update={"kind": "pairs", "use_margin": True, "center_rewards_coefficient": 0.1})
    context = dataclasses.replace(context, config=context.config.model_copy(update={"reward": reward_config}))
    words = np.array([5, END], np.int32)
    rows = [PreferenceExample(words, words[:1], margin=margin) for margin in (0.0, 2.0)]
    chosen, rejected = np.array([1.0, 2.0], np.float32), np.array([0.5, -1.0], np.float32)
    figures = KINDS["pairs"].figures(context, rows, chosen, rejected)
    terms = np.log1p(np.exp(-(chosen - rejected - [0, 2]))) + 0.1 * (chosen + rejected) ** 2
    assert figures["loss"] == pytest.approx(np.mean(terms), rel=1e-5)
    assert figures["guessing"] == {"loss": pytest.approx(np.mean(np.log1p(np.exp([0, 2])))), "accuracy": 0.5}


def test_accuracy_by_length_shows_a_model_that_looks_at_length_alone(labelled):
    rows = [PreferenceExample(np.arange(2 + i % 5), np.arange(2 + i % 4)) for i in range(60)]
    scores = [np.array([len(getattr(row, side)) for row in rows], np.float32) for side in ("chosen", "rejected")]
    for kind in ("pairs", "pairs-as-labels"):
        bins = KINDS[kind].figures(labelled(), rows, *scores)["by_length"]
        assert bins[0]["low"] == -3 and bins[0]["high"] < 0 < bins[-1]["low"] and bins[-1]["high"] == 4
    bins = KINDS["pairs"].figures(labelled(), rows, *scores)["by_length"]
    assert [bins[0]["accuracy"], bins[-1]["accuracy"]] == [0, 1]
