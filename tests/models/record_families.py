"""Keeps what transformers and torch compute for the tiny models, for `test_families.py`, which needs neither.

Run in an environment with the extra `parity`, from the repository's root:

    PYTHONPATH=.:tests python tests/models/record_families.py

Per case: logits of both rows, the gradients of a few leaves, and a checksum of the weights, which follow from their names.
"""

from __future__ import annotations

import zlib

import numpy as np
import safetensors.numpy
import torch
import transformers
from tiny_families import CASES, RECORDED, RECORDED_LEAVES, Tiny, tokens
from torch_families import torch_logits, torch_loss_gradients, torch_model


def main() -> None:
    recorded: dict[str, np.ndarray] = {}
    header = {"torch": torch.__version__, "transformers": transformers.__version__}
    for name in CASES:
        tiny = Tiny(name)
        model = torch_model(tiny)
        recorded[f"{name}/logits"] = torch_logits(model, tokens())
        gradients = torch_loss_gradients(tiny, model, tokens())
        recorded |= {f"{name}/{leaf}": np.ascontiguousarray(gradients[leaf]) for leaf in RECORDED_LEAVES}
        header[name] = str(tiny.checksum())
    safetensors.numpy.save_file(recorded, RECORDED, metadata=header)
    print(f"{RECORDED}: {RECORDED.stat().st_size} bytes, crc32 {zlib.crc32(RECORDED.read_bytes())}")


if __name__ == "__main__":
    main()
