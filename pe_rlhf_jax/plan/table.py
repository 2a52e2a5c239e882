"""A plan as tables for people, and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.segment import Segments
from rich.table import Table

from pe_rlhf_jax.plan.hlo import Communication
from pe_rlhf_jax.plan.plan import GIB, Plan, StagePlan, Timed

ASSUMPTIONS = (
    "Times are bounds from published peaks, not predictions: from everything overlapping to compute and links in turn. A collective is "
    "taken to use the two ports of one torus dimension. Runs reach about half of peak FLOP/s; FLOPs are by formula, at the longest "
    "texts, and generation is taken to run to its limit."
)

WIDTH = 200
"""Columns that the table may take."""


def show(plan: Plan, console: Console) -> None:
    """Prints a plan."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    console.print(f"\n[bold]{plan.topology}[/bold], mesh {mesh}, {plan.parameters / 1e9:.2f}B parameters in {plan.dtype}")
    table = Table(title="one step; GiB on each chip", caption="total: with what else the stage keeps. * a loop counted to its limit")
    for column in ("stage", "program", "args", "temp", "peak", "total", "sent", "TFLOP", "seconds", "compile"):
        table.add_column(column, justify="left" if column in ("stage", "program") else "right", no_wrap=True)
    devices = 1
    for size in plan.mesh.values():
        devices *= size
    for stage in plan.stages:
        for timed in stage.programs:
            table.add_row(*_row(stage, timed, devices))
    # As wide as it is, also in a file or a narrow terminal, where figures would be cut.
    console.print(Segments(console.render(table, console.options.update(max_width=WIDTH))), crop=False)
    for stage in plan.stages:
        console.print(f"{stage.stage}: " + dominates(stage), markup=False)
        for timed in stage.programs:
            program = timed.program
            if program.communication.collectives:
                console.print(f"  {program.name} sends: {_sends(program.communication)}", markup=False)
            if program.whole:
                console.print(f"  {program.name} holds whole: {'; '.join(program.whole)}", markup=False)
            if program.refused:
                console.print(f"  {program.name}: {program.refused}", markup=False)
    for note in plan.notes:
        console.print(f"note: {note}", markup=False)
    if plan.chip is not None:
        console.print(ASSUMPTIONS, markup=False, style="dim")
    if plan.usable is not None:
        verdict = "[green]fits[/green]" if plan.fits else "[red]does not fit[/red]"
        of = f"{plan.chip.name}: {plan.chip.hbm:g} published" if plan.chip else f"{plan.topology}: what programs may take of each device"
        console.print(f"{verdict}: {plan.hbm / GIB:.2f} of {plan.usable:.2f} GiB ({of})")


def dominates(stage: StagePlan) -> str:
    """What the fullest moment of a stage is made of."""
    program = stage.fullest.program
    parts = dict(stage.resident) | {f"temporaries of {program.name}": program.temporaries}
    largest = sorted(parts.items(), key=lambda part: -part[1])[:4]
    text = ", ".join(f"{name} {size / GIB:.2f}" for name, size in largest if size > 0.005 * GIB)
    arrays = ", ".join(f"{a.type}{list(a.shape)} {a.bytes / GIB:.2f}" for a in program.largest[:3])
    made = f"largest arrays made: {arrays}" if arrays else ""
    return f"{stage.hbm / GIB:.2f} GiB in {program.name}: " + "; ".join(part for part in (text, made) if part)


def _sends(communication: Communication) -> str:
    """Its collectives by kind, in GiB as everywhere."""
    return ", ".join(f"{one.kind} {one.bytes / GIB:.2f} in {one.count}" for one in communication.collectives)


def _row(stage: StagePlan, timed: Timed, devices: int) -> list[str]:
    p, time = timed.program, timed.time
    calls = f" x {p.repeats}" if p.repeats > 1 else ""
    sent = p.communication.bytes
    seconds = "" if time is None or not timed.flops else f"{time.least:.2g}-{time.most:.2g}"
    mark = "" if not p.communication.unknown_loops else " *"
    figures = [f"{size / GIB:.2f}" for size in (p.arguments, p.temporaries, p.peak, timed.hbm, sent)]
    figures[-1] += mark
    return [stage.stage, p.name + calls, *figures, f"{timed.flops / devices / 1e12:.3g}", seconds, f"{p.seconds:.0f} s"]


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything in a plan; bytes, FLOPs and seconds."""
    found = dataclasses.asdict(plan) | {"fits": plan.fits, "hbm": plan.hbm, "seconds": plan.seconds}
    for stage, one in zip(found["stages"], plan.stages, strict=True):
        stage |= {"hbm": one.hbm, "dominates": dominates(one)}
        for program, timed in zip(stage["programs"], one.programs, strict=True):
            if timed.time is not None:
                program["time"] |= {"least": timed.time.least, "most": timed.time.most}
    return found
