"""A conversation: history, turns, its end. (Answers of a real run are in the end-to-end tests.)"""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from pe_rlhf_jax.answering import chat
from pe_rlhf_jax.config import ConfigError


class Parrot:
    """Says the last user turn again, and remembers what it was asked."""

    def __init__(self, chat_template="given"):
        self.asked: list[str] = []
        self.roles = {"reference": None, "policy": None}
        render = lambda turns, **_: "|".join(f"{turn['role']}:{turn['content']}" for turn in turns)  # noqa: E731
        self.backbone = SimpleNamespace(tokenizer=SimpleNamespace(chat_template=chat_template, apply_chat_template=render))

    def __call__(self, prompts):
        self.asked += prompts
        last = prompts[0].rpartition(":")[2]
        return [{"prompt": prompts[0], "reference": f"old {last}", "policy": f" new {last}\n"}]


def talk(parrot, *lines: str, end=EOFError) -> str:
    said, shown = iter(lines), io.StringIO()

    def read() -> str:
        try:
            return next(said)
        except StopIteration:
            raise end from None

    chat(parrot, read, Console(file=shown))
    return shown.getvalue()


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_turns_follow_each_other_and_the_policys_answer_is_the_history(end):
    parrot = Parrot()
    shown = talk(parrot, "one", "  ", "two", end=end)
    assert parrot.asked == ["user:one", "user:one|assistant: new one\n|user:two"]
    assert shown == "reference: old one\npolicy: new one\nreference: old two\npolicy: new two\n"


def test_characters_that_act_are_shown():
    assert "<U+001B>[31m" in talk(Parrot(), "\x1b[31mred")


def test_without_a_chat_template_it_says_what_to_do():
    with pytest.raises(ConfigError, match="--prompt"):
        talk(Parrot(chat_template=None), "one")
