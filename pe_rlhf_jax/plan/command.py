"""`pe-rlhf plan`: arguments, and what it prints.

pe-rlhf plan --config configs/llama3_8b_reward.yaml --topology v5e:4x4 --topology v5p:2x2x2 [--suggest | --no-suggest] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from rich.console import Console

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.config import ConfigError
from pe_rlhf_jax.devices import is_nvidia
from pe_rlhf_jax.plan.architecture import architecture
from pe_rlhf_jax.plan.plan import GIB, STAGES, Plan, plan
from pe_rlhf_jax.plan.suggest import Suggestion, suggest
from pe_rlhf_jax.plan.table import as_json, show
from pe_rlhf_jax.plan.topology import LOCAL, describe

TRIES = 14
"""Changes that are compiled at most; each takes as long as the plan itself."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--config", required=True, help="the run's YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a field; may be given several times")
    parser.add_argument(
        "--topology", action="append", metavar="NAME", help=f"v5e:4x4, v5p:8x8x16, ... or `{LOCAL}`, this machine's devices (the default)"
    )
    parser.add_argument("--stage", action="append", choices=STAGES, help="plan this stage alone; may be given several times")
    parser.add_argument("--model-config", type=Path, metavar="FILE", help="Hugging Face's config.json, where model.source is not at hand")
    parser.add_argument(
        "--suggest",
        action=argparse.BooleanOptionalAction,
        help="also where it fits, try what may be faster; or not even where it does not fit, try what would make it fit",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, one object a topology, in place of tables")


def run(arguments: argparse.Namespace, console: Console) -> bool:
    """Plans and prints; whether everything fits (True where nobody can tell). Raises this package's errors."""
    names = arguments.topology or [LOCAL]
    if LOCAL not in names:
        # Only the compiler is wanted: looking for real accelerators takes long where libtpu is installed and there is none.
        jax.config.update("jax_platforms", "cpu")
    elif len(names) > 1 and is_nvidia():
        raise ConfigError(f"programs of this machine's GPUs differ from those of TPUs: plan `{LOCAL}` and the slices by a command each")
    config = configuration.load(arguments.config, arguments.set)
    shape = architecture(config.model, arguments.model_config)
    stages = arguments.stage or STAGES
    messages = Console(stderr=True)
    topologies, plans = list(map(describe, names)), []
    if arguments.suggest and any(topology.usable is None for topology in topologies):
        raise ConfigError(f"--suggest: how much memory the devices of `{LOCAL}` have is not known; name a slice with --topology")
    for topology in topologies:
        with _telling(messages) as tell:
            plans.append((topology, plan(config, shape, topology, tell, stages)))
        if not arguments.json:
            show(plans[-1][1], console)
    for topology, found in plans:
        result = as_json(found)
        if found.usable is not None and (arguments.suggest or (arguments.suggest is None and not found.fits)):
            with _telling(messages) as tell:
                better = suggest(config, shape, topology, found, TRIES, tell, stages)
            result["suggestions"] = [
                {"set": one.overrides, "same_results": one.same_results, "hbm": one.plan.hbm, "seconds": one.plan.seconds} for one in better
            ]
            if not arguments.json:
                _show(better, found, console)
        if arguments.json:
            console.file.write(json.dumps(result) + "\n")
            console.file.flush()
    return all(found.fits is not False for _, found in plans)


@contextlib.contextmanager
def _telling(messages: Console) -> Iterator[Callable[[str], None]]:
    """Says what is being compiled: in a line that changes, or line by line where nobody watches a terminal."""
    with messages.status("") as status:

        def tell(text: str) -> None:
            status.update(f"compiling {text}")
            if not messages.is_terminal:
                messages.print(f"compiling {text}", markup=False, highlight=False, soft_wrap=True)

        yield tell


def _show(better: list[Suggestion], found: Plan, console: Console) -> None:
    """Prints what may be set, one line each, to be copied."""

    def line(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    def seconds(plan: Plan) -> str:
        return f", at most {plan.seconds:.3g} s a step of each stage" if plan.chip else ""  # else there are no published rates

    line("")
    if found.fits:
        line(f"{found.topology} as it is: {found.hbm / GIB:.2f} GiB{seconds(found)}")
    if not better and found.fits:
        line("nothing else that was tried fits")
    if not better and not found.fits:
        line(f"{found.topology}: nothing that was tried fits: take more chips, or chips with more memory")
    for one in better:
        sets = " ".join(f"--set {override}" for override in one.overrides)
        results = "" if one.same_results else ", with other results"
        line(f"{found.topology}: fits in {one.plan.hbm / GIB:.2f} GiB{seconds(one.plan)}{results}: {sets}")
