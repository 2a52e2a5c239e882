"""Makes screens to click on: small real web pages with a picture, an instruction, elements, and which clicks are right.

    apt-get install chromium          (or any Chromium; --chromium names it)
    python benchmarks/make_miniwob.py --folder data/miniwob --screens 60
    python benchmarks/make_miniwob.py --folder data/miniwob_held_out --screens 15 --first-seed 1000 --apart-from data/miniwob

The pages are those of the package miniwob (MIT; MiniWoB++), fetched but not imported. Chromium renders them, driven through a pipe by
its own protocol, so neither Selenium nor a driver is needed. A screen is one episode of one task, made by the task's own generator
from a seed. Which elements are right is read from the task itself: each is clicked in a fresh episode of the same seed, and the reward
decides.

Writes `screens.jsonl` and `images/*.png` (160 x 210 pixels): `task`, `seed`, `image`, `instruction`, `elements` (`index`, `words`, `box`
left, top, right, bottom in pixels), `correct`, and as text `prompt`, `completion` (" click [i]"), which is also `chosen`, and `rejected`;
`action` and `right_elements` serve `pe_rlhf_jax.data.ui_actions:action_match`. A row serves SFT, as a preference and as a prompt.
`boxes.jsonl` has the same screens with prompts in which elements are boxes without words, so that only the picture says what they are.
In a prompt an element's index stands behind it: the answer is what follows the words that the instruction names. Before them, and with the
boxes beside, a small model learned to find it far more slowly.
Screens without a right or without a wrong element, and screens that came before, are left out. Other seeds (--first-seed) make screens to
hold out; --apart-from leaves out those of another folder, because some tasks draw few different screens. It takes about two seconds a
screen on a 2-core machine.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import random
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from pe_rlhf_jax import package

PACKAGE = "miniwob==1.1.0"
WIDTH, HEIGHT = 160, 210
FILES = ("screens", "boxes")
TASKS = (
    "click-button",
    "click-color",
    "click-dialog",
    "click-dialog-2",
    "click-link",
    "click-shape",
    "click-tab",
    "click-test-2",
    "click-widget",
    "count-shape",
    "count-sides",
    "identify-shape",
)
"""Tasks that one click decides."""

# Starts the episode of a seed; nothing times out.
START = """new Promise(done => {
  core.EPISODE_MAX_TIME = 1e9; Math.seedrandom(%d); core.startEpisodeReal(); setTimeout(() => done(core.getUtterance()), 100);
})"""
# What can be clicked on: elements that hold no others or a text of their own, as they are shown.
ELEMENTS = """(() => {
  const apart = '#query, #reward-display, #sync-task-cover, #click-canvas', found = [];
  for (const e of document.body.querySelectorAll('*')) {
    const tag = e.tagName.toLowerCase(), box = e.getBoundingClientRect(), style = getComputedStyle(e);
    const own = [...e.childNodes].some(n => n instanceof Text && n.data.trim()) && !(parseFloat(style.textIndent) < 0);
    if (e.closest(apart) || ['script', 'style', 'br', 'option', 'defs'].includes(tag) || (e.children.length && !own)) continue;
    if (['area', 'wrap'].includes(e.id) || !box.width || !box.height || style.visibility === 'hidden') continue;
    const sides = [box.left, box.top, box.right, box.bottom];
    if (sides[0] < 0 || sides[1] < 50 || sides[2] > 160 || sides[3] > 210) continue;
    const text = (tag === 'textarea' ? e.value : e.textContent).replace(/\\s+/g, ' ').trim();
    const plain = ['rgba(0, 0, 0, 0)', 'rgb(255, 255, 255)'].includes(style.backgroundColor);
    if (tag === 'div' && !text && plain) continue;
    const colour = tag === 'div' && !text ? ' ' + style.backgroundColor.replace(/ /g, '') : '';
    found.push({words: (tag === 'input' ? 'input_' + e.type : tag) + (text ? ' "' + text + '"' : colour), box: sides});
  }
  return found;
})()"""
REWARD = "WOB_DONE_GLOBAL ? WOB_RAW_REWARD_GLOBAL : 0"


_ENDED = "Chromium ended; does it start by itself with --headless?"


class Browser:
    """A Chromium of our own, spoken to in its DevTools protocol through a pipe: messages of JSON, each ended by a zero byte."""

    def __init__(self, chromium: str, profile: str):
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        flags = ["--headless", "--remote-debugging-pipe", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        flags += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to sandbox for root

        def place() -> None:  # it reads from descriptor 3 and writes to 4
            ours = os.dup(to_read), os.dup(to_write)
            for theirs, descriptor in zip((3, 4), ours, strict=True):
                os.dup2(descriptor, theirs)

        self._process = subprocess.Popen(
            [chromium, *flags, "about:blank"],
            preexec_fn=place,
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._left, self._count, self._session = b"", 0, ""
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            self.call("Page.enable")
            # Larger than the task, or the page would scroll to what gets the focus; the counters stand beside the task then.
            self.call("Emulation.setDeviceMetricsOverride", width=4 * WIDTH, height=2 * HEIGHT, deviceScaleFactor=1, mobile=False)
        except BaseException:
            self.close()
            raise

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the protocol."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters} | ({"sessionId": self._session} if self._session else {})
        try:
            os.write(self._write, json.dumps(message).encode() + b"\0")
        except BrokenPipeError as error:
            raise RuntimeError(_ENDED) from error
        answer = self._wait(lambda found: found.get("id") == self._count)
        if "error" in answer:
            raise RuntimeError(f"Chromium refuses {method}: {answer['error']}")
        return answer["result"]

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self._wait(lambda found: found.get("method") == "Page.loadEventFired")

    def run(self, script: str) -> Any:
        """The value of an expression, awaited."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"the page's script failed: {found['exceptionDetails']}")
        return found["result"].get("value")

    def click(self, x: int, y: int) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self) -> bytes:
        """The task as it is shown, as PNG."""
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": HEIGHT, "scale": 1}
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", clip=clip)["data"])

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._read)
        os.close(self._write)

    def _wait(self, wanted: Any) -> dict[str, Any]:
        while True:
            while b"\0" not in self._left:
                more = os.read(self._read, 1 << 16)
                if not more:
                    raise RuntimeError(_ENDED)
                self._left += more
            message, _, self._left = self._left.partition(b"\0")
            if wanted(found := json.loads(message)):
                return found


def screen(browser: Browser, address: str, seed: int) -> dict[str, Any]:
    """One episode: instruction, picture, elements, and which of them the task rewards."""

    def start() -> str:
        browser.open(address)
        return browser.run(START % seed)

    instruction = start()
    elements = [{**element, "box": [round(side) for side in element["box"]]} for element in browser.run(ELEMENTS)]
    picture = browser.picture()
    correct = []
    for index, element in enumerate(elements):
        if index:  # the first click may use the episode that was looked at
            start()
        left, top, right, bottom = element["box"]
        browser.click((left + right) // 2, (top + bottom) // 2)
        if browser.run(REWARD) > 0:
            correct.append(index)
    return {"instruction": instruction, "picture": picture, "elements": elements, "correct": correct}


def rows(task: str, seed: int, found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A screen as the row of each file; no rows where no element is right, or none wrong."""
    elements = [{"index": i, **element} for i, element in enumerate(found["elements"])]
    correct = found["correct"]
    wrong = [element["index"] for element in elements if element["index"] not in correct]
    if not correct or not wrong:
        return {}
    right_click, wrong_click = f" click [{correct[0]}]", f" click [{random.Random(f'{task}:{seed}').choice(wrong)}]"
    screen = {
        "task": task,
        "seed": seed,
        "image": f"images/{task}-{seed}.png",
        "instruction": found["instruction"],
        "elements": elements,
        "correct": correct,
        "prompt": _prompt(found["instruction"], [f"{e['words']} [{e['index']}]" for e in elements]),
        "completion": right_click,
        "chosen": right_click,
        "rejected": wrong_click,
        "action": right_click.strip(),
        "right_elements": correct,
    }
    boxes = screen | {"prompt": _prompt(found["instruction"], [f"at {e['box']} [{e['index']}]" for e in elements])}
    return {"screens": screen, "boxes": boxes}


def _prompt(instruction: str, elements: list[str]) -> str:
    return "\n".join([f"Instruction: {instruction}", "Elements:", *elements, "<image>", "Action:"])


def identity(picture: bytes, instruction: str) -> str:
    """Equal screens have equal ones."""
    return hashlib.sha256(picture + instruction.encode()).hexdigest()


def known(folder: Path) -> set[str]:
    """Identities of a folder's screens."""
    rows = map(json.loads, (folder / "screens.jsonl").read_text(encoding="utf-8").splitlines())
    return {identity((folder / row["image"]).read_bytes(), row["instruction"]) for row in rows}


def write(folder: Path, written: dict[str, dict[str, Any]]) -> None:
    """Appends the rows to their files."""
    for name, row in written.items():
        with open(folder / f"{name}.jsonl", "a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")


def pages(folder: Path) -> Path:
    """The folder of the tasks' pages, unpacked from the package."""
    for name, content in package.read_members(package.fetch_package(PACKAGE), "miniwob/html/*").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder / "miniwob" / "html" / "miniwob"


def make(folder: Path, screens: int, first_seed: int, tasks: list[str], chromium: str, apart_from: Path | None = None) -> None:
    """Writes the rows of the tasks, without screens of the folder `apart_from`; says how many there are and what chance gets."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / f"{name}.jsonl").write_text("")
    seen = set() if apart_from is None else known(apart_from)
    chances: list[float] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        root = pages(Path(place) / "pages")
        browser = Browser(chromium, f"{place}/profile")
        try:
            for task in tasks:
                made, seed = 0, first_seed
                while made < screens and seed < first_seed + 4 * screens:
                    found = screen(browser, (root / f"{task}.html").as_uri(), seed)
                    same = identity(found["picture"], found["instruction"])
                    written = rows(task, seed, found)
                    if written and same not in seen:
                        (folder / written["screens"]["image"]).write_bytes(found["picture"])
                        write(folder, written)
                        chances.append(len(written["screens"]["correct"]) / len(written["screens"]["elements"]))
                        made += 1
                    seen.add(same)
                    seed += 1
                print(f"{task}: {made} screens of {seed - first_seed} episodes", flush=True)
        finally:
            browser.close()
    if chances:
        print(f"a random element is right in {sum(chances) / len(chances):.1%} of {len(chances)} screens")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("data/miniwob"))
    parser.add_argument("--screens", type=int, default=60, help="of each task")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--chromium", default="chromium")
    parser.add_argument("--apart-from", type=Path, help="a folder whose screens are not to be made again")
    given = parser.parse_args()
    make(given.folder, given.screens, given.first_seed, given.tasks, given.chromium, given.apart_from)
