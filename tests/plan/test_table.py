"""What a plan prints, of a plan made by hand: every figure is worked out here."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pe_rlhf_jax.plan.chips import Chip
from pe_rlhf_jax.plan.compiled import Program
from pe_rlhf_jax.plan.hlo import Array, Collective, Communication
from pe_rlhf_jax.plan.plan import GIB, Plan, StagePlan, Time, Timed
from pe_rlhf_jax.plan.table import as_json, dominates, show

CHIP = Chip("v0", 16, 10.5, 1e12, 1e12, 1e11, 4)
SENT = Communication((Collective("all-gather", 12, 1.25 * GIB), Collective("all-reduce", 3, 0.5 * GIB)), 1)
SILENT = Communication((), 0)


def program(name: str, repeats: int, gib: tuple[float, float, float], sent: Communication, whole: tuple[str, ...] = ()) -> Program:
    """With arguments, temporaries and peak of so many GiB."""
    arguments, temporaries, peak = (int(size * GIB) for size in gib)
    largest = (Array("bf16", (1024, 1024, 128), "dot"), Array("f32", (1024, 1024), "dot"))
    return Program(name, repeats, arguments, temporaries, 0, 0, peak, {}, 0, largest, sent, whole, 7.4)


@pytest.fixture
def made() -> Plan:
    """Two programs on eight chips; the second is the fullest."""
    take = program("mini-batch", 1, (0.25, 0.5, 0.75), SILENT)
    update = program("update", 4, (2, 3, 5.5), SENT, ("q_proj [64, 48]", "all layers' up_proj [2, 64, 80], kept whole"))
    timed = (
        Timed(take, 0.0, int(1.5 * GIB), Time(0, 0, 0)),
        Timed(update, 24e12, int(6.75 * GIB), Time(compute=0.4, memory=0.1, links=0.3)),
    )
    resident = {"backbone": 4 * GIB, "training state": GIB, "reference": 12}
    mesh, stages = {"data": 1, "fsdp": 4, "tensor": 2}, (StagePlan("rl", timed, resident),)
    return Plan("v0:2x4", CHIP, CHIP.usable, mesh, "bfloat16", 7_500_000_000, stages, ("a",))


def shown(plan: Plan, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    show(plan, console)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 160])
def test_a_row_has_the_figures_of_one_call_on_one_chip_and_the_seconds_of_all(made, width):
    """Also where the terminal is too narrow for the table: figures are not cut."""
    head, *rows = [[cell.strip() for cell in line.split(line[0])[1:-1]] for line in shown(made, width) if line[:1] in ("┃", "│")]
    assert head == ["stage", "program", "args", "temp", "peak", "total", "sent", "TFLOP", "seconds", "compile"]
    assert rows == [
        ["rl", "mini-batch", "0.25", "0.50", "0.75", "1.50", "0.00", "0", "", "7 s"],
        ["rl", "update x 4", "2.00", "3.00", "5.50", "6.75", "1.75 *", "3", "0.4-0.7", "7 s"],
    ]


def test_below_it_stands_what_dominates_what_is_sent_and_what_is_whole(made):
    lines = shown(made, 200)
    assert "v0:2x4, mesh data 1 x fsdp 4 x tensor 2, 7.50B parameters in bfloat16" in lines
    start = lines.index("rl: " + dominates(made.stages[0]))
    assert lines[start + 1 :][:3] == [
        "  update sends: all-gather 1.25 in 12, all-reduce 0.50 in 3",
        "  update holds whole: q_proj [64, 48]; all layers' up_proj [2, 64, 80], kept whole",
        "note: a",
    ]
    assert lines[-1] == "fits: 6.75 of 10.50 GiB (v0: 16 published)"


def test_what_dominates_is_the_largest_of_what_stays_and_of_the_fullest_program(made):
    assert dominates(made.stages[0]) == (
        "6.75 GiB in update: backbone 4.00, temporaries of update 3.00, training state 1.00; "
        "largest arrays made: bf16[1024, 1024, 128] 0.25, f32[1024, 1024] 0.00"
    )


def test_json_has_the_bounds_of_time_and_the_collectives(made):
    found = as_json(made)
    assert (found["fits"], found["hbm"], found["seconds"]) == (True, int(6.75 * GIB), pytest.approx(0.7))
    update = found["stages"][0]["programs"][1]
    assert update["time"] == {"compute": 0.4, "memory": 0.1, "links": 0.3, "least": 0.4, "most": pytest.approx(0.7)}
    assert update["program"]["communication"]["collectives"][1] == {"kind": "all-reduce", "count": 3, "bytes": 0.5 * GIB}
