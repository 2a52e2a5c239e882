"""The paper's memory table for real sizes: what one update takes of each chip of a slice, adapters beside full tuning.

    python benchmarks/paper_memory.py --config configs/llama3_8b.yaml --model-config configs/shapes/llama3_8b.json --topology v5e:4x4 \\
        --stage rl --modes shared separate full [--set rl.batch_size=32]

The updates are those of a run, compiled by the slice's own compiler (extra `tpu-plan`); nothing is loaded or run. `--topology local` is
this machine's CPU. Modes:

    shared      adapters, all roles on one backbone
    separate    adapters; the reward model on a backbone of its own, as in the paper (RL only)
    full        full tuning everywhere: four models in RL

One row of Markdown each: what the update reads, its temporaries, and the whole: both, what it returns, and what else the stage keeps in
memory. Rollout, scoring and experience are other programs, which `pe-rlhf plan` compiles too; they hold no gradients, and no activations
for a backward pass. Then the share of `full`, where that is among the modes, and the matrices of the
backbone, or logits, of which a chip makes a whole copy, if only for the time that it uses it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.config import Config
from pe_rlhf_jax.models.architecture import DecoderConfig
from pe_rlhf_jax.plan.architecture import architecture
from pe_rlhf_jax.plan.compiled import compile_call, device_bytes
from pe_rlhf_jax.plan.plan import GIB, backbone_matrices
from pe_rlhf_jax.plan.programs import Call, abstract_context, stage_calls
from pe_rlhf_jax.plan.topology import Topology, describe
from pe_rlhf_jax.sharding import ROWS, with_places
from pe_rlhf_jax.types import PyTree

FULL = [f"{name}.tuning=full" for name in ("sft", "reward", "rl")] + ["rl.roles=separate"]
MODES = {"shared": ["rl.roles=shared"], "separate": ["rl.roles=separate"], "full": FULL}


class Row(NamedTuple):
    """GiB on each chip, and seconds to trace and compile."""

    mode: str
    arguments: float
    temporaries: float
    whole: float
    refused: bool
    seconds: float
    held_whole: tuple[str, ...]
    """Matrices of the backbone, or logits, of which a chip makes a whole copy."""


def measure(config: Config, shape: DecoderConfig, topology: Topology, stage: str, mode: str) -> Row:
    """Compiles the stage's update alone; of the programs before it only the shapes are worked out."""
    dtype = jnp.dtype(config.model.dtype_on(topology.devices[0].platform))
    context = abstract_context(config, shape, dtype, topology.devices)
    updates = []

    def compile(call: Call) -> PyTree:
        if call.name == "update":
            program, returned = compile_call(call, context.mesh, backbone_matrices(shape), shape.vocab_size)
            updates.append(program)
            return returned
        with jax.set_mesh(context.mesh):
            shapes = jax.eval_shape(lambda *arguments: call.function(*call.static, *arguments), *call.arguments.values())
        return with_places(shapes, jax.tree.map(lambda x: NamedSharding(context.mesh, ROWS if x.ndim else PartitionSpec()), shapes))

    kept = sum(device_bytes(tree) for tree in stage_calls(context, stage, compile).values())
    (update,) = updates
    whole = update.peak + max(0, kept - update.staying)
    sizes = (size / GIB for size in (update.arguments, update.temporaries, whole))
    return Row(mode, *sizes, bool(update.refused), update.seconds, update.whole)


def line(row: Row, full: Row | None) -> str:
    """A row of the table."""
    share = f"{row.whole / full.whole:.0%}" if full else ""
    note = ", refused" if row.refused else ""
    held = ", ".join(row.held_whole) or "nothing"
    return f"| {row.mode} | {row.arguments:.2f} | {row.temporaries:.2f} | {row.whole:.2f}{note} | {row.seconds:.0f} s | {share} | {held} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--model-config", type=Path)
    parser.add_argument("--topology", required=True)
    parser.add_argument("--stage", required=True, choices=("sft", "reward", "rl"))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["shared", "full"])
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # what compiles for the slice is libtpu, which needs no device
    rows: list[Row] = []
    print("| mode | arguments | temporaries | whole | compiled in | of full | held whole |\n|---|---|---|---|---|---|---|", flush=True)
    for mode in sorted(arguments.modes, key=lambda mode: mode != "full"):  # first, so that the others' share is known
        config = configuration.load(arguments.config, [*MODES[mode], *arguments.overrides])
        shape = architecture(config.model, arguments.model_config)
        rows.append(measure(config, shape, describe(arguments.topology), arguments.stage, mode))
        print(line(rows[-1], rows[0] if rows[0].mode == "full" else None), flush=True)


if __name__ == "__main__":
    main()
