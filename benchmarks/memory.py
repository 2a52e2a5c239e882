"""What the compiler reserves for one update of the reward model and one of RL, with adapters and with full tuning.

    python benchmarks/memory.py --config configs/quickstart.yaml [--set rl.batch_size=8]

The steps are those of a run, compiled for its configuration's model, batch and longest texts, and for the devices that are there; no
weight is loaded and nothing is run. Prints one line of JSON: bytes on each device, per stage and tuning,

    arguments    what the step reads: backbone, trained leaves, optimizer state, batch
    temporaries  the block that it needs meanwhile: activations and gradients, those that live at one time
    outputs      what it returns; `reused` of them take the place of arguments
    peak         arguments, temporaries, and outputs that take no argument's place: what has to fit
    trained      of the arguments, the trained leaves (of all devices together)
    optimizer    of the arguments, the optimizer's state (of all devices together)

and `backbone`, the bytes of its parameters. Rollout and scoring are other programs, whose memory is not in these figures; nor is the
frozen backbone that full tuning keeps as reference, which this step does not read. `pe-rlhf plan` tells all of that too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.models.roles import Tuning
from pe_rlhf_jax.plan.architecture import architecture
from pe_rlhf_jax.plan.programs import abstract_context, placed_update
from pe_rlhf_jax.training.context import Context
from pe_rlhf_jax.types import PyTree

STAGES = ("reward", "rl")


def figures(context: Context, stage: str, tuning: Tuning) -> dict[str, int]:
    """Bytes of one compiled update on each device; see the top of this file."""
    section = getattr(context.config, stage).model_copy(update={"tuning": tuning})
    call = placed_update(dataclasses.replace(context, config=context.config.model_copy(update={stage: section})), stage)
    with jax.set_mesh(context.mesh):
        stats = call.function.lower(*call.arguments.values()).compile().memory_analysis()
    state = call.arguments["training state"]
    return {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "reused": stats.alias_size_in_bytes,
        # `stats.peak_memory_in_bytes` leaves out the temporaries on CPU.
        "peak": stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "trained": size(state.trainable),
        "optimizer": size(state.opt_state),
    }


def size(tree: PyTree) -> int:
    """Bytes of all leaves, arrays or shapes, on all devices together."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="the run's YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="override a field")
    arguments = parser.parse_args()
    config = configuration.load(arguments.config, arguments.overrides)

    dtype = config.model.dtype_on(jax.default_backend())
    context = abstract_context(config, architecture(config.model), jnp.dtype(dtype))
    result: dict[str, Any] = {"dtype": dtype, "device": jax.devices()[0].device_kind, "backbone": size(context.backbone)}
    tunings: tuple[Tuning, ...] = ("lora", "full") if config.model.quantization is None else ("lora",)  # nothing trains what is quantized
    for stage in STAGES:
        result[stage] = {tuning: figures(context, stage, tuning) for tuning in tunings}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
