"""Typed, strict configuration: one YAML file plus `--set a.b=c`.

This package imports neither JAX nor Flax, so that a configuration can be checked anywhere.
`python -m pe_rlhf_jax.config` prints the reference page `configs/REFERENCE.md`.
"""

from pe_rlhf_jax.config.optimizer import OptimizerConfig
from pe_rlhf_jax.config.reading import differences, dump, load, parse
from pe_rlhf_jax.config.reference import reference
from pe_rlhf_jax.config.rl import RewardTermConfig, RLConfig, SamplingConfig
from pe_rlhf_jax.config.section import ConfigError, Section
from pe_rlhf_jax.config.sections import (
    PRESETS,
    STAGES,
    Config,
    DataConfig,
    EvaluateConfig,
    ExportConfig,
    FilesConfig,
    FormatName,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    Quantization,
    RewardConfig,
    RunConfig,
    SFTConfig,
    StageName,
)

__all__ = [
    "PRESETS",
    "STAGES",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FilesConfig",
    "FormatName",
    "LoRAConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Quantization",
    "RLConfig",
    "RewardConfig",
    "RewardTermConfig",
    "RunConfig",
    "SFTConfig",
    "SamplingConfig",
    "Section",
    "StageName",
    "differences",
    "dump",
    "load",
    "parse",
    "reference",
]
