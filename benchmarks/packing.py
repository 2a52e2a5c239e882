"""Examples that share rows (`data.packing`), beside rows of their own, in batches as they come and grouped by length.

    python benchmarks/packing.py [--batches 6] [--batch 16] [--median 48] [--longest 256] [--turns 3] [--layers 6]

Gradients of SFT on random texts whose lengths are drawn from a log-normal distribution (`--median`, `--sigma`), with adapters on all linear
layers of random weights in the shape of SmolLM2-135M (`--model-config` takes another `config.json`). All ways learn from as many batches of
examples of the same distribution: `padded` and `packed` from the very same. They take turns, so that other work on the machine meets all
of them, and the ratios are taken within each turn. Prints one line of JSON:

    padding   share of the tokens that is padding, by way
    programs  how many shapes of batches there are, for each of which one is compiled, by way
    seconds   for all batches, by way, in each turn
    ratio     padded over packed, grouped over packed, of seconds per token that is not padding: median, least and greatest of the turns
    processor the same ratios of the seconds that a processor worked on it, which other work lengthens less; for a CPU
    loss      largest relative difference of the losses of a batch, padded and packed
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from shared_prefix import SHAPE, random_context, seconds, spread

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.data import BatchOrder, Packing, SFTExample, pad_sft
from pe_rlhf_jax.data.rows import padded
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.training import sft
from pe_rlhf_jax.types import Batch, PyTree


def batches(examples: list[SFTExample], count: int, size: int, multiple: int) -> dict[str, list[Batch]]:
    """The first batches of each way."""
    lengths = [example.length for example in examples]
    packing = Packing(padded(max(lengths), multiple), 1, most=max(lengths))
    mixed, alike = BatchOrder(len(examples), size, 0), BatchOrder(len(examples), size, 0, lengths)

    def made(order: BatchOrder, packing: Packing | None = None) -> list[Batch]:
        return [pad_sft([examples[i] for i in order(step)], 0, multiple, packing) for step in range(count)]

    return {"padded": made(mixed), "grouped": made(alike), "packed": made(mixed, packing)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model-config", type=Path, default=SHAPE, help="Hugging Face's config.json of the shape")
    parser.add_argument("--layers", type=int, help="fewer than the model's")
    parser.add_argument("--batches", type=int, default=6, help="of each way, in a turn")
    parser.add_argument("--batch", type=int, default=16, help="examples in each")
    parser.add_argument("--median", type=float, default=48, help="of the examples' tokens")
    parser.add_argument("--sigma", type=float, default=0.7, help="of the logarithm of the tokens")
    parser.add_argument("--longest", type=int, default=256, help="tokens; longer draws are drawn again")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="override a field")
    a = parser.parse_args()
    config = configuration.parse("model: {source: none}", a.overrides)
    context = random_context(config, a.model_config, a.layers)
    role = Role(lora=jax.tree.map(lambda x: x + 0.01, context.decoder.init_lora(jax.random.key(1))))

    rng = np.random.default_rng(0)
    drawn = rng.lognormal(np.log(a.median), a.sigma, 100 * a.batches * a.batch).astype(int)
    lengths = [int(n) for n in drawn[(drawn > 1) & (drawn <= a.longest)]][: 10 * a.batches * a.batch]
    texts = [rng.integers(0, context.decoder.config.vocab_size, n).astype(np.int32) for n in lengths]
    ways = batches(
        [SFTExample(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts], a.batches, a.batch, config.data.length_multiple
    )

    loss = sft._loss(context)

    @jax.jit
    def learn(role: Role, backbone: PyTree, batch: Batch) -> tuple[jax.Array, Role]:
        return jax.value_and_grad(lambda role: loss(role, backbone, batch, sft._targets(batch), jax.random.key(0))[0])(role)

    def learned(made: list[Batch]) -> list[tuple[jax.Array, Role]]:
        return [learn(role, context.backbone, batch) for batch in made]

    losses = {way: np.array([float(loss) for loss, _ in learned(made)]) for way, made in ways.items()}
    turns = [{way: seconds(learned, made) for way, made in ways.items()} for _ in range(a.turns)]
    tokens = {way: int(sum(batch.mask.sum() for batch in made)) for way, made in ways.items()}

    def ratios(which: int) -> dict[str, list[float]]:
        each = [{way: turn[way][which] / tokens[way] for way in ways} for turn in turns]
        return {way: spread([turn[way] / turn["packed"] for turn in each]) for way in ("padded", "grouped")}

    result = {
        "device": jax.devices()[0].device_kind,
        "examples": {"mean": round(float(np.mean(lengths)), 1), "longest": max(lengths)},
        "padding": {way: round(1 - tokens[way] / sum(batch.mask.size for batch in made), 3) for way, made in ways.items()},
        "programs": {way: len({batch.tokens.shape for batch in made}) for way, made in ways.items()},
        "seconds": {way: [round(turn[way][0], 3) for turn in turns] for way in ways},
        "ratio": ratios(0),
        "processor": ratios(1),
        "loss": float(np.max(np.abs(losses["packed"] / losses["padded"] - 1))),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
