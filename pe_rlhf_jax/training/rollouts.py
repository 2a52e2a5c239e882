"""Responses of a policy: sampled, at once or to be watched, cut at stop strings, read as tokens and as text."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from pe_rlhf_jax.config import SamplingConfig
from pe_rlhf_jax.devices import is_nvidia
from pe_rlhf_jax.hosts import fetch
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.rollout.decode import DecodeState, Sampler, advance, begin, so_far
from pe_rlhf_jax.rollout.generate import generate
from pe_rlhf_jax.sharding import gathered
from pe_rlhf_jax.training.context import Context
from pe_rlhf_jax.types import PromptBatch, PyTree, Rollout

GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
"""Of the compiler, for decoding on NVIDIA GPUs: cuBLAS reads a layer's matrix where it lies, in the stack of all layers; otherwise every
step copies it first, or joins it with another that is multiplied by the same rows."""

WATCHED = 4
"""Tokens between two looks at a response that is watched."""


def respond(
    context: Context, policy: Role, prompts: PromptBatch, key: jax.Array, sampling: SamplingConfig | None = None, answers: int = 1
) -> Rollout:
    """Samples a response to each prompt, as `sampling` or else `rl.sampling` says; waits for the result.

    So many neighbouring rows as `answers` says have one prompt, which is read once for them.
    """
    sampling = sampling or context.config.rl.sampling
    sampled = jax.block_until_ready(_respond(_sampler(context, sampling, answers), policy, context.backbone, prompts, key))
    return cut_at_stop_strings(context, sampled, sampling.stop_strings) if sampling.stop_strings else sampled


def watch(context: Context, policy: Role, prompts: PromptBatch, key: jax.Array, sampling: SamplingConfig) -> Iterator[Rollout]:
    """The same responses as `respond`'s while they are sampled: what there is after every few tokens, until all have ended.

    All prompts are answered at once, whatever `max_num_seqs` says, and weights are gathered for each token, and not joined.
    """
    sampler = _sampler(context, sampling)
    state = _begin(sampler, policy, context.backbone, prompts)
    for _ in range(0, sampling.max_new_tokens, WATCHED):
        state, sampled = _advance(sampler, policy, context.backbone, prompts, key, state)
        if sampling.stop_strings:
            sampled = cut_at_stop_strings(context, sampled, sampling.stop_strings)
        yield sampled
        if np.all(fetch(sampled.ended)):
            return


def _sampler(context: Context, sampling: SamplingConfig, answers: int = 1) -> Sampler:
    return Sampler(context.decoder, sampling, context.end_tokens, context.pad_token, answers)


def _variables(sampler: Sampler, policy: Role, backbone: PyTree) -> PyTree:
    """The policy's, its matrices in the type in which they are computed: those of full tuning are float32, which every step would read."""
    variables, dtype = policy.variables(backbone), sampler.decoder.dtype
    if policy.params is None:
        return variables

    def narrow(path: tuple, leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if path[-1].key in ("kernel", "embed", "lm_head") else leaf

    return {**variables, "params": jax.tree_util.tree_map_with_path(narrow, variables["params"])}


class Decoding:
    """`jax.jit` of a function whose first argument is a `Sampler`, static, with the options that suit it; decided when it is used, since
    only then the devices are known. Inside another program JAX takes no options.
    """

    def __init__(self, function: Callable[..., Any], **jit: Any):
        functools.update_wrapper(self, function)
        self._plain: Any = jax.jit(function, static_argnums=0, **jit)
        self._on_gpu: Any = jax.jit(function, static_argnums=0, compiler_options=GPU_OPTIONS, **jit)

    def _of(self, sampler: Sampler, arguments: PyTree) -> Any:
        inside = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments))
        return self._on_gpu if is_nvidia() and sampler.decoder.config.quantization is None and not inside else self._plain

    def __call__(self, sampler: Sampler, *arguments: Any) -> Any:
        return self._of(sampler, arguments)(sampler, *arguments)

    def lower(self, sampler: Sampler, *arguments: Any) -> jax.stages.Lowered:
        return self._of(sampler, arguments).lower(sampler, *arguments)

    def _cache_size(self) -> int:
        return self._plain._cache_size() + self._on_gpu._cache_size()


@Decoding
def _respond(sampler: Sampler, policy: Role, backbone: PyTree, prompts: PromptBatch, key: jax.Array) -> Rollout:
    variables = _variables(sampler, policy, backbone)
    return generate(sampler, gathered(variables) if sampler.sampling.gather_weights else variables, prompts, key)


@Decoding
def _begin(sampler: Sampler, policy: Role, backbone: PyTree, prompts: PromptBatch) -> DecodeState:
    return begin(sampler, _variables(sampler, policy, backbone), prompts, sampler.sampling.max_new_tokens)


@functools.partial(Decoding, donate_argnames="state")
def _advance(
    sampler: Sampler, policy: Role, backbone: PyTree, prompts: PromptBatch, key: jax.Array, state: DecodeState
) -> tuple[DecodeState, Rollout]:
    state = advance(sampler, _variables(sampler, policy, backbone), key, state, WATCHED)
    return state, so_far(sampler, prompts, state)


def cut_at_stop_strings(context: Context, rollout: Rollout, stop_strings: Sequence[str]) -> Rollout:
    """Ends each response with the token that completes a stop string; such a response counts as ended.

    Strings are looked for in the decoded text, because they may begin or end inside a token; so this happens on the host, after
    sampling.
    """
    fetched = fetch((rollout.response, rollout.response_mask, rollout.logprobs, rollout.ended))
    tokens, mask, logprobs, ended = (np.array(x) for x in fetched)
    for row, kept in enumerate(response_tokens(rollout)):
        length = _length_to_stop(context, kept, stop_strings)
        if length is None:
            continue
        tokens[row, length:], mask[row, length:], logprobs[row, length:] = context.pad_token, False, 0.0
        ended[row] = True
    return rollout.replace(**context.rows({"response": tokens, "response_mask": mask, "logprobs": logprobs, "ended": ended}))


def _length_to_stop(context: Context, tokens: list[int], stop_strings: Sequence[str]) -> int | None:
    """How many tokens it takes to complete the first stop string; None if there is none."""

    def stops(count: int) -> bool:
        text = str(context.tokenizer.decode(tokens[:count]))  # special tokens may be asked for
        return any(string in text for string in stop_strings)

    return bisect.bisect_left(range(len(tokens) + 1), True, lo=1, key=stops) if stops(len(tokens)) else None


def response_tokens(rollout: Rollout) -> list[list[int]]:
    """The responses' real tokens, end token included."""
    tokens, mask = fetch((rollout.response, rollout.response_mask))
    return [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]


def texts(context: Context, rollout: Rollout) -> list[str]:
    """The responses as text, without special tokens."""
    return [str(context.tokenizer.decode(row, skip_special_tokens=True)) for row in response_tokens(rollout)]
