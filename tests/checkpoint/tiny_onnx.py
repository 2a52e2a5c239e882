"""A small DINOv2 backbone as an ONNX file, laid out as PyTorch's exporter does, written with Google's protobuf package."""

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

HIDDEN, INNER, PATCH, SIDE, LAYERS = 64, 96, 2, 3, 2


def _classes():
    file = descriptor_pb2.FileDescriptorProto(name="onnx.proto", package="onnx", syntax="proto2")
    kinds = {"int64": 3, "int32": 5, "string": 9, "bytes": 12, "float": 2}
    messages = {
        "Tensor": [
            ("dims", 1, "int64*"),
            ("data_type", 2, "int32"),
            ("float_data", 4, "float*"),
            ("name", 8, "string"),
            ("raw_data", 9, "bytes"),
        ],
        "Node": [("input", 1, "string*"), ("output", 2, "string*"), ("name", 3, "string"), ("op_type", 4, "string")],
        "Graph": [("node", 1, "Node*"), ("name", 2, "string"), ("initializer", 5, "Tensor*")],
        "Model": [("ir_version", 1, "int64"), ("producer_name", 2, "string"), ("graph", 7, "Graph")],
    }
    for name, fields in messages.items():
        made = file.message_type.add(name=name)
        for field, number, kind in fields:
            repeated, kind = kind.endswith("*"), kind.removesuffix("*")
            added = made.field.add(name=field, number=number, label=3 if repeated else 1, type=kinds.get(kind, 11))
            if kind == "float":
                added.options.packed = True
            if kind not in kinds:
                added.type_name = f".onnx.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"onnx.{name}")) for name in messages}


MESSAGES = _classes()


def weights() -> dict[str, np.ndarray]:
    """Hugging Face's names and shapes."""
    shapes = {
        "embeddings.cls_token": (1, 1, HIDDEN),
        "embeddings.patch_embeddings.projection.weight": (HIDDEN, 3, PATCH, PATCH),
        "embeddings.patch_embeddings.projection.bias": (HIDDEN,),
        "embeddings.position_embeddings": (1, 1 + SIDE**2, HIDDEN),
        "layernorm.weight": (HIDDEN,),
        "layernorm.bias": (HIDDEN,),
    }
    for layer in (f"encoder.layer.{i}." for i in range(LAYERS)):
        for norm in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "layer_scale1.lambda1", "layer_scale2.lambda1"):
            shapes[layer + norm] = (HIDDEN,)
        for linear in ("query", "key", "value"):
            shapes |= {f"{layer}attention.attention.{linear}.weight": (HIDDEN,) * 2, f"{layer}attention.attention.{linear}.bias": (HIDDEN,)}
        shapes |= {f"{layer}attention.output.dense.weight": (HIDDEN,) * 2, f"{layer}attention.output.dense.bias": (HIDDEN,)}
        shapes |= {f"{layer}mlp.fc1.weight": (INNER, HIDDEN), f"{layer}mlp.fc1.bias": (INNER,)}
        shapes |= {f"{layer}mlp.fc2.weight": (HIDDEN, INNER), f"{layer}mlp.fc2.bias": (HIDDEN,)}
    draw = np.random.default_rng(0)
    return {name: (0.2 * draw.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def model(given: dict[str, np.ndarray], leave_out: str = "") -> bytes:
    """The exported model: unnamed transposed matrices, positions in two parts, a decoder that is not wanted."""
    graph = MESSAGES["Graph"](name="main_graph")

    def tensor(name, value, packed=False):
        if not leave_out or leave_out not in name:
            content = {"float_data": value.ravel().tolist()} if packed else {"raw_data": value.astype("<f4").tobytes()}
            graph.initializer.append(MESSAGES["Tensor"](dims=value.shape, data_type=1, name=name, **content))

    def node(operation, name, *inputs):
        graph.node.append(MESSAGES["Node"](op_type=operation, name=name, input=inputs, output=[name + "_output_0"]))

    constants = iter(range(100, 1000))
    for name, value in given.items():
        if name == "embeddings.position_embeddings":
            one, patches = (f"onnx::{use}_{next(constants)}" for use in ("Concat", "Reshape"))
            tensor(one, value[:, :1])
            tensor(patches, value[:, 1:])
            node("Reshape", "/backbone/embeddings/Reshape_1", patches, "/backbone/embeddings/Concat_2_output_0")
            node("Concat", "/backbone/embeddings/Concat_6", one, "/backbone/embeddings/Reshape_2_output_0")
        elif value.ndim == 2:
            constant = f"onnx::MatMul_{next(constants)}"
            tensor(constant, value.T)
            module = name.removesuffix(".weight").replace("layer.", "layer_").replace(".", "/").replace("layer_", "layer.")
            module = module.replace("encoder/layer./", "encoder/layer.")
            node("MatMul", f"/backbone/{module}/MatMul", "/x_output_0", constant)
        else:
            tensor(f"backbone.{name}", value, packed=name == "layernorm.bias")
            node("Add", "/backbone/Add", f"backbone.{name}")
    tensor("decoder.final_conv.weight", np.ones((1, 64, 1, 1), np.float32))
    tensor("onnx::MatMul_99", np.ones((3, 3), np.float32))
    node("MatMul", "/decoder/head/MatMul", "/y_output_0", "onnx::MatMul_99")
    graph.initializer.append(MESSAGES["Tensor"](dims=[2], data_type=7, name="onnx::Unsqueeze_1", raw_data=b"\0" * 16))
    return MESSAGES["Model"](ir_version=7, producer_name="pytorch", graph=graph).SerializeToString()
