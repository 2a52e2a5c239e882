"""Answers of a run's policy beside its reference's (before RL, of the SFT model alone): to given prompts, or turn by turn in a
conversation, shown while they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import pydantic
from rich.console import Console

from pe_rlhf_jax import run_folder
from pe_rlhf_jax.checkpoint.store import Store
from pe_rlhf_jax.config import Config, ConfigError, MeshConfig, SamplingConfig
from pe_rlhf_jax.data import PromptExample, pad_prompts
from pe_rlhf_jax.data.encoder import Encoder
from pe_rlhf_jax.data.formats import Reader
from pe_rlhf_jax.data.sources import Row, Skipped
from pe_rlhf_jax.hosts import fetch
from pe_rlhf_jax.loading import load
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.outcomes import ROLE_OF, Outcomes, without_spent_adapters
from pe_rlhf_jax.report import samples
from pe_rlhf_jax.report.progress import Progress
from pe_rlhf_jax.sharding import make_mesh, row_multiple
from pe_rlhf_jax.training import sft
from pe_rlhf_jax.training.rollouts import respond, texts, watch
from pe_rlhf_jax.types import PromptBatch

Prompt = str | list[dict[str, str]]
"""What may stand under `prompt` in a row of the data: a text as it is, or turns for the chat template."""


class Answerer:
    """A run's reference and its policy, or before RL the SFT model alone, loaded once.

    Args:
        changes: fields of `rl.sampling` to be used instead of the run's, such as {"temperature": 0.0}; None leaves the run's.

    Raises:
        ConfigError: the folder holds neither, or a changed field has a value that it cannot have.
    """

    def __init__(self, folder: Path, console: Console, changes: Mapping[str, Any], seed: int | None = None):
        store = Store(folder / "checkpoints")
        config = _to_answer(without_spent_adapters(run_folder.read_config(folder), store))
        try:
            given = {name: value for name, value in changes.items() if value is not None}
            self.sampling = SamplingConfig.model_validate(config.rl.sampling.model_dump() | given)
        except pydantic.ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}, found {e['input']!r}" for e in error.errors())
            raise ConfigError(f"sampling: {problems}") from error
        self.backbone, self.context = load(config, Progress(console), needs=set())
        outcomes = Outcomes(store, self.backbone, self.context)
        policy = outcomes.policy()
        if policy is None and outcomes.store.latest(ROLE_OF[sft.STAGE]) is None:
            raise ConfigError(f"{folder} has neither an SFT model nor a policy yet; run its stage `sft` or `rl` first")
        self.roles: dict[str, Role] = {"reference": outcomes.reference()} | ({} if policy is None else {"policy": policy})
        self.key = self.context.key("generate" if seed is None else f"generate/{seed}")
        self.asked = 0

    def __call__(self, prompts: Sequence[Prompt], images: Sequence[Path] = ()) -> list[dict[str, str]]:
        """Each role's answer to each prompt, as `prompt`, `reference` and `policy`; each shows all pictures. Asked again, it draws anew.

        Raises:
            ConfigError: a prompt leaves no room for a response, or does not take the pictures.
            DataError: the model takes no pictures.
        """
        rows = self._read(prompts, images)
        batch, key = self._placed(rows)
        answers: list[dict[str, str]] = [{"prompt": row.text} for row in rows]
        with jax.set_mesh(self.context.mesh):
            for name, role in self.roles.items():
                said = texts(self.context, respond(self.context, role, batch, key, self.sampling))
                for answer, text in zip(answers, said, strict=False):
                    answer[name] = text
        return answers

    def stream(self, prompt: Prompt, images: Sequence[Path] = ()) -> Iterator[tuple[str, str]]:
        """The same answers to one prompt while they are written: (role, what its answer has more than before), at first nothing.

        Raises what calling does.
        """
        batch, key = self._placed(self._read([prompt], images))
        for name, role in self.roles.items():
            yield name, ""
            for piece in additions(self._written(role, batch, key)):
                yield name, piece

    def _written(self, role: Role, batch: PromptBatch, key: jax.Array) -> Iterator[str]:
        """The first row's answer after every few tokens."""
        watched = watch(self.context, role, batch, key, self.sampling)
        ended = False
        while not ended:
            with jax.set_mesh(self.context.mesh):  # not while whoever asked goes on with the text
                sampled = next(watched, None)
            if sampled is None:
                return
            yield texts(self.context, sampled)[0]
            ended = bool(fetch(sampled.ended)[0])  # the other rows only fill the devices

    def _placed(self, rows: list[PromptExample]) -> tuple[PromptBatch, jax.Array]:
        """The prompts on the devices, and a key for their answers."""
        context = self.context
        # Lengths double, so that a conversation needs a new program rarely.
        length = context.config.data.length_multiple
        while length < max(len(row.tokens) for row in rows):
            length *= 2
        count = -(-len(rows) // row_multiple(context.mesh)) * row_multiple(context.mesh)
        batch = context.rows(pad_prompts(rows, context.pad_token, min(length, self._room), rows=count), rows)
        self.asked += 1
        return batch, jax.random.fold_in(self.key, self.asked - 1)

    def _read(self, prompts: Sequence[Prompt], images: Sequence[Path]) -> list[PromptExample]:
        """As rows of the data are read, which the policy was trained on."""
        tokenizer, vision = self.backbone.tokenizer, self.context.vision
        shown = {"images": [path.absolute() for path in images]} if images else {}
        given = [Row({"prompt": prompt} | shown, f"prompt {number}") for number, prompt in enumerate(prompts, start=1)]
        limits = self.context.config.data.model_copy(update={"max_prompt_length": self._room, "too_long": "error"})
        refused = _Refused()
        return Encoder(limits, tokenizer, refused, vision).prompts(Reader(tokenizer, refused, vision=vision).prompts(given))

    @property
    def _room(self) -> int:
        return self.backbone.config.max_position_embeddings - self.sampling.max_new_tokens


def _to_answer(config: Config) -> Config:
    """What answering needs of a run's configuration, which may have been trained on other devices, with functions that are not here."""
    run, reward, mesh = config.run.model_copy(update={"stages": []}), config.reward.model_copy(update={"adapter": None}), config.mesh
    sampling = config.rl.sampling
    try:
        make_mesh(mesh)
    except ConfigError:
        mesh, sampling = MeshConfig(data=1, fsdp=-1), sampling.model_copy(update={"gather_weights": False})  # there may be no room for it
    rl = config.rl.model_copy(update={"sampling": sampling})
    return config.model_copy(update={"run": run, "reward": reward, "mesh": mesh, "rl": rl})


class _Refused(Skipped):
    """Says what is wrong with a prompt that somebody typed."""

    def bad(self, place: str, problem: str) -> None:
        raise ConfigError(f"{place}: {problem}")

    def long(self, place: str, limit: str, allowed: int, found: int) -> None:
        raise ConfigError(f"{place}: expected at most {allowed} tokens, which leave room for a response, found {found}")


def additions(texts: Iterable[str]) -> Iterator[str]:
    """What each text has more than the one before it.

    A text's end waits while it may still change: characters of which only some bytes are there, which read as U+FFFD.
    """
    shown, text = 0, ""
    for text in texts:
        whole = len(text.rstrip("\ufffd"))
        if whole > shown:
            yield text[shown:whole]
            shown = whole
    if text[shown:]:
        yield text[shown:]


def show(console: Console, pieces: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Prints answers as they are written, each behind its role's name and without white space around it; returns them whole."""
    answers: dict[str, str] = {}
    for name, piece in pieces:
        if name not in answers:
            console.print("\n" * bool(answers), end="")
            console.print(f"{name}: ", style="bold" if name == "policy" else "dim", end="")
        before = answers.get(name, "")
        answers[name] = before + piece
        more = answers[name].strip()[len(before.strip()) :]
        console.print(samples.visible(more), markup=False, highlight=False, soft_wrap=True, end="")
    console.print()
    return answers


def chat(answerer: Answerer, read: Callable[[], str], console: Console, images: Sequence[Path] = ()) -> None:
    """A conversation about the pictures, if there are any, until the input ends, or Ctrl-C.

    All roles see the same history, whose answers are the last one's, the policy's; its first turn begins with the pictures.

    Raises ConfigError if the model's tokenizer has no chat template, and what asking the answerer does.
    """
    if not answerer.backbone.tokenizer.chat_template:
        raise ConfigError("the model's tokenizer has no chat template; ask single prompts with --prompt")
    turns: list[dict[str, str]] = []
    try:
        while True:
            if not (said := read().strip()):
                continue
            turns.append({"role": "user", "content": said})
            answers = show(console, answerer.stream(turns, images))
            *_, answer = answers.values()
            if answer.strip():
                turns.append({"role": "assistant", "content": answer})
            else:
                turns.pop()  # nothing was said: a history has no empty turns
    except (EOFError, KeyboardInterrupt):
        console.print()
