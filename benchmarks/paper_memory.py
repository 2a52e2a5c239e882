"""The paper's memory table for real sizes: what one update takes of each device of a slice, adapters beside full tuning.

    python benchmarks/paper_memory.py --config configs/llama3_8b.yaml --model-config configs/shapes/llama3_8b.json --topology v5e:4x4 \\
        --stage rl --modes shared separate full [--set rl.batch_size=32]
    python benchmarks/paper_memory.py --config configs/llama3_8b.yaml --model-config configs/shapes/llama3_8b.json \\
        --topology v5e:2x2 v5e:4x4 v6e:2x4 --stage reward rl --rows-a-device 4

The updates are those of a run, compiled by the slice's own compiler (extra `tpu-plan`); nothing is loaded or run. `--topology local` is
this machine's CPU. Modes:

    shared      adapters, all roles on one backbone
    separate    adapters; the reward model on a backbone of its own, as in the paper (RL only)
    full        full tuning everywhere: four models in RL

One row of Markdown each: what the update reads, its temporaries, and the whole: both, what it returns, and what else the stage keeps in
memory. Rollout, scoring and experience are other programs, which `pe-rlhf plan` compiles too; they hold no gradients, and no activations
for a backward pass. Then the share of `full`, where that is among the modes, what a device sends in an update, and the matrices of the
backbone, or logits, of which it makes a whole copy, if only for the time that it uses it. A table of the wholes comes last.

With `--rows-a-device`, batches and mesh go by the slice and not by the configuration: so many pairs or episodes for every device, all in
one update and without accumulation, and `fsdp` over all devices, or over 256 of more.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.config import Config
from pe_rlhf_jax.models.architecture import DecoderConfig
from pe_rlhf_jax.plan.architecture import architecture
from pe_rlhf_jax.plan.compiled import Program, compile_call, device_bytes
from pe_rlhf_jax.plan.plan import GIB, backbone_matrices
from pe_rlhf_jax.plan.programs import Call, abstract_context, stage_calls
from pe_rlhf_jax.plan.topology import Topology, describe
from pe_rlhf_jax.sharding import ROWS, check_batches, with_places
from pe_rlhf_jax.types import PyTree

FULL = [f"{name}.tuning=full" for name in ("sft", "reward", "rl")] + ["rl.roles=separate"]
MODES = {"shared": ["rl.roles=shared"], "separate": ["rl.roles=separate"], "full": FULL}


class Row(NamedTuple):
    """A stage's update in a mode."""

    slice: str
    stage: str
    mode: str
    update: Program
    whole: float
    """GiB on each chip: the update, and what else the stage keeps."""


def measure(config: Config, shape: DecoderConfig, topology: Topology, stage: str, mode: str, update: Program | None = None) -> Row:
    """Compiles the stage's update alone, if it is not given; of the programs before it only the shapes are worked out."""
    dtype = jnp.dtype(config.model.dtype_on(topology.devices[0].platform))
    context = abstract_context(config, shape, dtype, topology.devices)
    check_batches(config, context.mesh)

    def compile(call: Call) -> PyTree:
        nonlocal update
        if call.name == "update" and update is None:
            update, returned = compile_call(call, context.mesh, backbone_matrices(shape), shape.vocab_size)
            return returned
        with jax.set_mesh(context.mesh):
            shapes = jax.eval_shape(lambda *arguments: call.function(*call.static, *arguments), *call.arguments.values())
        return with_places(shapes, jax.tree.map(lambda x: NamedSharding(context.mesh, ROWS if x.ndim else PartitionSpec()), shapes))

    kept = sum(device_bytes(tree) for tree in stage_calls(context, stage, compile).values())
    assert update is not None
    return Row(topology.name, stage, mode, update, (update.peak + max(0, kept - update.staying)) / GIB)


def by_the_device(rows: int, devices: int) -> list[str]:
    """Overrides: so many pairs or episodes on every device, and `fsdp` over all of them, or over 256."""
    batches = [f"{stage}.batch_size={rows * devices}" for stage in ("sft", "reward", "rl", "evaluate")]
    at_once = [*(f"{stage}.micro_batch_size=null" for stage in ("sft", "reward", "rl")), "rl.num_mini_batches=1"]
    fsdp = devices if devices <= 256 else math.gcd(devices, 256)
    return [*batches, *at_once, f"mesh.fsdp={fsdp}", "mesh.data=-1", "mesh.tensor=1"]


HEAD = """
| slice | stage | mode | arguments | temporaries | whole | compiled in | of full | sent | held whole |
|---|---|---|---|---|---|---|---|---|---|
""".strip()


def line(row: Row, full: Row | None, compiled: bool = True) -> str:
    """A row of the table; `compiled` is whether its update was, or is another row's."""
    share, held = f"{row.whole / full.whole:.0%}" if full else "", "; ".join(row.update.whole) or "nothing"
    sizes = row.update.arguments, row.update.temporaries, row.update.communication.bytes
    arguments, temporaries, sent = (f"{size / GIB:.2f}" for size in sizes)
    seconds = f"{row.update.seconds:.0f} s" if compiled else "as shared"
    figures = f"{arguments} | {temporaries} | {_whole(row)} | {seconds} | {share} | {'' if row.update.refused else sent}"
    return f"| {row.slice} | {row.stage} | {row.mode} | {figures} | {held} |"


def table(rows: list[Row]) -> str:
    """Slices down, stages and modes across: the whole of each."""
    found = {(row.slice, f"{row.stage}, {row.mode}"): _whole(row) for row in rows}
    columns = list(dict.fromkeys(column for _, column in found))
    lines = [f"| slice | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in dict.fromkeys(name for name, _ in found):
        lines.append(f"| {name} | {' | '.join(found.get((name, column), '') for column in columns)} |")
    return "\n".join(lines)


def _whole(row: Row) -> str:
    return f"{row.whole:.2f}" + (", refused" if row.update.refused else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--model-config", type=Path)
    parser.add_argument("--topology", required=True, nargs="+")
    parser.add_argument("--stage", required=True, nargs="+", choices=("sft", "reward", "rl"))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["shared", "full"])
    parser.add_argument("--rows-a-device", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides")
    arguments = parser.parse_args()
    if arguments.modes == ["separate"] and arguments.stage != ["rl"]:
        parser.error("separate is a mode of rl alone")
    jax.config.update("jax_platforms", "cpu")  # what compiles for the slice is libtpu, which needs no device
    rows: list[Row] = []
    print(HEAD, flush=True)
    for topology, stage in itertools.product(map(describe, arguments.topology), arguments.stage):
        given = [] if arguments.rows_a_device is None else by_the_device(arguments.rows_a_device, len(topology.devices))
        modes = [mode for mode in MODES if mode in arguments.modes and (mode != "separate" or stage == "rl")]
        found: dict[str, Row] = {}
        for mode in sorted(modes, key=lambda mode: mode != "full"):  # first, so that the others' share is known
            config = configuration.load(arguments.config, [*MODES[mode], *given, *arguments.overrides])
            same = found["shared"].update if mode == "separate" and "shared" in found else None  # it does not read the reward model
            found[mode] = measure(config, architecture(config.model, arguments.model_config), topology, stage, mode, same)
            print(line(found[mode], found.get("full"), same is None), flush=True)
        rows += found.values()
    print(f"\n{table(sorted(rows, key=lambda row: (row.stage, list(MODES).index(row.mode))))}")


if __name__ == "__main__":
    main()
