"""Answers of a run's policy beside its reference's: to given prompts, or turn by turn in a conversation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pydantic
from rich.console import Console

from pe_rlhf_jax import run_folder
from pe_rlhf_jax.checkpoint.store import Store
from pe_rlhf_jax.config import ConfigError, SamplingConfig
from pe_rlhf_jax.data import PromptExample, pad_prompts
from pe_rlhf_jax.loading import load
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.outcomes import Outcomes
from pe_rlhf_jax.report import samples
from pe_rlhf_jax.report.progress import Progress
from pe_rlhf_jax.sharding import row_multiple
from pe_rlhf_jax.training.rollouts import respond, texts


class Answerer:
    """A run's policy and reference, loaded once.

    Args:
        changes: fields of `rl.sampling` to be used instead of the run's, such as {"temperature": 0.0}; None leaves the run's.

    Raises:
        ConfigError: the folder holds no policy, or a changed field has a value that it cannot have.
    """

    def __init__(self, folder: Path, console: Console, changes: Mapping[str, Any], seed: int | None = None):
        config = run_folder.read_config(folder)
        try:
            given = {name: value for name, value in changes.items() if value is not None}
            self.sampling = SamplingConfig.model_validate(config.rl.sampling.model_dump() | given)
        except pydantic.ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}, found {e['input']!r}" for e in error.errors())
            raise ConfigError(f"sampling: {problems}") from error
        self.backbone, self.context = load(config, Progress(console), needs=set())
        outcomes = Outcomes(Store(folder / "checkpoints"), self.backbone, self.context)
        policy = outcomes.policy()
        if policy is None:
            raise ConfigError(f"{folder} has no policy yet; run its stage `rl` first")
        self.roles: dict[str, Role] = {"reference": outcomes.reference(), "policy": policy}
        self.key = self.context.key("generate" if seed is None else f"generate/{seed}")
        self.asked = 0

    def __call__(self, prompts: Sequence[str]) -> list[dict[str, str]]:
        """Both answers to each prompt, as `prompt`, `reference` and `policy`. Asked again, it draws anew.

        Raises ConfigError for a prompt that leaves no room for a response.
        """
        context, tokenizer = self.context, self.backbone.tokenizer
        rows = [PromptExample(np.asarray(tokenizer(text)["input_ids"], np.int32), text, {}) for text in prompts]
        room = self.backbone.config.max_position_embeddings - self.sampling.max_new_tokens
        for row in rows:
            if not 0 < len(row.tokens) <= room:
                raise ConfigError(f"expected a prompt of 1 to {room} tokens, found {len(row.tokens)}: {row.text[:60]!r}")
        count = -(-len(rows) // row_multiple(context.mesh)) * row_multiple(context.mesh)
        batch = context.rows(pad_prompts(rows, context.pad_token, context.config.data.length_multiple, rows=count))
        answers: list[dict[str, str]] = [{"prompt": text} for text in prompts]
        key = jax.random.fold_in(self.key, self.asked)
        self.asked += 1
        with jax.set_mesh(context.mesh):
            for name, role in self.roles.items():
                said = texts(context, respond(context, role, batch, key, self.sampling))
                for answer, text in zip(answers, said, strict=False):
                    answer[name] = text
        return answers


def chat(answerer: Answerer, read: Callable[[], str], console: Console) -> None:
    """A conversation until the input ends. Both models see the same history, whose answers are the policy's.

    Raises ConfigError if the model's tokenizer has no chat template.
    """
    tokenizer = answerer.backbone.tokenizer
    if not tokenizer.chat_template:
        raise ConfigError("the model's tokenizer has no chat template; ask single prompts with --prompt")
    turns: list[dict[str, str]] = []
    while True:
        try:
            said = read().strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not said:
            continue
        turns.append({"role": "user", "content": said})
        prompt = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        (answer,) = answerer([prompt])
        for name in answerer.roles:
            console.print(f"{name}: ", style="bold" if name == "policy" else "dim", end="")
            console.print(samples.visible(answer[name].strip()), markup=False, highlight=False)
        turns.append({"role": "assistant", "content": answer["policy"]})
