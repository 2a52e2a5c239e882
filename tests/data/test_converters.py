"""Small files in the original formats of the paper's data sets, read as the rows that the pipeline trains on."""

import json
import math
import typing

import pytest

from pe_rlhf_jax.config import DataConfig, FilesConfig, FormatName
from pe_rlhf_jax.data import load
from pe_rlhf_jax.data.converters import FORMATS, READERS, convert
from pe_rlhf_jax.data.formats import Kind, Reader
from pe_rlhf_jax.data.sources import DataError, Row, Skipped, read

COMPARISON = {
    "info": {"id": "t3_1", "post": "My dog ate my\nhomework.\n", "title": "Dog [17m]", "subreddit": "r/pets"},
    "split": "train",
    "summaries": [{"text": " Dog ate it. ", "policy": "sup1", "note": "ok"}, {"text": " A dog.", "policy": "ref", "note": None}],
    "choice": 1,
    "worker": "w",
    "batch": "batch3",
    "extra": {"confidence": 6},
}
POST = {"id": "t3_2", "subreddit": "pets", "title": "Dog", "post": "It barks.", "summary": "Loud dog."}
HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: How?\n\nAssistant: No way.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: How?\n\nAssistant: Not so.\n",
}
SHP = {
    "post_id": "p1",
    "domain": "askculinary_train",
    "history": "Why salt?\n",
    "human_ref_A": "Taste.",
    "human_ref_B": "Because.",
    "labels": 0,
    "score_A": 5,
    "score_B": 20,
    "score_ratio": 4.0,
}
BOLT = {"id": 7, "prompt": "A: hi\nB: hello\n", "summary": "They greet."}
CONTEXT = [
    {"role": "agent", "text": "Welcome."},
    {"role": "user", "text": "a latte, por favor ☕ "},
    {"role": "agent", "api": {"get_menu_items": {"query": "latte ☕"}}},
    {"role": "api", "response": {"get_menu_items": {"items": []}}},
]
CONTEXT_LINES = (
    "Agent: Welcome.\nUser: a latte, por favor ☕\n"
    'Call: {"get_menu_items": {"query": "latte ☕"}}\nResult: {"get_menu_items": {"items": []}}\n'
)
RATED = {
    "conversation_id": "dlg-1",
    "context": json.dumps(CONTEXT),
    "generation": json.dumps({"role": "agent", "text": "We have none. "}),
    "reward": 0.0,
}
RATED_LINES = {"id": "dlg-1", "prompt": CONTEXT_LINES, "response": "Agent: We have none.", "reward": 0.0}
MENU, ORDER = '{"items":[{"name":"Crème"}]}', '{"order_id":"7"}'  # written as in the data, without spaces


def annotations(*names_and_values):
    return [{"name": name, "value": value, "context": "api_call_0"} for name, value in names_and_values]


# Taskmaster-4: an utterance's calls in order, name, request, name, response; of the calls without arguments, some have no request.
COFFEE = {
    "conversation_id": "dlg-2",
    "utterances": [
        {"index": 0, "speaker": "ASSISTANT", "text": "Welcome", "annotations": []},
        {
            "index": 1,
            "speaker": "user",
            "text": "one mocha ",
            "segments": [],
            "annotations": annotations(
                ("api_call", "show_menu"),
                ("api_response", "show_menu"),
                ("response", MENU),
                ("api_call", "add_order_item"),
                ("request", '{"id": "m-1","quantity": "1"}'),
                ("api_response", "add_order_item"),
                ("response", ORDER),
            ),
        },
        {"index": 2, "speaker": "assistant", "text": "Is that all?", "annotations": []},
        {"index": 3, "speaker": "user", "text": "yes"},
        {"index": 4, "speaker": "assistant", "text": "Coming up."},
    ],
}
COFFEE_TURNS = [
    "Agent: Welcome",
    "User: one mocha",
    'Call: {"show_menu": {}}',
    'Result: {"show_menu": {"items": [{"name": "Crème"}]}}',
    'Call: {"add_order_item": {"id": "m-1", "quantity": "1"}}',
    'Result: {"add_order_item": {"order_id": "7"}}',
    "Agent: Is that all?",
    "User: yes",
    "Agent: Coming up.",
]
# Taskmaster-3: an utterance's calls in order; several values of a result are numbered.
SHOWTIMES = {
    "index": 0,
    "name": "find_showtimes",
    "args": {"name.movie": "Mulan"},
    "response": {"time.showing_1": "4pm", "time.showing_2": "6pm", "name.movie": "Mulan"},
}
BOOK = {"index": 0, "name": "book", "args": {}, "response": {"status": "no", "status_1": "full"}}  # no list: the name is taken
TICKETS = {
    "conversation_id": "dlg-3",
    "utterances": [
        {"index": 0, "speaker": "user", "text": "Mulan?", "segments": []},
        {"index": 1, "speaker": "assistant", "text": "Let me look.", "apis": [SHOWTIMES, BOOK]},
        {"index": 2, "speaker": "assistant", "text": "At 4pm or 6pm.", "apis": []},
    ],
}
TICKETS_TURNS = [
    "User: Mulan?",
    "Agent: Let me look.",
    'Call: {"find_showtimes": {"name.movie": "Mulan"}}',
    'Result: {"find_showtimes": {"time.showing": ["4pm", "6pm"], "name.movie": "Mulan"}}',
    'Call: {"book": {}}',
    'Result: {"book": {"status": "no", "status_1": "full"}}',
    "Agent: At 4pm or 6pm.",
]


def learned(turns, *ends):
    """A dialog's rows, whose responses are the turns with these numbers."""
    opening = next(turn for turn in turns if turn.startswith("User: ")).removeprefix("User: ")
    return [{"prompt": "".join(f"{turn}\n" for turn in turns[:end]), "completion": turns[end], "conversation": opening} for end in ends]


TALK = "a latte, por favor ☕"

PET_PROMPT = "SUBREDDIT: r/pets\n\nTITLE: Dog [17m]\n\nPOST: My dog ate my\nhomework.\n\nTL;DR:"
POST_PROMPT = "SUBREDDIT: r/pets\n\nTITLE: Dog\n\nPOST: It barks.\n\nTL;DR:"
HH_PROMPT = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: How?\n\nAssistant:"
SHP_PROMPT = "POST: Why salt?\n\nRESPONSE:"
SHP_COLUMNS = {"post_id": "p1", "domain": "askculinary_train"}
BOLT_PROMPT = "POST: A: hi\nB: hello\n\nTL;DR:"
CASES: dict[tuple[str, str], tuple[list, list]] = {
    ("openai-tldr-comparisons", "preference"): (
        [COMPARISON, {**COMPARISON, "info": {"post": "x", "title": None}, "choice": 0}],
        [
            {"prompt": PET_PROMPT, "chosen": " A dog.", "rejected": " Dog ate it.", "post_id": "t3_1"},
            {"prompt": "POST: x\n\nTL;DR:", "chosen": " Dog ate it.", "rejected": " A dog.", "post_id": None},
        ],
    ),
    ("openai-tldr-sft", "sft"): ([POST], [{"prompt": POST_PROMPT, "completion": " Loud dog.", "post_id": "t3_2"}]),
    ("openai-tldr-sft", "prompts"): ([POST], [{"prompt": POST_PROMPT, "reference": "Loud dog.", "post_id": "t3_2"}]),
    ("anthropic-hh", "preference"): (
        [
            HH,
            # the sides part before the last turn, and one begins like the other's name
            {"chosen": "\n\nHuman: Hi\n\nAssistant: A\n\nHuman: B\n\nAssistant: C", "rejected": "\n\nHuman: Hi\n\nAssistant: A2"},
            {"chosen": "\n\nHuman: Hi\n\nAssistant: A\n\nAssistant: C", "rejected": "\n\nHuman: Hi\n\nAssistant: A\n\nAssistants"},
        ],
        [
            {"prompt": HH_PROMPT, "chosen": " No way.", "rejected": " Not so."},
            {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " A\n\nHuman: B\n\nAssistant: C", "rejected": " A2"},
            {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " A\n\nAssistant: C", "rejected": " A\n\nAssistants"},
        ],
    ),
    ("anthropic-hh", "sft"): ([HH], [{"prompt": HH_PROMPT, "completion": " No way."}]),
    ("anthropic-hh", "prompts"): ([HH], [{"prompt": HH_PROMPT}]),
    ("shp", "preference"): (
        [SHP, {**SHP, "labels": 1, "score_ratio": 1}],
        [
            {"prompt": SHP_PROMPT, "chosen": " Because.", "rejected": " Taste.", "margin": math.log(4), **SHP_COLUMNS},
            {"prompt": SHP_PROMPT, "chosen": " Taste.", "rejected": " Because.", "margin": 0.0, **SHP_COLUMNS},
        ],
    ),
    ("shp", "sft"): ([SHP], [{"prompt": SHP_PROMPT, "completion": " Because.", **SHP_COLUMNS}]),
    ("shp", "prompts"): ([SHP], [{"prompt": SHP_PROMPT, "reference": "Because.", **SHP_COLUMNS}]),
    ("bolt", "sft"): ([BOLT], [{"prompt": BOLT_PROMPT, "completion": " They greet.", "post_id": 7}]),
    ("bolt", "prompts"): ([BOLT], [{"prompt": BOLT_PROMPT, "reference": "They greet.", "post_id": 7}]),
    ("taskmaster", "label"): (
        [RATED, RATED_LINES, {**RATED, "generation": json.dumps({"role": "agent", "api": {"pay": {}}}), "reward": 1.0}],
        [
            {"prompt": CONTEXT_LINES, "completion": "Agent: We have none.", "label": 0.0, "conversation": TALK},
            {"prompt": CONTEXT_LINES, "completion": "Agent: We have none.", "label": 0.0, "conversation": TALK},
            {"prompt": CONTEXT_LINES, "completion": 'Call: {"pay": {}}', "label": 1.0, "conversation": TALK},
        ],
    ),
    ("taskmaster", "prompts"): (
        [RATED, RATED_LINES],
        [{"prompt": CONTEXT_LINES, "conversation": TALK}] * 2,
    ),
    ("taskmaster", "sft"): (
        [COFFEE, TICKETS, {"prompt": "User: hi\n", "response": "Agent: Hi."}],
        [
            *learned(COFFEE_TURNS, 2, 4, 6, 8),  # not the welcome, which answers nothing
            *learned(TICKETS_TURNS, 1, 2, 4, 6),
            {"prompt": "User: hi\n", "completion": "Agent: Hi.", "conversation": "hi"},
        ],
    ),
}


def test_every_format_and_kind_has_a_case():
    assert set(FORMATS) == set(typing.get_args(FormatName))
    # Formats with readers of their own have test files of their own.
    assert set(READERS) == {"android-control", "vqa"}
    assert set(CASES) == {(name, kind) for name, kinds in FORMATS.items() for kind in kinds if name not in READERS}


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_original_rows_become_ours(name, kind, jsonl, tokenizer):
    original, expected = CASES[name, kind]
    rows = list(convert(name, kind, read(jsonl(original), Skipped()), Skipped()))
    assert [row.values for row in rows] == expected
    lines = {int(row.place.rpartition(":")[2]) for row in rows}
    assert lines == set(range(1, len(original) + 1))
    reader = Reader(tokenizer, Skipped(), "conversation" if name == "taskmaster" else None)
    assert len(getattr(reader, kind)(rows)) == len(expected)  # the pipeline takes them as they are


def user(**calls):
    return {"utterances": [{"speaker": "user", "text": "a", **calls}]}


BAD = [
    ("openai-tldr-comparisons", "preference", {**COMPARISON, "choice": 2}, "expected two `summaries` and `choice` 0 or 1, found 2 and 2"),
    ("openai-tldr-comparisons", "preference", {**COMPARISON, "choice": None}, "expected `choice` with a whole number, found None"),
    ("openai-tldr-comparisons", "preference", {**COMPARISON, "summaries": [3, 4]}, "expected objects in `summaries`, found 3"),
    ("openai-tldr-comparisons", "preference", {**COMPARISON, "info": {"article": "x"}}, "expected `post` with text, found `article`"),
    ("openai-tldr-sft", "sft", {"post": "a", "title": 3, "summary": "b"}, "expected `title` with text, found 3"),
    ("openai-tldr-sft", "sft", {}, "found no keys"),
    ("anthropic-hh", "preference", {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, "to begin alike up to a '\\n\\nAssistant:'"),
    ("anthropic-hh", "preference", {**HH, "rejected": "\n\nHuman: Ho\n\nAssistant: x"}, "to begin alike"),
    ("shp", "preference", {**SHP, "labels": 2}, "expected `labels` 0 or 1 and `score_ratio` of at least 1, found 2 and 4.0"),
    ("shp", "preference", {**SHP, "score_ratio": 0.5}, "found 0 and 0.5"),
    ("shp", "preference", {**SHP, "score_ratio": True}, "expected `score_ratio` with a number, found True"),
    ("bolt", "sft", {"prompt": "a"}, "expected `summary` with text"),
    ("taskmaster", "label", {**RATED, "context": "[{]"}, "expected `context` to be a text that holds JSON, found '[{]'"),
    ("taskmaster", "label", {**RATED, "context": "{}"}, "expected `context` with a list, found {}"),
    ("taskmaster", "label", {**RATED, "context": '[{"role": "api"}]'}, "expected a turn with `role` user or agent and `text`"),
    ("taskmaster", "label", {**RATED, "context": "[]"}, "expected a turn of the user, found none"),
    ("taskmaster", "sft", {"utterances": [{"speaker": "bot", "text": "a"}]}, "expected `speaker` user or assistant, found 'bot'"),
    ("taskmaster", "sft", user(apis=[{"name": "book", "args": []}]), "expected `args` with an object, found []"),
    ("taskmaster", "sft", user(apis=[{"name": "book", "args": {}}]), "expected `response` with an object, found `name`, `args`"),
    ("taskmaster", "sft", user(annotations=annotations(("request", "{}"))), "a `request` after its `api_call`"),
    ("taskmaster", "sft", user(annotations=annotations(("api_call", "a"), *2 * [("request", '{"b": 1}')])), "after its `api_call`"),
    ("taskmaster", "sft", user(annotations=annotations(("api_call", "a"), ("response", "{}"))), "after its `api_response`, found response"),
    # As in some of the dialogs: a name in doubled quotation marks.
    ("taskmaster", "sft", user(annotations=annotations(("api_call", "a"), ("request", '{"id":""m-1""}'))), "to be a text that holds JSON"),
]


@pytest.mark.parametrize(("name", "kind", "row", "message"), BAD, ids=[f"{case[0]} {case[3][-24:]}" for case in BAD])
def test_bad_original_row_is_named(name, kind, row, message):
    good = CASES[name, kind][0][0]
    rows = [Row(good, "x.jsonl:1"), Row(row, "x.jsonl:2")]
    with pytest.raises(DataError) as error:
        list(convert(name, kind, rows, Skipped()))
    assert str(error.value).startswith("x.jsonl:2: ") and message in str(error.value) and f"(format {name})" in str(error.value)
    skipped = Skipped(on_error="skip")
    assert {made.place for made in convert(name, kind, rows, skipped)} == {"x.jsonl:1"}
    assert "1 row skipped as bad in x.jsonl" in skipped.notes()[0]


def test_an_empty_or_equal_answer_is_a_bad_row(jsonl, tokenizer):
    """The original HH files have empty answers."""
    rows = [{"chosen": HH["chosen"].replace("How", f"How {i}"), "rejected": HH["rejected"].replace("How", f"How {i}")} for i in range(30)]
    empty = {**HH, "rejected": HH_PROMPT}
    equal = {**HH, "rejected": HH["chosen"]}
    files = FilesConfig(train=[jsonl([*rows, empty, equal])], format="anthropic-hh")
    with pytest.raises(DataError, match=r"rows.jsonl:31: expected `rejected` to be text, found none"):
        load(DataConfig(preference=files), tokenizer, needs={"preference"})
    data = load(DataConfig(preference=files, on_error="skip"), tokenizer, needs={"preference"})
    assert len(data.preference.train) + len(data.preference.validation) == 30
    assert data.notes[0].startswith("2 rows skipped as bad")


def test_ratings_of_one_dialog_stay_together(tmp_path, tokenizer):
    """The original ratings: a JSON list, in which every prefix of a dialog has an id of its own."""
    rows = []
    for talk in range(20):
        turns = [{"role": "user", "text": f"talk {talk}"}]
        for step in range(4):
            generation = json.dumps({"role": "agent", "text": f"step {step}"})
            rows.append({"conversation_id": f"{talk} {step}", "context": json.dumps(turns), "generation": generation, "reward": step % 2})
            turns = [*turns, json.loads(generation), {"role": "user", "text": "go on"}]
    path = tmp_path / "reward_00.json"
    path.write_text(json.dumps(rows, indent=4))
    files = FilesConfig(train=[str(path)], format="taskmaster")
    kinds: set[Kind] = {"label", "prompts"}
    data = load(DataConfig(label=files, prompts=files, group_by="conversation", validation_share=0.2), tokenizer, needs=kinds)
    talks = [{tokenizer.decode(e.tokens).split("\n")[0] for e in half} for half in (data.label.train, data.label.validation)]
    assert talks[0].isdisjoint(talks[1]) and len(data.label.validation) == 4 * len(talks[1]) > 0
    assert {e.text.split("\n")[0] for e in data.prompts.validation} == talks[1]
