"""Whether answers to one prompt go into one row, where the prompt is computed once.

It saves tokens, never adds any; but attention is computed over the square of a row, and so grows with its length. (That rows of more than
one block of `models/attention.py` compute part of it is left out: it speaks for one row.)
"""

from __future__ import annotations

import math

from pe_rlhf_jax.config import Config
from pe_rlhf_jax.data.rows import padded
from pe_rlhf_jax.models.architecture import DecoderConfig, matrices
from pe_rlhf_jax.types import Rollout

ATTENTION = 3
"""How much dearer a multiplication of attention is than one of the matrices: it has two gradients where frozen matrices have one, is
computed again more often, and moves scores and masks. `benchmarks/shared_prefix.py --prompt 0`, where sharing can only lose, tells:
2.6 with answers of 128 tokens, 3.3 with 256, on a CPU."""


def pair_in_one_row(config: Config, c: DecoderConfig, devices: int, pair: int, side: int) -> bool:
    """Whether pairs go into one row each of `pair` tokens, rather than into two rows of `side`.

    Not where that would take longer; nor where the rows that are computed at once would no longer divide over the `devices` of the
    mesh's axes data and fsdp; nor where the model's table of positions is too short for such a row.
    """
    rows = config.reward.micro_batch_size or config.reward.batch_size
    if rows % devices or (c.learned_positions and pair > c.max_position_embeddings):
        return False
    return row_cost(c, pair) <= 2 * row_cost(c, side)


def longest_pair(config: Config, c: DecoderConfig, devices: int) -> tuple[int, int]:
    """Rows of a pair and their tokens, with the longest prompt, which both sides share, and the longest answers."""
    data, multiple = config.data, config.data.length_multiple
    side = data.max_prompt_length + data.max_response_length
    if data.packing:
        return 1, padded(side + data.max_response_length, multiple)
    pair, side = padded(side + data.max_response_length, 2 * multiple), padded(side, multiple)
    return (1, pair) if pair_in_one_row(config, c, devices, pair, side) else (2, side)


def answers_in_a_row(c: DecoderConfig, rollout: Rollout, group: int, devices: int) -> int:
    """How many of a group's responses go into one row, as `answers_for`."""
    return answers_for(c, len(rollout.response), rollout.prompt.shape[1], rollout.response.shape[1], group, devices)


def answers_for(c: DecoderConfig, rows: int, prompt: int, response: int, group: int, devices: int) -> int:
    """How many of a group's `group` responses of `response` tokens go into one row behind their prompt, where that takes least time.

    The rows that are left of `rows` divide over the devices as they did before. Where `rows` are a part that cuts groups, so many go
    together as each of the cuts leaves.
    """

    def fits(answers: int) -> bool:
        if group % answers or rows % (answers * devices):
            return False
        return not c.learned_positions or prompt + answers * response <= c.max_position_embeddings

    choices = [1, *(answers for answers in range(2, group + 1) if fits(answers))]
    return min(choices, key=lambda answers: row_cost(c, prompt + answers * response) / answers)


def row_cost(c: DecoderConfig, length: int) -> float:
    """What a row takes, in multiplications of one layer; only ratios mean anything."""
    token = sum(math.prod(shape) for shape in matrices(c).values())
    return length * (token + ATTENTION * 2 * length * c.num_heads * c.head_dim)
