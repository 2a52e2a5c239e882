"""AndroidControl in its original records (Li et al. 2024, "On the Effects of Data Scale on UI Control Agents").

A source is FOLDER:SPLIT, such as `data/android_control:train`. The folder holds the gzipped TFRecord files `android_control-*`, and
`splits.json` (and perhaps `test_subsplits.json`), which say which episodes make up a split. Each record is an episode: goal, step
instructions, actions, screenshots, accessibility trees.

The files cannot be read from the middle, and their screenshots do not fit into memory; so each file is unpacked once into the cache.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import random
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pe_rlhf_jax import protobuf
from pe_rlhf_jax.data import images, tfrecord
from pe_rlhf_jax.data.accessibility import Element, elements
from pe_rlhf_jax.data.sources import BadRow, DataError, Row, Skipped
from pe_rlhf_jax.data.ui_actions import Action, from_android_control, right_elements, wrong_action
from pe_rlhf_jax.package import cache_folder

FORM = "FOLDER:SPLIT, such as data/android_control:train"
SPLITS = ("splits.json", "test_subsplits.json")
FORMAT_VERSION = 2
"""Of what is unpacked; another one is unpacked anew."""

Values = dict[str, Any]


def read(source: str, skipped: Skipped) -> Iterator[Row]:
    """One row a step, in the order of the files: instruction, screenshot, elements and the right action.

    `others` gives the right actions of all steps, from which `_wrong` draws; it reads the files once more when it is first called.

    Raises:
        DataError: the source has another form, a file is missing or damaged; or an episode is, and bad rows are not skipped.
    """
    folder, colon, split = source.rpartition(":")
    if not colon or not folder or not split:
        raise DataError(f"{source}: expected {FORM}")
    root = Path(folder).expanduser()
    wanted = _split(root, split)
    files = sorted(path for path in root.glob("android_control-*") if path.is_file())
    if not files:
        raise DataError(f"{root}: expected the files android_control-*, found none (from {Path.cwd()})")

    @functools.cache
    def others() -> list[Action]:
        # The actions of all steps are kept, but not their elements, of which there are millions.
        return [step["right"] for file in files for _, step in _steps(file, wanted, Skipped("skip"))]

    for place, step in (step for file in files for step in _steps(file, wanted, skipped)):
        yield Row({**step, "others": others}, place)


def sft(row: Values) -> list[Values]:
    """The step, and its action."""
    return [{**_step(row), "completion": f" {row['right']}"}]


def label(row: Values) -> list[Values]:
    """The right action, labelled 1, and a wrong one, labelled 0."""
    right, wrong = [{**_step(row), "completion": f" {row['right']}", "label": 1}], _wrong(row)
    return right + ([] if wrong is None else [{**_step(row), "completion": f" {wrong}", "label": 0}])


def preference(row: Values) -> list[Values]:
    """The same two actions as a pair; no row where no wrong one was found."""
    wrong = _wrong(row)
    return [] if wrong is None else [{**_step(row), "chosen": f" {row['right']}", "rejected": f" {wrong}"}]


def prompts(row: Values) -> list[Values]:
    """The step; `action` and `right_elements` serve `pe_rlhf_jax.data.ui_actions:action_match`."""
    return [{**_step(row), "action": str(row["right"]), "right_elements": right_elements(row["right"], row["elements"])}]


def _wrong(row: Values) -> Action | None:
    """A wrong action, drawn by episode and step; None where none was found."""
    found = wrong_action(row["right"], row["elements"], row["others"](), random.Random(f"{row['episode_id']}:{row['step']}"))
    return found and found[1]


def _step(row: Values) -> Values:
    shown = "".join(f"[{index}] {element}\n" for index, element in enumerate(row["elements"]))
    prompt = f"Goal: {row['goal']}\nStep: {row['instruction']}\nElements:\n{shown}Action:"
    return {"prompt": prompt, "image": row["image"], "episode_id": row["episode_id"]}


def _split(root: Path, split: str) -> set[int]:
    known: dict[str, Any] = {}
    for name in SPLITS:
        if (root / name).is_file():
            try:
                known |= json.loads((root / name).read_text(encoding="utf-8"))
            except (OSError, ValueError, TypeError) as error:
                raise DataError(f"{root / name}: expected an object of split -> list of episodes, found {error}") from error
    if not known:
        raise DataError(f"{root / SPLITS[0]}: no such file; it says which episodes make up a split (from {Path.cwd()})")
    if not isinstance(known.get(split), list):
        raise DataError(f"{root}: expected one of the splits {', '.join(known)}, found {split!r}")
    return set(known[split])


def _steps(file: Path, wanted: set[int], skipped: Skipped) -> Iterator[tuple[str, Values]]:
    """The steps of the wanted episodes of a file, with their places."""
    folder = _unpacked(file)
    with open(folder / "episodes.jsonl", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            episode, place = json.loads(line), f"{file}:{number}"
            if "episode_id" in episode and episode["episode_id"] not in wanted:
                continue
            if "problem" in episode:
                skipped.bad(place, episode["problem"])
                continue
            for index, step in enumerate(episode["steps"]):
                shown = [Element.from_json(element) for element in step["elements"]]
                try:
                    right = from_android_control(step["action"], shown)
                    picture = _picture(folder, file.name, step["image"])
                except BadRow as problem:
                    skipped.bad(place, f"step {index}: {problem}")
                    continue
                yield (
                    place,
                    {
                        "episode_id": episode["episode_id"],
                        "step": index,
                        "goal": episode["goal"],
                        "instruction": step["instruction"],
                        "image": picture,
                        "elements": shown,
                        "right": right,
                    },
                )


def _picture(folder: Path, file: str, name: str) -> images.Picture:
    """A screenshot, which is called the same wherever and whenever its file was unpacked."""
    return dataclasses.replace(images.find(folder / name, None, "image"), label=f"{file}/{name}")


def _unpacked(file: Path) -> Path:
    """The folder with the file's episodes as JSON lines and its screenshots; made at the first call, whole or not at all."""
    state = file.stat()
    identity = repr((FORMAT_VERSION, str(file.resolve()), state.st_size, state.st_mtime_ns))
    target = cache_folder() / "android-control" / f"{file.name}-{hashlib.sha256(identity.encode()).hexdigest()[:20]}"
    if target.is_dir():
        return target
    temporary = target.with_name(f".incoming-{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        with open(temporary / "episodes.jsonl", "w", encoding="utf-8") as lines:
            for number, record in enumerate(tfrecord.records(file)):
                lines.write(json.dumps(_episode(record, number, temporary)) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
        try:
            os.replace(temporary, target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    except OSError as error:
        raise DataError(f"{file}: cannot be unpacked into {target.parent}: {error}. Its screenshots need about the file's size") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _episode(record: bytes, number: int, folder: Path) -> Values:
    """What is kept of an episode; its screenshots are written. Where it has another form, `problem` says so."""
    known: Values = {}
    try:
        values = tfrecord.features(record)
        [known["episode_id"]] = _column(values, "episode_id", int)
        [goal] = _column(values, "goal", bytes)
        screenshots, trees = (_column(values, name, bytes) for name in ("screenshots", "accessibility_trees"))
        # An episode without actions may leave both out.
        actions, instructions = (_column(values, name, bytes) if name in values else [] for name in ("actions", "step_instructions"))
        widths, heights = (_column(values, name, int) for name in ("screenshot_widths", "screenshot_heights"))
        if not len(actions) == len(instructions) == len(screenshots) - 1 == len(trees) - 1 == len(widths) - 1 == len(heights) - 1:
            raise BadRow(
                f"expected one screenshot and tree more than actions and instructions, found {len(screenshots)}, {len(trees)}, "
                f"{len(actions)} and {len(instructions)}"
            )
        steps = []
        for index, (action, instruction) in enumerate(zip(actions, instructions, strict=True)):
            image = f"{number}-{index}.png"
            (folder / image).write_bytes(screenshots[index])
            shown = elements(trees[index], widths[index], heights[index])
            steps.append(
                {
                    "instruction": " ".join(instruction.decode("utf-8").split()),
                    "action": _object(json.loads(action)),
                    "image": image,
                    "elements": [element.to_json() for element in shown],
                }
            )
        return known | {"goal": " ".join(goal.decode("utf-8").split()), "steps": steps}
    except (protobuf.WireError, BadRow, ValueError) as problem:
        return known | {"problem": f"expected an episode of AndroidControl, found another record ({problem})"}


def _object(value: Any) -> Values:
    if not isinstance(value, dict):
        raise BadRow(f"expected `actions` to be JSON objects, found {value!r}")
    return value


def _column(values: tfrecord.Features, name: str, kind: type) -> list[Any]:
    found = values.get(name)
    if found is None or not all(isinstance(value, kind) for value in found):
        raise BadRow(f"expected the feature `{name}` with {'numbers' if kind is int else 'bytes'}, found {'others' if found else 'none'}")
    return list(found)
