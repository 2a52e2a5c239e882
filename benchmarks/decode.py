"""Decode steps beside what the memory allows: a step has to read every weight once, and the keys and values of all tokens so far.

    python benchmarks/decode.py [--batch 1 8 32 64 128 256] [--prompt 64] [--steps 16] [--turns 5] [--adapter]
    python benchmarks/decode.py --config configs/quickstart.yaml

Without `--config`, the shape is that of SmolLM2-135M (`--model-config` takes another `config.json`). No weight is loaded and no prompt is
read: caches stand as if so many tokens had been. With `--adapter` the configuration's adapter is on top, as RL samples. In each turn, every
batch is timed for `--steps` steps, and before it reads of a large matrix, products with a vector. The roofline is the greatest rate
at which that was read. Weights are joined beforehand where a rollout joins them (`rl.sampling.join_weights`). Prints a line of JSON for
each batch, with medians, least and greatest of the turns:

    tokens     a second, all rows together
    bytes      that a step has to read, in MB
    rate       bytes over the time of a step, in GB/s
    read       the large matrix' greatest rate, in GB/s
    share      rate over read
    processor  the same share by the seconds that a processor worked, which other work lengthens less; for a CPU
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from memory import size
from shared_prefix import SHAPE, seconds, spread

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.models.roles import TOWER
from pe_rlhf_jax.plan.architecture import architecture
from pe_rlhf_jax.plan.programs import abstract_context
from pe_rlhf_jax.rollout.decode import DecodeState, Sampler, advance, for_decoding, idle
from pe_rlhf_jax.training.rollouts import Decoding
from pe_rlhf_jax.types import PyTree

LARGE = {"cpu": (11584, 1)}
"""Side of the square matrix that is read, far beyond any cache, and how often in one program, so that starting it does not count."""


def filled(shapes: PyTree) -> PyTree:
    """Arrays of these shapes, with a number in each place: an array of zeros might share one page of memory."""
    return jax.jit(
        lambda: jax.tree.map(lambda x: jnp.full(x.shape, 0.01 if jnp.issubdtype(x.dtype, jnp.floating) else 1, x.dtype), shapes)
    )()


def weights_read(backbone: PyTree) -> int:
    """Bytes of what every step reads whole: the layers, and the matrix that makes logits."""
    looked_up = {"position_embed", "embed" if "lm_head" in backbone else ""}
    return size({name: tree for name, tree in backbone.items() if name not in {TOWER, "projector"} | looked_up})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", help="a configuration, whose model it is")
    parser.add_argument("--model-config", type=Path, help="Hugging Face's config.json of the shape")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--prompt", type=int, default=64, help="tokens before the first that is decoded")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--adapter", action="store_true", help="as RL samples, with the policy's adapter")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="override a field")
    a = parser.parse_args()
    config = configuration.load(a.config, a.overrides) if a.config else configuration.parse("model: {source: none}", a.overrides)
    shape = architecture(config.model, a.model_config or (None if a.config else SHAPE))
    dtype = jnp.dtype(config.model.dtype_on(jax.default_backend()))
    context = abstract_context(config, shape, dtype)
    decoder, variables = context.decoder, {"params": filled(context.backbone)}
    if a.adapter:
        variables["lora"] = filled(jax.eval_shape(decoder.init_lora, jax.random.key(0)))
    sampling = config.rl.sampling.model_copy(update={"max_new_tokens": a.steps + 1})  # so that no row ends
    key, samplers = jax.random.key(0), [Sampler(decoder, sampling, (), 0)]

    @jax.jit
    def prepared(variables: PyTree) -> PyTree:
        sampler, variables = for_decoding(samplers[0], variables)
        samplers.append(sampler)
        return variables

    weights = weights_read(variables["params"]) + size(variables.get("lora", ()))
    variables = prepared(variables)
    sampler = samplers[-1]

    @jax.jit(static_argnums=0)
    def begun(rows: int) -> DecodeState:
        state, at = idle(sampler, rows, a.prompt + a.steps), jnp.int32(a.prompt)
        return state.replace(slot=at, position=jnp.full_like(state.position, at), alive=jnp.ones_like(state.alive))

    def advanced(sampler: Sampler, state: DecodeState, variables: PyTree) -> DecodeState:
        return advance(sampler, variables, key, state, a.steps)

    decoded = Decoding(advanced, donate_argnames="state")
    side, times_read = LARGE.get(jax.default_backend(), (32768, 8))
    large = jnp.full((side, side), 1 / side, dtype), jnp.ones(side, dtype)

    @jax.jit
    def product(matrix: jax.Array, vector: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, times_read, lambda _, x: matrix @ x, vector)

    token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * dtype.itemsize
    read: list[tuple[float, float]] = []
    steps: dict[int, list[tuple[float, float]]] = {rows: [] for rows in a.batch}
    for turn in range(a.turns + 1):
        for rows in a.batch:
            state = jax.block_until_ready(begun(rows))
            measured = seconds(product, *large), seconds(decoded, sampler, state, variables)
            if turn:  # the first one compiles
                read.append(measured[0])
                steps[rows].append(measured[1])
    roofline, of_processor = (times_read * large[0].nbytes / min(times) for times in zip(*read, strict=True))
    for rows, times in steps.items():
        needed = weights + rows * token * (a.prompt + (a.steps + 1) / 2)
        rates = [(a.steps * needed / clock, a.steps * needed / worked) for clock, worked in times]
        result = {
            "device": jax.devices()[0].device_kind,
            "batch": rows,
            "tokens": spread([a.steps * rows / clock for clock, _ in times]),
            "bytes": round(needed / 1e6),
            "rate": spread([rate / 1e9 for rate, _ in rates]),
            "read": round(roofline / 1e9, 3),
            "share": spread([rate / roofline for rate, _ in rates]),
            "processor": spread([rate / of_processor for _, rate in rates]),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
