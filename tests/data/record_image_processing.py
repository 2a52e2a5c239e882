"""Keeps what transformers' PIL image processors make of small pictures, for `test_image_processing.py`, which needs no torch.

Run in an environment with the extra `parity`, from the repository's root:

    PYTHONPATH=.:tests/data python tests/data/record_image_processing.py

Per case and size of picture: number of pictures, height, width, and sums that any other pixel, order or scale would change.
"""

import json

import numpy as np
import PIL.Image
import transformers
from test_image_processing import RECORDED, SIZES, summary
from tiny_images import pixels
from tiny_processors import CONFIGS


def main() -> None:
    cases = {}
    for name, config in CONFIGS.items():
        arguments = {key: value for key, value in config.items() if key != "image_processor_type"}
        processor = getattr(transformers, config["image_processor_type"] + "Pil")(**arguments)
        for size in SIZES:
            values = processor(PIL.Image.fromarray(pixels(*size)), return_tensors="np")["pixel_values"]
            values = np.moveaxis(np.asarray(values).reshape(-1, *np.shape(values)[-3:]), 1, -1)
            cases[f"{name}/{size[0]}x{size[1]}"] = summary(values)
    RECORDED.write_text(json.dumps({"transformers": transformers.__version__, "pillow": PIL.__version__, "cases": cases}, indent=1) + "\n")
    print(f"{RECORDED}: {RECORDED.stat().st_size} bytes, {len(cases)} cases")


if __name__ == "__main__":
    main()
