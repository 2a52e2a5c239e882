"""Rows into tokens: the exact ids, and what is said about a row that is wrong."""

import numpy as np
import pytest
from tiny_data import make_tokenizer
from tiny_images import encoded, pixels
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from pe_rlhf_jax.config import DataConfig
from pe_rlhf_jax.data.encoder import Encoder
from pe_rlhf_jax.data.formats import Reader, Text, TextRow
from pe_rlhf_jax.data.images import find
from pe_rlhf_jax.data.sources import DataError, Row, Skipped

TURNS = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
ANSWER = {"role": "assistant", "content": "Hello ☺"}
TOOL = {"type": "function", "function": {"name": "clock"}}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {}}}


def examples(kind, *values, tokenizer=None, skipped=None, **config):
    tokenizer, skipped = tokenizer or make_tokenizer(), skipped or Skipped()
    rows = [Row(value, f"x.jsonl:{i}") for i, value in enumerate(values, start=1)]
    encoder = Encoder(DataConfig(**config), tokenizer, skipped)
    return getattr(encoder, kind)(getattr(Reader(tokenizer, skipped), kind)(rows))


def test_plain_texts_are_verbatim_and_end_once(tokenizer):
    first, ended = examples("sft", {"prompt": " Q: 1 ", "completion": " é\n"}, {"prompt": "Q", "completion": "A<|end|>"})
    assert tokenizer.decode(first.prompt) == " Q: 1 "
    assert tokenizer.decode(first.response) == " é\n<|end|>"
    assert list(first.response).count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ended.response) == "A<|end|>"
    assert first.prompt.dtype == first.response.dtype == "int32"


@pytest.mark.parametrize(
    "row", [{"messages": [*TURNS, ANSWER]}, {"prompt": TURNS, "completion": [ANSWER]}, {"prompt": TURNS, "completion": ANSWER["content"]}]
)
def test_turns_are_what_the_template_makes_of_the_conversation(tokenizer, row):
    [example] = examples("sft", row)
    whole = tokenizer.apply_chat_template([*TURNS, ANSWER], tokenize=True, return_dict=False)
    assert [*example.prompt, *example.response] == whole
    assert tokenizer.decode(example.response) == "Hello ☺<|end|>"


def test_turns_end_as_the_template_ends_them_and_texts_as_the_tokenizer_does():
    """Gemma's turns end with <end_of_turn>, its texts with <eos>: a policy that answers turns ends with the former."""
    tokenizer = make_tokenizer()
    turn, text = tokenizer.eos_token_id, tokenizer.bos_token_id
    tokenizer.eos_token = tokenizer.bos_token
    rows = [Row({"messages": [*TURNS, ANSWER]}, "x.jsonl:1"), Row({"prompt": "Q", "completion": " A"}, "x.jsonl:2")]
    read = Reader(tokenizer, Skipped()).sft(rows)
    ends = [example.response[-1] for example in Encoder(DataConfig(), tokenizer, Skipped(), end_tokens=(text, turn)).sft(read)]
    assert ends == [turn, text]
    assert Encoder(DataConfig(), tokenizer, Skipped(), end_tokens=(text,)).sft(read)[0].response[-1] == text  # where no sample ends so
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    assert Encoder(DataConfig(), tokenizer, Skipped(), end_tokens=(text, turn)).sft(read)[0].response[-1] == text


def test_a_response_is_written_behind_its_prompt_also_where_texts_begin_with_a_space_of_their_own():
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", "\u2581", "Q", "A", ":", "\n"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["</s>"])
    llama = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    for tokenizer in (llama, make_tokenizer()):
        for response in (" A", "A", "\nA", "\n\nA", ":A", "  A"):
            [row] = examples("sft", {"prompt": "Q:", "completion": response}, tokenizer=tokenizer)
            joint = tokenizer(f"Q:{response}", add_special_tokens=False)["input_ids"]
            assert [*row.prompt, *row.response] == [*joint, tokenizer.eos_token_id], response
    [pair] = examples("preference", {"chosen": " A", "rejected": " Q"}, tokenizer=llama)  # whole texts are verbatim
    assert llama.convert_ids_to_tokens(pair.chosen) == ["\u2581", "\u2581", "A", "</s>"]


def test_templates_are_told_the_same_date_every_day():
    template = "{{ strftime_now('%d %b %Y') }} {% for turn in messages %}{{ turn.content }}{% endfor %}"
    [prompt] = examples("prompts", {"prompt": TURNS}, tokenizer=make_tokenizer(template))
    assert prompt.text.startswith("26 Jul 2024 Be kind.")


def test_preference_forms_agree(tokenizer):
    worse = {"role": "assistant", "content": "No"}
    rendered = "<|start|>system\nBe kind.<|end|><|start|>user\nHi<|end|><|start|>assistant\n"
    forms = [
        {"prompt": TURNS, "chosen": [ANSWER], "rejected": [worse]},
        {"chosen": [*TURNS, ANSWER], "rejected": [*TURNS, worse]},
        {"prompt": "Hi", "chosen": [*TURNS, ANSWER], "rejected": [*TURNS, worse]},  # UltraFeedback's, as published
        {"prompt": rendered, "chosen": ANSWER["content"], "rejected": "No", "margin": 2},
        {"chosen": rendered + ANSWER["content"], "rejected": rendered + "No", "margin": None},
    ]
    made = examples("preference", *forms)
    for example in made:
        assert tokenizer.decode(example.chosen) == rendered + "Hello ☺<|end|>"
        assert tokenizer.decode(example.rejected) == rendered + "No<|end|>"
    assert [example.margin for example in made] == [0.0, 0.0, 0.0, 2.0, 0.0]


HEADS = "{% for turn in messages %}<|start|>{{ turn.role }}\n"
ENDS = "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n"
ANSWERED = {
    "trimmed": (HEADS + "{{ turn.content | trim }}" + ENDS + "{% endif %}", " Blue.\n", "<|start|>assistant\n", "Blue."),
    "as it is": (HEADS + "{{ turn.content }}" + ENDS + "{% endif %}", " Blue. ", "<|start|>assistant\n", " Blue. "),
    "a space before": (  # Idefics 3
        "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        "Blue.",
        "assistant:",
        " Blue.",
    ),
    "a space behind": (  # LLaVA 1.5
        "{% for turn in messages %}{{ turn.role }}: {{ turn.content }} {% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
        "Blue.",
        "assistant:",
        " Blue.",
    ),
    "no thought": (  # Qwen 3
        HEADS + "{% if turn.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ turn.content }}" + ENDS + "{% endif %}",
        "Blue.",
        "<|start|>assistant\n",
        "<think>\n\n</think>\n\nBlue.",
    ),
    "begun by the template": (  # Qwen 3 Thinking
        HEADS + "{% if turn.role == 'assistant' %}<think>\n{{ turn.reasoning_content }}\n</think>\n\n{% endif %}{{ turn.content }}"
        + ENDS + "<think>\n{% endif %}",
        {"content": "Blue.", "reasoning_content": "Sky."},
        "<|start|>assistant\n<think>\n",
        "Sky.\n</think>\n\nBlue.",
    ),
    "begun, but not shown": (  # DeepSeek R1
        HEADS + "{{ (turn.content or '').split('</think>') | last | trim }}" + ENDS + "<think>\n{% endif %}",
        "<think>\nSky.\n</think>\n\nBlue.",
        "<|start|>assistant\n<think>\n",
        "Sky.\n</think>\n\nBlue.",
    ),
    "begun, but not by the answer": (
        HEADS + "{{ (turn.content or '').split('</think>') | last | trim }}" + ENDS + "<think>\n{% endif %}",
        "Blue.",
        "<|start|>assistant\n",
        "Blue.",
    ),
    "a call": (
        HEADS + "{{ turn.content or '' }}{% for call in turn.tool_calls or [] %}call {{ call.function.name }}{% endfor %}"
        + ENDS + "{% endif %}",
        {"content": None, "tool_calls": [CALL]},
        "<|start|>assistant\n",
        "call clock",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERED)
def test_an_answer_is_what_the_template_writes_behind_the_prompt(name):
    template, answer, prompt_ends, response = ANSWERED[name]
    turn = {"role": "assistant"} | ({"content": answer} if isinstance(answer, str) else answer)
    tokenizer = make_tokenizer(template)
    [row] = Reader(tokenizer, Skipped()).sft([Row({"messages": [TURNS[1], turn]}, "x.jsonl:1")])
    assert row.texts[0].prompt.endswith(prompt_ends) and row.texts[0].response == response
    if not name.startswith("begun, but"):
        assert tokenizer.apply_chat_template([TURNS[1], turn], tokenize=False).startswith(row.texts[0].prompt + response)
    [example] = Encoder(DataConfig(), tokenizer, Skipped()).sft([row])
    assert tokenizer.decode(example.response) == response + "<|end|>"


def test_a_prompt_parts_from_a_conversation_between_tokens():
    """`<|start|>` and `<|end|>` begin alike, but are one token each."""
    turn = "{% if turn.role == 'user' %}Q{% endif %}<|end|>{{ turn.content }}"
    tokenizer = make_tokenizer("{% for turn in messages %}" + turn + "{% endfor %}{% if add_generation_prompt %}<|start|>{% endif %}")
    [row] = examples("sft", {"messages": [TURNS[1], ANSWER]}, tokenizer=tokenizer)
    assert (tokenizer.decode(row.prompt), tokenizer.decode(row.response)) == ("Q<|end|>Hi", "<|end|>Hello ☺<|end|>")


def test_templates_are_given_tools_and_the_rows_own_settings():
    template = (
        "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}{% if loud %}!{% endif %}" + make_tokenizer().chat_template
    )
    rows = [
        {"prompt": TURNS, "tools": [TOOL]},
        {"prompt": TURNS, "tools": '[{"function": {"name": "clock"}}]', "chat_template_kwargs": {"loud": True, "soft": None}},
        {"prompt": TURNS, "tools": [], "chat_template_kwargs": None},
    ]
    read = examples("prompts", *rows, tokenizer=make_tokenizer(template))
    assert [row.text.partition("<|start|>")[0] for row in read] == ["[clock]", "[clock]!", ""]
    assert "tools" in read[0].columns  # reward functions see them too
    [row] = examples("sft", {"messages": [*TURNS, ANSWER], "tools": [TOOL]}, tokenizer=make_tokenizer(template))
    assert make_tokenizer().decode(row.prompt).startswith("[clock]<|start|>system")


def test_an_empty_system_turn_is_given_to_the_template(tokenizer):
    [row] = examples("prompts", {"prompt": [{"role": "system", "content": ""}, TURNS[1]]})
    assert row.text == "<|start|>system\n<|end|><|start|>user\nHi<|end|><|start|>assistant\n"


def test_models_with_other_templates_hold_out_the_same_rows():
    rows = [{"messages": [{"role": "user", "content": f"Q{i}"}, ANSWER]} for i in range(3)]
    pairs = [{"prompt": row["messages"][:1], "chosen": "a", "rejected": "b"} for row in rows]
    keys = []
    for template in (make_tokenizer().chat_template, HEADS + "{{ turn.content }}" + ENDS + "{% endif %}"):
        reader = Reader(make_tokenizer(template), Skipped())
        for kind, values in (("sft", rows), ("preference", pairs), ("prompts", pairs)):
            keys.append([row.keys for row in getattr(reader, kind)(Row(value, "x.jsonl:1") for value in values)])
    assert all(found == keys[0] for found in keys) and len(set.union(*keys[0])) == 3


def test_labels_are_zero_or_one_however_written(tokenizer):
    rows = [{"prompt": "Q", "completion": " A", "label": label} for label in (1, 0, True, False, 1.0, 0.0)]
    made = examples("label", *rows, {"messages": [*TURNS, ANSWER], "label": 1})
    assert [example.label for example in made] == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    assert all(type(example.label) is float for example in made)
    assert tokenizer.decode(made[0].tokens) == "Q A<|end|>"
    assert list(made[-1].tokens) == tokenizer.apply_chat_template([*TURNS, ANSWER], tokenize=True, return_dict=False)


def test_groups_are_read_where_the_configuration_names_them(tokenizer):
    rows = [Row({"prompt": "a", "topic": value}, f"x.jsonl:{i}") for i, value in enumerate(["t", 3, "3"], start=1)]
    assert [row.group for row in Reader(tokenizer, Skipped(), "topic").prompts(rows)] == ["t", "3", "3"]
    assert [row.group for row in Reader(tokenizer, Skipped()).prompts(rows)] == [None] * 3
    for value, found in ((None, "found None"), (True, "found True"), (1.5, "found 1.5"), ("", "found ''")):
        with pytest.raises(DataError, match=f"y.jsonl:7: expected the key `topic` .data.group_by. with a text .*{found}"):
            Reader(tokenizer, Skipped(), "topic").prompts([Row({"prompt": "a", "topic": value}, "y.jsonl:7")])
    with pytest.raises(DataError, match="found `prompt`"):
        Reader(tokenizer, Skipped(), "topic").prompts([Row({"prompt": "a"}, "y.jsonl:7")])


def test_rows_go_together_by_group_or_by_what_they_share():
    """Intervals draw them together; a hash stands for a text, and the value of `data.group_by` for itself."""
    answered = [{"prompt": prompt, "completion": text, "label": 1} for prompt, text in (("P", " a"), ("Q", " a"), ("P", " b"))]
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " c"} for row in answered]
    for kind, rows in (("label", answered), ("preference", pairs), ("prompts", answered)):
        first, second, third = (example.group for example in examples(kind, *rows))
        assert first == third != second and len(first) == 16, kind
    wholes = [{"chosen": "x", "rejected": "y"}, {"chosen": "x", "rejected": "z"}, {"chosen": "y", "rejected": "x"}]
    first, second, third = (example.group for example in examples("preference", *wholes))
    assert first == third != second
    rows = [Row({**row, "topic": f"t{i % 2}"}, f"x.jsonl:{i}") for i, row in enumerate(answered)]
    encoder = Encoder(DataConfig(), make_tokenizer(), Skipped())
    for kind in ("label", "prompts"):
        grouped = getattr(encoder, kind)(getattr(Reader(make_tokenizer(), Skipped(), "topic"), kind)(rows))
        assert [example.group for example in grouped] == ["t0", "t1", "t0"]


def test_prompts_about_one_picture_go_together_and_answers_by_their_prompt_too():
    cat, dog = (find(encoded(pixels(seed=seed)), None, "image") for seed in (1, 2))

    def row(prompt, picture, *answers):
        return TextRow("x.jsonl:1", tuple(Text(prompt, answer) for answer in answers or [""]), pictures=(picture,)).together

    assert row("P", cat) == row("Q", cat) != row("P", dog)
    assert row("P", cat, " a") == row("P", cat, " b") != row("Q", cat, " a")
    assert row("P", cat, " a", " b") != row("P", dog, " a", " b")


def test_prompts_keep_text_and_columns(tokenizer):
    plain, chat = examples("prompts", {"prompt": "Say", "answer": 3, "prompt_id": None}, {"prompt": TURNS})
    assert (plain.text, plain.columns) == ("Say", {"answer": 3, "prompt_id": None})
    assert chat.text.endswith("Hi<|end|><|start|>assistant\n") and chat.columns == {}
    for example in (plain, chat):
        assert tokenizer.decode(example.tokens) == example.text


def test_start_token_comes_once_and_only_where_the_model_has_one():
    tokenizer = make_tokenizer("<s>" + make_tokenizer().chat_template, adds_start=True)
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": TURNS, "completion": "b"}, {"prompt": "<s>a", "completion": "b"}]
    for example in examples("sft", *rows, tokenizer=tokenizer):
        assert list(example.prompt).index(tokenizer.bos_token_id) == 0
        assert list(example.prompt).count(tokenizer.bos_token_id) == 1
        assert tokenizer.bos_token_id not in example.response
    [whole] = examples("preference", {"chosen": "a", "rejected": "b"}, tokenizer=tokenizer)
    assert tokenizer.decode(whole.chosen) == "<s>a<|end|>"
    [plain] = examples("sft", rows[0])  # has a <s> too, but does not put it before texts
    assert plain.prompt[0] != tokenizer.bos_token_id


BAD_ROWS = [
    ("prompts", {"prompt": "a", "completions": [1]}, "expected other keys than `completions`, which reward functions are given"),
    ("sft", {"completion": "b"}, "expected the key `prompt`, found `completion`"),
    ("sft", {"prompt": "a"}, "expected the key `completion`, found `prompt`"),
    ("sft", {}, "found no keys"),
    ("sft", {"prompt": None, "completion": "b"}, "expected the key `prompt`, found null there"),
    ("sft", {"prompt": 3, "completion": "b"}, "expected `prompt` to be text or a list of turns, found 3"),
    ("sft", {"prompt": "a", "completion": 3}, "expected `completion` to be text because `prompt` is, found 3"),
    ("sft", {"prompt": "", "completion": "b"}, "expected `prompt` to be text, found none"),
    ("sft", {"prompt": "a", "completion": " \n"}, "expected `completion` to be text, found only white space"),
    ("sft", {"prompt": "a", "completion": "b\ud800"}, "half of a surrogate pair at character 2"),
    ("sft", {"messages": []}, "expected at least one turn in `messages`"),
    ("sft", {"messages": TURNS}, "expected the last turn of `messages` to be the assistant's, found role 'user'"),
    ("sft", {"messages": [ANSWER]}, "expected a turn before the assistant's"),
    ("sft", {"messages": [{"role": "user"}, ANSWER]}, "expected turn 1 of messages to be an object with `role` and `content`"),
    ("sft", {"messages": [{"role": "user", "content": 1}, ANSWER]}, "expected `content of turn 1 of messages` to be text, found 1"),
    ("sft", {"messages": [{"role": "tool", "content": "x"}, ANSWER]}, "chat template refuses the turns of `messages`: no tools here"),
    ("prompts", {"prompt": [*TURNS, ANSWER]}, "to end with another role than the assistant's"),
    ("prompts", {"text": "a"}, "expected the key `prompt`, found `text`"),
    ("label", {"prompt": "a", "completion": "b"}, "expected the key `label`, found `prompt`, `completion`"),
    ("label", {"prompt": "a", "completion": "b", "label": None}, "expected the key `label`, found null there"),
    ("label", {"prompt": "a", "completion": "b", "label": "1"}, "expected `label` to be 0 or 1, or false or true, found '1'"),
    ("label", {"prompt": "a", "completion": "b", "label": 0.5}, "or true, found 0.5"),
    ("label", {"prompt": "a", "completion": "b", "label": 2}, "or true, found 2"),
    ("label", {"prompt": "a", "label": 1}, "expected the key `completion`"),
    ("preference", {"prompt": "a", "chosen": "b"}, "expected the key `rejected`"),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, "found the same text twice"),
    ("preference", {"chosen": "b", "rejected": "c", "margin": "2"}, "expected `margin` to be a number of at least 0, found '2'"),
    ("preference", {"chosen": "b", "rejected": "c", "margin": -1}, "found -1"),
    ("preference", {"chosen": "b", "rejected": "c", "margin": float("nan")}, "found nan"),
    ("preference", {"chosen": "b", "rejected": "c", "margin": True}, "found True"),
    (
        "preference",
        {"prompt": TURNS, "chosen": [*TURNS, ANSWER], "rejected": [*TURNS, {**ANSWER, "content": "no"}]},
        "expected `chosen` to go on where `prompt` ends, found that it begins with the prompt's turns",
    ),
    ("preference", {"prompt": "a", "chosen": [ANSWER], "rejected": "c"}, "expected a turn before the assistant's in `chosen`, found none"),
    (
        "preference",
        {"prompt": "a", "chosen": [*TURNS, ANSWER], "rejected": 3},
        "expected `rejected` to be text because `prompt` is, found 3",
    ),
    ("sft", {"messages": [*TURNS, ANSWER], "tools": "{"}, "expected `tools` to be a list of objects, or its JSON, found '{'"),
    ("sft", {"messages": [*TURNS, ANSWER], "tools": [TOOL]}, "expected a model whose chat template shows `tools`"),
    ("prompts", {"prompt": TURNS, "tools": [TOOL]}, "expected a model whose chat template shows `tools`"),
    (
        "sft",
        {"messages": [*TURNS, {**ANSWER, "tool_calls": [CALL]}]},
        "whose chat template shows `tool_calls` of `messages`, found one that",
    ),
    ("label", {"messages": [*TURNS, {**ANSWER, "thinking": "h"}], "label": 1}, "whose chat template shows `thinking` of `messages`"),
    ("sft", {"messages": [*TURNS, {"role": "assistant"}]}, "expected turn 3 of messages to be an object with `role` and `content`"),
    ("sft", {"messages": [{"role": "user", "content": ""}, ANSWER]}, "expected `content of turn 1 of messages` to be text, found none"),
    ("sft", {"messages": [*TURNS, ANSWER], "chat_template_kwargs": {"tokenize": True}}, "with names of the template's own"),
]


@pytest.mark.parametrize(("kind", "row", "message"), BAD_ROWS, ids=[message[-30:] for _, _, message in BAD_ROWS])
def test_bad_row_is_named(kind, row, message):
    good = {"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d", "label": 1}
    with pytest.raises(DataError) as error:
        examples(kind, good, row)
    assert str(error.value).startswith("x.jsonl:2: ") and message in str(error.value)
    skipped = Skipped(on_error="skip")
    assert len(examples(kind, good, row, good, skipped=skipped)) == 2
    [note] = skipped.notes()
    assert note.startswith("1 row skipped as bad in x.jsonl; the first: x.jsonl:2: ") and message in note


def test_length_limits_are_inclusive_and_count_the_end_token():
    limits = {"max_prompt_length": 3, "max_response_length": 4}
    skipped = Skipped()
    rows = [{"prompt": "123", "completion": "123"}, {"prompt": "1234", "completion": "1"}, {"prompt": "1", "completion": "1234"}]
    assert len(examples("sft", *rows, skipped=skipped, **limits)) == 1
    assert skipped.notes() == ["1 row over max_prompt_length skipped in x.jsonl", "1 row over max_response_length skipped in x.jsonl"]
    with pytest.raises(DataError, match=r"x.jsonl:2: expected at most 3 tokens \(data.max_prompt_length\), found 4"):
        examples("sft", *rows, skipped=Skipped(too_long="error"), **limits)
    # One side over the limit takes the pair out; whole texts have the sum of both limits.
    assert not examples("preference", {"prompt": "1", "chosen": "1", "rejected": "1234"}, **limits)
    assert len(examples("preference", {"chosen": "123456", "rejected": "1"}, **limits)) == 1
    assert not examples("preference", {"chosen": "1", "rejected": "1234567"}, **limits)


def test_truncated_prompts_keep_their_end_and_are_counted():
    limits: dict = {"max_prompt_length": 3, "max_response_length": 4, "too_long": "truncate"}
    skipped = Skipped(too_long="truncate")
    rows = [{"prompt": "123", "completion": "1"}, {"prompt": "12345", "completion": "1"}, {"prompt": "1", "completion": "1234"}]
    whole, cut = examples("sft", *rows, skipped=skipped, **limits)
    end = examples("sft", {"prompt": "345", "completion": "1"})[0]
    np.testing.assert_array_equal(cut.prompt, end.prompt)
    np.testing.assert_array_equal(cut.response, whole.response)
    assert skipped.notes() == [
        "1 row over max_response_length skipped in x.jsonl",
        "1 row with the start of the prompt cut off (max_prompt_length) in x.jsonl",
    ]
    # Both sides of a pair keep the same prompt; a whole text has none that could be cut; a start token stays in front.
    [pair] = examples("preference", {"prompt": "12345", "chosen": "1", "rejected": "2"}, **limits)
    np.testing.assert_array_equal(pair.chosen[:3], end.prompt)
    np.testing.assert_array_equal(pair.rejected[:3], end.prompt)
    assert not examples("preference", {"chosen": "1", "rejected": "1234567"}, **limits)
    started = make_tokenizer(adds_start=True)
    [first] = examples("prompts", {"prompt": "12345"}, tokenizer=started, **limits)
    assert list(first.tokens) == [started.bos_token_id, *examples("prompts", {"prompt": "45"}, tokenizer=started)[0].tokens[1:]]


def test_templates_without_a_default_are_none_where_they_are_not_needed():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"tool_use": "x", "rag": "y"}
    [row] = examples("sft", {"prompt": "Q", "completion": " A"}, tokenizer=tokenizer)
    assert tokenizer.decode(row.response) == " A<|end|>"
    with pytest.raises(DataError, match="has no chat template"):
        examples("prompts", {"prompt": TURNS}, tokenizer=tokenizer)


def test_turns_without_a_template():
    with pytest.raises(DataError, match="no chat template"):
        examples("prompts", {"prompt": TURNS}, tokenizer=make_tokenizer(chat_template=None), skipped=Skipped(on_error="skip"))
