"""What the compiler reserves for an evaluation on held-out rows, beside the update that it comes after."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pe_rlhf_jax.data import LabelExample, PreferenceExample, SFTExample, Split
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.training import loop, reward, reward_kinds, sft

WORDS = np.arange(2, 26, dtype=np.int32)
EXAMPLES = {
    "sft": SFTExample(WORDS[:16], WORDS[16:]),
    "preference": PreferenceExample(WORDS, WORDS[::-1].copy()),
    "label": LabelExample(WORDS, 1.0),
}


@pytest.fixture
def temporaries(monkeypatch):
    """Bytes of temporaries of the update and of the evaluation, once they have run."""
    programs = {}

    def measure(name, function, static=0):
        def called(*arguments):
            if name not in programs:
                programs[name] = function.lower(*arguments).compile()
            return programs[name](*arguments[static:])

        return called

    make_step = loop.make_step
    monkeypatch.setattr(loop, "make_step", lambda *arguments: measure("update", make_step(*arguments)))
    monkeypatch.setattr(sft, "_evaluate", measure("evaluation", sft._evaluate, 2))
    for name in ("_score_pairs", "_score_labels"):
        monkeypatch.setattr(reward_kinds, name, measure("evaluation", getattr(reward_kinds, name), 1))
    return lambda: {name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()}


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("kind", ["sft", "pairs", "labels"])
def test_an_evaluation_computes_as_much_at_once_as_an_update(make_context, temporaries, kind):
    """Of rows alike, micro-batches of two in batches of 32."""
    section = {"steps": 1, "evaluate_every": 1, "batch_size": 32, "micro_batch_size": 2}
    context = make_context(sft=section, reward=section | ({} if kind == "sft" else {"kind": kind}))
    splits = {name: Split([row] * 32, [row] * 6) for name, row in EXAMPLES.items()}
    context = dataclasses.replace(context, data=dataclasses.replace(context.data, **splits))
    if kind == "sft":
        _, metrics = next(sft.run(context, sft.init(context)))
    else:
        _, metrics = next(reward.run(context, Role(), reward.init(context, Role())))
    assert np.isfinite(metrics["eval/loss"])
    found = temporaries()
    assert found["evaluation"] < found["update"], found
