"""Evaluation of a policy beside its reference on held-out prompts.

Both answer the same prompts; differences are taken prompt by prompt, and intervals are bootstrapped over prompts, or over
groups of them (`TextRow.together`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from pe_rlhf_jax.algorithms.masked import masked_sum
from pe_rlhf_jax.config import Config
from pe_rlhf_jax.data import PromptExample, pad_prompts
from pe_rlhf_jax.hosts import fetch
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.rollout.score import response_logprobs
from pe_rlhf_jax.sharding import row_multiple
from pe_rlhf_jax.training.context import Context
from pe_rlhf_jax.training.functions import call_function, column_names, columns_of, load_function
from pe_rlhf_jax.training.micro_batches import in_micro_batches
from pe_rlhf_jax.training.rewards import Rewards
from pe_rlhf_jax.training.rollouts import respond, response_tokens, texts
from pe_rlhf_jax.training.statistics import bootstrap_ci, distinct_n, members
from pe_rlhf_jax.training.step import NonFiniteError
from pe_rlhf_jax.types import PyTree, Rollout

STAGE = "evaluate"


def policy(context: Context, roles: dict[str, Role], rewards: Rewards, pictured: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the number of prompts done and, with the last of them, the figures and samples.

    `roles` holds `reference` and `policy`; `rewards` scores both, before any scaling. The first `pictured` samples
    have their prompts' pictures.
    """
    config = context.config.evaluate
    prompts = list(context.split("prompts").validation[: config.prompts])
    # Now, not at the end: a file that vanishes meanwhile must not take the figures of a long evaluation with it.
    thumbnails = [[picture.thumbnail() for picture in prompt.pictures] for prompt in prompts[:pictured]]
    columns = columns_of(prompts, column_names(context.data.prompts)) if config.judge else {}
    answers = {name: _Answers(context, rewards) for name in ("reference", "policy")}
    key = context.key(STAGE)
    for at in range(0, len(prompts), config.batch_size):
        rows = prompts[at : at + config.batch_size]
        batch = pad_prompts(rows, context.pad_token, context.config.data.length_multiple, rows=config.batch_size)
        batch = context.rows(batch, rows)
        for name, collected in answers.items():
            collected.add(roles, name, respond(context, roles[name], batch, jax.random.fold_in(key, at)), rows)
        done = at + len(rows)
        yield done, _figures(context.config, prompts, columns, answers, thumbnails) if done == len(prompts) else {}


def at_once(context: Context) -> int:
    """Answers whose rewards and log-probabilities are computed at once: no more than in RL, so that they need no more memory.

    It divides `evaluate.batch_size`, and the mesh can split it.
    """
    rows, multiple = context.config.evaluate.batch_size, row_multiple(context.mesh)
    each, most = rows // multiple, (context.config.rl.micro_batch_size or rows) // multiple  # of a device
    return multiple * max(part for part in range(1, each + 1) if each % part == 0 and part <= max(1, most))


class _Answers:
    """One role's answers to all prompts, with scores and log-probability ratios to the reference."""

    def __init__(self, context: Context, rewards: Rewards):
        self.context, self.rewards, self.at_once = context, rewards, at_once(context)
        self.texts: list[str] = []
        self.tokens: list[list[int]] = []
        self.ended: list[float] = []
        self.scores: list[float] = []
        self.terms: dict[str, list[float]] = {}
        self.kl: list[float] = []

    def add(self, roles: dict[str, Role], name: str, rollout: Rollout, prompts: Sequence[PromptExample]) -> None:
        context, rows = self.context, len(prompts)
        self.tokens += response_tokens(rollout)[:rows]
        self.texts += texts(context, rollout)[:rows]
        self.ended += np.asarray(fetch(rollout.ended), np.float64)[:rows].tolist()
        scores = self.rewards(rollout, prompts, at_once=self.at_once)
        self.scores += scores.total.tolist()
        for term, values in scores.terms.items():
            if not np.all(np.isfinite(values)):
                what = f"{int(np.sum(~np.isfinite(values)))} of {rows} held-out responses of the {name}"
                raise NonFiniteError(f"evaluate: the reward {term!r} of {what} is not a finite number, so nothing can be said of its mean")
            self.terms.setdefault(term, []).extend(values.tolist())
        if name == "policy":
            static = context.decoder, context.config.rl.sampling.temperature, context.config.model.logprob_chunk, self.at_once
            ratios = _log_ratio(*static, roles["policy"], roles["reference"], context.backbone, rollout)
            self.kl += fetch(ratios)[:rows].tolist()


@jax.jit(static_argnums=(0, 1, 2, 3))
def _log_ratio(
    decoder: Decoder, temperature: float, chunk: int, at_once: int, role: Role, reference: Role, backbone: PyTree, rollout: Rollout
) -> Array:
    """log pi(response) - log pi_ref(response) of each row, so many at once; its mean over samples of pi is KL(pi || pi_ref)."""

    def forward(part: Rollout) -> Array:
        logprobs, _ = response_logprobs(decoder, backbone, role, part, temperature, chunk)
        ref_logprobs, _ = response_logprobs(decoder, backbone, reference, part, temperature, chunk)
        return jax.vmap(masked_sum)(logprobs - ref_logprobs, part.response_mask)

    return in_micro_batches(forward, rollout, at_once)


def _figures(
    config: Config,
    prompts: Sequence[PromptExample],
    columns: dict[str, list[Any]],
    answers: dict[str, _Answers],
    thumbnails: list[list[str]],
) -> dict[str, Any]:
    before, after = answers["reference"], answers["policy"]
    resamples = config.evaluate.bootstrap
    figures: dict[str, Any] = {}
    rl: dict[str, Any] = {"prompts": len(prompts), "kl_per_response": float(np.mean(after.kl))}
    rl["kl_per_token"] = float(np.sum(after.kl) / max(sum(map(len, after.tokens)), 1))
    for when, collected in (("before", before), ("after", after)):
        rl[f"length_{when}"] = float(np.mean([len(row) for row in collected.tokens]))
        rl[f"distinct_2_{when}"] = distinct_n(collected.tokens, 2)
        rl[f"ended_{when}"] = float(np.mean(collected.ended))
    samples: list[dict[str, Any]] = [
        {"prompt": prompt.text, "reference": a, "policy": b} for prompt, a, b in zip(prompts, before.texts, after.texts, strict=True)
    ]
    for sample, shown in zip(samples, thumbnails, strict=False):
        if shown:
            sample["images"] = shown
    gain = np.asarray(after.scores) - np.asarray(before.scores)
    # Equal numbers may have a standard deviation of 1e-17, and one number has none.
    spread = float(np.std(before.scores, ddof=1)) if np.ptp(before.scores) else 0.0
    groups = [prompt.group for prompt in prompts]
    rl["groups"] = len(members(len(prompts), groups))
    interval = bootstrap_ci(gain, resamples, groups)
    rl |= {
        "reward_before": float(np.mean(before.scores)),
        "reward_after": float(np.mean(after.scores)),
        "reward_std_before": spread,
        "gain": float(np.mean(gain)),
        "gain_ci": interval,
        "gain_in_std": float(np.mean(gain)) / spread if spread else None,
        "ci": [bound / spread for bound in interval] if spread else None,
        "rewards": {
            name: {"before": float(np.mean(values)), "after": float(np.mean(after.terms[name]))} for name, values in before.terms.items()
        },
    }
    for sample, a, b in zip(samples, before.scores, after.scores, strict=True):
        sample |= {"reward_reference": a, "reward_policy": b}
    if config.evaluate.judge:
        judged = [_judge(config.evaluate.judge, prompts, collected.texts, columns) for collected in (before, after)]
        delta = np.asarray(judged[1]) - np.asarray(judged[0])
        figures["judge"] = {
            "name": config.evaluate.judge,
            "before": float(np.mean(judged[0])),
            "after": float(np.mean(judged[1])),
            "delta": float(np.mean(delta)),
            "ci": bootstrap_ci(delta, resamples, groups),
        }
        for sample, a, b in zip(samples, *judged, strict=True):
            sample |= {"judge_reference": a, "judge_policy": b}
    return figures | {"rl": rl, "samples": samples}


def _judge(spec: str, prompts: Sequence[PromptExample], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> list[float]:
    """The judge's verdicts, blind to superfluous white space."""
    function = load_function(spec)
    return call_function(spec, function, [p.text for p in prompts], [text.strip() for text in completions], columns)
