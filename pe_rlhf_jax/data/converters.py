"""From the original formats of the paper's data sets to our rows: `data.KIND.format` names one, and the keys of an original row become
`prompt`, `completion`, `chosen`, `rejected`, `margin`, `label` and a few columns. configs/DATA.md says where the originals come from.

A format gives rows of some kinds only. One original row may become several, which keep its place for error messages. The prompts
continue in their responses: a response starts with the space that separates the two, because tokens of both are made apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args

from pe_rlhf_jax.config import FormatName
from pe_rlhf_jax.data import android_control, vqa
from pe_rlhf_jax.data.formats import Kind
from pe_rlhf_jax.data.sources import BadRow, DataError, Row, Skipped

Values = dict[str, Any]
Convert = Callable[[Values], list[Values]]


def convert(name: FormatName, kind: Kind, rows: Iterable[Row], skipped: Skipped) -> Iterator[Row]:
    """Rows of one kind out of rows of an original format. Bad rows go to `skipped`, which raises DataError or counts them.

    Raises:
        DataError: the format has no rows of this kind.
    """
    if kind not in FORMATS[name]:
        raise DataError(f"data.{kind}.format: {name} gives rows for {' and '.join(FORMATS[name])}, not for {kind}")
    make = FORMATS[name][kind]
    for row in rows:
        try:
            made = make(row.values)
        except BadRow as problem:
            skipped.bad(row.place, f"{problem} (format {name})")
            continue
        yield from (Row(values, row.place) for values in made)


# --- Reddit TL;DR, Stiennon et al. 2020, "Learning to summarize from human feedback" ---


def _post(post: Values) -> str:
    """The query of Stiennon et al., table 15 and their `format_str`."""
    title = _get(post, "title", str, optional=True)
    subreddit = _get(post, "subreddit", str, optional=True)
    lines = [f"SUBREDDIT: r/{subreddit.removeprefix('r/')}"] if subreddit else []
    lines += [f"TITLE: {title.strip()}"] if title else []
    return "\n\n".join([*lines, f"POST: {_get(post, 'post', str).strip()}", "TL;DR:"])


def _tldr_preference(row: Values) -> list[Values]:
    summaries = _get(row, "summaries", list)
    choice = _get(row, "choice", int)
    if len(summaries) != 2 or choice not in (0, 1):
        raise BadRow(f"expected two `summaries` and `choice` 0 or 1, found {len(summaries)} and {choice}")
    texts = [_continuation(_get(_object("summaries", summary), "text", str)) for summary in summaries]
    info = _get(row, "info", dict)
    return [{"prompt": _post(info), "chosen": texts[choice], "rejected": texts[1 - choice], "post_id": info.get("id")}]


def _tldr_sft(row: Values) -> list[Values]:
    return [{"prompt": _post(row), "completion": _continuation(_get(row, "summary", str)), "post_id": row.get("id")}]


def _tldr_prompt(row: Values) -> list[Values]:
    return [{"prompt": _post(row), "reference": _get(row, "summary", str).strip(), "post_id": row.get("id")}]


# --- BOLT English SMS/Chat, LDC2018T19: licensed, so the user writes `prompt` (the conversation) and `summary` ---


def _bolt_sft(row: Values) -> list[Values]:
    # The form of a TL;DR post, because the reward model is TL;DR's.
    return _tldr_sft({"post": _get(row, "prompt", str), "summary": row.get("summary"), "id": row.get("id")})


def _bolt_prompt(row: Values) -> list[Values]:
    return _tldr_prompt({"post": _get(row, "prompt", str), "summary": row.get("summary"), "id": row.get("id")})


# --- Anthropic HH, Bai et al. 2022, "Training a Helpful and Harmless Assistant" ---

_ASSISTANT = "\n\nAssistant:"


def _hh(row: Values) -> tuple[str, str, str]:
    """The common prompt, up to and including an "Assistant:", and both continuations; of most rows, one turn each."""
    chosen, rejected = _get(row, "chosen", str), _get(row, "rejected", str)
    common = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
    end = chosen.rfind(_ASSISTANT, 0, common) + len(_ASSISTANT)
    if end < len(_ASSISTANT):
        raise BadRow(f"expected `chosen` and `rejected` to begin alike up to a {_ASSISTANT!r}, found {_shown(chosen)}, {_shown(rejected)}")
    return chosen[:end], chosen[end:].rstrip(), rejected[end:].rstrip()


def _hh_preference(row: Values) -> list[Values]:
    prompt, chosen, rejected = _hh(row)
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]


def _hh_sft(row: Values) -> list[Values]:
    prompt, chosen, _ = _hh(row)
    return [{"prompt": prompt, "completion": chosen}]


def _hh_prompt(row: Values) -> list[Values]:
    return [{"prompt": _hh(row)[0]}]


# --- Stanford Human Preferences, Ethayarajh et al. 2022 ---


def _shp(row: Values) -> tuple[str, str, str, float]:
    """Prompt, better and worse comment, and the logarithm of how many times as many votes the better one has."""
    label, ratio = _get(row, "labels", int), _get(row, "score_ratio", (int, float))
    if label not in (0, 1) or not ratio >= 1:
        raise BadRow(f"expected `labels` 0 or 1 and `score_ratio` of at least 1, found {label} and {ratio}")
    a, b = (_continuation(_get(row, f"human_ref_{side}", str)) for side in "AB")
    prompt = f"POST: {_get(row, 'history', str).strip()}\n\nRESPONSE:"
    better, worse = (a, b) if label else (b, a)  # 1: A has more votes
    return prompt, better, worse, math.log(ratio)


def _shp_preference(row: Values) -> list[Values]:
    prompt, chosen, rejected, margin = _shp(row)
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": margin, **_shp_columns(row)}]


def _shp_sft(row: Values) -> list[Values]:
    prompt, better, _, _ = _shp(row)
    return [{"prompt": prompt, "completion": better, **_shp_columns(row)}]


def _shp_prompt(row: Values) -> list[Values]:
    prompt, better, _, _ = _shp(row)
    return [{"prompt": prompt, "reference": better.strip(), **_shp_columns(row)}]


def _shp_columns(row: Values) -> Values:
    return {"post_id": row.get("post_id"), "domain": row.get("domain")}


# --- Taskmaster-3 and -4, Byrne et al.: ratings of single responses (the paper's first version), and the dialogs ---


def _taskmaster_label(row: Values) -> list[Values]:
    prompt, turns = _context(row)
    completion = _line(_parsed(row, "generation", dict)) if "context" in row else _get(row, "response", str)
    label = _get(row, "reward", (int, float))
    return [{"prompt": prompt, "completion": completion, "label": label, "conversation": _conversation(turns)}]


def _taskmaster_prompt(row: Values) -> list[Values]:
    prompt, turns = _context(row)
    return [{"prompt": prompt, "conversation": _conversation(turns)}]


def _taskmaster_sft(row: Values) -> list[Values]:
    """Everything the agent of a dialog says, and every call it makes, after all that came before. Or one row with `prompt` and
    `response`.
    """
    if "utterances" not in row:
        prompt, turns = _context(row)
        return [{"prompt": prompt, "completion": _get(row, "response", str), "conversation": _conversation(turns)}]
    turns = []
    for utterance in _get(row, "utterances", list):
        utterance = _object("utterances", utterance)
        speaker = {"user": "User", "assistant": "Agent", "agent": "Agent"}.get(_get(utterance, "speaker", str).lower())
        if speaker is None:
            raise BadRow(f"expected `speaker` user or assistant, found {_shown(utterance['speaker'])}")
        turns.append(f"{speaker}: {_get(utterance, 'text', str).strip()}")
        turns += [_line(turn) for turn in (*_tickets_calls(utterance), *_coffee_calls(utterance))]
    ends = [i for i, turn in enumerate(turns) if turn.startswith(("Agent: ", "Call: ")) and any(t.startswith("User: ") for t in turns[:i])]
    return [
        {"prompt": "".join(f"{turn}\n" for turn in turns[:i]), "completion": turns[i], "conversation": _conversation(turns)} for i in ends
    ]


def _tickets_calls(utterance: Values) -> list[Values]:
    """The calls after an utterance of Taskmaster-3 and their results, as turns of a rated context."""
    turns: list[Values] = []
    for api in _get(utterance, "apis", list, optional=True) or []:
        name = _get(_object("apis", api), "name", str)
        turns += [{"api": {name: _get(api, "args", dict)}}, {"response": {name: _listed(_get(api, "response", dict))}}]
    return turns


def _listed(response: Values) -> Values:
    """`name.movie_1` and `name.movie_2`, as the dialogs have them, in a list `name.movie`, as the rated contexts have them."""
    made: Values = {}
    for key, value in response.items():
        name, _, number = key.rpartition("_")
        if number.isdecimal() and name and name not in response:
            made.setdefault(name, []).append(value)
        else:
            made[key] = value
    return made


def _coffee_calls(utterance: Values) -> list[Values]:
    """The calls after an utterance of Taskmaster-4 and their results, as turns of a rated context. There, a name is followed by its
    values, `api_call` by `request` and `api_response` by `response`; a call without arguments may have no `request`.
    """
    turns: list[Values] = []
    for annotation in _get(utterance, "annotations", list, optional=True) or []:
        kind, value = (_get(_object("annotations", annotation), key, str) for key in ("name", "value"))
        key = "api" if kind in ("api_call", "request") else "response"
        if kind in ("api_call", "api_response"):
            turns.append({key: {value: {}}})
        elif kind in ("request", "response") and turns and key in turns[-1] and not any(turns[-1][key].values()):
            turns[-1] = {key: dict.fromkeys(turns[-1][key], _parsed(annotation, "value", dict))}
        else:
            raise BadRow(
                f"expected `annotations` of calls, a `request` after its `api_call`, a `response` after its `api_response`, found {kind}"
            )
    return turns


def _context(row: Values) -> tuple[str, list[str]]:
    """The prompt of an original row (`context`: JSON in a text) or of one whose turns are lines already, and its lines."""
    if "context" in row:
        lines = [_line(_object("context", turn)) for turn in _parsed(row, "context", list)]
        return "".join(f"{line}\n" for line in lines), lines
    prompt = _get(row, "prompt", str)
    return prompt, prompt.splitlines()


def _line(turn: Values) -> str:
    """One turn as a line: what user and agent say, the agent's call of the ordering system as JSON, and the system's answer."""
    if "text" in turn:
        speaker = {"user": "User", "agent": "Agent"}.get(_get(turn, "role", str), "")
        if speaker:
            return f"{speaker}: {_get(turn, 'text', str).strip()}"
    for key, name in (("api", "Call"), ("response", "Result")):
        if key in turn:
            return f"{name}: {json.dumps(turn[key], ensure_ascii=False)}"
    raise BadRow(f"expected a turn with `role` user or agent and `text`, with `api` or with `response`, found {_shown(turn)}")


def _conversation(turns: list[str]) -> str:
    """What the user said first. The ids of the rated rows differ within a dialog; its opening does not."""
    first = next((turn for turn in turns if turn.startswith("User: ")), None)
    if first is None:
        raise BadRow("expected a turn of the user, found none")
    return first.removeprefix("User: ").strip()


FORMATS: dict[FormatName, dict[Kind, Convert]] = {
    "android-control": {
        "sft": android_control.sft,
        "preference": android_control.preference,
        "label": android_control.label,
        "prompts": android_control.prompts,
    },
    "anthropic-hh": {"sft": _hh_sft, "preference": _hh_preference, "prompts": _hh_prompt},
    "bolt": {"sft": _bolt_sft, "prompts": _bolt_prompt},
    "openai-tldr-comparisons": {"preference": _tldr_preference},
    "openai-tldr-sft": {"sft": _tldr_sft, "prompts": _tldr_prompt},
    "shp": {"sft": _shp_sft, "preference": _shp_preference, "prompts": _shp_prompt},
    "taskmaster": {"sft": _taskmaster_sft, "label": _taskmaster_label, "prompts": _taskmaster_prompt},
    "vqa": {"sft": vqa.sft, "preference": vqa.preference, "label": vqa.label, "prompts": vqa.prompts},
}
"""Which kinds of rows each format gives, and how."""
assert set(FORMATS) == set(get_args(FormatName))

READERS: dict[FormatName, Callable[[str, Skipped], Iterator[Row]]] = {"android-control": android_control.read, "vqa": vqa.read}
"""Formats whose files are read together, or are of a kind of their own: what a source is, they say."""


def _get(values: Values, key: str, kind: type | tuple[type, ...], optional: bool = False) -> Any:
    value = values.get(key)
    if optional and value is None:
        return None
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = {str: "text", list: "a list", dict: "an object", int: "a whole number"}.get(kind, "a number")  # type: ignore[arg-type]
        found = _shown(value) if key in values else ", ".join(f"`{k}`" for k in values) or "no keys"
        raise BadRow(f"expected `{key}` with {wanted}, found {found}")
    return value


def _object(key: str, value: Any) -> Values:
    if not isinstance(value, dict):
        raise BadRow(f"expected objects in `{key}`, found {_shown(value)}")
    return value


def _parsed(values: Values, key: str, kind: type) -> Any:
    """A value that was written as JSON into a text."""
    text = _get(values, key, str)
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"expected `{key}` to be a text that holds JSON, found {_shown(text)} ({error})") from error
    return _get({key: parsed}, key, kind)


def _continuation(text: str) -> str:
    """One space, and the text without white space around it."""
    return f" {text.strip()}" if text.strip() else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
