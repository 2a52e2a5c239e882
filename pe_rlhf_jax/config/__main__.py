"""Prints the reference page: `python -m pe_rlhf_jax.config > configs/REFERENCE.md`."""

from pe_rlhf_jax.config.reference import reference

print(reference(), end="")
