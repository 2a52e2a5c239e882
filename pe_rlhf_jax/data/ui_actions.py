"""Actions on a screen as text: written, read back, compared with the right one, and made wrong.

click [3]           long_press [3]      type [3] some text     an element of the screen by its index
click (540, 1200)                                              a place in pixels, where nothing can be acted on
scroll down         open_app Gmail      input_text some text
navigate_back       navigate_home       wait
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pe_rlhf_jax.data.accessibility import Element, target_of
from pe_rlhf_jax.data.sources import BadRow

TOUCHES = ("click", "long_press", "type")
WITH_TEXT = {"type": "text", "input_text": "text", "open_app": "app_name", "scroll": "direction"}
"""Actions with an argument -> its key in AndroidControl's actions."""
PLAIN = ("navigate_back", "navigate_home", "wait")
DIRECTIONS = ("up", "down", "left", "right")

Way = Literal["element", "type", "argument"]
"""What is wrong in a wrong action; a wrong place counts as a wrong element."""

# AndroidControl's screens have 2 to 3 pixels a dp.
SAME_SIDE = 3
"""Pixels between the sides of two boxes that are the same place, such as a button in a frame of its own: one dp."""
SAME_PLACE = 60
"""Pixels between two touches of the same place: half of the 48 dp that Android asks of whatever is to be touched."""

_TARGET = re.compile(r"\[(\d{1,9})\]\s*|\((\d{1,9}),\s*(\d{1,9})\)\s*")


@dataclass(frozen=True)
class Action:
    """One action: what is done, to which element or at which place, and with which argument."""

    type: str
    element: int | None = None
    place: tuple[int, int] | None = None
    argument: str = ""
    touch: tuple[float, float] | None = field(default=None, compare=False)
    """Where a person touched; it is not written."""

    def __str__(self) -> str:
        target = f" [{self.element}]" if self.element is not None else f" ({self.place[0]}, {self.place[1]})" if self.place else ""
        return self.type + target + (f" {self.argument}" if self.argument else "")


def from_android_control(action: dict[str, Any], shown: list[Element]) -> Action:
    """An action of the data set, its place as an element of the screen. Raises BadRow if it has another form."""
    kind = action.get("action_type")
    if kind not in (*TOUCHES, *WITH_TEXT, *PLAIN):
        raise BadRow(f"expected an action of a known type, found {kind!r}")
    element, place, touch = None, None, None
    if kind in TOUCHES:
        x, y = (action.get(key) for key in "xy")
        if not all(isinstance(side, (int, float)) and not isinstance(side, bool) for side in (x, y)):
            raise BadRow(f"expected `x` and `y` of {kind} to be numbers, found {x!r} and {y!r}")
        touch = float(x), float(y)  # type: ignore[arg-type]
        element = touched(*touch, shown)
        place = None if element is not None else (round(touch[0]), round(touch[1]))
    argument = ""
    if kind in WITH_TEXT:
        argument = action.get(WITH_TEXT[kind])  # type: ignore[assignment]
        if not isinstance(argument, str) or not argument.strip():
            raise BadRow(f"expected `{WITH_TEXT[kind]}` of {kind} to be text, found {argument!r}")
        argument = " ".join(argument.split())
    return Action(kind, element, place, argument, touch)


def touched(x: float, y: float, shown: list[Element]) -> int | None:
    """The index of the element that a touch acts on: the smallest there that can be acted on; None where there is none."""
    able = [index for index, element in enumerate(shown) if element.can_be_acted_on]
    found = target_of(x, y, [shown[index] for index in able])
    return None if found is None else able[found]


def touchable(shown: list[Element]) -> list[int]:
    """The elements that are some touch's target, and so can be right: what a touch of an element's centre acts on."""
    found = {touched(*element.centre, shown) for element in shown if element.can_be_acted_on}
    return sorted(index for index in found if index is not None)


def parse(text: str) -> Action | None:
    """The action that a text's first line names, or None if it names none."""
    lines = text.strip().splitlines()
    kind, _, rest = (lines[0].strip() if lines else "").partition(" ")
    rest = rest.strip()
    if kind in TOUCHES:
        match = _TARGET.match(rest)
        if not match:
            return None
        index, x, y = match.groups()
        rest = rest[match.end() :].strip()
        if bool(rest) != (kind in WITH_TEXT):
            return None
        return Action(kind, int(index), None, rest) if index else Action(kind, None, (int(x), int(y)), rest)
    if bool(rest) != (kind in WITH_TEXT) or kind not in (*WITH_TEXT, *PLAIN):
        return None
    return Action(kind, argument=rest)


def right_elements(action: Action, shown: list[Element]) -> list[int]:
    """The elements that count as the action's target: itself, those whose centre's touch acts on it (the text on a button), and those in
    the same place.
    """
    if action.element is None:
        return []
    target = shown[action.element]
    return [
        i
        for i, element in enumerate(shown)
        if i == action.element
        or (target.holds(*element.centre) and touched(*element.centre, shown) == action.element)
        or (element.can_be_acted_on and all(abs(a - b) <= SAME_SIDE for a, b in zip(element.box, target.box, strict=True)))
    ]


def action_match(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """1 for a completion that names the right action, type, target and argument, else 0.

    Args:
        columns: `action` and `right_elements`, as in rows of the format `android-control`.
    """
    return [float(_matches(*row)) for row in zip(completions, *_columns(columns, "action", "right_elements"), strict=True)]


def action_type_match(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """1 for a completion that names an action of the right type, else 0; `action` as in `action_match`."""
    [actions] = _columns(columns, "action")
    return [
        float((found := parse(completion)) is not None and found.type == _parsed(right).type)
        for completion, right in zip(completions, actions, strict=True)
    ]


def wrong_action(right: Action, shown: list[Element], others: Sequence[Action], draw: random.Random) -> tuple[Way, Action] | None:
    """An action that is wrong in one way; which one, and how, is drawn.

    Wrong elements are drawn from those that could be right on this screen, and wrong places from those of other steps, so that neither is
    known by what it is.

    Args:
        others: actions of other steps, whose types, places and arguments are used.
    """
    ways: list[Way] = ["type"]
    ways += ["element"] if right.type in TOUCHES else []
    ways += ["argument"] if right.type in WITH_TEXT else []
    draw.shuffle(ways)
    for way in ways:
        made = _WAYS[way](right, shown, others, draw)
        if made is not None:
            return way, made
    return None


def _other_element(right: Action, shown: list[Element], others: Sequence[Action], draw: random.Random) -> Action | None:
    if right.element is None:
        places = [other.place for other in others if other.place is not None and not _same_place(other.place, right.place)]
        draw.shuffle(places)
        place = next((place for place in places if _free(place, shown)), None)
        return None if place is None else replace(right, place=place, touch=None)
    x, y = right.touch or shown[right.element].centre
    taken = set(right_elements(right, shown))
    # What holds the touch may be right as well, such as the row around a box that is ticked.
    free = [index for index in touchable(shown) if index not in taken and not shown[index].holds(x, y)]
    return replace(right, element=draw.choice(free), touch=None) if free else None


def _other_type(right: Action, shown: list[Element], others: Sequence[Action], draw: random.Random) -> Action | None:
    targets = touchable(shown)
    for _ in range(50):
        other = draw.choice(others) if others else Action("wait")
        if other.type == right.type:
            continue
        if other.type not in TOUCHES:
            return other
        if _free(other.place, shown):
            return replace(other, touch=None)
        if targets:
            return replace(other, element=draw.choice(targets), place=None, touch=None)
    return None


def _other_argument(right: Action, shown: list[Element], others: Sequence[Action], draw: random.Random) -> Action | None:
    if right.type == "scroll":
        return replace(right, argument=draw.choice([d for d in DIRECTIONS if d != right.argument]))
    for _ in range(50):
        other = draw.choice(others) if others else right
        if other.type == right.type and _plain(other.argument) != _plain(right.argument):
            return replace(right, argument=other.argument)
    return None


_WAYS = {"element": _other_element, "type": _other_type, "argument": _other_argument}


def _matches(completion: str, right_text: str, right_elements: Sequence[int]) -> bool:
    found, right = parse(completion), _parsed(right_text)
    if found is None or found.type != right.type or _plain(found.argument) != _plain(right.argument):
        return False
    if right.element is not None:
        return found.element in right_elements
    return found.element is None and (found.place == right.place or _same_place(found.place, right.place))


def _same_place(a: tuple[int, int] | None, b: tuple[int, int] | None) -> bool:
    return a is not None and b is not None and math.dist(a, b) <= SAME_PLACE


def _free(place: tuple[int, int] | None, shown: list[Element]) -> bool:
    """Whether a touch there would be written as a place on this screen."""
    return place is not None and touched(*place, shown) is None


def _parsed(text: str) -> Action:
    action = parse(text)
    if action is None:
        raise ValueError(f"expected the right action in the column `action`, found {text!r}")
    return action


def _plain(argument: str) -> str:
    return " ".join(argument.casefold().split())


def _columns(columns: dict[str, Sequence[Any]], *names: str) -> list[Sequence[Any]]:
    if missing := [name for name in names if name not in columns]:
        raise ValueError(f"expected the columns {', '.join(names)} of data.prompts, found no {' and no '.join(missing)}")
    return [columns[name] for name in names]
