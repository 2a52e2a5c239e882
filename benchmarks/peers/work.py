"""The same work for everyone: shape, sizes, random tokens, what is counted, and the record of a measurement.

Imported by the scripts beside it, each in an environment of its own; needs only Python, and for the tokenizer transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

SHAPE_FILE = Path(__file__).parents[2] / "configs" / "shapes" / "smollm2_135m.json"
SHAPE = json.loads(SHAPE_FILE.read_text())
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA, LEARNING_RATE = 16, 32, 1e-5
PAIRS, LENGTH = 8, 128
ROWS, PROMPT, RESPONSE, GROUP = 8, 64, 64, 4
KL_COEF = 0.05

WORKS = {
    "reward_lora": "an update of the reward model on 8 pairs of 128 tokens, adapters",
    "reward_lora_prompt": "the same, where both sides of a pair begin with the same 64 tokens",
    "reward_full": "an update of the reward model on 8 pairs of 128 tokens, full tuning",
    "ppo_model": "a PPO step of 8 prompts of 64 tokens and 64 sampled ones, adapters, scored by a reward model",
    "ppo_function": "the same, scored by a function",
    "rloo": "an RLOO step of 2 prompts of 64 tokens and 4 times 64 sampled ones, adapters, scored by a function",
}
ADAPTER, BACKBONE, HEAD = 4_884_480, 134_515_008, SHAPE["hidden_size"]
TRAINED = dict.fromkeys(WORKS, ADAPTER + HEAD) | {"reward_full": BACKBONE + HEAD, "rloo": ADAPTER}
TRAINED |= dict.fromkeys(("ppo_model", "ppo_function"), 2 * ADAPTER + HEAD)

END, PAD = SHAPE["vocab_size"], SHAPE["vocab_size"] + 1
"""Beyond the vocabulary of the model, so never sampled: no response ends early, and no random token is taken for padding."""


def rows(count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Random tokens [count, length]."""
    draw = random.Random(seed)
    return [[draw.randrange(SHAPE["vocab_size"]) for _ in range(length)] for _ in range(count)]


def pairs(what: str) -> tuple[list[list[int]], list[list[int]]]:
    """Chosen and rejected, [PAIRS, LENGTH] each."""
    chosen, rejected = rows(PAIRS, LENGTH), rows(PAIRS, LENGTH, seed=1)
    shared = LENGTH // 2 if what == "reward_lora_prompt" else 0
    return chosen, [one[:shared] + other[shared:] for one, other in zip(chosen, rejected, strict=True)]


def tokenizer() -> Any:
    """Writes every token as its number."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(SHAPE["vocab_size"])}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>", padding_side="left")
    assert (made.eos_token_id, made.pad_token_id) == (END, PAD)
    return made


def texts(tokens: list[list[int]]) -> list[str]:
    """As the tokenizer reads them."""
    return [" ".join(map(str, row)) for row in tokens]


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A plain function as reward: cheap, fractional, not the same for all."""
    return [sum(map(int, text.split())) % 97 / 97 for text in completions]


class Clock:
    """Seconds of each step and of its parts: `rollout`, `score`, and what is left, `learn`."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.start()

    def start(self) -> None:
        self.began, self.spent = time.perf_counter(), {"rollout": 0.0, "score": 0.0}

    def stop(self) -> None:
        """Ends a step and begins the next."""
        whole = time.perf_counter() - self.began
        self.steps.append({"step": whole, **self.spent, "learn": whole - sum(self.spent.values())})
        self.start()

    def part(self, name: str, function: Callable, wait: Callable = lambda x: x, when: Callable = lambda: True) -> Callable:
        """The function, its time counted as a part's; what it calls may count for another part. `wait` waits for its result."""

        def timed(*arguments: Any, **named: Any) -> Any:
            if not when():
                return function(*arguments, **named)
            began, inside = time.perf_counter(), sum(self.spent.values())
            result = wait(function(*arguments, **named))
            self.spent[name] += time.perf_counter() - began - (sum(self.spent.values()) - inside)
            return result

        return timed


@dataclass
class Done:
    """What a script did, and what shows that it was the work."""

    steps: list[dict[str, float]]
    """Seconds, by part; the first of them warmed up."""
    trained: int
    """Numbers that are trained."""
    updates: int
    """Of the optimizer, or of each of two."""
    generated: int = 0
    """Sampled tokens that are learned from."""
    note: str = ""


def main(who: str, package: str, runs: dict[str, Callable[[argparse.Namespace], Done]]) -> None:
    """Does what the command line asks for, checks that it was the work, and prints the record as one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--what", required=True, choices=runs)
    parser.add_argument("--steps", type=int, default=3, help="timed ones")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them, which compile; tunix compiles in its second one as well")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing: recompute each layer's activations")
    parser.add_argument("--micro-batch", type=int, help="pairs or episodes that an update computes at a time")
    a = parser.parse_args()
    a.total = a.steps + a.warmup
    with contextlib.redirect_stdout(sys.stderr):  # trainers print
        done = runs[a.what](a)
    tokens = 0 if a.what.startswith("reward") else a.total * ROWS * RESPONSE
    counted, expected = (len(done.steps), done.updates, done.generated), (a.total, a.total, tokens)
    assert counted == expected, f"{who} {a.what}: steps, updates, generated tokens: expected {expected}, found {counted}"
    assert done.trained - TRAINED[a.what] in (0, 1), f"{who} {a.what}: {done.trained} numbers trained, expected {TRAINED[a.what]}"
    timed = done.steps[a.warmup :]
    parts = {name: round(statistics.median(step[name] for step in timed), 3) for name in timed[0] if name != "step"} if tokens else {}
    record = {
        "who": who,
        "version": version(package),
        "what": a.what,
        "recompute": a.recompute,
        "micro_batch": a.micro_batch,
        "processors": len(os.sched_getaffinity(0)),
        "seconds": [round(step["step"], 3) for step in timed],
        "median": round(statistics.median(step["step"] for step in timed), 3),
        "parts": parts,
        "warmup": [round(step["step"], 3) for step in done.steps[: a.warmup]],
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "trained": done.trained,
        "updates": done.updates,
        "generated": done.generated,
        "note": done.note,
    }
    print(json.dumps(record), flush=True)
