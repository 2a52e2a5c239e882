"""Checkpoints of a run: what training changes, the data position and the controllers; never the backbone.

Layout: `checkpoints/<stage>/<step>/` holds `state/` (the arrays, written by Orbax), `meta.json` (everything else) and
`SHA256SUMS` (every other file's hash; `sha256sum -c SHA256SUMS` checks it by hand). A checkpoint is made under a hidden name
and gets its own by one rename, so a kill at any instant leaves the old or the new one. Reading checks the hashes first: a file
that a disk, a copy or a power cut damaged is never restored. Object stores (`gs://`) have no rename of folders; there,
`SHA256SUMS` is written last, and a folder without it is no checkpoint. Saved again, a step is gone there until it is whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from pe_rlhf_jax import hosts
from pe_rlhf_jax.files import is_remote, sync, sync_tree
from pe_rlhf_jax.types import PyTree

log = logging.getLogger(__name__)

KEPT = 2  # newest ones: if the last is found damaged, there is one before it
MANIFEST = "SHA256SUMS"
SAVING, REPLACED = ".saving-", ".replaced-"  # + step: not finished yet; the old one while a step is saved anew


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or not read as what was asked for; the message says where and what to do."""


class _Damaged(CheckpointError):
    """Files are missing or differ from what was written; an older checkpoint may serve."""


class Store:
    """The checkpoints of one run; the processes of one run write, others may read meanwhile.

    Of several processes every one writes and reads its own parts of the arrays, and the first does and decides all the rest: all call
    `save`, `restore`, `latest`, `best`, `meta` and `fingerprint` together.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = epath.Path(folder if is_remote(folder) else Path(folder).absolute())
        self._remote = is_remote(self.folder)
        self._arrays = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())  # the synchronous one: no threads stay behind
        self._damaged: set[tuple[str, int]] = set()
        self._leftovers_removed = False

    def save(self, stage: str, step: int, state: PyTree, meta: dict[str, Any], metric: float | None = None) -> None:
        """Write the checkpoint of `step`, replacing one of the same step; then keep the newest two and the stage's best.

        Args:
            state: arrays in any tree (JAX, sharded or not, or NumPy); none may have size 0.
            meta: what JSON can hold.
            metric: higher is better; not finite counts as none.

        Raises:
            CheckpointError: nothing was written (a full disk, say); the checkpoints that were there are untouched.
        """
        parent = self.folder / stage
        unfinished = parent / (str(step) if self._remote else f"{SAVING}{step}")
        leaves = _named_leaves(state)
        content = {"meta": meta, "metric": metric if metric is not None and math.isfinite(metric) else None}
        there = "unknown"
        try:
            there = hosts.once(lambda: _listed(self._steps(stage)))
            hosts.once(lambda: self._begin(unfinished, leaves))
            if leaves:
                self._arrays.save(unfinished / "state", args=ocp.args.PyTreeSave(leaves))
            hosts.once(lambda: self._finish(parent, step, unfinished, content))
        except Exception as error:
            if hosts.first():
                _remove(unfinished)
            raise CheckpointError(
                f"could not save step {step} of stage {stage!r} under {parent}: {error}\n"
                f"The checkpoints already there ({there}) are untouched. Make room or give access, then start again."
            ) from error
        hosts.once(lambda: self._tidy(stage, step))

    def _begin(self, unfinished: epath.Path, leaves: dict[str, Any]) -> None:
        """Makes room for a new checkpoint."""
        if not self._leftovers_removed:
            self._remove_leftovers()
            self._leftovers_removed = True
        if self._remote:  # where it has its name from the beginning, and an old one may be in its place
            _remove(unfinished)
        unfinished.mkdir(parents=True, exist_ok=True)
        _check_space(unfinished, leaves)

    def _finish(self, parent: epath.Path, step: int, unfinished: epath.Path, content: dict[str, Any]) -> None:
        """Gives the checkpoint, whose arrays are written, the rest of its files and its name."""
        target, replaced = parent / str(step), parent / f"{REPLACED}{step}"
        (unfinished / "meta.json").write_text(json.dumps(content, indent=1))
        (unfinished / MANIFEST).write_text(_manifest(unfinished))
        if self._remote:
            return
        # On the disk before it gets its name, and the name before older ones are deleted: a power cut finds one of them whole.
        sync_tree(Path(unfinished))
        if target.exists():
            _remove(replaced)
            target.rename(replaced)
        unfinished.rename(target)
        sync(Path(parent))

    def _tidy(self, stage: str, step: int) -> None:
        """Deletes what the checkpoint of this step makes needless."""
        self._damaged.discard((stage, step))
        _remove(self.folder / stage / f"{REPLACED}{step}")
        self._delete_all_but_kept(stage, step)

    def latest(self, stage: str) -> int | None:
        """Step of the stage's newest checkpoint, or None; should that be damaged, `restore` gives one before it."""
        return hosts.once(lambda: max(self._steps(stage), default=None))

    def best(self, stage: str) -> int | None:
        """Step of the undamaged checkpoint with the highest metric, the earliest of equals; None if none has one."""
        return hosts.once(lambda: self._best([step for step in self._steps(stage) if self._is_good(stage, step)], stage))

    def restore(self, stage: str, like: PyTree, step: int | None = None) -> tuple[PyTree, dict[str, Any]]:
        """Read the checkpoint of `step`, or the newest good one; returns the state, identical to the bit, and its meta.

        Args:
            like: tree of arrays or `jax.ShapeDtypeStruct` with the wanted structure, shapes and dtypes. A leaf comes back
                with the sharding it has here, whatever it was saved with; as NumPy where it is NumPy here; uncommitted on the
                default device otherwise.

        Raises:
            CheckpointError: there is none; all, or that of `step`, are damaged; or `like` differs (the leaf is named).
        """
        step, meta = hosts.once(lambda: self._find(stage, step))
        return self._read_arrays(self._folder_of(stage, step), like), meta

    def meta(self, stage: str, step: int | None = None) -> dict[str, Any]:
        """The meta of the checkpoint of `step`, or of the newest good one. Raises CheckpointError like `restore`."""
        return hosts.once(lambda: self._find(stage, step))[1]

    def fingerprint(self, stage: str) -> str | None:
        """SHA-256 of the `SHA256SUMS` of the stage's newest checkpoint; None if there is none, or it cannot be read."""
        return hosts.once(lambda: self._fingerprint(stage))

    def _fingerprint(self, stage: str) -> str | None:
        try:
            return hashlib.sha256((self._folder_of(stage, max(self._steps(stage))) / MANIFEST).read_bytes()).hexdigest()
        except Exception:  # clients of object stores have errors of their own
            return None

    def _folder_of(self, stage: str, step: int) -> epath.Path:
        folder = self.folder / stage / str(step)
        replaced = folder.parent / f"{REPLACED}{step}"
        # A kill between the two renames of a replacement leaves the old one under its other name: it still counts.
        return replaced if replaced.exists() and not folder.exists() else folder

    def _steps(self, stage: str) -> list[int]:
        folder = self.folder / stage
        children = list(folder.iterdir()) if folder.exists() else []
        if self._remote:
            return sorted(int(child.name) for child in children if child.name.isdecimal() and (child / MANIFEST).exists())
        names = [child.name.removeprefix(REPLACED) for child in children]
        return sorted({int(name) for name in names if name.isdecimal()})

    def _find(self, stage: str, step: int | None) -> tuple[int, dict[str, Any]]:
        """The newest good step (or `step`, which must be good) and its meta."""
        steps = self._steps(stage)
        if not steps or (step is not None and step not in steps):
            wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise CheckpointError(f"{wanted} of stage {stage!r} in {self.folder / stage}; there are: {_listed(steps)}")
        problems = []
        for candidate in [step] if step is not None else reversed(steps):
            try:
                meta = self._read_meta(stage, candidate)
            except _Damaged as error:
                problems.append(str(error))
                self._damaged.add((stage, candidate))
                continue
            for problem in problems:
                log.warning("%s; continuing from step %d, the newest good one", problem, candidate)
            return candidate, meta
        parent = self.folder / stage
        advice = f"No good checkpoint is left there: restore {parent} from a copy, or delete it, and start again."
        raise CheckpointError("\n".join([*problems, advice]))

    def _read_meta(self, stage: str, step: int) -> dict[str, Any]:
        """Check every file of the checkpoint; return its meta. Raises _Damaged naming the first bad file."""
        folder = self._folder_of(stage, step)
        try:
            expected, found = (folder / MANIFEST).read_text(), _manifest(folder)
            if expected != found:
                differing = set(expected.splitlines()) ^ set(found.splitlines())
                bad = min((line.partition("  ")[2] for line in differing), default=MANIFEST)
                raise _Damaged(f"checkpoint {folder} is damaged: {bad} is not what was written")
            return json.loads((folder / "meta.json").read_text())["meta"]
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, not JSON
            raise _Damaged(f"checkpoint {folder} is damaged: {error}") from error

    def _is_good(self, stage: str, step: int) -> bool:
        try:
            self._read_meta(stage, step)
        except _Damaged as error:
            log.warning("%s", error)
            return False
        return True

    def _best(self, steps: list[int], stage: str) -> int | None:
        metrics = {}
        for step in steps:
            try:
                metric = json.loads((self._folder_of(stage, step) / "meta.json").read_text())["metric"]
            except (OSError, ValueError, KeyError, TypeError):
                continue  # damaged: never the best
            if metric is not None:
                metrics[step] = metric
        return max(metrics, key=lambda step: (metrics[step], -step), default=None)

    def _delete_all_but_kept(self, stage: str, saved: int) -> None:
        steps = [step for step in self._steps(stage) if (stage, step) not in self._damaged]
        # Beside the one just saved, so that saving a step below existing ones cannot delete it at once.
        kept = {saved, self._best(steps, stage), *[step for step in steps if step != saved][-(KEPT - 1) :]}
        for step in set(self._steps(stage)) - kept:
            _remove(self._folder_of(stage, step))
            self._damaged.discard((stage, step))

    def _remove_leftovers(self) -> None:
        """Remove what a kill left behind: unfinished checkpoints, and replaced ones whose replacement arrived."""
        if not self.folder.exists():
            return
        for child in [child for stage in self.folder.iterdir() if stage.is_dir() for child in stage.iterdir()]:
            finished = child.parent / child.name.removeprefix(REPLACED)
            if self._remote:
                if child.name.isdecimal() and not (child / MANIFEST).exists():
                    _remove(child)
            elif child.name.startswith(REPLACED) and not finished.exists():
                child.rename(finished)
            elif child.name.startswith((SAVING, REPLACED)):
                _remove(child)

    def _read_arrays(self, folder: epath.Path, like: PyTree) -> PyTree:
        wanted = _named_leaves(like)
        if not wanted and not (folder / "state").exists():
            return like
        saved = self._arrays.metadata(folder / "state").item_metadata.tree if (folder / "state").exists() else {}
        problems = [f"{name} is expected but was not saved" for name in wanted if name not in saved]
        problems += [f"{name} was saved but is not expected" for name in saved if name not in wanted]
        for name in wanted.keys() & saved.keys():
            expected, found = (f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" for leaf in (wanted[name], saved[name]))
            if expected != found:
                problems.append(f"{name} was saved as {found}, expected {expected}")
        if problems:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise CheckpointError(
                f"checkpoint {folder} does not fit: {'; '.join(sorted(problems)[:5])}{more}. "
                "It was saved with another configuration: use that one, or start the stage anew."
            )
        restore_args = {name: _restore_args(leaf) for name, leaf in wanted.items()}
        try:
            arrays = self._arrays.restore(folder / "state", args=ocp.args.PyTreeRestore(restore_args=restore_args))
        except Exception as error:
            raise CheckpointError(f"checkpoint {folder} could not be read: {error}") from error
        leaves = [_placed(arrays[name], leaf) for name, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by their path, in the tree's order: node types (Optax's named tuples) need not be known to Orbax."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in named:
            raise CheckpointError(f"two leaves of the state are both called {name}; rename one")
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            kind = type(leaf).__name__
            raise CheckpointError(f"leaf {name} of the state is {kind}, expected an array; put it into `meta`")
        named[name] = leaf
    return named


def _check_space(folder: epath.Path, leaves: dict[str, Any]) -> None:
    """Refuse early: Orbax on a full disk fails as it should, but under hundreds of lines of its threads' tracebacks."""
    if is_remote(folder):
        return
    needed = sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in leaves.values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"it may need {needed / 1e6:.0f} MB, but {free / 1e6:.0f} MB are free on that disk")


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """The sharding asked for; None for NumPy, an abstract leaf without one, and an array that JAX may still move."""
    return None if getattr(leaf, "committed", True) is False else getattr(leaf, "sharding", None)


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    sharding = _sharding(leaf)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _placed(array: Any, leaf: Any) -> Any:
    return array if _sharding(leaf) is not None or isinstance(leaf, np.ndarray | np.generic) else jnp.array(array)


def _manifest(folder: epath.Path) -> str:
    """The content that SHA256SUMS must have: a line `hash  path` for every other file."""
    lines = []
    for name, file in sorted((name, file) for name, file in _files(folder) if name != MANIFEST):
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        lines.append(f"{digest.hexdigest()}  {name}\n")
    return "".join(lines)


def _files(folder: epath.Path, prefix: str = "") -> Iterator[tuple[str, epath.Path]]:
    for child in folder.iterdir():
        if child.is_dir():
            yield from _files(child, f"{prefix}{child.name}/")
        else:
            yield f"{prefix}{child.name}", child


def _remove(folder: epath.Path) -> None:
    """Delete a folder if it is there; one that resists is only reported, since no good checkpoint depends on it.

    In an object store, where files go one by one, that which says that it is a checkpoint goes first.
    """
    try:
        if is_remote(folder):
            (folder / MANIFEST).unlink(missing_ok=True)
        if folder.exists():
            folder.rmtree()
    except Exception as error:  # clients of object stores have errors of their own
        log.warning("could not delete %s: %s", folder, error)


def _listed(steps: list[int]) -> str:
    return ", ".join(f"step {step}" for step in steps) or "none"
