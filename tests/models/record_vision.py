"""Keeps what transformers and torch compute for the tiny models that see, for `test_vision.py`, which needs neither.

Run in an environment with the extra `parity`, from the repository's root:

    PYTHONPATH=.:tests python tests/models/record_vision.py

Per case: features of both pictures after the projector, logits of the rows with two, one and no pictures, the gradients of a few leaves,
and a checksum of the weights, which follow from their names.
"""

from __future__ import annotations

import zlib

import numpy as np
import safetensors.numpy
import torch
import transformers
from tiny_vision import CASES, RECORDED, TinyVision
from torch_vision import torch_features, torch_gradients, torch_logits, torch_model


def main() -> None:
    recorded: dict[str, np.ndarray] = {}
    header = {"torch": torch.__version__, "transformers": transformers.__version__}
    for name in CASES:
        tiny = TinyVision(name)
        model = torch_model(tiny)
        recorded[f"{name}/features"] = torch_features(tiny, model)
        recorded |= {f"{name}/logits/{count}": torch_logits(tiny, model, count) for count in (2, 1, 0)}
        gradients = torch_gradients(tiny, model)
        recorded |= {f"{name}/{leaf}": np.ascontiguousarray(gradients[leaf]) for leaf in tiny.leaves}
        header[name] = str(tiny.checksum())
    safetensors.numpy.save_file(recorded, RECORDED, metadata=header)
    print(f"{RECORDED}: {RECORDED.stat().st_size} bytes, crc32 {zlib.crc32(RECORDED.read_bytes())}")


if __name__ == "__main__":
    main()
