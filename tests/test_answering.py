"""A conversation: history, turns, its end; and answers shown while they are written. (Those of a real run are in the end-to-end tests.)"""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from tiny_data import make_tokenizer
from tiny_gguf import hf_tensors, write_gguf

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.answering import Answerer, _to_answer, additions, chat, show
from pe_rlhf_jax.checkpoint.gguf import GGUFFile
from pe_rlhf_jax.checkpoint.tokenizer import tokenizer_from_gguf
from pe_rlhf_jax.config import ConfigError, DataConfig, MeshConfig, SamplingConfig


class Parrot:
    """Says the last user turn again, and remembers what it was asked."""

    def __init__(self, chat_template="given"):
        self.asked: list[str] = []
        self.images: list[Path] = []
        self.backbone = SimpleNamespace(tokenizer=SimpleNamespace(chat_template=chat_template))

    def stream(self, turns, images):
        self.asked.append("|".join(f"{turn['role']}:{turn['content']}" for turn in turns))
        self.images = list(images)
        last = turns[-1]["content"]
        if last == "silence":
            yield from [("reference", "no"), ("policy", " \n")]
            return
        yield from [("reference", ""), ("reference", "old"), ("reference", f" {last}")]
        yield from [("policy", ""), ("policy", " "), ("policy", "new "), ("policy", f"{last}\n")]


class BeforeRL(Parrot):
    """One model alone."""

    def stream(self, turns, images):
        yield from [piece for piece in super().stream(turns, images) if piece[0] == "reference"]


def talk(parrot, *lines: str, end=EOFError, images=()) -> str:
    said, shown = iter(lines), io.StringIO()

    def read() -> str:
        try:
            return next(said)
        except StopIteration:
            raise end from None

    chat(parrot, read, Console(file=shown), images)
    return shown.getvalue()


def test_before_rl_the_one_model_has_the_history():
    parrot = BeforeRL()
    assert talk(parrot, "one", "two") == "reference: old one\nreference: old two\n\n"
    assert parrot.asked == ["user:one", "user:one|assistant:old one|user:two"]


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_turns_follow_each_other_and_the_policys_answer_is_the_history(end):
    parrot = Parrot()
    shown = talk(parrot, "one", "  ", "two", end=end)
    assert parrot.asked == ["user:one", "user:one|assistant: new one\n|user:two"]
    assert shown == "reference: old one\npolicy: new one\nreference: old two\npolicy: new two\n\n"


def test_every_turn_is_asked_with_the_pictures():
    parrot = Parrot()
    talk(parrot, "one", "two", images=[Path("a.png")])
    assert parrot.asked[1:] and parrot.images == [Path("a.png")]


def test_what_got_no_answer_is_not_in_the_history():
    parrot = Parrot()
    talk(parrot, "silence", "two")
    assert parrot.asked == ["user:silence", "user:two"]


def test_an_answer_can_be_interrupted():
    class Interrupted(Parrot):
        def stream(self, turns, images):
            yield from [("reference", ""), ("reference", "half")]
            raise KeyboardInterrupt

    assert talk(Interrupted(), "one", "two") == "reference: half\n"


def test_characters_that_act_are_shown():
    assert "<U+001B>[31m" in talk(Parrot(), "\x1b[31mred")


def test_without_a_chat_template_it_says_what_to_do():
    with pytest.raises(ConfigError, match="--prompt"):
        talk(Parrot(chat_template=None), "one")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token for every byte, and a few words."""
    path = tmp_path_factory.mktemp("tokenizer") / "m.gguf"
    write_gguf(path, hf_tensors())
    return tokenizer_from_gguf(GGUFFile(path))


@pytest.mark.parametrize("text", ["a \u00e9\u20ac", "\U0001f600 hello\n\n12 \U0001f469\u200d\U0001f680!", "plain", "\ufffd a\ufffd", ""])
def test_no_character_is_shown_before_it_is_whole(tokenizer, text):
    ids = tokenizer(text).input_ids
    texts = [tokenizer.decode(ids[: i + 1]) for i in range(len(ids))]
    pieces = list(additions(texts))
    assert "".join(pieces) == text and all(pieces)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        assert any("\ufffd" in part for part in texts) == (not text.isascii())
    assert len(pieces) > 1 or len(text) < 2


def test_bytes_that_never_become_a_character_are_shown_at_the_end(tokenizer):
    ids = tokenizer("a\u20ac").input_ids[:-1]
    assert list(additions([tokenizer.decode(ids[:1]), tokenizer.decode(ids)])) == ["a", "\ufffd"]


def test_each_piece_is_printed_when_it_comes():
    shown, seen = io.StringIO(), []

    def pieces():
        for piece in ("", "\n", "one", " ", "two", " \n"):
            yield "policy", piece
            seen.append(shown.getvalue())

    answers = show(Console(file=shown), pieces())
    assert answers == {"policy": "\none two \n"}
    assert seen == ["policy: ", "policy: ", "policy: one", "policy: one", "policy: one two", "policy: one two"]
    assert shown.getvalue() == "policy: one two\n"


def test_an_answer_without_text_is_shown_empty():
    shown = io.StringIO()
    assert show(Console(file=shown), [("reference", ""), ("policy", ""), ("policy", "x")]) == {"reference": "", "policy": "x"}
    assert shown.getvalue() == "reference: \npolicy: x\n"


def test_a_run_of_other_devices_is_asked_on_these(tmp_path):
    text = "{model: {source: x}, mesh: {data: 64}, reward: {adapter: gone}, sft: {micro_batch_size: 1}, evaluate: {judge: 'gone:f'}}"
    config = _to_answer(configuration.parse(text))
    assert config.run.stages == [] and config.reward.adapter is None and config.mesh == MeshConfig(data=1, fsdp=-1)
    assert _to_answer(configuration.parse("{model: {source: x}, mesh: {tensor: -1, data: 1}}")).mesh.tensor == -1


def asked_as(prompt, template="{{ bos_token }}{% for turn in messages %}{{ turn.content }}{% endfor %}", room=40):
    """The tokens of a prompt for a model whose tokenizer puts a start token before every text, as Llama 3's does."""
    made = object.__new__(Answerer)  # without a run folder
    made.sampling = SamplingConfig(max_new_tokens=8)
    config = SimpleNamespace(max_position_embeddings=8 + room)
    made.backbone = SimpleNamespace(tokenizer=make_tokenizer(template, adds_start=True), config=config)
    made.context = SimpleNamespace(vision=None, config=SimpleNamespace(data=DataConfig(max_prompt_length=4)))
    return made._read([prompt], [])[0].tokens.tolist()


def test_a_prompt_has_one_start_token_as_in_training():
    start = make_tokenizer().bos_token_id
    plain, turns = asked_as("hello"), asked_as([{"role": "user", "content": "hello"}])
    assert plain == turns and len(plain) == 6 and plain.count(start) == 1


@pytest.mark.parametrize("prompt,said", [(" ", "white space"), ("x" * 41, "at most 40 tokens, .* found 42"), ("\ud800", "surrogate")])
def test_a_prompt_that_cannot_be_asked_is_refused(prompt, said):
    with pytest.raises(ConfigError, match=f"prompt 1: .*{said}"):
        asked_as(prompt)
