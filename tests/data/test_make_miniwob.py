"""The generator of screens to click on, with a stand-in for Chromium: the pipe's protocol, clicks in fresh episodes, rows."""

import base64
import json
import stat
import sys

import make_miniwob
import pytest
from tiny_images import encoded, pixels

from pe_rlhf_jax.data.formats import Reader
from pe_rlhf_jax.data.image_processing import ImageProcessing
from pe_rlhf_jax.data.sources import Skipped, read
from pe_rlhf_jax.data.turns import Vision
from pe_rlhf_jax.data.ui_actions import action_match
from pe_rlhf_jax.image_prompt import ImagePrompt

ELEMENTS = [
    {"words": 'button "Ok"', "box": [2.4, 52.5, 30.6, 73.5]},
    {"words": "input_text", "box": [40, 52, 90, 73]},
    {"words": 'p "Some text"', "box": [2, 80, 90, 100]},
]
STAND_IN = f"""#!{sys.executable}
import json, os
left, state = b"", {{"seed": None, "clicked": None}}
shown = {ELEMENTS!r}
picture = {base64.b64encode(encoded(pixels(210, 160))).decode()!r}

def say(**message):
    os.write(4, json.dumps(message).encode() + b"\\0")

while True:
    while b"\\0" not in left:
        more = os.read(3, 7)  # in small pieces
        if not more:
            raise SystemExit
        left += more
    message, _, left = left.partition(b"\\0")
    message = json.loads(message)
    method, parameters, result = message["method"], message["params"], {{}}
    if method == "Target.createTarget":
        result = {{"targetId": "t"}}
    elif method == "Target.attachToTarget":
        result = {{"sessionId": "s"}}
    elif method == "Page.navigate":
        state["seed"] = state["clicked"] = None
    elif method == "Page.captureScreenshot":
        result = {{"data": picture}}
    elif method == "Input.dispatchMouseEvent" and parameters["type"] == "mouseReleased":
        assert message["sessionId"] == "s" and state["seed"] is not None and state["clicked"] is None, "not a fresh episode"
        x, y, boxes = parameters["x"], parameters["y"], [e["box"] for e in shown]
        state["clicked"] = [i for i, (l, t, r, b) in enumerate(boxes) if l <= x < r and t <= y < b]
    elif method == "Runtime.evaluate":
        script = parameters["expression"]
        if "seedrandom" in script:
            state["seed"] = int(script.partition("seedrandom(")[2].partition(")")[0])
            value = f"Click number {{state['seed'] % 2}}." if state["seed"] < 100 else "Click anything."
        elif "querySelectorAll" in script:
            value = shown
        else:
            value = 1.0 if state["clicked"] == [state["seed"] % 2] or state["seed"] >= 100 else -1.0
        result = {{"result": {{"value": value}}}}
    elif method not in ("Page.enable", "Emulation.setDeviceMetricsOverride", "Input.dispatchMouseEvent"):
        say(id=message["id"], error={{"message": "unknown"}})
        continue
    if method == "Page.navigate":
        say(method="Page.frameStartedLoading", params={{}})
    say(id=message["id"], result=result)
    if method == "Page.navigate":
        say(method="Page.loadEventFired", params={{}})
"""

pytestmark = pytest.mark.filterwarnings("ignore:os.fork")  # JAX warns; the child only becomes the browser


@pytest.fixture
def chromium(tmp_path, monkeypatch):
    (tmp_path / "chromium").write_text(STAND_IN)
    (tmp_path / "chromium").chmod((tmp_path / "chromium").stat().st_mode | stat.S_IEXEC)
    monkeypatch.setattr(make_miniwob, "pages", lambda folder: tmp_path)
    return str(tmp_path / "chromium")


def test_screens_become_rows_that_the_pipeline_reads(chromium, tmp_path, tokenizer):
    folder = tmp_path / "made"
    make_miniwob.make(folder, screens=2, first_seed=0, tasks=["click-button"], chromium=chromium)
    rows = [json.loads(line) for line in (folder / "screens.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["correct"], row["chosen"]) for row in rows] == [(0, [0], " click [0]"), (1, [1], " click [1]")]
    assert rows[0]["elements"][0] == {"index": 0, "words": 'button "Ok"', "box": [2, 52, 31, 74]}
    assert rows[0]["prompt"].startswith('Instruction: Click number 0.\nElements:\nbutton "Ok" [0]\ninput_text [1]\n')
    assert rows[0]["prompt"].endswith("\n<image>\nAction:")
    columns = {name: [row[name] for row in rows] for name in ("action", "right_elements")}
    assert action_match(["", ""], [row["chosen"] for row in rows], **columns) == [1, 1]
    assert action_match(["", ""], [row["rejected"] for row in rows], **columns) == [0, 0]
    vision = Vision(ImagePrompt("<image>", "*", 1), ImageProcessing((0, 0, 0), (1, 1, 1), size=(4, 4)))
    file = str(folder / "screens.jsonl")
    for kind in ("sft", "preference", "prompts"):
        found = getattr(Reader(tokenizer, Skipped(), vision=vision), kind)(read(file, Skipped()))
        assert [(row.pictures[0].height, row.pictures[0].width) for row in found] == [(210, 160)] * 2
    boxes = [json.loads(line) for line in (folder / "boxes.jsonl").read_text().splitlines()]
    assert boxes[0]["prompt"].startswith("Instruction: Click number 0.\nElements:\nat [2, 52, 31, 74] [0]\nat [40")
    assert [{**row, "prompt": ""} for row in boxes] == [{**row, "prompt": ""} for row in rows]


def test_screens_that_decide_nothing_or_came_before_are_left_out(chromium, tmp_path, capsys):
    make_miniwob.make(tmp_path / "a", screens=3, first_seed=100, tasks=["click-tab"], chromium=chromium)  # every click is right
    make_miniwob.make(tmp_path / "b", screens=3, first_seed=0, tasks=["click-tab"], chromium=chromium)  # two instructions, one picture
    make_miniwob.make(tmp_path / "c", screens=1, first_seed=0, tasks=["click-tab"], chromium=chromium, apart_from=tmp_path / "b")
    assert [len((tmp_path / name / "screens.jsonl").read_text().splitlines()) for name in "abc"] == [0, 2, 0]
    assert capsys.readouterr().out.splitlines() == [
        "click-tab: 0 screens of 12 episodes",
        "click-tab: 2 screens of 12 episodes",
        "a random element is right in 33.3% of 2 screens",  # one of three
        "click-tab: 0 screens of 4 episodes",
    ]


def test_what_goes_wrong_is_said(chromium, tmp_path):
    browser = make_miniwob.Browser(chromium, str(tmp_path))
    with pytest.raises(RuntimeError, match=r"Chromium refuses Page.print: {'message': 'unknown'}"):
        browser.call("Page.print")
    browser.close()
    with pytest.raises(RuntimeError, match="Chromium ended; does it start by itself"):
        make_miniwob.Browser("/bin/false", str(tmp_path))
