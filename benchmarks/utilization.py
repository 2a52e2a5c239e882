"""How near the learning step comes to what the device's matrix products allow, and what it needs of its memory.

    python benchmarks/utilization.py --model-config configs/shapes/llama3_1b.json --grid model.remat=none,dots,full
    python benchmarks/utilization.py --config configs/llama3_8b.yaml --stages reward --turns 5

Learning steps of the reward model and of RL, with adapters, on one device, on random weights of the shape and with the longest texts of the
configuration. In every turn large products of two square matrices are timed before it. Prints a line of JSON for each step:

    seconds      median, least and greatest of the turns
    tflop        that the step has to do, as `pe-rlhf plan` counts, without what it computes again to save memory; attention is counted
                 over the whole square, of which a causal mask needs half
    tflops       tflop over seconds, with its spread: TFLOP/s
    product      the large products' TFLOP/s, median, least and greatest
    share        tflops over the products' greatest
    peak         tflops over what the device's maker publishes for dense products of this dtype, None where that is not known here
    gib          what was in use on the device at most, by its own count, since the process began; None for a CPU
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import paper_tables
import sweep
from shared_prefix import SHAPE, seconds, spread

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.config import Config
from pe_rlhf_jax.plan.architecture import architecture
from pe_rlhf_jax.plan.flops import Costs
from pe_rlhf_jax.plan.programs import abstract_context, updates_a_step
from pe_rlhf_jax.training import rl
from pe_rlhf_jax.training.context import Context

PUBLISHED = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12}
"""FLOP/s of dense products in bfloat16, by a part of the device's name."""

PRODUCTS = {"cpu": (2048, 1)}
"""Side of the square matrices, and products in one program, so that starting it does not count."""


def peak_of(kind: str, dtype: jnp.dtype) -> float | None:
    """What the maker publishes."""
    return next((rate for name, rate in PUBLISHED.items() if name in kind), None) if dtype == jnp.bfloat16 else None


def needed(context: Context, stage: str) -> float:
    """FLOPs that the updates of a learning step have to do."""
    config = context.config
    kept = config.model_copy(update={"model": config.model.model_copy(update={"remat": "none", "attention_block": None})})
    costs = Costs(kept, context.decoder.config, 1, str(jnp.dtype(context.decoder.dtype)))
    # Logits are always computed again: once forward, once backward for their input, and once more.
    logits = config.rl.batch_size // config.rl.mini_batches * config.rl.sampling.max_new_tokens if stage == rl.STAGE else 0
    again = logits * costs.head
    return updates_a_step(context, stage) * (costs.of(stage, "update") - again)


def measured(config: Config, context: Context, stage: str, turns: int) -> dict[str, Any]:
    """Figures of one step; see the top of this file."""
    context = paper_tables._tuned(config, context, "lora")
    twin = {"reward": paper_tables.reward_twin, "rl": paper_tables.rl_twin}[stage](context)
    device, dtype = jax.devices()[0], jnp.dtype(context.decoder.dtype)
    side, count = PRODUCTS.get(device.platform, (8192, 8))
    square = jax.random.normal(jax.random.key(0), (side, side), dtype) / side**0.5

    @jax.jit
    def product(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, count, lambda _, y: x @ y, x)

    times, products = [], []
    for turn in range(turns + 1):
        found = seconds(product, square)[0] / count, twin.run()["learning"]
        if turn:  # the first one compiles
            products.append(found[0])
            times.append(found[1])
    work, stats = needed(context, stage), device.memory_stats()
    peak, best, rate = peak_of(device.device_kind, dtype), 2 * side**3 / min(products), work / statistics.median(times)
    return {
        "device": device.device_kind,
        "dtype": str(dtype),
        "stage": stage,
        "seconds": spread(times),
        "tflop": round(work / 1e12, 3),
        "tflops": spread([work / x / 1e12 for x in times]),
        "product": spread([2 * side**3 / x / 1e12 for x in products]),
        "share": round(rate / best, 3),
        "peak": None if peak is None else round(rate / peak, 3),
        "gib": round(stats["peak_bytes_in_use"] / 2**30, 2) if stats else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", help="a configuration: model, batch, lengths")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="override a field")
    parser.add_argument("--grid", nargs="+", default=[], metavar="FIELD=V1,V2,...", help="fields that vary: every combination of values")
    parser.add_argument("--model-config", type=Path, help="config.json of another shape than the configuration's")
    parser.add_argument("--stages", nargs="+", choices=("reward", "rl"), default=["reward", "rl"])
    parser.add_argument("--turns", type=int, default=5)
    a = parser.parse_args()
    if jax.device_count() > 1:
        raise SystemExit(f"expected one device, found {jax.device_count()}: name one with CUDA_VISIBLE_DEVICES or the like")
    for point in sweep.points(a.grid):
        given = [*a.overrides, *point]
        config = configuration.load(a.config, given) if a.config else configuration.parse("model: {source: none}", given)
        shape = architecture(config.model, a.model_config or (None if a.config else SHAPE))
        context = abstract_context(config, shape, jnp.dtype(config.model.dtype_on(jax.default_backend())))
        context = dataclasses.replace(context, backbone=jax.jit(context.decoder.init_params)(jax.random.key(0)))
        for stage in a.stages:
            with jax.set_mesh(context.mesh):
                print(json.dumps({"setting": " ".join(point)} | measured(config, context, stage, a.turns)), flush=True)


if __name__ == "__main__":
    main()
