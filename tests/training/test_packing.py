"""Examples that share rows teach what they teach in rows of their own, in every stage that packs; and none sees another."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import packing as benchmark
import pytest
from tiny_context import tiny_context
from tiny_families import CASES
from tiny_pairs import FAST, MARGINS, SHAPES, assert_alike, learned, model_of, pairs, role_of
from tiny_pictures import seeing_context

from pe_rlhf_jax.config import ConfigError
from pe_rlhf_jax.data import (
    BatchOrder,
    LabelExample,
    Packing,
    PreferenceExample,
    SFTExample,
    Split,
    pack_labels,
    pack_preferences,
    pad_labels,
    pad_preferences,
    pad_sft,
)
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.training import loop, reward, reward_batches, sft
from pe_rlhf_jax.training.reward_kinds import label_scores, pair_scores

pytestmark = pytest.mark.usefixtures("quick_compile")

ROWS = Packing(length=20, multiple=1)
"""Longer than every window of the tiny models."""
ROUNDING = 5e-5
"""Of float32, in products over rows of other lengths."""


def texts(vocabulary: int, lengths: tuple[int, ...] = (13, 6, 5, 2, 9, 1)) -> list[np.ndarray]:
    """The second begins as the first does, and all of the fourth is its beginning."""
    rng = np.random.default_rng(2)
    found = [rng.integers(2, vocabulary, n).astype(np.int32) for n in lengths]
    found[1][:4], found[3][:] = found[0][:4], found[0][:2]
    return found


def sft_examples(vocabulary: int) -> list[SFTExample]:
    """One has no prompt, and one no more than a token, which nothing predicts."""
    return [SFTExample(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts(vocabulary)]


def label_examples(vocabulary: int) -> list[LabelExample]:
    return [LabelExample(text, float(i % 3 == 0)) for i, text in enumerate(texts(vocabulary))]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in CASES])
def test_packed_pairs_are_pairs_apart(name):
    """Loss, figures and gradients, whatever places mean to the family: rotations, windows, a table of positions."""
    model = model_of(name)
    size = model.config.vocab_size
    context = tiny_context(model, reward=MARGINS)
    packed = pack_preferences(pairs(size), 0, ROWS)[0]
    assert packed.tokens.shape == (2, 1, 20)
    assert_alike(*(learned(context, role_of(context), batch) for batch in (packed, pad_preferences(pairs(size), 0, 7))), ROUNDING)


def test_packed_labels_are_labels_apart(tiny):
    """With a row that only fills a multiple, too."""
    context = tiny_context(tiny, reward={"kind": "labels"})
    examples = label_examples(tiny.config.vocab_size)
    packed = pack_labels(examples, 0, dataclasses.replace(ROWS, multiple=3))[0]
    assert packed.tokens.shape == (3, 20) and not packed.mask[2].any()
    assert packed.mask.sum() <= sum(example.length for example in examples) - 4 - 2  # what is there once
    assert_alike(*(learned(context, role_of(context), batch) for batch in (packed, pad_labels(examples, 0, 7))), ROUNDING)


def test_packed_sft_is_sft_apart(tiny):
    context, examples = tiny_context(tiny), sft_examples(tiny.config.vocab_size)
    role, loss = role_of(context).replace(head=None), sft._loss(context)

    def taught(batch):
        learn = jax.value_and_grad(lambda role: loss(role, context.backbone, batch, sft._targets(batch), jax.random.key(0))[0])
        return jax.jit(learn)(role), sft._targets(batch)

    assert_alike(taught(pad_sft(examples, 0, 1, ROWS)), taught(pad_sft(examples, 0, 7)), ROUNDING)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_examples_do_not_see_each_other(name):
    """Not one bit of a score changes with the neighbours' tokens."""
    model = model_of(name)
    context = tiny_context(model)
    role, size = role_of(context), model.config.vocab_size
    examples = [LabelExample(np.insert(text, 0, i).astype(np.int32), 1.0) for i, text in enumerate(texts(size))]  # begin unlike
    batch = pack_labels(examples, 0, ROWS)[0]
    scores = jax.jit(lambda batch: label_scores(context.decoder, role, context.backbone, batch).reshape(batch.label.shape))
    before = np.asarray(scores(batch))
    ends = batch.last + 1
    for number in (0, 1):
        changed = np.where(batch.ends == ends[:, number, None], (batch.tokens + 3) % size, batch.tokens)
        after = np.asarray(scores(batch.replace(tokens=changed)))
        same = (np.arange(before.shape[1]) != number) & (batch.weight > 0)
        np.testing.assert_array_equal(after[same], before[same])
        there = batch.weight[:, number] > 0
        assert there.any() and np.all((after != before)[there, number])


@pytest.mark.parametrize(("kind", "micro_batch_size"), [("sft", 1), ("pairs", 2), ("labels", None)])
def test_the_stages_learn_the_same_packed(tiny, kind, micro_batch_size):
    """Updates from the same batches, in portions or not; with fewer tokens that are padding."""
    size, results = tiny.config.vocab_size, {}
    rows = {"sft": sft_examples(size), "preference": pairs(size, (*SHAPES, (1, 1, 1), (2, 1, 2))), "label": label_examples(size)}
    stage = "sft" if kind == "sft" else "reward"
    for packing in (False, True):
        section = {"batch_size": 4, "micro_batch_size": micro_batch_size, "evaluate_every": 2, "steps": 2}
        section |= {} if stage == "sft" else {"kind": kind} | ({"balance_classes": True} if kind == "labels" else {})
        context = tiny_context(tiny, **{stage: section, "data": {"packing": packing, "length_multiple": 1}})
        splits = {name: Split(examples, examples) for name, examples in rows.items()}
        context = dataclasses.replace(context, data=dataclasses.replace(context.data, **splits))
        updates = sft.run(context, sft.init(context)) if stage == "sft" else reward.run(context, Role(), reward.init(context, Role()))
        results[packing] = [(jax.device_get(state.trainable), metrics) for state, metrics in updates]
    for (role, metrics), (packed, packed_metrics) in zip(results[False], results[True], strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), role, packed)
        assert packed_metrics.keys() == metrics.keys()
        for name in metrics.keys() - {name for name in metrics if name.startswith(("time/", "perf/"))}:
            assert packed_metrics[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-5), name
    padding = [[metrics["perf/padding"] for _, metrics in results[way]] for way in (False, True)]
    assert np.mean(padding[1]) < np.mean(padding[0])


@pytest.mark.parametrize("kind", ["labels", "pairs"])
def test_what_begins_alike_comes_in_one_batch(tiny, kind):
    """24 dialogs of four rated turns, or as many prompts with four pairs of answers; batches of 12 of them. SFT takes rows as ever."""
    rng = np.random.default_rng(0)
    dialogs = [rng.integers(2, tiny.config.vocab_size, 10).astype(np.int32) for _ in range(24)]
    turns = [[dialog[: 4 + 2 * turn] for turn in range(4)] for dialog in dialogs]
    answers = [[np.append(dialog[:8], [i, i]).astype(np.int32) for i in range(2, 6)] for dialog in dialogs]
    examples = {
        "labels": [LabelExample(text, 1.0) for texts in turns for text in texts],
        "pairs": [PreferenceExample(texts[i], texts[i - 1]) for texts in answers for i in range(4)],
    }[kind]
    tokens = {}
    for together in (False, True):
        context = tiny_context(tiny, reward={"kind": kind, "batch_size": 12}, data={"packing": True, "group_by_prefix": together})
        data = dataclasses.replace(context.data, **{"label" if kind == "labels" else "preference": Split(examples, examples[:4])})
        context = dataclasses.replace(context, data=data)
        order = loop._order(context, context.config.reward, examples)
        batches = [order(step) for step in range(8)]
        assert sorted(np.concatenate(batches).tolist()) == list(range(96))
        collate = reward.kind_of(context.config.reward).collator(context)
        tokens[together] = sum(collate([examples[i] for i in batch]).mask.sum() for batch in batches)
        assert isinstance(loop._order(context, context.config.sft, examples), BatchOrder)
    every = 24 * {"labels": 10, "pairs": 8 + 4 * 2}[kind]  # but for families, of three, that two rows or batches part
    assert every <= tokens[True] < 0.8 * tokens[False]


@pytest.mark.parametrize("kind", ["labels", "pairs", "pairs-as-labels"])
def test_what_is_scored_shares_rows_too(tiny, kind, monkeypatch):
    """Scores and hidden states of packed rows are those of rows apart, in the examples' order; one shape of batch for all of them.

    Rows are made of a few examples at a time, the last time of fewer. An example that is longer than those that are trained on is apart.
    """
    monkeypatch.setattr(reward_batches, "PACKED_AT_ONCE", 6)
    rng = np.random.default_rng(1)
    dialogs = [rng.integers(2, tiny.config.vocab_size, 12).astype(np.int32) for _ in range(5)]
    labels = [LabelExample(dialog[: 5 + 2 * turn], float(turn % 2)) for turn in range(3) for dialog in dialogs]
    both = [PreferenceExample(np.append(dialog[:8], 2), np.append(dialog[:8], [3, 4 + i])) for i in range(3) for dialog in dialogs]
    examples, longer = {"labels": (labels, LabelExample(np.tile(dialogs[0], 3), 0.0))}.get(
        kind, (both, PreferenceExample(np.tile(dialogs[0], 2), np.append(dialogs[0], 2)))
    )
    found, computed, shapes = {}, {}, {}
    for packing in (False, True):
        section = {"kind": kind, "batch_size": 8, "micro_batch_size": 4}
        context = tiny_context(tiny, reward=section, data={"packing": packing, "length_multiple": 4})
        data = dataclasses.replace(context.data, **{reward.kind_of(context.config.reward).data: Split(examples, examples)})
        context, role, kinds = dataclasses.replace(context, data=data), role_of(context), reward.kind_of(context.config.reward)
        rows = [*examples, longer]
        found[packing] = [*kinds.scores(context, role, rows), *kinds.probed(context, role, rows)]
        batches = [batch for batch, _ in reward_batches.scored_batches(context, kinds.data, rows)]
        computed[packing] = sum(batch.tokens.size for batch in batches)
        if packing and kind == "labels":
            assert sum(batch.mask.sum() for batch in batches[:-1]) == 5 * 9  # dialogs whose turns are far apart, each token once
        shapes[packing] = [batch.tokens.shape for batch in batches]
    assert len(set(shapes[True][:-1])) == 1 and shapes[True][-1] == shapes[False][-1] and computed[True] < computed[False]
    assert shapes[True][0][0] <= 4
    assert len(found[True][0]) == 16
    assert_alike(found[True], found[False], ROUNDING)


def test_pairs_in_one_row_that_would_not_pay(tiny):
    """Packed, a pair is one row, however long: its sides have places in one."""
    context = tiny_context(tiny, data={"packing": True, "length_multiple": 1})
    collate = reward.kind_of(context.config.reward).collator(context)
    batch = collate(list(context.data.preference.train))
    longest = max(pair.length for pair in context.data.preference.train)
    assert batch.tokens.shape[1:] == (1, longest) and batch.weight.sum() == 8
    scores = jnp.stack(pair_scores(context.decoder, role_of(context), context.backbone, batch))
    assert scores.shape == (2, batch.weight.size)


def test_pairs_that_share_little_are_refused(tiny):
    """They would make every row longer than was planned."""
    limits = {"packing": True, "max_prompt_length": 4, "max_response_length": 2}
    context = tiny_context(tiny, data=limits)  # sides of 5 to 7 and of 6 tokens, with nothing in common
    with pytest.raises(ConfigError, match=r"takes 13 tokens, more than one prompt and two responses \(8\)"):
        context.packing("reward", "preference")


def test_a_micro_batch_of_all_is_none(tiny):
    """Else there would be as many rows as examples."""
    sections = {"batch_size": 4, "micro_batch_size": 4}
    context = tiny_context(tiny, sft=sections, data={"packing": True})
    assert context.packing("sft", "sft") == Packing(8, 1, 8)
    _, metrics = next(sft.run(context, sft.init(context)))
    assert metrics["perf/padding"] < 0.5


def test_models_that_see_do_not_pack():
    """Nor is that planned: the context is refused."""
    with pytest.raises(ConfigError, match=r"data\.packing is for models of text"):
        seeing_context("llava", data={"packing": True})


@pytest.mark.slow
def test_the_benchmark_compares_what_it_says(tmp_path, monkeypatch, capsys):
    shape = {"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(shape | {"tie_word_embeddings": False}))
    few = ["--batches=2", "--batch=8", "--median=12", "--longest=48", "--turns=1"]
    monkeypatch.setattr("sys.argv", ["packing", "--model-config", str(tmp_path / "config.json"), *few])
    benchmark.main()
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] < 1e-5 and found["padding"]["packed"] < found["padding"]["grouped"] < found["padding"]["padded"]
    assert found["ratio"].keys() == found["processor"].keys() == {"padded", "grouped"} and len(found["seconds"]["packed"]) == 1
