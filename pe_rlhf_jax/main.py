"""Command line.

    python -m pe_rlhf_jax.main --config configs/quickstart.yaml [--set section.field=value ...] [--restart]
    python -m pe_rlhf_jax.main generate --run runs/quickstart --prompt "Film review: The acting is"
    python -m pe_rlhf_jax.main report runs/quickstart
    python -m pe_rlhf_jax.main plan --config configs/llama3_8b_reward.yaml --topology v5e:4x4

On several hosts the same command runs on each; `hosts` says how they find each other.

Exit codes: 0 done; 1 a plan that does not fit, another process of the run was lost, the store of its folder is out of reach, or an error
that nobody foresaw, with its traceback; 2 an error that the message explains; 75 stopped by SIGTERM, Ctrl-C or the notice that a TPU VM
is taken away, with everything saved.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax import hosts, maintenance, run_folder
from pe_rlhf_jax.answering import Answerer, chat, show
from pe_rlhf_jax.checkpoint.peft_import import AdapterError
from pe_rlhf_jax.checkpoint.store import CheckpointError
from pe_rlhf_jax.checkpoint.weights import WeightsError
from pe_rlhf_jax.config import Config, ConfigError
from pe_rlhf_jax.data import DataError
from pe_rlhf_jax.devices import skip_missing_tpu
from pe_rlhf_jax.files import is_remote, passing, path_of
from pe_rlhf_jax.package import PackageError, cache_folder
from pe_rlhf_jax.plan import command as planning
from pe_rlhf_jax.report import html, samples
from pe_rlhf_jax.report.progress import Progress
from pe_rlhf_jax.run import Run, Stopped
from pe_rlhf_jax.training.functions import FunctionError
from pe_rlhf_jax.training.step import NonFiniteError

STOPPED = 75
"""Exit code of a run that was stopped and can be continued (EX_TEMPFAIL)."""
FULL = """out of memory: {}
Compute fewer rows at once (sft.micro_batch_size, reward.micro_batch_size, rl.micro_batch_size, evaluate.batch_size), or logits of fewer \
tokens (model.logprob_chunk), recompute activations (model.remat: full), sample fewer responses at once (rl.sampling.max_num_seqs), copy \
no weights for that (rl.sampling.join_weights: false), or spread the model over more devices (mesh.fsdp); a run may be continued with \
these changed. `plan` says beforehand what fits."""


REASONS = ("", signal.SIGTERM.name, signal.SIGINT.name, *maintenance.NOTICES.values())
"""Why a run stops early; processes tell each other the number."""


class StopSignal:
    """Turns the first SIGTERM or Ctrl-C into a flag that is looked at between steps; a second Ctrl-C acts at once."""

    def __init__(self) -> None:
        self._reason = 0

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        self.ask(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def ask(self, reason: str) -> None:
        """Sets the flag for one of `REASONS`; from any thread."""
        self._reason = max(self._reason, REASONS.index(reason))

    def asked(self) -> str | None:
        """Why one of the run's processes is to stop; all of them ask at the same time and get the same answer."""
        return REASONS[int(hosts.largest(self._reason))] or None


def run(config: Config, restart: bool = False, console: Console | None = None, command: str | None = None) -> dict[str, Any]:
    """Runs or continues a configuration; returns its summary. Raises Stopped if one of `REASONS` ended it early.

    `command` is what the user typed, which the model cards repeat.
    """
    if config.run.compilation_cache and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(compiled_programs(config)))
    hosts.start(config.run.host_timeout_s)
    hosts.same({"configuration": configuration.dump(config).encode()})
    progress = Progress(console if hosts.first() else Console(quiet=True))
    with StopSignal() as stop, maintenance.watched(stop.ask), run_folder.opened(config, restart) as folder:
        this = Run(config, folder, progress, stop, command)
        try:
            with jax.set_mesh(this.context.mesh):
                summary = this.execute()
        finally:
            this.close()
        progress.note(f"report: {folder / 'report.html'}")
        return summary


def compiled_programs(config: Config) -> Path:
    """Where compiled programs are kept: with the user's other files, or beside runs that are in an object store, where new hosts find them
    and all hosts of a run, of which the first alone writes them.
    """
    folder = path_of(config.run.folder)
    return folder / ".compiled" if is_remote(folder) else cache_folder() / "compiled"


def cli(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    parser = argparse.ArgumentParser(prog="pe-rlhf", description="Parameter-efficient RLHF in JAX.")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run or continue a configuration (the default command)")
    running.add_argument("--config", required=True, help="YAML file; configs/REFERENCE.md lists every field")
    running.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a field; may be given several times")
    running.add_argument("--restart", action="store_true", help="start anew; an existing run folder is moved aside")
    reporting = commands.add_parser("report", help="rebuild report.html of a run folder")
    reporting.add_argument("folder", type=_place)
    generating = commands.add_parser(
        "generate", help="answer prompts with a run's policy, beside its reference, or before RL with its SFT model"
    )
    generating.add_argument("--run", required=True, type=_place, metavar="FOLDER", help="run folder")
    generating.add_argument("--prompt", action="append", help="several are answered in a table; without one, a conversation begins")
    generating.add_argument(
        "--image", action="append", default=[], type=_place, metavar="FILE", help="a picture that every prompt, or a conversation, shows"
    )
    generating.add_argument("--temperature", type=float, help="0 is greedy; the run's rl.sampling by default, and so below")
    generating.add_argument("--top-k", type=int)
    generating.add_argument("--top-p", type=float)
    generating.add_argument("--max-new-tokens", type=int)
    generating.add_argument("--seed", type=int, help="other answers")
    planning.add_arguments(
        commands.add_parser("plan", help="memory, FLOPs and traffic of a configuration on any topology, before renting it")
    )
    skip_missing_tpu()
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for what it has no sign for
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv.insert(0, "run")
    arguments = parser.parse_args(argv)
    console = Console()
    code = 0
    errors = (ConfigError, DataError, WeightsError, PackageError, CheckpointError, NonFiniteError, FunctionError, AdapterError, OSError)
    try:
        if arguments.command == "report":
            run_folder.config_file(arguments.folder)
            console.print(f"report: {html.build(arguments.folder)}", markup=False, soft_wrap=True)
        elif arguments.command == "plan":
            code = 0 if planning.run(arguments, console) else 1
        elif arguments.command == "generate":
            changes = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p", "max_new_tokens")}
            hosts.start(run_folder.read_config(arguments.run).run.host_timeout_s)
            shown = console if hosts.first() else Console(quiet=True)
            answerer = Answerer(arguments.run, shown, changes, arguments.seed)
            if arguments.prompt and len(arguments.prompt) == 1:
                shown.print(samples.visible(arguments.prompt[0]), style="dim", markup=False, highlight=False, soft_wrap=True)
                show(shown, answerer.stream(arguments.prompt[0], arguments.image))
            elif arguments.prompt:  # all at once
                samples.show(shown, answerer(arguments.prompt, arguments.image), len(arguments.prompt))
            else:
                chat(answerer, lambda: hosts.once(lambda: console.input("[bold]you: [/]")), shown, arguments.image)
        else:
            run(configuration.load(arguments.config, arguments.set), arguments.restart, console, shlex.join(["pe-rlhf", *argv]))
    except Stopped as reason:
        console.print(f"Stopped by {reason}; everything is saved. Run the same command again to continue.", markup=False)
        code = STOPPED
    except (Exception, KeyboardInterrupt) as error:
        lost, full = hosts.several() and hosts.is_loss(error), _out_of_memory(error)
        away = passing(error)
        code = 2 if (isinstance(error, errors) or full) and not (lost or away) else 1
        if lost or away or code == 2:
            text = f"{hosts.LOST}\n{error}" if lost else FULL.format(str(error).partition("\n")[0]) if full else str(error)
            text += "\nThe same command goes on once that can be reached again." if away and not lost else ""
            console.print(f"error: {text}", markup=False, style="red", soft_wrap=True)  # a path stays in one piece
        elif hosts.several():
            traceback.print_exc()
        else:
            raise
    hosts.leave(code)
    return code


def _place(text: str) -> Path:
    """`path_of`, whose error argparse shows."""
    try:
        return path_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error))


if __name__ == "__main__":
    sys.exit(cli())
