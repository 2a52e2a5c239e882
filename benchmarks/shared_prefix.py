"""What texts begin with alike computed once for all of them, beside the same texts in rows of their own.

    python benchmarks/shared_prefix.py [--prompt 256] [--answer 64] [--pairs 2] [--turns 5] [--set model.remat=none]
    python benchmarks/shared_prefix.py --responses 8 --answer 32
    python benchmarks/shared_prefix.py --rated 6 --prompt 64 --answer 48

First form: a gradient of reward training on preference pairs, as the stage takes it. With `--responses`: log-probabilities of so many
sampled responses to each of `--pairs` prompts, which RLOO and GRPO learn from, and their gradient. With `--rated`: a gradient of reward
training on labels of so many turns of each of `--pairs` dialogs, which each turn makes longer by `--answer` tokens; those of one length
make a batch of their own where they stand alone, so that nothing is padded. Adapters are on all linear layers; weights are random, in the
shape of SmolLM2-135M (`--model-config` takes another `config.json`). Both ways take turns, so that other work on the machine meets both,
and the ratio is taken within each turn. Prints one line of JSON:

    seconds   shared and alone, in each turn
    ratio     alone over shared: median, least and greatest of the turns
    processor the same ratio of the seconds that a processor worked on it, which other work lengthens less; for a CPU
    flops     the same ratio by formula, as `pe-rlhf plan` counts
    compiled  and as XLA counts, which takes the bodies of loops, over layers and over chunks of logits, once
    loss      relative difference of the two losses
    gradient  largest difference of the adapters' two gradients, relative to the largest number of each leaf
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.config import Config
from pe_rlhf_jax.data import LabelExample, Packing, PreferenceExample, pack_labels, pad_labels, pad_preferences
from pe_rlhf_jax.models.heads import init_head
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.plan.architecture import architecture
from pe_rlhf_jax.plan.flops import Costs
from pe_rlhf_jax.plan.programs import abstract_context
from pe_rlhf_jax.rollout.score import response_logprobs
from pe_rlhf_jax.training import reward
from pe_rlhf_jax.training.context import Context
from pe_rlhf_jax.types import LabelBatch, PyTree, Rollout

SHAPE = Path(__file__).parent.parent / "configs" / "shapes" / "smollm2_135m.json"

Loss = Callable[[Role, PyTree], jax.Array]
"""Of the trained role and the backbone."""


def pair_losses(context: Context, pairs: int, prompt: int, answer: int) -> list[Loss]:
    """Bradley-Terry of random pairs, in one row each and in two."""
    rng, vocabulary = np.random.default_rng(0), context.decoder.config.vocab_size
    words = rng.integers(0, vocabulary, (pairs, prompt + 2 * answer)).astype(np.int32)
    examples = [PreferenceExample(row[: prompt + answer], np.append(row[:prompt], row[prompt + answer :])) for row in words]
    loss = reward._loss(context, reward.kind_of(context.config.reward))

    def of(one: bool) -> Loss:
        batch = pad_preferences(examples, 0, 1, in_one_row=lambda *_: one)
        return lambda role, backbone: loss(role, (backbone, Role()), batch, jnp.float32(pairs), jax.random.key(0))[0]

    return [of(True), of(False)]


def group_losses(context: Context, prompts: int, prompt: int, answer: int, responses: int) -> list[Loss]:
    """Mean log-probability of random responses, all of a prompt in one row and each in its own."""
    rng, vocabulary, rows = np.random.default_rng(0), context.decoder.config.vocab_size, prompts * responses
    asked = jnp.asarray(np.repeat(rng.integers(0, vocabulary, (prompts, prompt)), responses, axis=0))
    given, real = jnp.asarray(rng.integers(0, vocabulary, (rows, answer))), jnp.ones((rows, answer), bool)
    rollout = Rollout(asked, jnp.ones(asked.shape, bool), given, real, jnp.zeros(real.shape), jnp.ones(rows, bool))
    chunk = context.config.model.logprob_chunk

    def of(answers: int) -> Loss:
        return lambda role, backbone: jnp.mean(response_logprobs(context.decoder, backbone, role, rollout, 1.0, chunk, answers)[0])

    return [of(responses), of(1)]


def label_losses(context: Context, dialogs: int, prompt: int, answer: int, rated: int) -> list[Loss]:
    """Logistic loss of random labels of all turns, those of a dialog in one row (at most 16 dialogs) and each in its own."""
    rng, lengths = np.random.default_rng(0), prompt + answer * np.arange(1, rated + 1)
    words = rng.integers(0, context.decoder.config.vocab_size, (dialogs, lengths[-1])).astype(np.int32)
    labels = rng.integers(0, 2, (rated, dialogs)).astype(float)
    turns = [[LabelExample(row[:length], label) for row, label in zip(words, labels[i], strict=True)] for i, length in enumerate(lengths)]
    together, _ = pack_labels([example for turn in turns for example in turn], 0, Packing(int(lengths[-1]), 1, rated))
    loss = reward._loss(context, reward.kind_of(context.config.reward))

    def of(batches: list[LabelBatch]) -> Loss:
        total = jnp.float32(dialogs * rated)
        return lambda role, backbone: sum(loss(role, (backbone, Role()), batch, total, jax.random.key(0))[0] for batch in batches)

    return [of([together]), of([pad_labels(turn, 0, 1) for turn in turns])]


def spread(ratios: list[float]) -> list[float]:
    """Median, least and greatest."""
    return [round(x, 3) for x in (statistics.median(ratios), min(ratios), max(ratios))]


def random_context(config: Config, model_config: Path, layers: int | None) -> Context:
    """Random weights of a shape, on all its layers or fewer."""
    shape = architecture(config.model, model_config)
    shape = dataclasses.replace(shape, num_layers=layers or shape.num_layers)
    context = abstract_context(config, shape, jnp.dtype(config.model.dtype_on(jax.default_backend())))
    return dataclasses.replace(context, backbone=jax.jit(context.decoder.init_params)(jax.random.key(0)))


def seconds(f: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """By the clock, and of a processor."""
    began, worked = time.perf_counter(), time.process_time()
    jax.block_until_ready(f(*arguments))
    return time.perf_counter() - began, time.process_time() - worked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model-config", type=Path, default=SHAPE, help="Hugging Face's config.json of the shape")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--answer", type=int, default=64, help="tokens of each")
    parser.add_argument("--pairs", type=int, default=2, help="or prompts, with --responses")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--responses", type=int, help="to each prompt, in place of pairs")
    instead.add_argument("--rated", type=int, help="turns of each dialog, in place of pairs")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--layers", type=int, help="fewer than the model's, for a quick look")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="override a field")
    a = parser.parse_args()
    config = configuration.parse(f"{{model: {{source: none}}, reward: {{kind: {'labels' if a.rated else 'pairs'}}}}}", a.overrides)
    context = random_context(config, a.model_config, a.layers)
    role = reward.init(context, Role()).trainable
    # Fresh adapters, and heads of 0, would hide gradients.
    head = init_head(jax.random.key(1), context.decoder.config.hidden_size)
    role = role.replace(lora=jax.tree.map(lambda x: x + 0.01, role.lora), head=head)

    answers = a.rated or a.responses or 2
    size = (context, a.pairs, a.prompt, a.answer)
    if a.rated:
        losses, lengths = label_losses(*size, answers), [a.prompt + a.answer * (turn + 1) for turn in range(answers)]
    else:
        losses = group_losses(*size, answers) if a.responses else pair_losses(*size)
        lengths = [a.prompt + a.answer] * answers
    programs = [jax.jit(jax.value_and_grad(loss)).lower(role, context.backbone).compile() for loss in losses]

    (loss, gradient), (expected, wanted) = (program(role, context.backbone) for program in programs)
    leaves = zip(jax.tree.leaves(gradient.lora), jax.tree.leaves(wanted.lora), strict=True)
    difference = max(float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y))) for x, y in leaves)
    turns = [[seconds(program, role, context.backbone) for program in programs] for _ in range(a.turns)]
    costs, logits = Costs(config, context.decoder.config), a.answer if a.responses else 0
    shared = costs.update(a.pairs, a.prompt + answers * a.answer, answers * logits, "lora")
    counted = [float(program.cost_analysis()["flops"]) for program in programs]
    result = {
        "device": jax.devices()[0].device_kind,
        "seconds": [[round(x, 3) for x, _ in turn] for turn in turns],
        "ratio": spread([alone / shared for (shared, _), (alone, _) in turns]),
        "processor": spread([alone / shared for (_, shared), (_, alone) in turns]),
        "flops": round(sum(costs.update(a.pairs, length, logits, "lora") for length in lengths) / shared, 3),
        "compiled": round(counted[1] / counted[0], 3),
        "loss": abs(float(loss / expected) - 1),
        "gradient": difference,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
