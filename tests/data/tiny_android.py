"""AndroidControl episodes in their original format, written with Google's protobuf package and TFDS's `tf.train.Example`, not with ours."""

import gzip
import json
import struct

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from tensorflow_datasets.proto.tf_example_generated_pb2 import Example
from tiny_images import encoded, pixels

WIDTH, HEIGHT = 100, 200

_KINDS = {"int32": 5, "string": 9, "bool": 8, "message": 11}


def _classes():
    """The messages of android_env's accessibility protos, with the fields that matter and some that do not."""
    file = descriptor_pb2.FileDescriptorProto(name="a11y.proto", package="android_env", syntax="proto3")
    messages = {
        "Rect": [("left", 1, "int32"), ("top", 2, "int32"), ("right", 3, "int32"), ("bottom", 4, "int32")],
        "Node": [
            ("unique_id", 1, "int32"),
            ("bounds_in_screen", 2, "Rect"),
            ("class_name", 3, "string"),
            ("content_description", 4, "string"),
            ("hint_text", 5, "string"),
            ("package_name", 6, "string"),
            ("text", 7, "string"),
            ("is_checkable", 12, "bool"),
            ("is_checked", 13, "bool"),
            ("is_clickable", 14, "bool"),
            ("is_editable", 15, "bool"),
            ("is_scrollable", 21, "bool"),
            ("is_visible_to_user", 23, "bool"),
            ("child_ids", 25, "int32*"),
            ("depth", 27, "int32"),
        ],
        "Tree": [("nodes", 1, "Node*")],
        "Window": [("bounds_in_screen", 1, "Rect"), ("id", 3, "int32"), ("title", 5, "string"), ("tree", 11, "Tree")],
        "Forest": [("windows", 1, "Window*")],
    }
    for name, fields in messages.items():
        made = file.message_type.add(name=name)
        for field, number, kind in fields:
            kind, repeated = kind.removesuffix("*"), kind.endswith("*")
            added = made.field.add(name=field, number=number, label=3 if repeated else 1, type=_KINDS.get(kind, 11))
            if kind not in _KINDS:
                added.type_name = f".android_env.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"android_env.{name}")) for name in messages}


MESSAGES = _classes()


def node(kind, box, text="", visible=True, **more):
    left, top, right, bottom = box
    rect = MESSAGES["Rect"](left=left, top=top, right=right, bottom=bottom)
    return MESSAGES["Node"](bounds_in_screen=rect, class_name=kind, text=text, is_visible_to_user=visible, child_ids=[1, 300], **more)


SCREEN = [
    node("android.widget.FrameLayout", (0, 0, 100, 200)),  # says nothing and does nothing
    node("android.widget.Button", (10, 10, 60, 40), content_description="Send", is_clickable=True, unique_id=2**31 - 1),
    node("android.widget.TextView", (20, 20, 50, 30), "Send  now", unique_id=-5),
    node("android.widget.EditText", (0, 50, 100, 80), hint_text="Search", is_editable=True, is_clickable=True),
    node("android.widget.ScrollView", (-20, 80, 120, 400), is_scrollable=True),
    node("android.widget.CheckBox", (0, 90, 20, 110), "Día ☕", is_checkable=True, is_checked=True, is_clickable=True),
    node("android.widget.TextView", (0, 120, 50, 140), "hidden", visible=False),
    node("android.widget.TextView", (0, 300, 50, 340), "below the screen"),
    node("android.view.View", (5, 5, 5, 30), "no width", is_clickable=True),
]
SHOWN = [
    'Button "Send" clickable',
    'TextView "Send now"',
    'EditText "Search" clickable editable',
    "ScrollView scrollable",
    'CheckBox "Día ☕" checked checkable clickable',
]
ACTIONS = [
    ({"action_type": "click", "x": 30, "y": 25}, "Press send"),
    ({"action_type": "scroll", "direction": "down"}, "Scroll down"),
    ({"action_type": "open_app", "app_name": "Mail"}, "Open the mail app"),
    ({"action_type": "input_text", "text": "two  words"}, "Write two words"),
    ({"action_type": "navigate_back"}, "Go back"),
]


def forest(nodes=SCREEN):
    tree = MESSAGES["Tree"](nodes=nodes)
    return MESSAGES["Forest"](windows=[MESSAGES["Window"](id=7, title="App", tree=tree)]).SerializeToString()


def episode(number, steps=ACTIONS, **changes):
    """An episode as `tf.train.Example`, serialized; a feature that is None is left out."""
    count = len(steps) + 1
    values = {
        "episode_id": [number],
        "goal": [f"Do thing {number}".encode()],
        "screenshots": [encoded(pixels(20, 10, seed=abs(number) * 100 + i)) for i in range(count)],
        "accessibility_trees": [forest()] * count,
        "screenshot_widths": [WIDTH] * count,
        "screenshot_heights": [HEIGHT] * count,
        "actions": [json.dumps(action).encode() for action, _ in steps],
        "step_instructions": [text.encode() for _, text in steps],
        **changes,
    }
    example = Example()
    for name, value in values.items():
        if value is None:
            continue
        if value and isinstance(value[0], int):
            example.features.feature[name].int64_list.value.extend(value)
        else:
            example.features.feature[name].bytes_list.value.extend(value)
    example.features.feature["a ratio"].float_list.value.extend([0.5, -2.0])
    return example.SerializeToString()


def crc32c(data: bytes) -> int:
    """Bit by bit, from the definition."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


def tfrecord(records, zipped=True) -> bytes:
    """A TFRecord file; as everywhere, both checksums are masked."""

    def masked(data):
        crc = crc32c(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    content = b""
    for record in records:
        length = struct.pack("<Q", len(record))
        content += length + masked(length) + record + b"\0\0\0\0"
    return gzip.compress(content) if zipped else content
