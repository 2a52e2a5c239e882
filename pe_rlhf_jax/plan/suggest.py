"""Changes that make a configuration fit, or a faster one of one that does; each is tried by compiling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import jax

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.config import Config, ConfigError
from pe_rlhf_jax.models.architecture import DecoderConfig
from pe_rlhf_jax.plan.plan import GIB, STAGES, Plan, plan
from pe_rlhf_jax.plan.programs import LOADING, names_other_runs
from pe_rlhf_jax.plan.topology import Topology
from pe_rlhf_jax.rollout.decode import joins
from pe_rlhf_jax.sharding import micro_batch_multiple
from pe_rlhf_jax.training import evaluate, reward, rl

GATHER = "rl.sampling.gather_weights"
JOIN = "rl.sampling.join_weights"
ENOUGH = 3
"""Changes that make it fit, after which no more are tried."""
Overrides = tuple[str, ...]
Axes = tuple[int, int, int]
"""Sizes of `mesh.data`, `mesh.fsdp` and `mesh.tensor`."""


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """Overrides (`--set` each) and what they give."""

    overrides: Overrides
    plan: Plan
    same_results: bool


def same_results(config: Config, overrides: Overrides) -> bool:
    """Whether a run trains as it did, up to rounding: where things lie, how many rows at once, what is computed again.

    An evaluation of other batches draws other samples. With dropout, which is drawn anew for each device and micro-batch, meshes and
    micro-batches change results.
    """
    free = ("model.remat", "evaluate.batch_size", GATHER, JOIN)
    fields = [field for field in (override.partition("=")[0] for override in overrides) if field not in free]
    if config.lora.lora_dropout > 0 and {"sft", reward.STAGE} & {*config.run.stages}:
        return not fields
    return all(field.startswith("mesh.") or field.endswith(".micro_batch_size") for field in fields)


def suggest(
    config: Config,
    architecture: DecoderConfig,
    topology: Topology,
    first: Plan,
    limit: int,
    tell: Callable[[str], None] = lambda _: None,
    only: Collection[str] = STAGES,
) -> list[Suggestion]:
    """Tries changes, those first that change least, and returns those that fit: the ones with the same results first, and of these and
    of the others the fastest. Ctrl-C ends the tries, not what was found.

    Args:
        first: the plan of the configuration as it is, on devices whose memory is known.
        limit: changes to compile at most.
        tell: is told what is being compiled, and with which change.
    """
    assert first.usable is not None
    room = first.usable * GIB
    large = [stage.stage for stage in first.stages if stage.hbm > room or any(timed.program.refused for timed in stage.programs)]
    crowded = LOADING in large or any(sum(stage.resident.values()) > room for stage in first.stages)
    found: list[Suggestion] = []
    tried = 0
    tries = candidates(config, architecture, first.mesh, bool(first.fits), crowded, large or only)
    for overrides in _gathering(config, first, room, tries):
        if tried == limit or (not first.fits and len(found) == ENOUGH):
            break
        try:
            outcome = plan(changed(config, overrides), architecture, topology, _with(tell, overrides), only)
        except KeyboardInterrupt:
            break
        except (ConfigError, jax.errors.JaxRuntimeError):  # what cannot be computed is no suggestion
            continue
        tried += 1
        if outcome.fits:
            found.append(Suggestion(overrides, outcome, same_results(config, overrides)))
    return sorted(found, key=lambda one: (not one.same_results, one.plan.seconds))


def _gathering(config: Config, first: Plan, room: float, tries: Iterator[Overrides]) -> Iterator[Overrides]:
    """The tries, all with weights apart, and gathered for each token, where joined ones, or all at once, are too much; or first with them
    gathered at once, where all fits.
    """
    rollouts = [timed for stage in first.stages for timed in stage.programs if timed.program.name == "rollout"]
    sharded, gathers = first.mesh["fsdp"] > 1, config.rl.sampling.gather_weights
    if first.fits and rollouts and sharded and not gathers:
        yield (f"{GATHER}=true",)
    off: Overrides = ()
    crowded = any(timed.hbm > room or timed.program.refused for timed in rollouts)
    if crowded and joins(config.rl.sampling):
        off += (f"{JOIN}=false",)
        yield off
    if crowded and gathers:
        off += (f"{GATHER}=false",)
        if sharded:
            yield off
    yield from (one + off for one in tries)


def _with(tell: Callable[[str], None], overrides: Overrides) -> Callable[[str], None]:
    return lambda text: tell(f"{text}, with {' '.join(overrides)}")


def changed(config: Config, overrides: Overrides) -> Config:
    """A configuration with `--set`s. Raises ConfigError if they do not go together."""
    return configuration.parse(configuration.dump(config), overrides)


def candidates(
    config: Config, c: DecoderConfig, mesh: Mapping[str, int], fits: bool, crowded: bool = False, only: Collection[str] = STAGES
) -> Iterator[Overrides]:
    """Overrides to try: first what trains as before, which is meshes, smaller micro-batches and recomputation; then adapters in place of
    full tuning, and shared roles; then the backbone in few bits. For a configuration that fits, larger micro-batches and meshes.

    Args:
        mesh: the sizes of its axes as they are.
        crowded: what stays in memory is too much alone, or its loading is, so that fewer rows at once or recomputation do not help.
        only: the stages whose rows at once may change.
    """
    stages = [stage for stage in STAGES if stage in config.run.stages]
    planned = [stage for stage in stages if stage in only]
    mine = mesh["data"], mesh["fsdp"], mesh["tensor"]
    others = _meshes(config, c, mine, stages)
    if fits:
        yield from _larger(config, planned)
        yield from map(_set, others)
        return
    remat = ("model.remat=full",) if config.model.remat != "full" else ()
    bases = [mine, *others[:1]]  # its own mesh, and the most sharded one
    smaller = {base: [_smaller(config, planned, base[0] * base[1], part) for part in (2, 4)] for base in bases}
    for base in bases:
        if crowded and base[0] >= mine[0]:  # with as many copies as there are, as much stays in memory
            continue
        place, (halves, quarters) = _set(base) if base != mine else (), smaller[base]
        tries = [place, place + halves, place + remat + halves, place + remat + quarters]
        yield from dict.fromkeys(one for one in tries if one)
    yield from (_set(one) for one in others[1:3] if one[0] < mine[0] or (one[0] == mine[0] and not crowded))
    base = bases[-1] if bases[-1][0] < mine[0] else mine  # the one with fewer copies
    place, less = _set(base) if base != mine else (), remat + smaller[base][0]
    change, few_bits = _with_other_results(config, stages)
    if change:
        yield place + change
        if less:
            yield place + change + less
    yield from (place + change + (f"model.quantization={name}",) + less for name in few_bits)


def _with_other_results(config: Config, stages: Sequence[str]) -> tuple[Overrides, Sequence[str]]:
    """Adapters in place of full tuning and shared roles, where there are others; and quantizations, of which full tuning has nothing.

    Another run's reward model shares roles only with the same backbone, in the same few bits, which nobody looks up here.
    """
    full = [field for field, tuning in config.tunings().items() if tuning == "full"]
    if config.rl.value_tuning is None and "rl.value_tuning" in full:
        full.remove("rl.value_tuning")  # goes with rl.tuning
    separate, others = config.rl.roles == "separate", names_other_runs(config)
    shared = ("rl.roles=shared",) if rl.STAGE in stages and separate and not others else ()
    free = config.model.quantization is None and (separate or not others)
    return (*(f"{field}=lora" for field in full), *shared), ("int8", "nf4") if free else ()


def _set(axes: Axes) -> Overrides:
    return tuple(f"mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), axes, strict=True))


def _meshes(config: Config, c: DecoderConfig, mine: Axes, stages: Sequence[str]) -> list[Axes]:
    """Other axes that divide heads and batches; fully sharded first, then copies, then tensor axes."""
    devices, found = mine[0] * mine[1] * mine[2], []
    for tensor in (1, 2, 4, 8, 16):
        if devices % tensor or c.num_kv_heads % tensor:
            continue
        rest = devices // tensor
        for data in (1, 2, 4, 8, 16, 32):
            if rest % data == 0 and all(getattr(config, stage).batch_size % rest == 0 for stage in stages):
                found.append((data, rest // data, tensor))
    return sorted((mesh for mesh in found if mesh != mine), key=lambda mesh: (mesh[0], mesh[2]))


def _smaller(config: Config, stages: Sequence[str], groups: int, part: int) -> Overrides:
    """So small a part of the rows that are computed at once, in each stage where that divides its updates and the mesh it."""
    found = []
    for stage in stages:
        rows, field = _rows(config, stage), "batch_size" if stage == evaluate.STAGE else "micro_batch_size"
        size = (getattr(getattr(config, stage), field) or rows) // part
        if size and rows % size == 0 and size % micro_batch_multiple(config, stage, groups) == 0:
            found.append(f"{stage}.{field}={size}")
    return tuple(found)


def _larger(config: Config, stages: Sequence[str]) -> list[Overrides]:
    """All rows of an update at once, and twice as many as are set, in the stages that have a micro-batch."""
    whole, twice = [], []
    for stage in stages:
        rows, size = _rows(config, stage), getattr(getattr(config, stage), "micro_batch_size", None)
        if size is None or size == rows:
            continue
        whole.append(f"{stage}.micro_batch_size=null")
        if rows % (2 * size) == 0:
            twice.append(f"{stage}.micro_batch_size={2 * size if 2 * size < rows else 'null'}")
    return list(dict.fromkeys(tuple(one) for one in (whole, twice) if one))


def _rows(config: Config, stage: str) -> int:
    """Of an update."""
    return getattr(config, stage).batch_size // (config.rl.mini_batches if stage == rl.STAGE else 1)
