"""Plays `gcloud` for tests: writes down its arguments, answers as told, and lets folders play the hosts of a slice.

In the folder of the environment variable FAKE: `calls` gets a JSON list of arguments a line; `answers.json` maps the beginning of a call,
such as "tpu-vm describe", to a list of [exit code, stdout, stderr], taken in turn, the last again and again; `host0`, `host1`, ... are
the hosts' home folders. Calls that no answer is given for succeed; ssh and scp are then done in those folders.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    fake = Path(os.environ["FAKE"])
    with open(fake / "calls", "a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    call = " ".join(arguments).removeprefix("compute tpus ")
    answers = json.loads((fake / "answers.json").read_text())
    for begin, outcomes in answers.items():
        if call.startswith(begin) and outcomes:
            code, out, err = outcomes.pop(0) if len(outcomes) > 1 else outcomes[0]
            (fake / "answers.json").write_text(json.dumps(answers))
            sys.stdout.write(out + "\n" * bool(out))
            sys.stderr.write(err + "\n" * bool(err))
            return code
    flags = dict(argument[2:].split("=", 1) for argument in arguments if argument.startswith("--") and "=" in argument)
    hosts = sorted(fake.glob("host*"))
    if flags.get("worker", "all") != "all":
        hosts = [hosts[int(flags["worker"])]]
    if call.startswith("tpu-vm ssh"):
        return max(
            subprocess.run(["bash", "-c", flags["command"]], cwd=host, env={**os.environ, "HOME": str(host)}).returncode for host in hosts
        )
    if call.startswith("tpu-vm scp"):
        *sources, target = [argument for argument in arguments[4:] if not argument.startswith("--")]
        for host in hosts:
            for source in sources:
                copy(source, host / target.partition(":")[2] if ":" in target else Path(target), host)
    return 0


def copy(source: str, target: Path, host: Path) -> None:
    path = host / source.partition(":")[2] if ":" in source else Path(source)
    if path.is_dir():
        shutil.copytree(path, target / path.name, dirs_exist_ok=True)
    else:
        shutil.copy(path, target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
