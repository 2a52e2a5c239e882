"""A head that is fitted before the first update, and a rate of its own for heads."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_context import tiny_context
from tiny_pairs import pairs, role_of

from pe_rlhf_jax.config import ConfigError, OptimizerConfig
from pe_rlhf_jax.data import LabelExample, Split
from pe_rlhf_jax.models.heads import zero_head
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.training import reward
from pe_rlhf_jax.training.optimizer import make_optimizer
from pe_rlhf_jax.training.probe import _fit, _folds, linear_probe
from pe_rlhf_jax.training.statistics import area_under_curve

pytestmark = pytest.mark.usefixtures("quick_compile")


def drawn(rows: int = 300, size: int = 12):
    """Hidden states of which nearly everything is common to all, and a label that one small direction tells, with noise."""
    rng = np.random.default_rng(0)
    labels = (rng.random(rows) < 0.8).astype(float)
    hidden = 50 + rng.normal(size=(rows, size)) * np.geomspace(0.01, 10, size)
    hidden[:, 0] += 0.02 * labels
    return hidden.astype(np.float32), labels


def names(count):
    """Every row is alone."""
    return [str(i) for i in range(count)]


def scores(head, hidden):
    return hidden.astype(np.float64) @ head["kernel"][:, 0].astype(np.float64) + float(head["bias"][0])


@pytest.mark.parametrize("labelled", [False, True])
def test_a_fit_is_where_the_loss_is_least(labelled):
    """The gradient, worked out anew, is 0."""
    hidden, labels = drawn()
    x, y, weight = (hidden - 50) / 10, labels if labelled else np.ones(len(labels)), 1 + labels
    kernel, bias = _fit(x, y, weight, 0.03, labelled)
    wrong = weight / weight.sum() * (1 / (1 + np.exp(-(x @ kernel + bias))) - y)
    np.testing.assert_allclose(x.T @ wrong + 0.03 * kernel, 0, atol=1e-5)
    assert abs(wrong.sum()) < 1e-5 if labelled else bias == 0
    assert np.abs(kernel).max() > 0.05


@pytest.mark.parametrize("balanced", [False, True])
def test_a_head_ranks_and_is_not_too_sure(balanced):
    """Where most of what is told is common to all; on rows of the same kind that it has not seen, its loss is less than without it."""
    hidden, labels = drawn(2000)
    head = linear_probe(hidden[:1000], labels[:1000], names(1000), balanced)
    found, y = scores(head, hidden[1000:]), labels[1000:]
    assert area_under_curve(found, y) > 0.85
    weight = np.where(y == 1, 0.5 / y.mean(), 0.5 / (1 - y.mean())) if balanced else np.ones(1000)
    loss = lambda scores: np.average(np.logaddexp(0, np.where(y == 1, -scores, scores)), weights=weight)  # noqa: E731
    base = np.log(1 if balanced else labels[:1000].sum() / (1000 - labels[:1000].sum()))
    assert loss(found) < 0.85 * loss(np.full(1000, base))
    assert loss(found) < min(loss(2 * found - base), loss(found / 2 + base / 2), loss(found - 1), loss(found + 1))
    assert head["kernel"].dtype == head["bias"].dtype == np.float32 and head["kernel"].shape == (12, 1)


def test_the_size_of_hidden_states_does_not_matter():
    """Nor does a number that is always the same."""
    hidden, labels = drawn()
    groups = names(len(labels))
    other = np.append(hidden.astype(np.float64) * np.geomspace(0.1, 7, 12) - 3, np.full((len(labels), 1), 5.0), axis=1)
    found, expected = linear_probe(other, labels, groups, True), linear_probe(hidden, labels, groups, True)
    np.testing.assert_allclose(scores(found, other), scores(expected, hidden), atol=1e-2)
    assert found["kernel"][-1] == 0


def test_differences_become_positive():
    rng = np.random.default_rng(0)
    difference = rng.normal(size=(200, 6)) + np.array([1, 0, 0, -1, 0, 0])
    head = linear_probe(difference, None, names(200), False)
    assert head["bias"] == 0 and np.mean(scores(head, difference) > 0) > 0.85


def test_groups_stay_together():
    folds = _folds(["a", "b", "a", "d", "e", "b"] + ["c"] * 3, np.ones(9))
    assert folds[0] == folds[2] and folds[1] == folds[5] and len(set(folds[6:])) == 1
    assert set(_folds(names(10), np.ones(10)).tolist()) == set(_folds(["one"] * 10, np.ones(10)).tolist()) == set(range(5))


def test_no_head_is_without_a_label():
    """Two groups have all rows of a label: they are in two folds. One has: then its rows are apart, and other groups are not."""
    labels = np.repeat([1.0, 0.0], [20, 180])
    for positive, apart in ((["p"] * 10 + ["q"] * 10, True), (["p"] * 20, False)):
        folds = _folds(positive + [f"n{i // 4}" for i in range(180)], labels)
        assert all(len(set(labels[folds != part])) == 2 for part in range(5))
        assert (folds[0] == folds[9] != folds[10]) if apart else len(set(folds[:20].tolist())) == 5
        assert all(len(set(folds[at : at + 4].tolist())) == 1 for at in range(20, 200, 4))
    few = _folds(names(200), labels)
    assert [int(labels[few == part].sum()) for part in range(5)] == [4] * 5


def test_hidden_states_that_are_all_alike():
    head = linear_probe(np.ones((20, 3), np.float32), np.arange(20) % 2, names(20), False)
    assert not np.any(head["kernel"]) and not np.any(head["bias"])


def test_a_penalty_that_holds_out():
    """Labels of chance: the strongest one. Labels that many rows tell without error: a weak one."""
    rng = np.random.default_rng(0)
    hidden, chance = rng.normal(size=(100, 60)), rng.integers(0, 2, 100).astype(float)
    weak = linear_probe(hidden, chance, names(100), False)
    strong = linear_probe(hidden, (hidden[:, 0] > 0).astype(float), names(100), False)
    assert np.abs(weak["kernel"]).max() < 0.25 < np.abs(strong["kernel"]).max()


@pytest.mark.parametrize("kind", ["labels", "pairs", "pairs-as-labels"])
def test_the_stage_begins_with_a_fitted_head(tiny, kind):
    """Of the rows it is given, judged as step 0; a run that goes on keeps the head it has."""
    size, rng = tiny.config.vocab_size, np.random.default_rng(1)
    texts = [rng.integers(4, size, 6).astype(np.int32) for _ in range(40)]
    labels = [LabelExample(np.append(text, 2 + i % 2).astype(np.int32), float(i % 2), prompt_length=3) for i, text in enumerate(texts)]
    both = pairs(size, ((3, 2, 2),) * 24)
    marked = [dataclasses.replace(x, chosen=np.append(x.chosen, 2), rejected=np.append(x.rejected, 3)) for x in both]
    balance = {"balance_classes": True} if kind == "labels" else {}
    section = {"kind": kind, "linear_probe": 40, "steps": 2, "batch_size": 4, "evaluate_every": 1, "evaluation_pairs": 40, **balance}
    context = tiny_context(tiny, reward=section | {"optimizer": {"learning_rate": 1e-9}})
    data = dataclasses.replace(context.data, label=Split(labels, labels), preference=Split(marked, marked))
    context = dataclasses.replace(context, data=data)
    start = reward.init(context, Role())
    updates = reward.run(context, Role(), start)
    state, judged = next(updates)
    assert int(state.step) == 0 and all(name.startswith("eval/") for name in judged)
    assert judged["eval/accuracy"] > 0.75 and judged["eval/loss"] < 0.6  # half, and 0.69, by chance
    zero = jax.tree.map(jnp.copy, state.replace(trainable=state.trainable.replace(head=jax.tree.map(jnp.zeros_like, state.trainable.head))))
    _, metrics = next(updates)
    assert metrics["loss"] < 0.6
    kept, _ = next(reward.run(context, Role(), zero, fresh=False))
    assert int(kept.step) == 1 and float(jnp.abs(kept.trainable.head["kernel"]).max()) < 1e-6


def test_a_head_that_is_there_already(tiny):
    context = tiny_context(tiny, reward={"linear_probe": 10})
    with pytest.raises(ConfigError, match=r"linear_probe would take the place of the head of reward\.adapter"):
        dataclasses.replace(context, reward_base=Role(head=role_of(context).head))


def test_rows_are_drawn_and_not_every_other(tiny, monkeypatch):
    """Right and wrong by turns, of which a probe of half would see one kind; and rows of one label are refused."""
    rng = np.random.default_rng(0)
    labels = [LabelExample(rng.integers(2, tiny.config.vocab_size, 5).astype(np.int32), float(i % 2)) for i in range(40)]
    context = tiny_context(tiny, reward={"kind": "labels", "linear_probe": 20, "steps": 1})
    seen = []
    monkeypatch.setattr(reward, "linear_probe", lambda hidden, y, *_: seen.append(y) or zero_head(hidden.shape[1]))
    for rows in (labels, [dataclasses.replace(row, label=1.0) for row in labels]):
        inside = dataclasses.replace(context, data=dataclasses.replace(context.data, label=Split(rows, labels)))
        if rows is labels:
            next(reward.run(inside, Role(), reward.init(inside, Role())))
            assert 5 <= sum(seen[0]) <= 15 and len(seen[0]) == 20
        else:
            with pytest.raises(ConfigError, match="of the 20 rows drawn for it, fewer than two have one of the labels"):
                next(reward.run(inside, Role(), reward.init(inside, Role())))


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_a_head_has_a_rate_of_its_own(name):
    trained = Role(lora={"a": jnp.ones((4, 2))}, head={"kernel": jnp.ones((4, 1)), "bias": jnp.ones(1)})
    gradient = jax.tree.map(lambda x: 0.1 * jnp.arange(1.0, x.size + 1).reshape(x.shape), trained)

    def updates(**rate):
        config = OptimizerConfig(name=name, learning_rate=1e-2, weight_decay=0.1, **rate)
        rule = make_optimizer(config, 10, "lora")
        return rule.update(gradient, rule.init(trained), trained)[0]

    plain, slow = updates(), updates(head_learning_rate=1e-3)
    np.testing.assert_array_equal(slow.lora["a"], plain.lora["a"])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, 0.1 * y, rtol=1e-6), slow.head, plain.head)
