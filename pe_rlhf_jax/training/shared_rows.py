"""Whether answers to one prompt go into one row, where the prompt is computed once.

It saves tokens, never adds any; but attention is computed over the whole square of a row, and so grows with its length.
"""

from __future__ import annotations

from pe_rlhf_jax.config import Config
from pe_rlhf_jax.models.architecture import DecoderConfig

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
    pair, side = (-(-length // multiple) * multiple for length in (side + data.max_response_length, side))
    return (1, pair) if pair_in_one_row(config, c, devices, pair, side) else (2, side)


def row_cost(c: DecoderConfig, length: int) -> float:
    """What a row takes, in multiplications of one layer; only ratios mean anything."""
    heads = c.num_heads * c.head_dim
    matrices = c.hidden_size * (2 * heads + 2 * c.num_kv_heads * c.head_dim + (2 + c.gated_mlp) * c.intermediate_size)
    return length * (matrices + ATTENTION * 2 * length * heads)
