"""One update: loss to gradients of what is trained, in micro-batches, and a guard against non-finite numbers."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from pe_rlhf_jax.sharding import keep_placed
from pe_rlhf_jax.training.micro_batches import micro_batches, rejoined
from pe_rlhf_jax.types import PyTree, TrainState

Statistics = dict[str, Float[Array, ""]]

Loss = Callable[[PyTree, PyTree, PyTree, Float[Array, ""], jax.Array], tuple[Float[Array, ""], Statistics]]
"""loss(trainable, frozen, rows, total, key) -> (loss, statistics), both already divided by `total`, the whole update's normaliser, so
that the sums over micro-batches are exactly the whole batch's."""

TellingLoss = Callable[[PyTree, PyTree, PyTree, Float[Array, ""], jax.Array], tuple[Float[Array, ""], tuple[Statistics, PyTree]]]
"""A loss that also tells something of each of its rows: loss(...) -> (loss, (statistics, told))."""


class Gradient(NamedTuple):
    """Of a loss over a whole batch."""

    loss: Float[Array, ""]
    statistics: Statistics
    gradients: PyTree
    told: PyTree = None
    """Has a row for each of the batch."""


GradientOf = Callable[[PyTree, PyTree, PyTree, Float[Array, ""], jax.Array], Gradient]
"""f(trainable, frozen, batch, total, key); `total` as for a loss."""

Step = Callable[[TrainState, PyTree, PyTree, jax.Array], tuple[TrainState, dict[str, Array]]]


class NonFiniteError(RuntimeError):
    """Too many updates in a row were skipped, or a reward of an evaluation is not a finite number."""


def new_state(trainable: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""

    @jax.jit
    def start(trainable: PyTree) -> PyTree:
        return keep_placed((*jnp.zeros((3,), jnp.int32), optimizer.init(_float32(trainable))))

    step, skipped, in_a_row, opt_state = start(trainable)
    return TrainState(step, trainable, opt_state, skipped=skipped, skipped_in_a_row=in_a_row)


def make_step(
    loss: Loss,
    total: Callable[[PyTree], Float[Array, ""]],
    optimizer: optax.GradientTransformation,
    micro_batch_size: int | None,
) -> Step:
    """`step_of` the loss's gradient, `micro_batch_size` rows at a time."""

    def telling(trainable: PyTree, frozen: PyTree, rows: PyTree, total: Array, key: jax.Array) -> tuple[Array, tuple[Statistics, None]]:
        value, statistics = loss(trainable, frozen, rows, total, key)
        return value, (statistics, None)

    return step_of(gradient_of(telling, micro_batch_size), total, optimizer)


def gradient_of(loss: TellingLoss, micro_batch_size: int | None) -> GradientOf:
    """The loss's gradient over a batch, of which so many rows as `micro_batch_size` says are computed at once, None for all.

    It divides the rows of a batch, unless these are fewer.
    """
    of_rows = jax.value_and_grad(loss, has_aux=True)

    def gradient(trained: PyTree, frozen: PyTree, batch: PyTree, total: Float[Array, ""], key: jax.Array) -> Gradient:
        def of_part(rows: PyTree, key: jax.Array) -> Gradient:
            (value, (statistics, told)), gradients = of_rows(trained, frozen, rows, total, key)
            return Gradient(value, statistics, gradients, told)

        rows = len(jax.tree.leaves(batch)[0])
        count = max(1, rows // (micro_batch_size or rows))
        if count == 1:
            return of_part(batch, key)
        parts = micro_batches(batch, count)

        def accumulate(sums: Gradient, inputs: tuple[PyTree, Array]) -> tuple[Gradient, PyTree]:
            rows, index = inputs
            part = of_part(rows, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, sums, part._replace(told=None)), part.told

        shapes = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts), key)._replace(told=None)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        sums, told = jax.lax.scan(accumulate, zeros, (parts, jnp.arange(count)))
        return sums._replace(told=rejoined(told))

    return gradient


def step_of(gradient: GradientOf, total: Callable[[PyTree], Float[Array, ""]], optimizer: optax.GradientTransformation) -> Step:
    """A jitted step(state, frozen, batch, key) -> (state, metrics). The state's buffers are reused.

    `total` is the normaliser of a whole batch. A non-finite loss or gradient changes nothing but the counters. `state.step` is left to the
    caller: a step of RL may hold several updates. The metrics have the gradient's norm before it is clipped, and where several models are
    trained (a dict of them), each of which may be clipped by its own, `grad_norm/<name>` too.
    """

    def step(state: TrainState, frozen: PyTree, batch: PyTree, key: jax.Array) -> tuple[TrainState, dict[str, Array]]:
        trained = _float32(state.trainable)  # so that gradients, moments and updates are, however it is stored
        value, statistics, gradients, _ = gradient(trained, frozen, batch, total(batch), key)
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
        trainable = optax.apply_updates(state.trainable, updates)

        def keep(new: Array, old: Array) -> Array:
            return jnp.where(finite, new, old)

        state = state.replace(
            trainable=jax.tree.map(keep, trainable, state.trainable),
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        parts = gradients if isinstance(gradients, dict) and len(gradients) > 1 else {}
        norms = {f"grad_norm/{name}": optax.global_norm(part) for name, part in parts.items()}
        return keep_placed(state), {"loss": value, "grad_norm": norm, **norms, "skipped": state.skipped, **statistics}

    return jax.jit(step, donate_argnums=0)


def _float32(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def skip(state: TrainState) -> TrainState:
    """The state where an update could not even be tried: the counters say that it was skipped."""
    return state.replace(skipped=state.skipped + 1, skipped_in_a_row=state.skipped_in_a_row + 1)


def applied(state: TrainState) -> int:
    """Updates that were not skipped: the optimizer's own count, by which its learning rate goes."""
    return int(optax.tree_utils.tree_get_all_with_path(state.opt_state, "count")[0][1])


def stop_if_not_finite(state: TrainState, limit: int, stage: str, cause: str | None = None) -> None:
    """Raises NonFiniteError after `limit` skipped updates in a row.

    Called when the last of them is logged, and when a stage goes on from a saved state.

    Args:
        cause: why the last one was skipped, where that was not a loss or gradient.
    """
    in_a_row = int(state.skipped_in_a_row)
    if in_a_row >= limit:
        raise NonFiniteError(
            f"{stage}: {in_a_row} updates in a row were skipped (run.max_nonfinite is {limit}), the last because "
            f"{cause or 'its loss or gradient is not a finite number'}. What is trained is as it was before them, here and in any "
            "checkpoint. A lower learning rate, gradient clipping, model.dtype float32 or, where a score is to blame, another reward model "
            "may help; that is another run, with a run.name of its own."
        )


def stage_key(seed: int, stage: str) -> jax.Array:
    """The key of a stage; keys of its steps are folded from it, so that nothing random needs to be saved."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode()))
