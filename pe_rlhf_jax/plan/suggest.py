"""Changes that make a configuration fit, or a faster mesh for one that does; each is tried by compiling."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence

import yaml

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.config import Config, ConfigError
from pe_rlhf_jax.models.architecture import DecoderConfig
from pe_rlhf_jax.plan.plan import STAGES, Plan, plan
from pe_rlhf_jax.plan.topology import Topology
from pe_rlhf_jax.training import reward, rl


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """Overrides (`--set` each) and what they give."""

    overrides: tuple[str, ...]
    plan: Plan

    @property
    def seconds(self) -> float:
        """Of a step of each stage, nothing overlapping."""
        return sum(timed.time.most for stage in self.plan.stages for timed in stage.programs if timed.time is not None)


def suggest(
    config: Config,
    architecture: DecoderConfig,
    topology: Topology,
    first: Plan,
    limit: int,
    tell: Callable[[str], None] = lambda _: None,
    only: Collection[str] = STAGES,
) -> list[Suggestion]:
    """Tries changes, cheapest first, and returns those that fit, fastest first; where the plan fits already, only other meshes.

    Args:
        limit: changes to try at most.
    """
    found: list[Suggestion] = []
    for tried, overrides in enumerate(candidates(config, architecture, len(topology.devices), bool(first.fits))):
        if tried == limit or (found and not first.fits and len(found) == 3):
            break
        tell("trying " + " ".join(overrides))
        try:
            outcome = plan(changed(config, overrides), architecture, topology, tell, only)
        except ConfigError:
            continue
        if outcome.fits:
            found.append(Suggestion(overrides, outcome))
    return sorted(found, key=lambda one: one.seconds)


def changed(config: Config, overrides: tuple[str, ...]) -> Config:
    """A configuration with `--set`s. Raises ConfigError if they do not go together."""
    return configuration.parse(yaml.safe_dump(config.model_dump(mode="json")), overrides)


def candidates(config: Config, c: DecoderConfig, devices: int, fits: bool) -> Iterator[tuple[str, ...]]:
    """Overrides to try: first what changes no result, which is meshes, smaller micro-batches and recomputation; then adapters in place
    of full tuning, and shared roles. A configuration that fits is only tried on other meshes.
    """
    stages = [stage for stage in STAGES if stage in config.run.stages]
    meshes = [(f"mesh.data={d}", f"mesh.fsdp={f}", f"mesh.tensor={t}") for d, f, t in _meshes(config, c, devices, stages)]
    if fits:
        yield from meshes
        return
    bases = [(), *meshes[:1]]  # its own mesh, and the most sharded one
    smaller = {mesh: [_smaller(config, stages, _row_groups(config, mesh, devices), part) for part in (2, 4)] for mesh in bases}
    for mesh in bases:
        halves, quarters = smaller[mesh]
        if mesh:
            yield mesh
        if halves:
            yield (*mesh, *halves)
        if config.model.remat != "full":
            yield (*mesh, "model.remat=full", *halves)
        if quarters and quarters != halves:
            yield (*mesh, *quarters, *(["model.remat=full"] if config.model.remat != "full" else []))
    yield from meshes[1:3]
    lora = tuple(f"{stage}.tuning=lora" for stage in stages if getattr(config, stage).tuning == "full")
    shared = ("rl.roles=shared",) if "rl" in stages and config.rl.roles == "separate" else ()
    if lora or shared:
        for mesh in bases:
            yield (*mesh, *lora, *shared)
            yield (*mesh, *lora, *shared, *smaller[mesh][0])


def _meshes(config: Config, c: DecoderConfig, devices: int, stages: Sequence[str]) -> list[tuple[int, int, int]]:
    """Axes that divide heads and batches; fully sharded first, then copies, then tensor axes."""
    found = []
    for tensor in (1, 2, 4, 8, 16):
        if devices % tensor or c.num_kv_heads % tensor:
            continue
        rest = devices // tensor
        for data in (1, 2, 4, 8, 16, 32):
            if rest % data == 0 and all(getattr(config, stage).batch_size % rest == 0 for stage in stages):
                found.append((data, rest // data, tensor))
    mine = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    return sorted((mesh for mesh in found if mesh != mine), key=lambda mesh: (mesh[0], mesh[2]))


def _row_groups(config: Config, mesh: tuple[str, ...], devices: int) -> int:
    """Into how many parts a mesh, given as overrides or in the configuration, splits rows."""
    if mesh:
        return math.prod(int(axis.partition("=")[2]) for axis in mesh[:2])
    return devices // config.mesh.tensor if config.mesh.tensor > 0 else config.mesh.data * config.mesh.fsdp


def _smaller(config: Config, stages: Sequence[str], groups: int, part: int) -> tuple[str, ...]:
    """So small a part of the rows that are computed at once, in each stage where that divides its updates and the mesh it."""
    found = []
    for stage in stages:
        section = getattr(config, stage)
        rows = section.batch_size // (rl._mini_batches(config.rl) if stage == rl.STAGE else 1)
        size = (section.micro_batch_size or rows) // part
        sides = 2 if stage == reward.STAGE and config.reward.kind != "labels" else 1
        if size and rows % size == 0 and sides * size % groups == 0:
            found.append(f"{stage}.micro_batch_size={size}")
    return tuple(found)
