"""Published figures of TPU generations, and of the devices that JAX makes of a chip.

Source: Cloud TPU's pages of each generation (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x), read in 2026: HBM, its rate, peak
bfloat16 FLOP/s, and the inter-chip interconnect (ICI). ICI is published in both directions together; here it is one direction, half.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX sees it: a chip, or half of a TPU7x chip, which shows itself as two."""

    name: str
    hbm: float
    """Published memory, GiB."""
    usable: float
    """GiB that the compiler lets a program and its data have, read off the error with which it refuses a larger one (libtpu 0.0.42)."""
    flops: float
    """Peak FLOP/s in bfloat16."""
    hbm_rate: float
    """Bytes a second."""
    ici_rate: float
    """Bytes a second that leave over all ports together."""
    ports: int
    """4 in a 2D torus, 6 in a 3D torus."""

    @property
    def axis_rate(self) -> float:
        """Bytes a second over the two ports of one dimension of the torus."""
        return self.ici_rate * 2 / self.ports


CHIPS = {
    "v4": Chip("v4", 32, 30.75, 275e12, 1.2e12, 3.0e11, 6),
    "v5e": Chip("v5e", 16, 15.75, 197e12, 8.19e11, 2.0e11, 4),
    "v5p": Chip("v5p", 95, 95.74, 459e12, 2.765e12, 6.0e11, 6),
    "v6e": Chip("v6e", 32, 31.25, 918e12, 1.638e12, 4.0e11, 4),
    "tpu7x": Chip("tpu7x", 96, 94.75, 1153.5e12, 3.69e12, 3.0e11, 6),
}
"""tpu7x: half of a chip, which has 192 GiB and 2307 TFLOP/s. v5p: the compiler gives more than the 95 GiB that are published."""
