"""AndroidControl: small files in the original format, read as rows; actions as text, and how they are compared and made wrong."""

import json
import os
import random
from collections import Counter

import numpy as np
import PIL.Image
import pytest
from tiny_android import ACTIONS, SCREEN, SHOWN, crc32c, episode, forest, node, tfrecord
from tiny_data import make_tokenizer
from tiny_images import pixels

from pe_rlhf_jax import protobuf
from pe_rlhf_jax.config import DataConfig, FilesConfig
from pe_rlhf_jax.data import android_control, load
from pe_rlhf_jax.data import tfrecord as reading
from pe_rlhf_jax.data.accessibility import Element, elements, target_of
from pe_rlhf_jax.data.converters import convert
from pe_rlhf_jax.data.image_processing import ImageProcessing
from pe_rlhf_jax.data.sources import BadRow, DataError, Skipped
from pe_rlhf_jax.data.turns import Vision
from pe_rlhf_jax.data.ui_actions import (
    Action,
    action_match,
    action_type_match,
    from_android_control,
    parse,
    right_elements,
    touchable,
    touched,
    wrong_action,
)
from pe_rlhf_jax.image_prompt import ImagePrompt


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PE_RLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    """Two files of two episodes; the last episode is of another split."""
    root = tmp_path / "android_control"
    root.mkdir()
    (root / "android_control-00000-of-00002").write_bytes(tfrecord([episode(1), episode(2)]))
    (root / "android_control-00001-of-00002").write_bytes(tfrecord([episode(3), episode(4)]))
    (root / "splits.json").write_text(json.dumps({"train": [1, 2, 3], "test": [4]}))
    (root / "test_subsplits.json").write_text(json.dumps({"app_unseen": [4], "nothing": []}))
    return root


def rows(folder, kind, split="train", on_error="error"):
    skipped = Skipped(on_error)
    return [row.values for row in convert("android-control", kind, android_control.read(f"{folder}:{split}", skipped), skipped)], skipped


TEXTS = [" click [0]", " scroll down", " open_app Mail", " input_text two words", " navigate_back"]
PROMPT = "Goal: Do thing 1\nStep: Press send\nElements:\n" + "".join(f"[{i}] {text}\n" for i, text in enumerate(SHOWN)) + "Action:"


def told(found):
    """Rows with their pictures by name and identity."""
    return [{**row, "image": (row["image"].label, row["image"].key)} for row in found]


def test_steps_become_rows(folder):
    found, _ = rows(folder, "sft")
    assert [row["completion"] for row in found] == TEXTS * 3
    assert found[0]["prompt"] == PROMPT and [row["episode_id"] for row in found] == [1] * 5 + [2] * 5 + [3] * 5
    for row, (number, step) in zip(found, [(n, s) for n in (1, 2, 3) for s in range(5)], strict=True):
        np.testing.assert_array_equal(np.asarray(PIL.Image.open(row["image"].content)), pixels(20, 10, seed=number * 100 + step))
    prompts, _ = rows(folder, "prompts")
    assert prompts[0]["action"] == "click [0]" and prompts[0]["right_elements"] == [0, 1] and prompts[1]["right_elements"] == []
    assert [len(rows(folder, kind)[0]) for kind in ("label", "preference", "prompts")] == [30, 15, 15]
    assert (
        [row["episode_id"] for row in rows(folder, "sft", "app_unseen")[0]]
        == [4] * 5
        == [r["episode_id"] for r in rows(folder, "sft", "test")[0]]
    )


def test_labelled_rows_are_a_right_and_a_wrong_action_the_same_in_every_run(folder):
    found, _ = rows(folder, "label")
    assert [row["label"] for row in found] == [1, 0] * 15 and told(found) == told(rows(folder, "label")[0])
    columns = {name: [row[name] for row in rows(folder, "prompts")[0] for _ in "rw"] for name in ("action", "right_elements")}
    assert action_match([""] * 30, [row["completion"] for row in found], **columns) == [1, 0] * 15
    pairs, _ = rows(folder, "preference")
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [
        (good["completion"], bad["completion"]) for good, bad in zip(found[::2], found[1::2], strict=True)
    ]


def test_the_pipeline_reads_it_with_its_screenshots(folder):
    vision = Vision(ImagePrompt("<image>", "*", 2), ImageProcessing((0, 0, 0), (1, 1, 1), size=(2, 2)))
    label = FilesConfig(train=[f"{folder}:train"], validation=[f"{folder}:test"], format="android-control")
    loaded = load(DataConfig(label=label, group_by="episode_id"), make_tokenizer(), needs={"label"}, vision=vision)
    assert (len(loaded.label.train), len(loaded.label.validation)) == (30, 10)
    example = loaded.label.train[0]
    assert example.group == "1" and len(example.pictures) == 1 and example.place.endswith("android_control-00000-of-00002:1")


def test_files_are_unpacked_once(folder, cache, monkeypatch):
    first = told(rows(folder, "sft")[0])
    made = sorted(path.name for path in (cache / "android-control").iterdir())
    assert len(made) == 2 and not any(name.startswith(".") for name in made)
    monkeypatch.setattr(android_control.tfrecord, "records", lambda path: pytest.fail("unpacked again"))
    assert told(rows(folder, "sft")[0]) == first


def test_a_screenshot_is_called_the_same_wherever_its_file_lies(folder, cache):
    first = [row["image"].label for row in rows(folder, "sft")[0]]
    assert first[:2] == ["android_control-00000-of-00002/0-0.png", "android_control-00000-of-00002/0-1.png"] and len(set(first)) == 15
    for file in folder.iterdir():
        os.utime(file, (1, 1))  # as a copy has another time
    assert [row["image"].label for row in rows(folder, "sft")[0]] == first
    assert len(list((cache / "android-control").iterdir())) == 4


def test_an_interrupted_unpacking_leaves_nothing(folder, cache):
    damaged = tfrecord([episode(1), episode(2)])
    (folder / "android_control-00000-of-00002").write_bytes(damaged[: len(damaged) // 2])
    with pytest.raises(DataError, match=r"android_control-00000-of-00002: (cannot be read after|cut off in) record"):
        rows(folder, "sft")
    assert list((cache / "android-control").iterdir()) == []


def test_damaged_episodes_are_refused_or_counted_at_every_reading(folder):
    other = {"action_type": "swipe"}
    bad = [
        episode(1, step_instructions=[b"one"]),
        episode(1, episode_id=[b"x"]),
        episode(1, accessibility_trees=[b"\xff\xff"] * 6),
        episode(1, actions=[b"[1]"] * 5),
        episode(1, actions=[b"{"] * 5),
        b"\x07garbage",
        episode(2, [(other, "Swipe"), *ACTIONS]),
    ]
    (folder / "android_control-00000-of-00002").write_bytes(tfrecord(bad))
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"-00002:1: expected an episode of AndroidControl, found another record \(expected one screenshot"
        ):
            rows(folder, "sft")
        found, skipped = rows(folder, "sft", on_error="skip")
        assert len(found) == 5 + 5 and "7 rows skipped as bad" in skipped.notes()[0]


def test_an_episode_without_actions_has_no_steps(folder):
    for left_out in ([], None):
        records = [episode(1), episode(2, [], actions=left_out, step_instructions=left_out)]
        (folder / "android_control-00000-of-00002").write_bytes(tfrecord(records))
        found, skipped = rows(folder, "sft")
        assert len(found) == 2 * 5 and skipped.notes() == []


def test_damage_outside_the_split_is_not_looked_at(folder):
    whole, _ = rows(folder, "sft")
    records = [episode(1), episode(2), episode(12345, step_instructions=[b"one"])]
    (folder / "android_control-00000-of-00002").write_bytes(tfrecord(records))
    assert len(rows(folder, "sft")[0]) == len(whole)


def test_what_is_missing_is_said(folder, tmp_path):
    for source, message in {
        "folder": "expected FOLDER:SPLIT, such as data/android_control:train",
        f"{folder}:none": r"expected one of the splits train, test, app_unseen, nothing, found 'none'",
        f"{tmp_path}:train": r"splits.json: no such file; it says which episodes",
    }.items():
        with pytest.raises(DataError, match=message):
            list(android_control.read(source, Skipped()))
    for path in folder.glob("android_control-*"):
        path.unlink()
    with pytest.raises(DataError, match="expected the files android_control-"):
        list(android_control.read(f"{folder}:train", Skipped()))


# --- records and trees ---


def test_tfrecords_plain_and_gzipped(tmp_path):
    assert crc32c(b"123456789") == 0xE3069283, "the check value of CRC-32C"
    for zipped in (True, False):
        (tmp_path / "file").write_bytes(tfrecord([b"one", b"", b"three"], zipped))
        assert list(reading.records(tmp_path / "file")) == [b"one", b"", b"three"]
    (tmp_path / "file").write_bytes(tfrecord([b"one"], zipped=False)[:-3])
    with pytest.raises(DataError, match="cut off in record 1"):
        list(reading.records(tmp_path / "file"))
    (tmp_path / "file").write_bytes(b"this is some text, no record")
    with pytest.raises(DataError, match="expected a TFRecord file, found something else"):
        list(reading.records(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot be read after record 0"):
        list(reading.records(tmp_path / "gone"))


def test_features_of_every_kind():
    found = reading.features(episode(2**40, goal=[b"a", b"b"]))
    assert found["episode_id"] == [2**40] and found["goal"] == [b"a", b"b"] and found["a ratio"] == [0.5, -2.0]
    assert reading.features(episode(-7))["episode_id"] == [-7]


def test_elements_are_what_is_seen_and_says_or_does_something():
    found = elements(forest(), 100, 200)
    assert [str(element) for element in found] == SHOWN
    assert found[3].box == (0, 80, 100, 200), "cut at the edges of the screen"
    assert [Element.from_json(json.loads(json.dumps(element.to_json()))) for element in found] == found
    long = elements(forest([node("View", (0, 0, 9, 9), "x" * 300)]), 100, 200)[0]
    assert len(long.words) == 80 and long.words.endswith("...")
    assert elements(b"", 100, 200) == []


def test_every_cut_of_a_tree_is_refused_or_read():
    data = forest()
    for end in range(1, len(data)):
        try:
            elements(data[:end], 100, 200)
        except protobuf.WireError:
            continue
        raise AssertionError(f"{end} of {len(data)} bytes were read as a whole tree")


def test_wire_format_by_hand():
    fields = lambda data: [(n, v if isinstance(v, int) else bytes(v)) for n, v in protobuf.fields(memoryview(data))]  # noqa: E731
    # The examples of the encoding's documentation.
    assert fields(bytes.fromhex("089601")) == [(1, 150)]
    assert fields(bytes.fromhex("120774657374696e67")) == [(2, b"testing")]
    assert protobuf.numbers(memoryview(bytes.fromhex("038e029ea705"))) == [3, 270, 86942]
    assert protobuf.number(fields(bytes.fromhex("08feffffffffffffffff01"))[0][1]) == -2
    assert fields(b"\x0d\0\0\0\x40\x11" + b"\1" * 8) == [(1, b"\0\0\0\x40"), (2, b"\1" * 8)]
    for bad in ("08", "0880", "12ff", "0b", "00", "ff" * 11):
        with pytest.raises(protobuf.WireError):
            fields(bytes.fromhex(bad))
    for read in (protobuf.message, protobuf.text):
        with pytest.raises(protobuf.WireError, match="found a number"):
            read(3)


def test_a_touch_means_the_smallest_element_there():
    shown = elements(forest(), 100, 200)
    assert target_of(30, 25, shown) == 1 and target_of(12, 12, shown) == 0 and target_of(50, 60, shown) == 2
    assert target_of(10, 100, shown) == 4 and target_of(60, 100, shown) == 3 and target_of(99, 5, shown) is None
    assert target_of(60, 20, shown) is None, "the right and lower edges are outside"


# --- actions ---

SCREEN_SHOWN = elements(forest(SCREEN), 100, 200)


@pytest.mark.parametrize(
    ("action", "text"),
    [
        ({"action_type": "click", "x": 30, "y": 25}, "click [0]"),  # through the text on the button
        ({"action_type": "click", "x": 98.6, "y": 5}, "click (99, 5)"),
        ({"action_type": "long_press", "x": 10, "y": 100}, "long_press [4]"),
        ({"action_type": "type", "x": 50, "y": 60, "text": "tea"}, "type [2] tea"),
        ({"action_type": "input_text", "text": "a [1]\nb"}, "input_text a [1] b"),
        ({"action_type": "scroll", "direction": "up"}, "scroll up"),
        ({"action_type": "open_app", "app_name": "My Mail"}, "open_app My Mail"),
        ({"action_type": "wait"}, "wait"),
        ({"action_type": "navigate_home"}, "navigate_home"),
    ],
)
def test_actions_are_written_and_read_back(action, text):
    written = from_android_control(action, SCREEN_SHOWN)
    assert str(written) == text and parse(f" {text}\nand more") == written


@pytest.mark.parametrize(
    "text", ["", " ", "click", "click it", "click [1] now", "click [x]", "press [1]", "wait 3", "scroll", "type [2]", "the wait"]
)
def test_what_names_no_action(text):
    assert parse(text) is None


@pytest.mark.parametrize(
    "action",
    [
        {"action_type": "click", "x": "3", "y": 4},
        {"action_type": "click"},
        {"action_type": "scroll"},
        {"action_type": "input_text", "text": " "},
        {},
    ],
)
def test_actions_of_another_form_are_refused(action):
    with pytest.raises(BadRow):
        from_android_control(action, SCREEN_SHOWN)


@pytest.mark.parametrize(
    ("completion", "right", "match", "same_type"),
    [
        (" click [0]", "click [0]", 1, 1),
        (" click [1]", "click [0]", 1, 1),  # the text on the button
        (" click [0]", "click [1]", 0, 1),
        (" click [2]", "click [0]", 0, 1),
        (" long_press [0]", "click [0]", 0, 0),
        (" click (3, 4)", "click (3, 4)", 1, 1),
        (" click (3, 64)", "click (3, 4)", 1, 1),  # a finger's width away
        (" click (3, 65)", "click (3, 4)", 0, 1),
        (" long_press (3, 4)", "click (3, 4)", 0, 0),
        (" click [0]", "click (3, 4)", 0, 1),
        (" open_app  my MAIL", "open_app My Mail", 1, 1),
        (" scroll up", "scroll down", 0, 1),
        (" type [2] tea", "type [2] coffee", 0, 1),
        (" navigate_back", "navigate_back", 1, 1),
        (" I would go back", "navigate_back", 0, 0),
    ],
)
def test_actions_match_by_type_target_and_argument(completion, right, match, same_type):
    accepted = {"click [0]": [0, 1], "click [1]": [1], "type [2] coffee": [2]}.get(right, [])
    assert action_match(["p"], [completion], action=[right], right_elements=[accepted], other=[0]) == [match]
    assert action_type_match(["p"], [completion], action=[right]) == [same_type]


def test_right_elements_are_the_target_and_what_lies_on_it():
    assert right_elements(Action("click", 0), SCREEN_SHOWN) == [0, 1]
    assert right_elements(Action("click", 2), SCREEN_SHOWN) == [2] and right_elements(Action("wait"), SCREEN_SHOWN) == []
    assert right_elements(Action("click", 3), SCREEN_SHOWN) == [3], "a touch of the box on the list does not act on the list"


def test_elements_in_the_same_place_are_right_together():
    for apart, together in ((3, [0, 1]), (4, [1])):
        frame = node("FrameLayout", (10, 10, 90, 50), is_clickable=True)
        # Its middle is beside the button's, on a bar across the button.
        button = node("Button", (10 + apart, 10, 90, 50), is_clickable=True)
        bar = node("Bar", (45, 10, 55, 50), is_clickable=True)
        shown = elements(forest([button, frame, bar]), 100, 200)
        assert right_elements(Action("click", 1), shown) == together


def test_a_touch_acts_on_the_smallest_element_that_can_be_acted_on():
    assert [touched(*point, SCREEN_SHOWN) for point in ((30, 25), (12, 12), (10, 100), (60, 100), (99, 5))] == [0, 0, 4, 3, None]
    assert touchable(SCREEN_SHOWN) == [0, 2, 3, 4], "all but the text"
    covered = elements(forest([node("Row", (0, 0, 100, 40), is_clickable=True), node("Box", (40, 0, 60, 40), is_clickable=True)]), 100, 200)
    assert touchable(covered) == [1] and touched(5, 5, covered) == 0


def test_a_reward_without_its_columns():
    with pytest.raises(ValueError, match="found no right_elements"):
        action_match(["p"], ["wait"], action=["wait"])
    with pytest.raises(ValueError, match="expected the right action in the column `action`, found 'x'"):
        action_match(["p"], ["wait"], action=["x"], right_elements=[[]])


def test_wrong_actions_are_wrong_in_each_way():
    others = [Action("click", 0), Action("scroll", argument="up"), Action("open_app", argument="Maps"), Action("wait")]
    expected = {
        Action("click", 0): {"element", "type"},
        Action("scroll", argument="down"): {"argument", "type"},
        Action("open_app", argument="Mail"): {"argument", "type"},
        Action("input_text", argument="tea"): {"type"},  # no other text is known
        Action("type", 2, argument="tea"): {"element", "type"},
        Action("wait"): {"type"},
    }
    for right, ways in expected.items():
        found = [wrong_action(right, SCREEN_SHOWN, others, random.Random(seed)) for seed in range(60)]
        counts = Counter(way for way, _ in found)
        assert set(counts) == ways and min(counts.values()) > 10
        for way, wrong in found:
            assert not action_match(["p"], [str(wrong)], action=[str(right)], right_elements=[right_elements(right, SCREEN_SHOWN)])[0]
            assert (wrong.type != right.type) == (way == "type")
            assert way != "element" or wrong.element in (2, 3, 4) or right.element != 0
            assert parse(str(wrong)) == wrong
    assert wrong_action(Action("wait"), [], [Action("wait")], random.Random(0)) is None


def random_screen(draw):
    """A list of rows that can be clicked, each with a text and perhaps a box to tick; below, a button in a frame, and a bare text."""
    nodes = [node("RecyclerView", (0, 0, 100, 150), is_scrollable=True)]
    for top in range(0, draw.choice([60, 90]), 30):
        wide, box = draw.randint(60, 100), draw.choice([None, 4, 35])  # at 35 the box hides the row's middle
        nodes += [node("Row", (0, top, wide, top + 30), is_clickable=True), node("TextView", (2, top + 2, wide, top + 28), "Row")]
        nodes += [] if box is None else [node("CheckBox", (box, top + 5, box + 20, top + 25), is_checkable=True)]
    nodes += [node("View", (0, 150, 80, 180), is_clickable=True), node("Button", (1, 151, 79, 179), "Save", is_clickable=True)]
    return [*nodes, node("TextView", (0, 180, 100, 200), "Nothing happens here")]


def test_right_and_wrong_elements_are_of_the_same_population(tmp_path):
    """Where a person touches everything that can be acted on in its middle, the same elements are right and wrong: not one is always
    wrong, or always right, for what it is, says or measures.
    """
    draw, records, screens = random.Random(0), [], {}
    for screen in [random_screen(draw) for _ in range(6)]:
        shown = elements(forest(screen), 100, 200)
        touches = {element.centre for element in shown if element.can_be_acted_on}
        steps = [({"action_type": "click", "x": x, "y": y}, f"{x} {y}") for x, y in sorted(touches)]
        for _ in range(25):  # each draws its own wrong actions
            screens[len(records)] = shown
            records.append(episode(len(records), steps, accessibility_trees=[forest(screen)] * (len(steps) + 1)))
    (tmp_path / "android_control-00000-of-00001").write_bytes(tfrecord(records))
    (tmp_path / "splits.json").write_text(json.dumps({"train": list(screens)}))

    right, wrong = {number // 25: set() for number in screens}, {number // 25: set() for number in screens}
    for row in rows(tmp_path, "label")[0]:
        element, shown = parse(row["completion"]).element, screens[row["episode_id"]]
        (right if row["label"] else wrong)[row["episode_id"] // 25].add(element)
        point = [float(side) for side in row["prompt"].split("Step: ")[1].split("\n")[0].split()]
        assert shown[element].holds(*point) == bool(row["label"])
    assert right == wrong
    assert {screens[25 * number][index].kind for number, found in right.items() for index in found} == {
        "RecyclerView",
        "Row",
        "CheckBox",
        "Button",
    }


def test_what_may_be_right_too_is_not_wrong():
    row, column = node("Row", (0, 0, 100, 40), is_clickable=True), node("Column", (0, 0, 40, 200), is_clickable=True)
    button, frame = node("Button", (61, 61, 99, 99), is_clickable=True), node("Frame", (60, 60, 100, 100), is_clickable=True)
    shown = elements(forest([row, column, button, frame]), 100, 200)

    def drawn(x, y):
        right = from_android_control({"action_type": "click", "x": x, "y": y}, shown)
        found = [wrong_action(right, shown, [right], random.Random(seed)) for seed in range(40)]
        return right.element, {wrong.element for _, wrong in found}

    assert drawn(80, 20) == (0, {1, 2})
    assert drawn(20, 20) == (0, {2}), "the column was touched as well"
    assert drawn(60, 80) == (3, {0, 1}), "the rim of the frame is the button to a person"


def test_wrong_places_are_places_of_other_steps():
    shown = elements(forest([node("Button", (0, 0, 50, 50), is_clickable=True)]), 1000, 2000)
    others = [Action("click", place=place) for place in ((500, 500), (500, 560), (500, 561), (20, 20), (900, 1900))]
    found = [wrong_action(others[0], shown, [*others, Action("wait")], random.Random(seed)) for seed in range(80)]
    assert {wrong.place for way, wrong in found if way == "element"} == {(500, 561), (900, 1900)}, "neither near nor on the button"
    found = [wrong_action(Action("wait"), shown, [others[0], others[3]], random.Random(seed)) for seed in range(80)]
    assert {str(wrong) for _, wrong in found} == {"click (500, 500)", "click [0]"}
