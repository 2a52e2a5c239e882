"""The programs that a stage runs, from shapes alone: the very functions that the stages call, with arguments placed as theirs are.

Rows of a model that sees have one picture each, and no picture was seen before. Both sides of a pair have one prompt, the longest.

Letters: B rows, T tokens, P prompt tokens, R response tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from transformers import PreTrainedTokenizerBase

from pe_rlhf_jax.config import Config, ConfigError
from pe_rlhf_jax.data import Data
from pe_rlhf_jax.data.rows import MOST_IN_A_ROW, padded
from pe_rlhf_jax.models.architecture import DecoderConfig
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.quantization import QuantizedMatrix, quantize_layers
from pe_rlhf_jax.models.roles import TOWER, Role
from pe_rlhf_jax.models.vlm import adapts_tower
from pe_rlhf_jax.rollout.decode import Sampler
from pe_rlhf_jax.rollout.generate import block_steps
from pe_rlhf_jax.rollout.refill import prompts_at_once
from pe_rlhf_jax.sharding import ROWS, make_mesh, placed_shapes, row_multiple, with_places
from pe_rlhf_jax.training import evaluate, reward, rl, sft
from pe_rlhf_jax.training.context import Context
from pe_rlhf_jax.training.evaluate import _log_ratio
from pe_rlhf_jax.training.experience import make_experience
from pe_rlhf_jax.training.images import AT_ONCE
from pe_rlhf_jax.training.images import _encode as encode
from pe_rlhf_jax.training.optimizer import make_optimizer
from pe_rlhf_jax.training.reward_kinds import _score_pairs
from pe_rlhf_jax.training.rewards import _score
from pe_rlhf_jax.training.rl_loss import Frozen, asked_before, gradient_of_update
from pe_rlhf_jax.training.rollouts import _respond
from pe_rlhf_jax.training.shared_rows import longest_pair
from pe_rlhf_jax.training.step import make_step, step_of
from pe_rlhf_jax.types import Batch, Estimates, Experience, Images, LabelBatch, PreferenceBatch, PromptBatch, PyTree, Rollout

LOADING = "loading"
"""What comes before all stages where the backbone is to be quantized."""
END_TOKENS = (0, 1)
"""Stand-ins: which tokens end a response changes nothing of a program's size."""


class Call(NamedTuple):
    """One call of a compiled function."""

    name: str
    function: Any
    """Jitted."""
    static: tuple[Any, ...]
    """Leading arguments that are not arrays."""
    arguments: dict[str, PyTree]
    """Placed shapes, in the function's order, by what they are."""
    repeats: int = 1
    """Calls in a step of the stage; 0 for what is called between steps."""
    loops: tuple[int, ...] = ()
    """Rounds, at most, of the loops whose length is not fixed, from the outermost inwards."""
    passing: frozenset[str] = frozenset({"batch", "prompts", "rollout", "scores", "experience", "rows", "kl_coef", "key", "pixels"})
    """Arguments that are gone after the step; the others stay in memory through the stage."""


Compile = Callable[[Call], PyTree]
"""Compiles a call and returns the placed shapes of what it returns."""


class Update(NamedTuple):
    """A stage's update: the function, and the shapes of its state, of what it only reads, and of its batch."""

    step: Any
    state: PyTree
    frozen: PyTree
    batch: PyTree


def abstract_context(config: Config, architecture: DecoderConfig, dtype: Any, devices: Sequence[jax.Device] | None = None) -> Context:
    """A context whose backbone is shapes, without data; enough to make states, losses and programs of.

    Raises ConfigError if the mesh does not fit the devices.
    """
    architecture = dataclasses.replace(architecture, quantization=config.model.quantization)
    decoder = Decoder(architecture, config.lora, dtype, dtype, config.model.remat, config.model.attention_block)
    params = jax.eval_shape(decoder.init_params, jax.random.key(0))
    data = Data(sft=None, preference=None, prompts=None, notes=[])
    tokenizer = cast(PreTrainedTokenizerBase, _Tokenizer())
    return Context(config, decoder, params, tokenizer, END_TOKENS, data, make_mesh(config.mesh, devices))


class _Tokenizer:
    pad_token_id = 0


def roles(context: Context, backbone: PyTree) -> tuple[Role, Role | None]:
    """Reference and reward model that a run has when its RL starts. Runs under `jax.eval_shape`."""
    inside = dataclasses.replace(context, backbone=backbone)
    stages, config = context.config.run.stages, context.config.rl
    reference = sft.init(inside).trainable if "sft" in stages else Role()
    mine = "reward" in stages or config.value_from_reward or any(term.model == "run" for term in config.rewards)
    if not mine and not names_other_runs(context.config):
        return reference, None
    model = reward.whole(inside, reference, reward.init(inside, reference).trainable)
    # Other runs' adapters and heads are taken to be as this run's; what else they have, `_score_calls` counts for each.
    return reference, model if mine else model.replace(params=None)


def names_other_runs(config: Config) -> bool:
    """Whether `rl.rewards` has another run's reward model."""
    return any(term.model not in (None, "run") for term in config.rl.rewards)


def update(context: Context, stage: str) -> Update:
    """The update of `sft`, `reward` or `rl`, as the stage makes it."""
    return {sft.STAGE: _sft_update, reward.STAGE: _reward_update, rl.STAGE: _rl_update}[stage](context)


def updates_a_step(context: Context, stage: str) -> int:
    """Calls of the update in one step of the stage."""
    return context.config.rl.updates_a_batch if stage == rl.STAGE else 1


def placed_update(context: Context, stage: str) -> Call:
    """The update's call, by the parameter rule and the batch rule."""
    found = update(context, stage)
    state, frozen, batch = placed(context, found.state), placed(context, found.frozen), rows(context, found.batch)
    return _update_call(context, stage, found.step, state, frozen, batch)


def stage_calls(context: Context, stage: str, compile: Compile) -> dict[str, PyTree]:
    """Compiles what a step of the stage calls, in its order, and returns everything that stays in memory meanwhile, by what it is.

    A step of `evaluate` is a batch of prompts, answered by the reference and by the policy; it needs RL among the run's stages. `loading`
    is no stage of a run, but what comes before all of them where the backbone is to be quantized.
    """
    if stage == LOADING:
        return _loading_calls(context, compile)
    _encode(context, getattr(context.config, stage).batch_size, compile)
    if stage == evaluate.STAGE:
        return _evaluate_calls(context, compile)
    if stage != rl.STAGE:
        call = placed_update(context, stage)
        compile(call)
        _held_out(context, stage, call, compile)
        return {name: tree for name, tree in call.arguments.items() if name != "batch"} | _other_roles(context, stage)
    return _rl_calls(context, compile)


def _loading_calls(context: Context, compile: Compile) -> dict[str, PyTree]:
    """Compiles what makes few bits of the largest matrices, and returns the rest of the backbone, as if these were the last to be loaded.

    A leaf is on the devices with all of its layers, in floating point, before it is quantized; see `loading.load_decoder`.
    """
    how = context.config.model.quantization
    assert how is not None
    kept = jax.tree.leaves(placed(context, context.backbone), is_leaf=lambda node: isinstance(node, QuantizedMatrix))
    pairs = zip(jax.tree.leaves(_unquantized(context)[1]), kept, strict=True)
    read, stored = max(
        (pair for pair in pairs if isinstance(pair[1], QuantizedMatrix)),
        key=lambda pair: math.prod(pair[0].sharding.shard_shape(pair[0].shape)),
    )
    function = jax.jit(functools.partial(quantize_layers, how=how), out_shardings=jax.tree.map(lambda leaf: leaf.sharding, stored))
    compile(Call("quantize", function, (), {"matrices as read": read}, repeats=0, passing=frozenset({"matrices as read"})))
    return {"rest of the backbone": [leaf for leaf in kept if leaf is not stored]}


def _unquantized(context: Context) -> tuple[Decoder, PyTree]:
    """The decoder in floating point, and the placed shapes of its parameters."""
    decoder = dataclasses.replace(context.decoder, config=dataclasses.replace(context.decoder.config, quantization=None))
    return decoder, placed(context, jax.eval_shape(decoder.init_params, jax.random.key(0)))


def _held_out(context: Context, stage: str, learning: Call, compile: Compile) -> None:
    """Compiles the scores of held-out pairs where the mesh has it that there are more of them at once than an update computes.

    A forward pass over as many rows as an update computes needs less memory than the update, and rows that are not pairs are never more.
    """
    config, size = context.config.reward, context.evaluated_at_once("reward")
    if stage != reward.STAGE or size <= (config.micro_batch_size or config.batch_size):
        return
    backbone, rest = learning.arguments["frozen"]
    pairs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), learning.arguments["batch"])
    role = learning.arguments["training state"].trainable.join(rest)
    arguments = {"reward model": role, "backbone": backbone, "batch": rows(context, pairs)}
    compile(Call("evaluation", _score_pairs, (context.decoder,), arguments, repeats=0))


def _encode(context: Context, count: int, compile: Compile) -> None:
    """Compiles what a frozen tower does with the pictures of so many rows."""
    pictures = _images(context, count)
    if pictures is None or pictures.pixels is not None:
        return
    size = AT_ONCE * row_multiple(context.mesh)
    tower, pixels = {TOWER: placed(context, context.backbone[TOWER])}, rows(context, _pixels(context, size))
    compile(Call("encode", encode, (context.decoder,), {"tower": tower, "pixels": pixels}, repeats=-(-count // size)))


def _rl_calls(context: Context, compile: Compile) -> dict[str, PyTree]:
    config, chunk = context.config.rl, context.config.model.logprob_chunk
    found = update(context, rl.STAGE)
    state, backbone = placed(context, found.state), placed(context, context.backbone)
    reference, model = (placed(context, role) for role in jax.eval_shape(lambda params: roles(context, params), context.backbone))
    whole = {name: role.join(placed(context, found.frozen.roles[name])) for name, role in state.trainable.items()}
    rollout = _respond_call(context, whole["policy"], backbone, config.batch_size, config.answers_each, 1, compile)
    resident = {"backbone": backbone, "training state": state, "reference": reference, "reward model": model}
    resident |= _score_calls(context, rollout, model, backbone, config.answers_each, config.micro_batch_size, 1, compile)
    scores = rows(context, _floats(config.batch_size))
    arguments = {
        "backbone": backbone,
        "policy": whole["policy"],
        "reference": reference,
        "value": asked_before(config, whole),
        "rollout": rollout,
        "scores": scores,
        "kl_coef": found.frozen.kl_coef,
    }
    experience, _ = compile(Call("experience", make_experience, (context.decoder, config, chunk), arguments))
    if config.mini_batches > 1:
        order = jax.ShapeDtypeStruct((config.batch_size // config.mini_batches,), jnp.int32)
        experience = compile(Call("mini-batch", rl._take, (), {"experience": experience, "rows": order}))
    frozen = placed(context, found.frozen)
    compile(_update_call(context, rl.STAGE, found.step, state, frozen, experience))
    return resident


def _evaluate_calls(context: Context, compile: Compile) -> dict[str, PyTree]:
    """With the policy's rollout for the reference's too, which is no larger."""
    config = context.config
    found, backbone = update(context, rl.STAGE), placed(context, context.backbone)
    reference, model = (placed(context, role) for role in jax.eval_shape(lambda params: roles(context, params), context.backbone))
    trained = {name: placed(context, role) for name, role in found.state.trainable.items()}
    policy = trained["policy"].join(placed(context, found.frozen.roles["policy"]))
    rollout = _respond_call(context, policy, backbone, config.evaluate.batch_size, 1, 2, compile)
    resident = {"backbone": backbone, "policy and value model": trained, "reference": reference, "reward model": model}
    at_once = evaluate.at_once(context)
    resident |= _score_calls(context, rollout, model, backbone, 1, at_once, 2, compile)
    static = context.decoder, config.rl.sampling.temperature, config.model.logprob_chunk, at_once
    arguments = {"policy": policy, "reference": reference, "backbone": backbone, "rollout": rollout}
    compile(Call("log-ratio", _log_ratio, static, arguments))
    return resident


def _respond_call(context: Context, policy: Role, backbone: PyTree, count: int, answers: int, repeats: int, compile: Compile) -> PyTree:
    """Compiles the sampling of so many responses, and returns the placed shapes of them."""
    sampling, prompt = context.config.rl.sampling, _rounded(context, context.config.data.max_prompt_length)
    prompts = rows(context, PromptBatch(_ints(count, prompt), _flags(count, prompt), _images(context, count)))
    sampler = Sampler(context.decoder, sampling, END_TOKENS, context.pad_token, answers)
    arguments = {"policy": policy, "backbone": backbone, "prompts": prompts, "key": _key()}
    rollout = compile(Call("rollout", _respond, (sampler,), arguments, repeats, _rollout_loops(context, count, answers)))
    return rows(context, rollout) if sampling.stop_strings else rollout  # cut on the host, and placed again


def _score_calls(
    context: Context, rollout: PyTree, model: Role, backbone: PyTree, group: int, at_once: int | None, repeats: int, compile: Compile
) -> dict[str, PyTree]:
    """Compiles the scores of each reward model, and returns the backbones of their own that they keep."""
    kept: dict[str, PyTree] = {}
    separate, quantized = context.config.rl.roles == "separate", context.config.model.quantization is not None
    for index, name in enumerate(term.model for term in context.config.rl.rewards if term.model is not None):
        decoder, scorer, params = context.decoder, model, backbone
        if separate and name != "run":  # nothing of it is taken to be shared or quantized, since nothing is known of it
            (decoder, params), scorer = _unquantized(context), Role(head=model.head)
            kept[f"reward backbone {index}"] = params
        elif separate and model.lora is not None and not quantized:  # merged; a quantized backbone is shared as it is
            scorer, params = Role(head=model.head), backbone if model.params is None else model.params
            kept[f"reward backbone {index}"] = params
        arguments = {"reward model": scorer, "backbone": params, "rollout": rollout}
        compile(Call("score", _score, (decoder, group, at_once), arguments, repeats))
    return kept


def _rollout_loops(context: Context, count: int, answers_each: int) -> tuple[int, ...]:
    """Rounds of the rollout's loops where every response has full length: blocks; or readings of prompts, and blocks between them."""
    sampling, groups = context.config.rl.sampling, row_multiple(context.mesh)
    blocks, at_once = -(-sampling.max_new_tokens // block_steps(sampling.max_new_tokens)), sampling.rows_at_once(count)
    if at_once == count:
        return (blocks,)
    responses = count // groups
    answers = math.gcd(answers_each, responses)
    readings = -(-responses // (answers * prompts_at_once(at_once // groups, answers)))
    return readings, -(-blocks * count // at_once // readings)


def _update_call(context: Context, stage: str, step: Any, state: PyTree, frozen: PyTree, batch: PyTree) -> Call:
    arguments = {"training state": state, "frozen": frozen, "batch": batch, "key": _key()}
    return Call("update", step, (), arguments, updates_a_step(context, stage))


def _other_roles(context: Context, stage: str) -> dict[str, PyTree]:
    """What earlier stages left in memory while this one trains."""
    if stage == sft.STAGE or "sft" not in context.config.run.stages:
        return {}
    return {"reference": placed(context, jax.eval_shape(lambda params: roles(context, params)[0], context.backbone))}


def _sft_update(context: Context) -> Update:
    config = context.config.sft
    state = jax.eval_shape(lambda params: sft.init(dataclasses.replace(context, backbone=params)), context.backbone)
    optimizer = make_optimizer(config.optimizer, config.steps, config.tuning)
    step = make_step(sft._loss(context), sft._targets, optimizer, config.micro_batch_size)
    width = _text_width(context)
    mask = _flags(config.batch_size, width)
    tokens = _ints(config.batch_size, width)
    return Update(step, state, context.backbone, Batch(tokens, mask, mask, _ends(context, tokens), **_seen(context, mask)))


def _reward_update(context: Context) -> Update:
    config = context.config.reward

    def start(params: PyTree) -> tuple[PyTree, PyTree]:
        inside = dataclasses.replace(context, backbone=params)
        reference = roles(context, params)[0]
        return reward.init(inside, reference), (params, reward._rest(inside, reference))

    state, frozen = jax.eval_shape(start, context.backbone)
    optimizer = make_optimizer(config.optimizer, config.steps, config.tuning)
    kind = reward.kind_of(config)
    step = make_step(reward._loss(context, kind), reward._examples, optimizer, config.micro_batch_size)
    width, rows, packing = _text_width(context), config.batch_size, context.config.data.packing
    each, said = (MOST_IN_A_ROW, _floats(rows, MOST_IN_A_ROW)) if packing else (1, _floats(rows))
    if kind.data == "label":
        tokens, mask, last = _ints(rows, width), _flags(rows, width), _ints(rows, each)
        labels = LabelBatch(tokens, mask, last, said, said, _ends(context, tokens), **_seen(context, mask))
        return Update(step, state, frozen, labels)
    n, width = longest_pair(context.config, context.decoder.config, row_multiple(context.mesh))
    tokens, mask, last = _ints(rows, n, width), _flags(rows, n, width), _ints(rows, n, 2 * each // n)
    ends = tokens if n == 1 else None
    return Update(step, state, frozen, PreferenceBatch(tokens, mask, last, ends, said, said, **_seen(context, mask)))


def _rl_update(context: Context) -> Update:
    config = context.config.rl

    def start(params: PyTree) -> tuple[PyTree, Frozen]:
        inside = dataclasses.replace(context, backbone=params)
        reference, model = roles(context, params)
        state = rl.init(inside, reference, model)
        return state.train, Frozen(params, rl._frozen(inside, reference, model), state.kl_coef)

    state, frozen = jax.eval_shape(start, context.backbone)
    rows = config.batch_size // config.mini_batches
    step = step_of(gradient_of_update(context), rl._tokens, rl._optimizer(config))
    prompt, response = _rounded(context, context.config.data.max_prompt_length), config.sampling.max_new_tokens
    numbers, seen = _floats(rows, response), _flags(rows, prompt)
    ended, pictures = _flags(rows), _images(context, rows)
    rollout = Rollout(_ints(rows, prompt), seen, _ints(rows, response), _flags(rows, response), numbers, ended, pictures)
    estimates = None if config.values_while_learning else Estimates(numbers, numbers, numbers)
    experience = Experience(rollout, numbers, numbers, numbers if estimates is None else None, estimates)
    return Update(step, state, frozen, experience)


def placed(context: Context, shapes: PyTree) -> PyTree:
    """Shapes with their places by the parameter rule."""
    return placed_shapes(shapes, context.mesh)


def rows(context: Context, shapes: PyTree) -> PyTree:
    """Shapes with their places by the batch rule. Raises ConfigError if the mesh does not divide the rows."""
    count, parts = jax.tree.leaves(shapes)[0].shape[0], row_multiple(context.mesh)
    if count % parts:
        raise ConfigError(f"a batch of {count} rows cannot be split over mesh axes data and fsdp, together {parts}: make it a multiple")
    return with_places(shapes, jax.tree.map(lambda _: NamedSharding(context.mesh, ROWS), shapes))


def _ends(context: Context, tokens: Any) -> Any:
    return tokens if context.config.data.packing else None


def _seen(context: Context, mask: Any) -> dict[str, Any]:
    """What a batch of SFT or of reward training says of pictures."""
    return {} if context.decoder.config.vision is None else {"prompt_mask": mask, "images": _images(context, mask.shape[0])}


def _images(context: Context, count: int) -> Images | None:
    """One picture a row: features, or pixels where adapters change the tower."""
    if context.decoder.config.vision is None:
        return None
    pixels = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, 1, *x.shape[1:]), x.dtype), _pixels(context, count))
    if adapts_tower(context.decoder.lora):
        return Images(pixels=pixels)
    tower = {TOWER: context.backbone[TOWER]}
    return Images(features=jax.eval_shape(lambda tower, x: context.decoder.encode_images({"params": tower}, x), tower, pixels))


def _pixels(context: Context, count: int) -> Any:
    vision = context.decoder.config.vision
    assert vision is not None
    return _floats(count, vision.tower.image_size, vision.tower.image_size, 3)


def _text_width(context: Context) -> int:
    data = context.config.data
    return _rounded(context, data.max_prompt_length + data.max_response_length)


def _rounded(context: Context, length: int) -> int:
    return padded(length, context.config.data.length_multiple)


def _key() -> Any:
    return jax.eval_shape(jax.random.key, 0)


def _ints(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _flags(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.bool_)


def _floats(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
