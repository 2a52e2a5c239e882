"""Floating-point operations of a step, by formula.

XLA's own cost analysis counts the body of a scan once, so it is of no use for scanned layers. Here, a matrix product of [n, a] and
[a, b] is 2 n a b; everything else (norms, softmax, rotations) is left out, as usual (Kaplan et al. 2020, PaLM appendix B). Letters: N
matrix parameters of the layers, L layers, H heads of h, V vocabulary, D hidden, S keys that a token's query meets.

    forward, one token     2 N + 4 L S H h                attention over what is computed: the whole square, or of a long row in
                                                          blocks (`model.attention_block`) 3/4 to 5/8 of it
    logits, one token      2 V D
    adapters, one token    2 A                            A their parameters; kept apart, since they are trained where N is not
    backward               as much again for inputs, and as much again for what is trained
    recomputation          the forward pass again, but for its last matrix, whose product nobody needs, and attention once more
                           (`remat: full`); attention alone (`dots`); a block's scores; and always the logits
"""

from __future__ import annotations

import math

from pe_rlhf_jax.config import Config
from pe_rlhf_jax.models.architecture import DecoderConfig, matrices
from pe_rlhf_jax.models.attention import blocks_of, keys_met
from pe_rlhf_jax.models.lora import is_target
from pe_rlhf_jax.training import evaluate, reward, rl_loss, sft
from pe_rlhf_jax.training.images import AT_ONCE
from pe_rlhf_jax.training.shared_rows import answers_for, longest_pair


class Costs:
    """FLOPs of passes through one architecture with one configuration, computed in `dtype`, its rows split over so many devices."""

    def __init__(self, config: Config, c: DecoderConfig, devices: int = 1, dtype: str = "float32"):
        self.config, self.c, self.devices = config, c, devices
        self.recomputes = not config.rl.keeps_sampled_logprobs(dtype)
        self.layers = 2 * c.num_layers * sum(math.prod(shape) for shape in matrices(c).values())
        sizes = [config.lora.r * sum(shape) for name, shape in matrices(c).items() if is_target(name, config.lora)]
        self.adapter = 2 * c.num_layers * sum(sizes)
        self.last = 2 * c.num_layers * math.prod(matrices(c)["mlp.down_proj"])
        self.head = 2 * c.vocab_size * c.hidden_size

    def attention(self, keys: float) -> float:
        """Scores and sums of one token over `keys` keys."""
        return 4 * self.c.num_layers * keys * self.c.num_heads * self.c.head_dim

    def own_attention(self, tokens: int) -> float:
        """Scores and sums of one token over its own row of so many."""
        ordered = self.c.vision is None or self.c.vision.attention == "causal"
        return self.attention(keys_met(tokens, self.config.model.attention_block, ordered))

    def forward(self, rows: int, tokens: int, logits: int = 0, adapter: bool = True) -> float:
        """One pass over rows of `tokens` tokens, with logits at `logits` of them each."""
        token = self.layers + self.own_attention(tokens) + (self.adapter if adapter else 0)
        return rows * (tokens * token + logits * self.head)

    def encode(self, pictures: int) -> float:
        """The vision tower over so many pictures: patches, and its layers over as many tokens as there are patches."""
        assert self.c.vision is not None
        t = self.c.vision.tower
        tokens, d = t.side**2 + t.class_token, t.hidden_size
        weights = 4 * d * d + (3 if t.gated_mlp else 2) * d * t.intermediate_size
        layer = 2 * weights + 4 * tokens * d
        return pictures * tokens * (t.num_layers * layer + 2 * 3 * t.patch_size**2 * d)

    def update(self, rows: int, tokens: int, logits: int, tuning: str) -> float:
        """Forward, recomputation, and backward for inputs (both of attention's products have two) and for what is trained."""
        remat, full = self.config.model.remat, tuning == "full"
        again, blocks = remat == "full", blocks_of(tokens, self.config.model.attention_block)[0] > 1
        attentions = 3 + ({"none": 0.5, "dots": 1.5, "full": 1.5} if blocks else {"none": 0, "dots": 1, "full": 2})[remat]
        token = (2 + again + full) * self.layers - again * self.last + attentions * self.own_attention(tokens)
        token += 0.0 if full else (3 + again) * self.adapter
        return rows * (tokens * token + logits * (4 if full else 3) * self.head)

    def generate(self, rows: int, prompt: int, response: int, answers: int = 1) -> float:
        """Prefill, once for so many answers to one prompt, then one token at a time against every slot of the cache."""
        slots = prompt + response
        decode = response * (self.layers + self.adapter + self.attention(slots) + self.head)
        return self.forward(rows // answers, prompt, answers) + rows * decode

    def of(self, stage: str, program: str) -> float:
        """FLOPs of one call of a stage's program, on all devices together, at the longest texts."""
        config, data, sampling = self.config, self.config.data, self.config.rl.sampling
        text = data.max_prompt_length + data.max_response_length
        if program == "encode":
            return self.encode(AT_ONCE * self.devices)
        if stage == sft.STAGE:
            return self.update(config.sft.batch_size, text, text, config.sft.tuning)
        if stage == reward.STAGE:
            rows, text = longest_pair(config, self.c, self.devices) if config.reward.kind != "labels" else (1, text)
            return self.update(rows * config.reward.batch_size, text, 0, config.reward.tuning)
        if stage == evaluate.STAGE:
            return self._of_evaluation(program)
        one, rows, response = config.rl, config.rl.batch_size, sampling.max_new_tokens
        at_once, values = one.micro_batch_size or rows, one.has_critic and one.value_model == "adapter"
        if program == "rollout":
            answers = math.gcd(one.answers_each, rows // self.devices)
            return self.generate(rows, data.max_prompt_length, response, answers)
        if program == "score":
            rows, length, _ = self._shared(rows, at_once, one.answers_each)
            return self.forward(rows, length, adapter=one.roles == "shared")
        if program == "experience":
            rows, length, response = self._shared(rows, at_once, one.answers_each)
            passes = 2 if self.recomputes else 1
            trunk = one.has_critic and not values and not self.recomputes  # the policy's pass, for values alone
            asked = 0 if one.values_while_learning else values + trunk
            return passes * self.forward(rows, length, response) + asked * self.forward(rows, length)
        rows //= one.mini_batches
        policy_rows, length, response = self._shared(rows, min(at_once, rows), rl_loss.group_to_learn(one))
        policy = self.update(policy_rows, length, response, one.tuning)
        return policy + (self.update(rows, length, 0, one.tuning_of("value")) if values else 0)

    def _of_evaluation(self, program: str) -> float:
        rows, prompt, response = self.config.evaluate.batch_size, self.config.data.max_prompt_length, self.config.rl.sampling.max_new_tokens
        if program == "rollout":
            return self.generate(rows, prompt, response)
        if program == "score":
            return self.forward(rows, prompt + response, adapter=self.config.rl.roles == "shared")
        return 2 * self.forward(rows, prompt + response, response)  # the policy's log-probabilities, and the reference's

    def _shared(self, episodes: int, at_once: int, group: int) -> tuple[int, int, int]:
        """Rows of so many episodes, their tokens, and how many of these are responses', with `group` episodes to a prompt."""
        prompt, response = self.config.data.max_prompt_length, self.config.rl.sampling.max_new_tokens
        answers = answers_for(self.c, at_once, prompt, response, group, self.devices)
        return episodes // answers, prompt + answers * response, answers * response
