"""The same work for everyone: shape, sizes, random tokens, what is counted, and the record of a measurement.

Imported by the scripts beside it, each in an environment of its own; needs only Python, and for the tokenizer transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
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

SMOLLM2 = Path(__file__).parents[2] / "configs" / "shapes" / "smollm2_135m.json"
RANK, ALPHA, LEARNING_RATE = 16, 32, 1e-5
KL_COEF = 0.05
WORKS = ("reward_lora", "reward_lora_prompt", "reward_full", "ppo_model", "ppo_function", "rloo")


@dataclass(frozen=True)
class Work:
    """One of `WORKS`, its sizes, and how it is measured: what the options of the command line say."""

    what: str
    model_config: Path
    dtype: str
    pairs: int
    length: int
    rows: int
    prompt: int
    response: int
    group: int
    steps: int
    warmup: int
    recompute: bool
    micro_batch: int | None

    @classmethod
    def of(cls, what: str, options: argparse.Namespace) -> Work:
        """Of options that may have others among them."""
        named = {field.name: getattr(options, field.name) for field in dataclasses.fields(cls) if field.name != "what"}
        return cls(what, **named)

    def options(self) -> list[str]:
        """The command line that it came from."""
        given = {f"--{name.replace('_', '-')}": value for name, value in vars(self).items() if value is not None and value is not False}
        return [word for name, value in given.items() for word in ([name] if value is True else [name, str(value)])]

    def record(self) -> dict[str, Any]:
        """What tells it from others: all of it, and the shape in place of where it was read."""
        return {name: value for name, value in vars(self).items() if name != "model_config"} | {"shape": self.shape}

    def __str__(self) -> str:
        reward, seen = f"an update of the reward model on {self.pairs} pairs of {self.length} tokens", f"prompts of {self.prompt} tokens"
        return {
            "reward_lora": f"{reward}, adapters",
            "reward_lora_prompt": f"{reward} whose sides begin with the same {self.length // 2}, adapters",
            "reward_full": f"{reward}, full tuning",
            "ppo_model": f"a PPO step of {self.rows} {seen} and {self.response} sampled ones, adapters, scored by a reward model",
            "ppo_function": f"a PPO step of {self.rows} {seen} and {self.response} sampled ones, adapters, scored by a function",
            "rloo": f"an RLOO step of {self.rows // self.group} {seen} and {self.group} times {self.response} sampled ones, adapters, "
            "scored by a function",
        }[self.what]

    @property
    def shape(self) -> dict[str, Any]:
        """Hugging Face's `config.json`, of a Llama."""
        shape = json.loads(self.model_config.read_text(encoding="utf-8"))
        if shape["model_type"] != "llama":
            raise ValueError(f"{self.model_config}: expected the config.json of a llama, found {shape['model_type']}")
        return shape

    @property
    def head_dim(self) -> int:
        return self.shape.get("head_dim") or self.shape["hidden_size"] // self.shape["num_attention_heads"]

    @property
    def end(self) -> int:
        """Like `pad` beyond the model's vocabulary, so never sampled: no response ends early, and no token is taken for padding."""
        return self.shape["vocab_size"]

    @property
    def pad(self) -> int:
        return self.end + 1

    @property
    def total(self) -> int:
        """Steps."""
        return self.warmup + self.steps

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """What has an adapter, of each layer: numbers in and out."""
        hidden, wide = self.shape["hidden_size"], self.shape["intermediate_size"]
        query, key = (self.shape[f"num_{name}_heads"] * self.head_dim for name in ("attention", "key_value"))
        attention = {"q_proj": (hidden, query), "k_proj": (hidden, key), "v_proj": (hidden, key), "o_proj": (query, hidden)}
        return attention | {"gate_proj": (hidden, wide), "up_proj": (hidden, wide), "down_proj": (wide, hidden)}

    @property
    def adapter(self) -> int:
        """Numbers of an adapter."""
        return self.shape["num_hidden_layers"] * sum(RANK * (ins + outs) for ins, outs in self.linear.values())

    @property
    def backbone(self) -> int:
        """Numbers below a head, so without an output layer: layers, each with two norms, the last norm, the embedding."""
        layer = sum(ins * outs for ins, outs in self.linear.values()) + 2 * self.shape["hidden_size"]
        return self.shape["num_hidden_layers"] * layer + (1 + self.shape["vocab_size"]) * self.shape["hidden_size"]

    @property
    def trained(self) -> int:
        """Numbers that are trained, but for a head's bias."""
        head = self.shape["hidden_size"]
        if self.what == "rloo":
            return self.adapter
        if self.what == "reward_full":
            return self.backbone + head
        return (2 if self.what.startswith("ppo") else 1) * self.adapter + head

    def tokens(self, count: int, length: int, seed: int = 0) -> list[list[int]]:
        """Random ones [count, length]."""
        draw, size = random.Random(seed), self.shape["vocab_size"]
        return [[draw.randrange(size) for _ in range(length)] for _ in range(count)]

    def preferences(self) -> tuple[list[list[int]], list[list[int]]]:
        """Chosen and rejected, [pairs, length] each."""
        chosen, rejected = self.tokens(self.pairs, self.length), self.tokens(self.pairs, self.length, seed=1)
        shared = self.length // 2 if self.what == "reward_lora_prompt" else 0
        return chosen, [one[:shared] + other[shared:] for one, other in zip(chosen, rejected, strict=True)]

    def prompts(self) -> list[list[int]]:
        """[rows, prompt], or for RLOO [rows / group, prompt]."""
        return self.tokens(self.rows // self.group if self.what == "rloo" else self.rows, self.prompt)

    def tokenizer(self) -> Any:
        """Writes every token as its number."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({str(i): i for i in range(self.shape["vocab_size"])}, unk_token="0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>", padding_side="left")
        assert (made.eos_token_id, made.pad_token_id) == (self.end, self.pad)
        return made


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of `Work` but for which it is, the same for every script here."""
    parser.add_argument("--model-config", type=Path, default=SMOLLM2, help="config.json of a Llama, for its shape")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of backbones and of what they compute")
    parser.add_argument("--pairs", type=int, default=8, help="of an update of the reward model")
    parser.add_argument("--length", type=int, default=128, help="tokens of each side of a pair")
    parser.add_argument("--rows", type=int, default=8, help="episodes of a step of PPO or RLOO")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--response", type=int, default=64, help="tokens, all sampled")
    parser.add_argument("--group", type=int, default=4, help="responses to a prompt of RLOO")
    parser.add_argument("--steps", type=int, default=3, help="timed ones of a process")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them, which compile; tunix compiles in its second one as well")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing, TRL's default and ours: recompute activations")
    parser.add_argument("--micro-batch", type=int, help="pairs or episodes that an update computes at a time; all at once by default")


def texts(tokens: list[list[int]]) -> list[str]:
    """As the tokenizer reads them."""
    return [" ".join(map(str, row)) for row in tokens]


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A plain function as reward: cheap, fractional, not the same for all."""
    return [sum(map(int, text.split())) % 97 / 97 for text in completions]


class Clock:
    """Seconds of each step and of its parts: `rollout`, `score`, and what is left, `learn`. `idle` waits until the device has done all."""

    def __init__(self, idle: Callable[[], Any] = lambda: None) -> None:
        self.idle = idle
        self.steps: list[dict[str, float]] = []
        self.start()

    def now(self) -> float:
        self.idle()
        return time.perf_counter()

    def start(self) -> None:
        self.began, self.spent = self.now(), {"rollout": 0.0, "score": 0.0}

    def stop(self) -> None:
        """Ends a step and begins the next."""
        whole = self.now() - self.began
        self.steps.append({"step": whole, **self.spent, "learn": whole - sum(self.spent.values())})
        self.start()

    def part(self, name: str, function: Callable, wait: Callable = lambda x: x, when: Callable = lambda: True) -> Callable:
        """The function, its time counted as a part's; what it calls may count for another part. `wait` waits for its result."""

        def timed(*arguments: Any, **named: Any) -> Any:
            if not when():
                return function(*arguments, **named)
            began, inside = self.now(), sum(self.spent.values())
            result = wait(function(*arguments, **named))
            self.spent[name] += self.now() - began - (sum(self.spent.values()) - inside)
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
    device: str
    """Its name; `cpu` for a CPU."""
    peak_device_bytes: int | None
    """Of the device's own memory."""
    generated: int = 0
    """Sampled tokens that are learned from."""
    note: str = ""


def main(who: str, package: str, runs: dict[str, Callable[[Work], Done]]) -> None:
    """Does what the command line asks for, checks that it was the work, and prints the record as one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--what", required=True, choices=runs)
    add_options(parser)
    a = parser.parse_args()
    work = Work.of(a.what, a)
    with contextlib.redirect_stdout(sys.stderr):  # trainers print
        done = runs[work.what](work)
    tokens = 0 if work.what.startswith("reward") else work.total * work.rows * work.response
    counted, expected = (len(done.steps), done.updates, done.generated), (work.total, work.total, tokens)
    assert counted == expected, f"{who} {work.what}: steps, updates, generated tokens: expected {expected}, found {counted}"
    assert done.trained - work.trained in (0, 1), f"{who} {work.what}: {done.trained} numbers trained, expected {work.trained}"
    timed = done.steps[work.warmup :]
    parts = {name: round(statistics.median(step[name] for step in timed), 3) for name in timed[0] if name != "step"} if tokens else {}
    record = {
        "who": who,
        "version": version(package),
        **work.record(),
        "processors": len(os.sched_getaffinity(0)),
        "device": done.device,
        "seconds": [round(step["step"], 3) for step in timed],
        "median": round(statistics.median(step["step"] for step in timed), 3),
        "parts": parts,
        "warmup_seconds": [round(step["step"], 3) for step in done.steps[: work.warmup]],
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "peak_device_gib": None if done.peak_device_bytes is None else round(done.peak_device_bytes / 2**30, 3),
        "trained": done.trained,
        "updates": done.updates,
        "generated": done.generated,
        "note": done.note,
    }
    print(json.dumps(record), flush=True)
