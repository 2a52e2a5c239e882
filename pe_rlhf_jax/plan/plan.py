"""The answer before the bill: every program of a run, compiled for devices that need not exist, and what it takes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax.numpy as jnp

from pe_rlhf_jax.config import Config, ConfigError
from pe_rlhf_jax.models import quantization
from pe_rlhf_jax.models.architecture import DecoderConfig, matrices
from pe_rlhf_jax.plan.chips import Chip
from pe_rlhf_jax.plan.compiled import Program, compile_call, device_bytes
from pe_rlhf_jax.plan.flops import Costs
from pe_rlhf_jax.plan.programs import LOADING, Call, abstract_context, names_other_runs, stage_calls
from pe_rlhf_jax.plan.topology import GIB, Topology
from pe_rlhf_jax.sharding import check_batches, row_multiple
from pe_rlhf_jax.training import evaluate, reward, rl, sft
from pe_rlhf_jax.types import PyTree

STAGES = (sft.STAGE, reward.STAGE, rl.STAGE, evaluate.STAGE)


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of all calls of a program in one step, by what they would take alone at the published rates."""

    compute: float
    memory: float
    """Generation alone: each token reads the backbone and the cache once."""
    links: float

    @property
    def least(self) -> float:
        """Everything overlaps."""
        return max(self.compute, self.memory, self.links)

    @property
    def most(self) -> float:
        """Nothing overlaps."""
        return max(self.compute, self.memory) + self.links


@dataclasses.dataclass(frozen=True)
class Timed:
    """A program in its stage."""

    program: Program
    flops: float
    """Of one call, on all devices together, by formula."""
    hbm: int
    """Bytes on each device while it runs: its peak, and what else the stage keeps."""
    time: Time | None
    """None where no rates are published."""


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """A stage: its programs, and what stays in memory through it, bytes on each device by what it is."""

    stage: str
    programs: tuple[Timed, ...]
    resident: Mapping[str, int]

    @property
    def hbm(self) -> int:
        return max(timed.hbm for timed in self.programs)

    @property
    def fullest(self) -> Timed:
        return max(self.programs, key=lambda timed: timed.hbm)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A configuration on a topology."""

    topology: str
    chip: Chip | None
    usable: float | None
    """GiB of each device that programs and their data may have."""
    mesh: Mapping[str, int]
    dtype: str
    parameters: int
    stages: tuple[StagePlan, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        """Whether every stage fits; None where nobody says how much memory there is."""
        if self.usable is None:
            return None
        refused = any(timed.program.refused for stage in self.stages for timed in stage.programs)
        return not refused and self.hbm <= self.usable * GIB

    @property
    def hbm(self) -> int:
        return max(stage.hbm for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Of a step of each stage, nothing overlapping; 0 where no rates are published."""
        return sum(timed.time.most for stage in self.stages for timed in stage.programs if timed.time is not None)


def plan(
    config: Config,
    architecture: DecoderConfig,
    topology: Topology,
    tell: Callable[[str], None] = lambda _: None,
    only: Collection[str] = STAGES,
) -> Plan:
    """Compiles every program of the configuration's stages for the topology; nothing is allocated.

    Args:
        only: the stages to plan, of those that the configuration runs; what the others leave in memory is counted in any case, and so is
            the loading of a backbone that is to be quantized.
        tell: is told what is being compiled, since each takes from seconds to minutes.

    Raises:
        ConfigError: the mesh does not fit the devices or the batches.
    """
    dtype = jnp.dtype(config.model.dtype_on(topology.devices[0].platform))
    context = abstract_context(config, architecture, dtype, topology.devices)
    check_batches(config, context.mesh)
    costs = Costs(config, architecture, row_multiple(context.mesh), dtype.name)
    whole = backbone_matrices(architecture)
    stages = []
    runs = [stage for stage in STAGES if stage in config.run.stages]
    # Without a policy there is nothing in an evaluation but held-out rows.
    chosen = [stage for stage in runs if stage in only and (stage != evaluate.STAGE or rl.STAGE in runs)]
    if not chosen:
        raise ConfigError(
            f"nothing to plan: run.stages is {', '.join(config.run.stages)}, asked for were {', '.join(only)} (evaluate is planned with rl)"
        )
    for stage in [LOADING] * (config.model.quantization is not None) + chosen:
        programs: list[Program] = []

        def compile(call: Call, stage: str = stage, programs: list[Program] = programs) -> PyTree:
            tell(f"{stage}: {call.name}")
            program, returned = compile_call(call, context.mesh, whole, architecture.vocab_size)
            programs.append(program)
            return returned

        resident = {part: device_bytes(tree) for part, tree in stage_calls(context, stage, compile).items()}
        stages.append(StagePlan(stage, tuple(_timed(stage, p, resident, costs, context, topology) for p in programs), resident))
    mesh = {axis: int(size) for axis, size in context.mesh.shape.items()}
    parameters = quantization.count(context.backbone)
    notes = tuple(_notes(config, architecture, mesh))
    return Plan(topology.name, topology.chip, topology.usable, mesh, dtype.name, parameters, tuple(stages), notes)


def backbone_matrices(c: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The embedding, and each matrix of one layer and of all layers together, by name."""
    layer = {f"{name.split('.')[1]}": shape for name, shape in matrices(c).items()}
    found: dict[str, tuple[int, ...]] = {"embedding": (c.vocab_size, c.hidden_size), **layer}
    return found | {f"all layers' {name}": (c.num_layers, *shape) for name, shape in layer.items()}


def _timed(stage: str, program: Program, resident: Mapping[str, int], costs: Costs, context: Any, topology: Topology) -> Timed:
    flops = 0.0 if program.name in ("quantize", "mini-batch", "evaluation") else costs.of(stage, program.name)
    hbm = program.peak + max(0, sum(resident.values()) - program.staying)
    chip, time = topology.chip, None
    if chip is not None:
        sent = program.communication.bytes
        memory = 0.0
        if program.name == "rollout":
            # A chip that holds a share of a matrix reads what it computes with: the whole matrix over its tensor axis.
            config, size = context.config.rl, jnp.dtype(context.decoder.dtype).itemsize
            read = program.parts["policy"] * size / 4 if config.tuning == "full" else program.parts["backbone"]
            backbone = read * context.mesh.shape["fsdp"]
            count = getattr(context.config, stage).batch_size
            at_once = config.sampling.rows_at_once(count)
            memory = config.sampling.max_new_tokens * count / at_once * (backbone + _cache(context, at_once)) / chip.hbm_rate
        n = program.repeats
        time = Time(n * flops / len(topology.devices) / chip.flops, n * memory, n * sent / chip.axis_rate)
    return Timed(program, flops, hbm, time)


def _cache(context: Any, at_once: int) -> float:
    """Bytes of keys and values on each device, of so many rows on all of them."""
    c, config, mesh = context.decoder.config, context.config, context.mesh.shape
    slots = config.data.max_prompt_length + config.rl.sampling.max_new_tokens
    heads = c.num_kv_heads / (mesh["tensor"] if c.num_kv_heads % mesh["tensor"] == 0 else 1)
    rows = at_once / (mesh["data"] * mesh["fsdp"])
    return 2 * c.num_layers * rows * slots * heads * c.head_dim * jnp.dtype(context.decoder.dtype).itemsize


def _notes(config: Config, c: DecoderConfig, mesh: Mapping[str, int]) -> list[str]:
    notes, tensor = [], mesh["tensor"]
    for name, count in (("attention heads", c.num_heads), ("key-value heads", c.num_kv_heads), ("vocabulary", c.vocab_size)):
        if count % tensor:
            choices = ", ".join(str(n) for n in range(1, tensor + 1) if count % n == 0 and n <= tensor)
            notes.append(f"{count} {name} do not divide over mesh.tensor {tensor}: every chip of the axis has all of them. {choices} would")
    if names_other_runs(config) and "rl" in config.run.stages:
        own = ", each with a backbone of its own that is not quantized" if config.rl.roles == "separate" else ""
        notes.append(f"reward models of other runs are taken to be as large as this run's{own}")
    if config.model.quantization is not None:
        notes.append(
            f"{LOADING} comes before all stages: matrices of one kind, of all layers, are there in floating point until they are in few "
            "bits; counted are the largest, as if all else were loaded before"
        )
    return notes
