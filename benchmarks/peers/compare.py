"""This project beside TRL and tunix, on the same work on a CPU: a table of times and of peak memory.

    python3 -m venv VENV-TRL && VENV-TRL/bin/pip install -r benchmarks/peers/requirements-trl.txt
    python3 -m venv VENV-TUNIX && VENV-TUNIX/bin/pip install -r benchmarks/peers/requirements-tunix.txt
    python benchmarks/peers/compare.py --trl-python VENV-TRL/bin/python --tunix-python VENV-TUNIX/bin/python \
        [--what reward_lora ppo_model] [--turns 3] [--steps 3] [--threads 2] [--recompute] [--micro-batch 2] [--log peers.jsonl]

Every measurement is a process of its own: one that warmed up takes `--steps` steps, whose median counts. In a turn, each work is done by
one after the other, so that other load on the machine meets all, and a ratio is taken within a turn. What the work is says `work.py`, and
how a peer's differs the docstring of its script. Nobody recomputes activations without `--recompute`: none of these works needs it to
fit, and it takes time. As a default, this project does and TRL does (but for its PPO, which cannot), and tunix does not. With
`--micro-batch`, everyone but TRL's PPO accumulates gradients over so many pairs or episodes at a time, with the same updates; without,
all are computed at once. `--log` keeps each record as it comes; records that it has already count as done.
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
    "ours": tuple(work.WORKS),
    "trl": ("reward_lora", "reward_lora_prompt", "reward_full", "ppo_model", "rloo"),
    "tunix": ("ppo_function",),
}
SCRIPTS = {"ours": "our_steps.py", "trl": "trl_steps.py", "tunix": "tunix_steps.py"}
Record = dict[str, Any]


def measured(python: str, who: str, what: str, a: argparse.Namespace) -> Record:
    """One process' record. Raises SystemExit with what it said if it fails."""
    options = ["--what", what, "--steps", str(a.steps), *(["--recompute"] if a.recompute else [])]
    options += [] if a.micro_batch is None else ["--micro-batch", str(a.micro_batch)]
    ran = subprocess.run([python, str(HERE / SCRIPTS[who]), *options], capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{who} {what} failed:\n{ran.stderr[-3000:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def spread(values: list[float], digits: int = 2) -> str:
    """Median, and the least and the greatest where they are more than one."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(records: list[Record]) -> str:
    """Markdown. A ratio above 1 says that the peer takes longer, or more memory."""
    lines = ["| work | who | seconds | peer over ours | rollout, score, learn | peak GiB | peer over ours |", "|---" * 7 + "|"]
    for what in work.WORKS:
        for who in SCRIPTS:
            found = [r for r in records if (r["what"], r["who"]) == (what, who)]
            both = [(ours, r) for r in found for ours in records if (ours["what"], ours["who"], ours["turn"]) == (what, "ours", r["turn"])]
            if not found:
                continue
            beside = [
                "" if who == "ours" or not both else spread([r[name] / ours[name] for ours, r in both]) + "x"
                for name in ("median", "peak_rss_gib")
            ]
            parts = ", ".join(f"{statistics.median(r['parts'][part] for r in found):.1f}" for part in found[0]["parts"])
            name = f"{who} {found[0]['version']}"
            seconds, memory = (spread([r[name] for r in found]) for name in ("median", "peak_rss_gib"))
            lines.append(f"| {what} | {name} | {seconds} | {beside[0]} | {parts} | {memory} | {beside[1]} |")
    notes = sorted({f"{r['what']}, {r['who']}: {r['note']}" for r in records if r["note"]})
    return "\n".join([*lines, "", *(f"- {name}: {text}" for name, text in work.WORKS.items()), "", *(f"- {note}" for note in notes)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trl-python", help="the interpreter of TRL's environment")
    parser.add_argument("--tunix-python", help="the interpreter of tunix's")
    parser.add_argument("--what", nargs="+", choices=work.WORKS, default=list(work.WORKS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed in a process")
    parser.add_argument("--threads", type=int, help="logical processors that each may use; all by default")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing, TRL's default and ours")
    parser.add_argument("--micro-batch", type=int, help="pairs or episodes at a time in updates; all at once by default")
    parser.add_argument("--log", type=Path, help="JSON lines; continued")
    a = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: a.threads])  # processes inherit it
    pythons = {"ours": sys.executable, "trl": a.trl_python, "tunix": a.tunix_python}
    kept = [json.loads(line) for line in a.log.read_text().splitlines()] if a.log and a.log.exists() else []
    same = {"recompute": a.recompute, "micro_batch": a.micro_batch, "processors": len(os.sched_getaffinity(0))}
    records: list[Record] = [r for r in kept if {name: r.get(name) for name in same} == same and len(r["seconds"]) == a.steps]
    for turn in range(a.turns):
        for what in a.what:
            who_does = [who for who, python in pythons.items() if python and what in DOES[who] and not (who == "tunix" and a.recompute)]
            for who in who_does[turn % len(who_does) :] + who_does[: turn % len(who_does)] if len(who_does) > 1 else ():
                if any((r["turn"], r["what"], r["who"]) == (turn, what, who) for r in records):
                    continue
                record = measured(pythons[who], who, what, a) | {"turn": turn}
                records.append(record)
                print(json.dumps(record), file=sys.stderr, flush=True)
                if a.log:
                    with a.log.open("a") as file:
                        file.write(json.dumps(record) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
