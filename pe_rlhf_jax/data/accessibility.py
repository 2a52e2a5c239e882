"""Android's accessibility trees (`AndroidAccessibilityForest` of android_env) as a list of what is on the screen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pe_rlhf_jax import protobuf

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""

LONGEST_WORDS = 80
"""Characters of an element's text that are shown."""

# Numbers of the fields in android_accessibility_node_info.proto.
_BOUNDS, _CLASS, _DESCRIPTION, _HINT, _TEXT = 2, 3, 4, 5, 7
_VISIBLE = 23
_STATES = {13: "checked", 22: "selected"}
_ABILITIES = {12: "checkable", 14: "clickable", 15: "editable", 19: "long-clickable", 21: "scrollable"}


@dataclass(frozen=True)
class Element:
    """Something on the screen that says something, or that can be acted on."""

    kind: str
    """The class of the view without its package, such as Button."""
    words: str
    box: Box
    states: tuple[str, ...] = ()
    """What it is and can, such as clickable or checked."""

    def holds(self, x: float, y: float) -> bool:
        left, top, right, bottom = self.box
        return left <= x < right and top <= y < bottom

    @property
    def area(self) -> int:
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def can_be_acted_on(self) -> bool:
        return not set(self.states).isdisjoint(_ABILITIES.values())

    def __str__(self) -> str:
        words = f' "{self.words}"' if self.words else ""
        return " ".join([self.kind + words, *self.states])

    def to_json(self) -> list[Any]:
        return [self.kind, self.words, list(self.box), list(self.states)]

    @classmethod
    def from_json(cls, value: list[Any]) -> Element:
        kind, words, box, states = value
        return cls(kind, words, tuple(box), tuple(states))


def elements(forest: bytes, width: int, height: int) -> list[Element]:
    """The elements on a screen of this size, window by window, in the order of the trees.

    Left out are nodes that are invisible, outside of the screen, or that neither say anything nor can be acted on.

    Raises:
        protobuf.WireError: the bytes are no accessibility forest.
    """
    found = []
    for number, window in protobuf.fields(memoryview(forest)):
        if number != 1:
            continue
        for field, tree in protobuf.fields(protobuf.message(window)):
            if field == 11:
                nodes = (node for kind, node in protobuf.fields(protobuf.message(tree)) if kind == 1)
                found += [element for node in nodes if (element := _element(protobuf.message(node), width, height))]
    return found


def target_of(x: float, y: float, shown: list[Element]) -> int | None:
    """The index of the element that a touch means: the smallest one there, the last of equals; None where there is none."""
    under = [(element.area, -index) for index, element in enumerate(shown) if element.holds(x, y)]
    return -min(under)[1] if under else None


def _element(node: memoryview, width: int, height: int) -> Element | None:
    values = dict(protobuf.fields(node))
    if not values.get(_VISIBLE):
        return None
    left, top, right, bottom = _box(values[_BOUNDS]) if _BOUNDS in values else (0, 0, 0, 0)
    box = (max(left, 0), max(top, 0), min(right, width), min(bottom, height))
    words = next((words for key in (_TEXT, _DESCRIPTION, _HINT) if (words := _words(values.get(key)))), "")
    states = tuple(name for table in (_STATES, _ABILITIES) for key, name in table.items() if values.get(key))
    element = Element((_words(values.get(_CLASS)) or "View").rpartition(".")[2], words, box, states)
    seen = box[0] < box[2] and box[1] < box[3]
    return element if seen and (words or element.can_be_acted_on) else None


def _box(value: protobuf.Value) -> Box:
    sides = {number: protobuf.number(side) for number, side in protobuf.fields(protobuf.message(value))}
    return sides.get(1, 0), sides.get(2, 0), sides.get(3, 0), sides.get(4, 0)


def _words(value: protobuf.Value | None) -> str:
    words = " ".join(protobuf.text(value).split()) if value is not None else ""
    return words if len(words) <= LONGEST_WORDS else words[: LONGEST_WORDS - 3] + "..."
