"""Time of sampling responses whose lengths have a long tail: rows that take the next prompt when they are free, beside fixed batches.

    python benchmarks/long_tail.py [--prompts 128] [--rows 16]          # two minutes on a CPU of its own

The model has random weights so small that every token is about as likely as any other, and one token in 64 ends a response: lengths
are geometric, with a mean of about 64, and cut at 512. Both sides answer the same prompts with as many rows, and so with a cache of one
size, and draw the same samples, which is checked:

    fixed    `--rows` prompts at a time, each batch until its longest response has ended
    refill   all prompts at once, with `sampling.max_num_seqs` rows

They run by turns in one process, after a turn that compiles. Times are medians of `--turns` turns, and ratios are of the two times of
a turn. Processor time is what to compare on a CPU that others use too. Decode steps are counted on the host, in a run of their own;
unlike times they are the same on any machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from pe_rlhf_jax.config import SamplingConfig
from pe_rlhf_jax.models.architecture import DecoderConfig
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.rollout.decode import Sampler, advance, begin, so_far
from pe_rlhf_jax.rollout.generate import block_steps, generate
from pe_rlhf_jax.types import PromptBatch, PyTree, Rollout

VOCABULARY, PROMPT, LONGEST, MEAN = 1024, 64, 512, 64
ENDS = tuple(range(VOCABULARY // MEAN))

Side = Callable[[PyTree, PromptBatch, jax.Array], Rollout]


def fixed(sampler: Sampler, rows: int) -> Side:
    """Batch after batch, each as `generate` answers it without refill; prompts are numbered through, which keys depend on."""

    steps = block_steps(sampler.sampling.max_new_tokens)

    @jax.jit
    def batch(variables: PyTree, prompts: PromptBatch, key: jax.Array, first: jax.Array) -> Rollout:
        state = begin(sampler, variables, prompts, sampler.sampling.max_new_tokens)
        state = state.replace(prompt=first + state.prompt)
        state = jax.lax.while_loop(lambda s: jnp.any(s.alive), lambda s: advance(sampler, variables, key, s, steps), state)
        return so_far(sampler, prompts, state)

    def run(variables: PyTree, prompts: PromptBatch, key: jax.Array) -> Rollout:
        parts = [
            batch(variables, PromptBatch(prompts.tokens[at : at + rows], prompts.mask[at : at + rows]), key, jnp.asarray(at))
            for at in range(0, len(prompts.tokens), rows)
        ]
        return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)

    return run


def refill(sampler: Sampler, rows: int) -> Side:
    sampling = sampler.sampling.model_copy(update={"max_num_seqs": rows})
    sampler = Sampler(sampler.decoder, sampling, sampler.end_tokens, sampler.pad_token)
    return jax.jit(lambda variables, prompts, key: generate(sampler, variables, prompts, key))


class Counted:
    """A decoder that counts, on the host, its decode steps and the rows of prompts that it reads."""

    def __init__(self, decoder: Decoder):
        self.decoder, self.steps, self.read = decoder, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)

    def apply(self, variables: PyTree, tokens: jax.Array, *rest: Any, **named: Any) -> Any:
        rows, length = tokens.shape

        def count() -> None:
            if length == 1:
                self.steps += 1
            else:
                self.read += rows

        jax.debug.callback(count)
        return self.decoder.apply(variables, tokens, *rest, **named)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--rows", type=int, default=16, help="responses at once; must divide the prompts")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128, help="hidden size; heads are of 64")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()

    heads = arguments.width // 64
    config = DecoderConfig(VOCABULARY, arguments.width, 4 * arguments.width, arguments.layers, heads, heads, 64, 1e4, 1e-5, False, 1024)
    decoder = Decoder(config, dtype=jnp.dtype(arguments.dtype), param_dtype=jnp.dtype(arguments.dtype))
    variables = {"params": decoder.init_params(jax.random.key(0))}
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(len(ENDS), VOCABULARY, (arguments.prompts, PROMPT)))
    prompts = PromptBatch(tokens, jnp.arange(PROMPT) >= jnp.asarray(rng.integers(0, PROMPT, (arguments.prompts, 1))))

    def sides(decoder: Decoder) -> dict[str, Side]:
        sampler = Sampler(decoder, SamplingConfig(max_new_tokens=LONGEST), ENDS, 0)
        return {"fixed": fixed(sampler, arguments.rows), "refill": refill(sampler, arguments.rows)}

    counted: dict[str, Counted] = {}
    for name in ("fixed", "refill"):
        counted[name] = Counted(decoder)
        jax.block_until_ready(sides(cast(Decoder, counted[name]))[name](variables, prompts, jax.random.key(0)))
        jax.effects_barrier()

    seconds: dict[str, list[float]] = {"fixed": [], "refill": []}
    processor: dict[str, list[float]] = {"fixed": [], "refill": []}
    timed = sides(decoder)
    for turn in range(arguments.turns + 1):
        rollouts: dict[str, Rollout] = {}
        for name, side in timed.items():
            began, used = time.perf_counter(), time.process_time()
            rollouts[name] = jax.block_until_ready(side(variables, prompts, jax.random.key(turn)))
            if turn:  # the first one compiles
                seconds[name].append(time.perf_counter() - began)
                processor[name].append(time.process_time() - used)
        same = jnp.all(rollouts["fixed"].response == rollouts["refill"].response, axis=1)
        differ = len(same) - int(jnp.sum(same))
        lengths = np.asarray(rollouts["refill"].response_mask).sum(1)
        print(
            f"{turn}: mean length {lengths.mean():.0f}, longest {lengths.max()}; {differ} of {len(same)} samples differ",
            flush=True,
        )

    print(f"\n{arguments} on {jax.devices()[0].device_kind}\n")
    print(f"|  | seconds: median of {arguments.turns} (best, worst) | processor seconds | decode steps | rows of prompts read |")
    print("|---|---|---|---|---|")
    for name in seconds:
        times = " | ".join(f"{statistics.median(x[name]):.2f} ({min(x[name]):.2f}, {max(x[name]):.2f})" for x in (seconds, processor))
        print(f"| {name} | {times} | {counted[name].steps} | {counted[name].read} |")
    print(f"| fixed / refill | {ratio(seconds)} | {ratio(processor)} | {counted['fixed'].steps / counted['refill'].steps:.2f} | |")


def ratio(times: dict[str, list[float]]) -> str:
    """Of the sides' times in each turn."""
    ratios = [a / b for a, b in zip(times["fixed"], times["refill"], strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"


if __name__ == "__main__":
    main()
