"""What the compiler reserves for one update of the reward model and one of RL, with adapters and with full tuning.

    python benchmarks/memory.py --config configs/quickstart.yaml [--set rl.batch_size=8]

The steps are those of a run, compiled for its configuration's model, batch and longest texts, and for the devices that are there; no
weight is loaded and nothing is run. Prints one line of JSON: bytes on each device, per stage and tuning,

    arguments    what the step reads: backbone, trained leaves, optimizer state, batch
    temporaries  the block that it needs meanwhile: activations and gradients, those that live at one time
    outputs      what it returns; `reused` of them take the place of arguments
    peak         arguments, temporaries, and outputs that take no argument's place: what has to fit
    trained      of the arguments, the trained leaves (of all devices together)
    optimizer    of the arguments, the optimizer's state (of all devices together)

and `backbone`, the bytes of its parameters. Rollout and scoring are other programs, whose memory is not in these figures; nor is the
frozen backbone that full tuning keeps as reference, which this step does not read.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from transformers import PreTrainedTokenizerBase

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.checkpoint import source
from pe_rlhf_jax.config import Config
from pe_rlhf_jax.data import Data
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.roles import Role, Tuning
from pe_rlhf_jax.sharding import ROWS, make_mesh, shardings
from pe_rlhf_jax.training import reward, rl
from pe_rlhf_jax.training.context import Context
from pe_rlhf_jax.training.optimizer import make_optimizer
from pe_rlhf_jax.training.step import make_step
from pe_rlhf_jax.types import Experience, PreferenceBatch, PyTree, Rollout, TrainState

STAGES = ("reward", "rl")


def abstract_context(config: Config, decoder: Decoder) -> Context:
    """A context whose backbone is shapes, without data; enough to make states and losses of under `jax.eval_shape`."""
    params = jax.eval_shape(decoder.init_params, jax.random.key(0))
    data = Data(sft=None, preference=None, prompts=None, notes=[])
    return Context(config, decoder, params, cast(PreTrainedTokenizerBase, None), (), data, make_mesh(config.mesh))


def compiled_step(context: Context, stage: str, tuning: Tuning) -> tuple[jax.stages.Compiled, PyTree]:
    """The update of a stage as the stage itself makes it, compiled; and the shapes of its state."""
    section = getattr(context.config, stage).model_copy(update={"tuning": tuning})
    context = dataclasses.replace(context, config=context.config.model_copy(update={stage: section}))
    make = _reward if stage == reward.STAGE else _rl
    step, state, frozen, batch = make(context)
    mesh = context.mesh
    placed = [_placed(tree, shardings(tree, mesh)) for tree in (state, frozen)]
    rows = _placed(batch, jax.tree.map(lambda _: NamedSharding(mesh, ROWS), batch))
    with jax.set_mesh(mesh):
        return step.lower(*placed, rows, jax.random.key(0)).compile(), state


def figures(context: Context, stage: str, tuning: Tuning) -> dict[str, int]:
    """Bytes of one compiled update on each device; see the top of this file."""
    compiled, state = compiled_step(context, stage, tuning)
    stats = compiled.memory_analysis()
    return {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "reused": stats.alias_size_in_bytes,
        # `stats.peak_memory_in_bytes` leaves out the temporaries on CPU.
        "peak": stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "trained": size(state.trainable),
        "optimizer": size(state.opt_state),
    }


def size(tree: PyTree) -> int:
    """Bytes of all leaves, arrays or shapes, on all devices together."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _reward(context: Context) -> tuple[Any, PyTree, PyTree, PyTree]:
    config = context.config.reward
    state = jax.eval_shape(lambda params: reward.init(dataclasses.replace(context, backbone=params), Role()), context.backbone)
    optimizer = make_optimizer(config.optimizer, config.steps, config.tuning)
    step = make_step(
        reward._loss(context, reward.kind_of(config)), lambda b: jnp.sum(b.weight), optimizer, config.batch_size, config.micro_batch_size
    )
    width = _rounded(context, context.config.data.max_prompt_length + context.config.data.max_response_length)
    tokens, mask = _ints(config.batch_size, width), _flags(config.batch_size, width)
    one = _floats(config.batch_size)
    return step, state, (context.backbone, Role()), PreferenceBatch(tokens, mask, tokens, mask, margin=one, weight=one)


def _rl(context: Context) -> tuple[Any, PyTree, PyTree, PyTree]:
    config = context.config.rl

    def start(params: PyTree) -> tuple[TrainState, rl.Frozen]:
        inside = dataclasses.replace(context, backbone=params)
        model = reward.init(inside, Role()).trainable
        state = rl.init(inside, Role(), model)
        return state.train, rl.Frozen(params, rl._frozen(inside, Role(), model), state.kl_coef)

    state, frozen = jax.eval_shape(start, context.backbone)
    rows = config.batch_size // rl._mini_batches(config)
    step = make_step(rl._loss(context), rl._tokens, rl._optimizer(config), rows, config.micro_batch_size)
    prompt, response = _rounded(context, context.config.data.max_prompt_length), config.sampling.max_new_tokens
    numbers = _floats(rows, response)
    rollout = Rollout(
        prompt=_ints(rows, prompt),
        prompt_mask=_flags(rows, prompt),
        response=_ints(rows, response),
        response_mask=_flags(rows, response),
        logprobs=numbers,
        ended=_flags(rows),
    )
    experience = Experience(rollout, old_logprobs=numbers, ref_logprobs=numbers, values=numbers, advantages=numbers, returns=numbers)
    return step, state, frozen, experience


def _rounded(context: Context, length: int) -> int:
    multiple = context.config.data.length_multiple
    return -(-length // multiple) * multiple


def _ints(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _flags(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.bool_)


def _floats(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _placed(shapes: PyTree, places: PyTree) -> PyTree:
    return jax.tree.map(lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place), shapes, places)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="the run's YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="override a field")
    arguments = parser.parse_args()
    config = configuration.load(arguments.config, arguments.overrides)

    shape = source.resolve(config.model).config
    dtype = {"auto": "float32" if jax.default_backend() == "cpu" else "bfloat16"}.get(config.model.dtype, config.model.dtype)
    context = abstract_context(config, Decoder(shape, config.lora, jnp.dtype(dtype), jnp.dtype(dtype), config.model.remat))
    result: dict[str, Any] = {"dtype": dtype, "device": jax.devices()[0].device_kind, "backbone": size(context.backbone)}
    for stage in STAGES:
        result[stage] = {tuning: figures(context, stage, tuning) for tuning in ("lora", "full")}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
