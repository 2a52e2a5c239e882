"""How long a configuration's programs take to trace and compile at a first start, and at a second one with what JAX's cache kept.

    python benchmarks/cold_start.py --config configs/quickstart.yaml
    python benchmarks/cold_start.py --config configs/llama3_8b.yaml --model-config configs/shapes/llama3_8b.json --topology v5e:4x4

`pe-rlhf plan` compiles the programs of a run's steps, twice, each time in a fresh process, with one new cache folder between them (a run
has its own under `PE_RLHF_CACHE`, `run.compilation_cache`). Nothing is loaded or run. Prints Markdown: seconds of each program, and their
sum with its ratio; other work on the machine lengthens both sides. All arguments go to `plan`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile


def seconds(arguments: list[str], cache: str) -> dict[str, float]:
    """Trace and compile of each program, by stage and name."""
    command = [sys.executable, "-m", "pe_rlhf_jax.main", "plan", "--json", "--no-suggest", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache})
    if done.returncode not in (0, 1):
        sys.exit(done.stdout)
    plan = json.loads(done.stdout)
    return {
        f"{stage['stage']}: {one['program']['name']}": one["program"]["seconds"] for stage in plan["stages"] for one in stage["programs"]
    }


def table(first: dict[str, float], second: dict[str, float]) -> str:
    """Markdown."""
    rows = [f"| {name} | {first[name]:.2f} | {second[name]:.2f} |" for name in first]
    cold, warm = sum(first.values()), sum(second.values())
    rows.append(f"| **all** | **{cold:.1f}** | **{warm:.1f}**, {warm / cold:.0%} |")
    return "\n".join(["| program | first start, s | second start, s |", "|---|---|---|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as cache:
        print(table(seconds(arguments, cache), seconds(arguments, cache)))


if __name__ == "__main__":
    main()
