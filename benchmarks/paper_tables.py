"""The paper's memory and speed tables with figures of your own: adapters beside full tuning, on your model, batch and device.

    python benchmarks/paper_tables.py --config configs/quickstart.yaml [--grid lora.r=1,4,8,16] [--steps 3] [--output tables.json]
    python benchmarks/paper_tables.py --config configs/quickstart.yaml --set reward.micro_batch_size=null --grid reward.batch_size=4,8,16
    python benchmarks/paper_tables.py --config configs/llama3_1b.yaml \\
        --model-config configs/shapes/smollm2_135m.json configs/shapes/llama3_1b.json

What is compared, per stage:

    reward   the learning step, with adapters and with full tuning
    rl       one whole step (sampling, scoring, anchor log-probabilities, learning): adapters with all roles on one backbone
             (`rl.roles: shared`) beside the full twin, whose reference, reward, policy and value models are four sets of parameters

Memory is what the compiler reports: everything resident (parameters, adapters, optimizer) and the largest need of any program of the
step on top of it. Times are medians of `--steps` runs after one that compiled, the two sides taking turns, with random weights of the
model's shape (the work is the same) and responses of full length. The paper's own figures stand beside. `--grid` takes every combination of
values of some fields, as in sweep.py, so that one sees what rank, batch or length do; `--model-config` the shapes of other models (a
`config.json` of Hugging Face's layout), whose weights must fit this device.

Rows of a model that sees have one picture each, whose features are there already: the frozen tower, one for all roles on both sides,
makes them once.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import sweep

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.config import Config
from pe_rlhf_jax.data import LabelExample, PreferenceExample
from pe_rlhf_jax.models.roles import TOWER, Role, Tuning
from pe_rlhf_jax.plan.architecture import architecture
from pe_rlhf_jax.plan.programs import _images, _rounded, abstract_context
from pe_rlhf_jax.rollout.decode import Sampler
from pe_rlhf_jax.rollout.score import response_logprobs
from pe_rlhf_jax.training import reward, rl
from pe_rlhf_jax.training.context import Context
from pe_rlhf_jax.training.experience import make_experience
from pe_rlhf_jax.training.micro_batches import in_micro_batches
from pe_rlhf_jax.training.optimizer import make_optimizer
from pe_rlhf_jax.training.reward_batches import padded_batch
from pe_rlhf_jax.training.rewards import _score
from pe_rlhf_jax.training.rl_loss import Frozen, asked_before, gradient_of_update, whole_roles
from pe_rlhf_jax.training.rollouts import _respond
from pe_rlhf_jax.training.shared_rows import answers_in_a_row
from pe_rlhf_jax.training.step import make_step, step_of
from pe_rlhf_jax.types import PromptBatch, PyTree

PAPER = {
    "reward": {"memory": "43 to 56% (vision 74%)", "speed": "1.5 to 1.9x (vision 1.15x)"},
    "rl": {"memory": "74 to 80%", "speed": "1.05 to 1.3x"},
}
"""Table 1 of arXiv 2403.10704: LoRA's share of the full twin's memory, and its speed-up."""

PARTS = ("sampling", "scoring", "anchor", "learning")


@dataclasses.dataclass
class Twin:
    """One side of a comparison, ready to run."""

    trained: int
    """Numbers that are trained."""
    memory: int
    """Bytes: resident, and the largest program's need on top."""
    run: Callable[[], dict[str, float]]
    """One step; seconds of each part."""


def reward_twin(context: Context) -> Twin:
    """The reward model's learning step."""
    config = context.config.reward
    state = reward.init(context, Role())
    optimizer = make_optimizer(config.optimizer, config.steps, config.tuning)
    loss = reward._loss(context, reward.kind_of(config))
    step = make_step(loss, reward._examples, optimizer, config.micro_batch_size)
    batch = _batch(context)
    frozen = (_kept(context, config.tuning), Role())
    compiled = step.lower(state, frozen, batch, jax.random.key(0)).compile()
    trained, memory = sum(x.size for x in jax.tree.leaves(state.trainable)), _unique((state, frozen)) + _need(compiled)

    def run() -> dict[str, float]:
        nonlocal state
        began = time.perf_counter()
        state, metrics = compiled(state, frozen, batch, jax.random.key(0))
        jax.block_until_ready(metrics)
        return {"learning": time.perf_counter() - began}

    return Twin(trained, memory, run)


def rl_twin(context: Context) -> Twin:
    """A whole step of RL. With full tuning every role has parameters of its own."""
    config, full = context.config.rl, context.config.rl.tuning == "full"
    copied = {name: tree for name, tree in context.backbone.items() if name != TOWER}
    copies = [jax.tree.map(lambda x: jnp.array(x, copy=True), copied) if full else None for _ in range(2)]
    head = reward.init(context, Role()).trainable.head
    adapter = None if full else context.decoder.init_lora(jax.random.key(1))
    reference, model = Role(params=copies[0]), Role(lora=adapter, head=head, params=copies[1] and _scoring(copies[1]))
    state = rl.init(context, reference, model)
    frozen_roles = rl._frozen(context, reference, model)
    backbone = _kept(context, config.tuning)
    frozen = Frozen(backbone, frozen_roles, state.kl_coef)
    rows = config.batch_size // config.mini_batches
    learn = step_of(gradient_of_update(context), rl._tokens, rl._optimizer(config))
    questions = config.batch_size // config.answers_each
    tokens, mask = _tokens(context, questions, _rounded(context, context.config.data.max_prompt_length))
    tokens, mask = (jnp.repeat(x, config.answers_each, axis=0) for x in (tokens, mask))
    prompts, chunk = _seeing(context, PromptBatch(tokens, mask)), context.config.model.logprob_chunk
    train, decoder, group, micro = state.train, context.decoder, config.answers_each, config.micro_batch_size
    sampler = Sampler(decoder, config.sampling, (), 0, config.answers_each)

    def roles() -> dict[str, Role]:
        return whole_roles(frozen_roles, train.trainable)

    def sample() -> Any:
        return _respond(sampler, roles()["policy"], backbone, prompts, jax.random.key(1))

    @jax.jit
    def anchor(backbone: PyTree, role: Role, rollout: Any) -> jax.Array:
        def forward(part: Any) -> jax.Array:
            answers = answers_in_a_row(decoder.config, part, group, 1)
            return response_logprobs(decoder, backbone, role, part, config.sampling.temperature, chunk, answers)[0]

        return in_micro_batches(forward, rollout, micro)

    rollout = jax.block_until_ready(sample())
    scores = _score(decoder, group, micro, model, backbone, rollout)

    def experience() -> Any:
        policy, value = roles()["policy"], asked_before(config, roles())
        return make_experience(decoder, config, chunk, backbone, policy, reference, value, rollout, scores, state.kl_coef)[0]

    mini_batch = jax.tree.map(lambda x: x[:rows], experience())
    compiled = learn.lower(train, frozen, mini_batch, jax.random.key(0)).compile()
    policy, value = roles()["policy"], asked_before(config, roles())
    shaped = (decoder, config, chunk, backbone, policy, reference, value, rollout, scores, state.kl_coef)
    programs = [
        compiled,
        _respond.lower(sampler, policy, backbone, prompts, jax.random.key(1)).compile(),
        _score.lower(decoder, group, micro, model, backbone, rollout).compile(),
        make_experience.lower(*shaped).compile(),
    ]
    trained = sum(x.size for x in jax.tree.leaves(train.trainable))
    memory = _unique((train, backbone, reference, model)) + max(map(_need, programs))
    updates = config.updates_a_batch

    def run() -> dict[str, float]:
        nonlocal train
        marks = [time.perf_counter()]
        for part in (sample, lambda: _score(decoder, group, micro, model, backbone, rollout), lambda: anchor(backbone, reference, rollout)):
            jax.block_until_ready(part())
            marks.append(time.perf_counter())
        # Once more the anchor, whose second share is taken off below, and what policy and value model are asked before they learn.
        jax.block_until_ready(experience())
        marks.append(time.perf_counter())
        for _ in range(updates):
            train, metrics = compiled(train, frozen, mini_batch, jax.random.key(0))
        jax.block_until_ready(metrics)
        marks.append(time.perf_counter())
        sampling, scoring, anchored, rest, learning = np.diff(marks)
        return dict(zip(PARTS, map(float, (sampling, scoring + rest - anchored, anchored, learning)), strict=True))

    return Twin(trained, memory, run)


def compare(config: Config, context: Context, stage: str, steps: int, setting: str) -> dict[str, Any]:
    """Both twins of a stage, in turns; `setting` tells the table's row from others."""
    twins: dict[str, Twin] = {}
    for tuning in ("lora", "full"):
        twins[tuning] = {"reward": reward_twin, "rl": rl_twin}[stage](_tuned(config, context, cast(Tuning, tuning)))
    seconds: dict[str, list[dict[str, float]]] = {"lora": [], "full": []}
    for turn in range(steps + 1):
        for name, twin in twins.items():
            found = twin.run()
            if turn:  # the first one compiles what is not compiled yet
                seconds[name].append(found)
    parts = {name: {part: statistics.median(s[part] for s in runs) for part in runs[0]} for name, runs in seconds.items()}
    lora, full = twins["lora"], twins["full"]
    total = {name: sum(values.values()) for name, values in parts.items()}
    return {
        "stage": stage,
        "setting": setting,
        "trained_share": lora.trained / full.trained,
        "memory_gib": {name: twin.memory / 2**30 for name, twin in twins.items()},
        "memory_share": lora.memory / full.memory,
        "seconds": parts,
        "speed_up": total["full"] / total["lora"],
        "speed_up_of_parts": {part: parts["full"][part] / parts["lora"][part] for part in parts["full"]},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, the paper's figures beside."""
    lines = [
        "| stage | setting | trained share | memory, lora / full | share of full | paper | time, lora / full | speed-up | paper |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        memory, total = row["memory_gib"], {name: sum(parts.values()) for name, parts in row["seconds"].items()}
        paper = PAPER[row["stage"]]
        lines.append(
            f"| {row['stage']} | {row['setting']} | {row['trained_share']:.2%} | {memory['lora']:.2f} / {memory['full']:.2f} GiB | "
            f"{row['memory_share']:.0%} | {paper['memory']} | {total['lora']:.2f} / {total['full']:.2f} s | {row['speed_up']:.2f}x | "
            f"{paper['speed']} |"
        )
    split = [row for row in rows if row["stage"] == "rl"]
    if split:
        lines += ["", "| rl | " + " | ".join(f"{part}, lora / full" for part in PARTS) + " |", "|---" * (len(PARTS) + 1) + "|"]
        for row in split:
            cells = [f"{row['seconds']['lora'][part]:.2f} / {row['seconds']['full'][part]:.2f} s" for part in PARTS]
            lines.append(f"| {row['setting']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _tuned(config: Config, context: Context, tuning: Tuning) -> Context:
    """The context with everything tuned one way."""
    roles = "shared" if tuning == "lora" else "separate"
    changed = config.model_copy(
        update={
            "reward": config.reward.model_copy(update={"tuning": tuning}),
            "rl": config.rl.model_copy(update={"tuning": tuning, "value_tuning": None, "roles": roles, "value_init": "reward"}),
        }
    )
    return dataclasses.replace(context, config=changed)


def _need(compiled: jax.stages.Compiled) -> int:
    stats = compiled.memory_analysis()
    return stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes


def _unique(tree: PyTree) -> int:
    """Bytes of all buffers of a tree on one device, each counted once however often it is referred to."""
    shards = [x.addressable_data(0) for x in jax.tree.leaves(tree)]
    return sum({x.unsafe_buffer_pointer(): x.nbytes for x in shards}.values())


def _batch(context: Context) -> PyTree:
    """Rows of the longest texts, or pairs of them, which have one prompt."""
    config, data = context.config.reward, context.config.data
    words = np.random.default_rng(0).integers(0, context.decoder.config.vocab_size, (config.batch_size, _longest(context))).astype(np.int32)
    if config.kind == "labels":
        return _seeing(context, padded_batch(context, "label", [LabelExample(row, 1.0) for row in words]))
    prompts, answers = words[:, : data.max_prompt_length], words[:, data.max_prompt_length :]
    sides = [np.concatenate([prompts, side], axis=1) for side in (answers, answers[:, ::-1])]
    return _seeing(context, padded_batch(context, "preference", [PreferenceExample(*pair) for pair in zip(*sides, strict=True)]))


def _kept(context: Context, tuning: Tuning) -> PyTree:
    """What stays of the backbone: full tuning trains a copy, and the one that it began from is not read and need not stay."""
    return {name: tree for name, tree in context.backbone.items() if tuning == "lora" or name == TOWER}


def _scoring(params: PyTree) -> PyTree:
    """What a scorer has of a backbone: not the matrix that predicts tokens."""
    return {name: tree for name, tree in params.items() if name != "lm_head"}


def _seeing(context: Context, batch: PyTree) -> PyTree:
    """The batch with one picture a row, for a model that sees."""
    images = _images(context, len(batch.tokens))
    if images is None:
        return batch
    images = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), images)
    if isinstance(batch, PromptBatch):
        return batch.replace(images=images)
    prompt = jnp.arange(batch.tokens.shape[-1]) < context.config.data.max_prompt_length
    return batch.replace(prompt_mask=jnp.broadcast_to(prompt, batch.tokens.shape), images=images)


def _longest(context: Context) -> int:
    return _rounded(context, context.config.data.max_prompt_length + context.config.data.max_response_length)


def _tokens(context: Context, rows: int, length: int) -> tuple[jax.Array, jax.Array]:
    tokens = np.random.default_rng(0).integers(0, context.decoder.config.vocab_size, (rows, length))
    return jnp.asarray(tokens, jnp.int32), jnp.ones((rows, length), bool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="the run's YAML file: model, batch, lengths, optimizer")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="override a field")
    parser.add_argument("--grid", nargs="+", default=[], metavar="FIELD=V1,V2,...", help="fields that vary: every combination of values")
    parser.add_argument("--model-config", type=Path, nargs="+", default=[None], help="config.json of shapes, in place of the model's own")
    parser.add_argument("--stages", nargs="+", choices=("reward", "rl"), default=["reward", "rl"])
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each side")
    parser.add_argument("--output", type=Path, help="also write all figures to this JSON file")
    arguments = parser.parse_args()
    rows, device = [], jax.devices()[0].device_kind
    for shape, point in itertools.product(arguments.model_config, sweep.points(arguments.grid)):
        config = configuration.load(arguments.config, [*arguments.overrides, *point])
        dtype = jnp.dtype(config.model.dtype_on(jax.default_backend()))
        context = abstract_context(config, architecture(config.model, shape), dtype)
        context = dataclasses.replace(context, backbone=jax.jit(context.decoder.init_params)(jax.random.key(0)))
        name = [] if shape is None else [shape.parent.name if shape.stem == "config" else shape.stem]
        setting = " ".join([*name, *point]) or f"lora.r={config.lora.r}"
        for stage in arguments.stages:
            with jax.set_mesh(context.mesh):
                rows.append(compare(config, context, stage, arguments.steps, setting))
            print(f"{stage}, {setting}: done", file=sys.stderr)
            if arguments.output:
                arguments.output.write_text(json.dumps({"device": device, "rows": rows}, indent=1) + "\n")
    print(f"{jax.device_count()} x {device}\n\n{table(sorted(rows, key=lambda row: arguments.stages.index(row['stage'])))}")


if __name__ == "__main__":
    main()
