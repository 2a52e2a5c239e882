"""What one compiled program takes on each device: memory, as the compiler says, and what it sends."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Mapping

import jax

from pe_rlhf_jax.models.quantization import QuantizedMatrix
from pe_rlhf_jax.plan import hlo
from pe_rlhf_jax.plan.programs import Call
from pe_rlhf_jax.sharding import with_places
from pe_rlhf_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Program:
    """Bytes on each device of one call of one program."""

    name: str
    repeats: int
    arguments: int
    """What it reads."""
    temporaries: int
    """The block that it needs meanwhile, of the arrays that live at one time."""
    outputs: int
    reused: int
    """Of the outputs, what takes the place of arguments."""
    peak: int
    """Arguments, temporaries, and outputs that take no argument's place."""
    parts: Mapping[str, int]
    """The arguments by what they are, before the padding of the device's tiles."""
    staying: int
    """Of what it reads, what stays in memory through the stage."""
    largest: tuple[hlo.Array, ...]
    """Of the arrays that it makes."""
    communication: hlo.Communication
    whole: tuple[str, ...]
    """Matrices of the backbone, or logits, that stand unsharded on a device; see `unsharded` and `kept_whole`."""
    seconds: float
    """To trace and compile."""
    refused: str = ""
    """The compiler's words, where it found that the program cannot fit; `peak` is then its figure, and the rest is unknown."""


def compile_call(call: Call, mesh: jax.sharding.Mesh, matrices: Mapping[str, tuple[int, ...]], vocabulary: int) -> tuple[Program, PyTree]:
    """The program, and the placed shapes of what it returns."""
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = call.function.lower(*call.static, *call.arguments.values())
        parts = {name: device_bytes(tree) for name, tree in call.arguments.items()}
        staying = {name: tree for name, tree in call.arguments.items() if name not in call.passing}
        kept = kept_whole(call.arguments, matrices) if mesh.size > 1 else ()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            peak = needed(str(error))
            if peak is None:
                raise
            read, words, spent = sum(parts.values()), str(error).split("\n")[0], time.perf_counter() - began
            nothing = hlo.Communication((), 0)
            stays = device_bytes(staying)
            program = Program(call.name, call.repeats, read, peak - read, 0, 0, peak, parts, stays, (), nothing, kept, spent, words)
            return program, lowered.out_info
    stats, text = compiled.memory_analysis(), compiled.as_text()
    arrays = hlo.arrays(text)
    program = Program(
        name=call.name,
        repeats=call.repeats,
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        reused=stats.alias_size_in_bytes,
        # `stats.peak_memory_in_bytes` leaves out the temporaries on CPU.
        peak=stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes,
        parts=parts,
        staying=device_bytes(_read(staying, dict(zip(call.arguments, compiled.input_shardings[0], strict=True)))),
        largest=tuple(arrays[:4]),
        communication=hlo.communication(text, mesh.size, call.loops),
        whole=(*unsharded(arrays, matrices, vocabulary, mesh.shape["fsdp"]), *kept) if mesh.size > 1 else (),
        seconds=time.perf_counter() - began,
    )
    return program, with_places(lowered.out_info, compiled.output_shardings)


def _read(arguments: PyTree, places: PyTree) -> list:
    """The leaves that the program reads; jit drops the others, and gives them no place, though they stay in memory all the same."""
    given = {path for path, _ in jax.tree_util.tree_leaves_with_path(places)}
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(arguments) if path in given]


def unsharded(arrays: list[hlo.Array], matrices: Mapping[str, tuple[int, ...]], vocabulary: int, fsdp: int) -> tuple[str, ...]:
    """Which matrices, of one layer or of all layers, and which logits a device makes a whole copy of.

    A matrix is known by its shape and by its layer's name in the path of operations, the embedding by its shape alone. Logits are
    arrays with the vocabulary as an axis, of two tokens or more, that are not the embedding or a share of it.
    """
    found: dict[str, None] = {}
    shares = {tuple(sorted((vocabulary, matrices["embedding"][1] // n))) for n in (1, fsdp)}
    for array in arrays:
        shape = tuple(sorted(n for n in array.shape if n > 1))
        known = [name for name, matrix in matrices.items() if shape == tuple(sorted(matrix))]
        for name in known:
            if name == "embedding" or name.split()[-1] in array.operation.split("/"):
                found[f"{name} {list(matrices[name])}"] = None
        if vocabulary in array.shape and not known and shape not in shares and math.prod(array.shape) >= 2 * vocabulary:
            found[f"logits {list(array.shape)}"] = None
    return tuple(found)


def kept_whole(arguments: PyTree, matrices: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Which matrices of the backbone, or of a trained copy of it, every device is given whole, in words.

    They are known by shape and by the layer's name in their path, quantized ones by the matrix that they stand for.
    """
    found: dict[str, None] = {}
    leaves = jax.tree_util.tree_leaves_with_path(arguments, is_leaf=lambda node: isinstance(node, QuantizedMatrix))
    for path, leaf in leaves:
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        stored = leaf.values if isinstance(leaf, QuantizedMatrix) else leaf
        place = getattr(stored, "sharding", None)
        if place is not None and place.shard_shape(stored.shape) != stored.shape:
            continue
        module = names[-2] if names[-1] == "kernel" and len(names) > 1 else "embedding" if names[-1] in ("embed", "lm_head") else None
        for name, matrix in matrices.items():
            if name.split()[-1] == module and tuple(leaf.shape) == tuple(matrix):
                found[f"{names[-1] if names[-1] == 'lm_head' else name} {list(matrix)}, kept whole"] = None
    return tuple(found)


def needed(message: str) -> int | None:
    """Bytes that a program would need, out of the compiler's refusal; None if it says something else."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"Used ([\d.]+)([KMGT]) of", message) or re.search(r"memory required for \w+ \w+ \(([\d.]+)([KMGT])\)", message)
    return None if found is None else int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]])


def device_bytes(tree: PyTree) -> int:
    """Bytes of a tree of placed shapes on one device."""

    def of(leaf) -> int:
        place = getattr(leaf, "sharding", None)
        shape = leaf.shape if place is None else place.shard_shape(leaf.shape)
        size = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        return math.prod(shape) * size

    return sum(of(leaf) for leaf in jax.tree.leaves(tree))
