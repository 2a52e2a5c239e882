"""This project beside TRL and tunix, on the same work: a table of times and of peak memory.

    python3 -m venv VENV-TRL && VENV-TRL/bin/pip install -r benchmarks/peers/requirements-trl.txt
    python3 -m venv VENV-TUNIX && VENV-TUNIX/bin/pip install -r benchmarks/peers/requirements-tunix.txt
    python benchmarks/peers/compare.py --trl-python VENV-TRL/bin/python --tunix-python VENV-TUNIX/bin/python \
        [--what reward_lora ppo_model] [--turns 3] [--steps 3] [--threads 2] [--recompute] [--micro-batch 2] [--log peers.jsonl]

On an NVIDIA GPU, with JAX for CUDA in this project's environment (its extra `cuda`) and in tunix's (`pip install "jax[cuda13]==0.10.2"`):

    python benchmarks/peers/compare.py --trl-python VENV-TRL/bin/python --tunix-python VENV-TUNIX/bin/python \
        --model-config configs/shapes/llama3_1b.json --dtype bfloat16 --pairs 16 --length 512 --rows 32 --prompt 256 --response 256 \
        --turns 2 --log peers.jsonl

Every measurement is a process of its own: one that warmed up takes `--steps` steps, whose median counts. In a turn, each work is done by
one after the other, so that other load on the machine meets all, and a ratio is taken within a turn. What the work is says `work.py`, and
how a peer's differs the docstring of its script. Nobody recomputes activations without `--recompute`: at the sizes that are the default,
none of these works needs it to fit, and it takes time. As a default, this project does and TRL does (but for its PPO, which cannot), and
tunix does not. With `--micro-batch`, everyone but TRL's PPO accumulates gradients over so many pairs or episodes at a time, with the same
updates; without, all are computed at once. `--log` keeps each record as it comes; records that it has already count as done. A process
that fails, for want of memory, say, is not tried again in later turns: what it said goes to stderr, the table says `failed`, and the exit
code is 1.

Peak memory is that of the process on a CPU, and of the device on a GPU: what JAX has in use of its pool, or PyTorch allocated of its own.
JAX's pool is three quarters of the device; `XLA_PYTHON_CLIENT_MEM_FRACTION=.95` makes it larger.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import work

HERE = Path(__file__).parent
DOES = {
    "ours": work.WORKS,
    "trl": ("reward_lora", "reward_lora_prompt", "reward_full", "ppo_model", "rloo"),
    "tunix": ("ppo_function",),
}
SCRIPTS = {"ours": "our_steps.py", "trl": "trl_steps.py", "tunix": "tunix_steps.py"}
Record = dict[str, Any]


def measured(python: str, who: str, asked: work.Work) -> Record | None:
    """One process' record; None if it fails, and what it said on stderr."""
    ran = subprocess.run([python, str(HERE / SCRIPTS[who]), *asked.options()], capture_output=True, text=True)
    if ran.returncode:
        print(f"{who} {asked.what} failed with {ran.returncode}:\n{ran.stderr[-3000:]}", file=sys.stderr, flush=True)
        return None
    return json.loads(ran.stdout.splitlines()[-1])


def spread(values: list[float], digits: int = 2) -> str:
    """Median, and the least and the greatest where they are more than one."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def peak(record: Record) -> float:
    """GiB of the device, or on a CPU of the process."""
    return record["peak_rss_gib"] if record["peak_device_gib"] is None else record["peak_device_gib"]


def table(works: list[work.Work], records: list[Record], failed: set[tuple[str, str]]) -> str:
    """Markdown. A ratio above 1 says that the peer takes longer, or more memory, on the same device."""
    lines = ["| work | who | device | seconds | peer over ours | rollout, score, learn | peak GiB | peer over ours |", "|---" * 8 + "|"]
    for what in (asked.what for asked in works):
        ours = {(r["turn"], r["device"]): r for r in records if (r["what"], r["who"]) == (what, "ours")}
        for who in SCRIPTS:
            found = [r for r in records if (r["what"], r["who"]) == (what, who)]
            if (what, who) in failed:
                lines.append(f"| {what} | {who} | | failed | | | | |")
            elif found:
                both = [(ours[at], r) for r in found if who != "ours" and (at := (r["turn"], r["device"])) in ours]
                ratios = [f"{spread([of(r) / of(mine) for mine, r in both])}x" if both else "" for of in (lambda r: r["median"], peak)]
                seconds, memory = spread([r["median"] for r in found], 3), spread([peak(r) for r in found])
                parts = ", ".join(f"{statistics.median(r['parts'][part] for r in found):.2f}" for part in found[0]["parts"])
                name, device = f"{who} {found[0]['version']}", " and ".join(sorted({r["device"] for r in found}))
                lines.append(f"| {what} | {name} | {device} | {seconds} | {ratios[0]} | {parts} | {memory} | {ratios[1]} |")
    notes = sorted({f"{r['what']}, {r['who']}: {r['note']}" for r in records if r["note"]})
    texts = (f"- {asked.what}: {asked}, in {asked.dtype}" for asked in works)
    return "\n".join([*lines, "", *texts, "", *(f"- {note}" for note in notes)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trl-python", help="the interpreter of TRL's environment")
    parser.add_argument("--tunix-python", help="the interpreter of tunix's")
    parser.add_argument("--what", nargs="+", choices=work.WORKS, default=list(work.WORKS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, help="logical processors that each may use; all by default")
    parser.add_argument("--log", type=Path, help="JSON lines; continued")
    work.add_options(parser)
    a = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: a.threads])  # processes inherit it
    pythons = {"ours": sys.executable, "trl": a.trl_python, "tunix": a.tunix_python}
    works = [work.Work.of(what, a) for what in a.what]
    same = [asked.record() | {"processors": len(os.sched_getaffinity(0))} for asked in works]
    kept = [json.loads(line) for line in a.log.read_text().splitlines()] if a.log and a.log.exists() else []
    records: list[Record] = [r for r in kept if any({name: r.get(name) for name in one} == one for one in same)]
    failed: set[tuple[str, str]] = set()
    for turn in range(a.turns):
        for asked in works:
            what = asked.what
            who_does = [who for who, python in pythons.items() if python and what in DOES[who] and not (who == "tunix" and a.recompute)]
            for who in who_does[turn % len(who_does) :] + who_does[: turn % len(who_does)] if len(who_does) > 1 else ():
                if (what, who) in failed or any((r["turn"], r["what"], r["who"]) == (turn, what, who) for r in records):
                    continue
                record = measured(pythons[who], who, asked)
                if record is None:
                    failed.add((what, who))
                    continue
                record["turn"] = turn
                records.append(record)
                print(json.dumps(record), file=sys.stderr, flush=True)
                if a.log:
                    with a.log.open("a") as file:
                        file.write(json.dumps(record) + "\n")
    print(table(works, records, failed))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
