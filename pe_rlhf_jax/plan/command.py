"""`pe-rlhf plan`: arguments, and what it prints.

pe-rlhf plan --config configs/llama3_8b_reward.yaml --topology v5e:4x4 --topology v5p:2x2x2 [--suggest] [--json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.config import ConfigError
from pe_rlhf_jax.plan.architecture import architecture
from pe_rlhf_jax.plan.plan import GIB, STAGES, plan
from pe_rlhf_jax.plan.suggest import suggest
from pe_rlhf_jax.plan.table import as_json, show
from pe_rlhf_jax.plan.topology import LOCAL, describe

TRIES = 8
"""Changes that `--suggest` compiles at most; each takes as long as the plan itself."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--config", required=True, type=Path, help="the run's YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a field; may be given several times")
    parser.add_argument(
        "--topology", action="append", metavar="NAME", help=f"v5e:4x4, v5p:8x8x16, ... or `{LOCAL}`, this machine's devices (the default)"
    )
    parser.add_argument("--stage", action="append", choices=STAGES, help="plan this stage alone; may be given several times")
    parser.add_argument("--model-config", type=Path, metavar="FILE", help="Hugging Face's config.json, where model.source is not at hand")
    parser.add_argument("--suggest", action="store_true", help="search mesh and micro-batch that fit the chips of --topology, by compiling")
    parser.add_argument("--json", action="store_true", help="print JSON, one object a topology, in place of tables")


def run(arguments: argparse.Namespace, console: Console) -> bool:
    """Plans and prints; whether everything fits (True where nobody can tell). Raises this package's errors."""
    names = arguments.topology or [LOCAL]
    if arguments.suggest and LOCAL in names:
        raise ConfigError(f"--suggest needs --topology: how much memory the devices of `{LOCAL}` have is not known")
    if LOCAL not in names:
        # Only the compiler is wanted: looking for real accelerators takes long where libtpu is installed and there is none.
        jax.config.update("jax_platforms", "cpu")
    config = configuration.load(arguments.config, arguments.set)
    shape = architecture(config.model, arguments.model_config)
    stages = arguments.stage or STAGES
    results: list[dict[str, Any]] = []
    fits = True
    with console.status("") as status:

        def tell(text: str) -> None:
            status.update(f"compiling {text}")

        for name in names:
            topology = describe(name)
            found = plan(config, shape, topology, tell, stages)
            result = as_json(found)
            fits &= found.fits is not False
            if not arguments.json:
                show(found, console)
            if arguments.suggest:
                better = suggest(config, shape, topology, found, TRIES, tell, stages)
                result["suggestions"] = [{"set": one.overrides, "hbm": one.plan.hbm, "seconds": one.seconds} for one in better]
                if not arguments.json:
                    _show(better, console)
            results.append(result)
    if arguments.json:
        for result in results:
            console.file.write(json.dumps(result) + "\n")
    return fits


def _show(better: list, console: Console) -> None:
    if not better:
        console.print("nothing that was tried fits: take more chips, or chips with more memory", markup=False)
    for one in better:
        sets = " ".join(f"--set {override}" for override in one.overrides)
        console.print(f"fits in {one.plan.hbm / GIB:.2f} GiB, at most {one.seconds:.3g} s a step of each stage: {sets}", markup=False)
