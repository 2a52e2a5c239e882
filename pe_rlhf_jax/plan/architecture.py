"""The architecture of `model.source` without its weights."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from pe_rlhf_jax.checkpoint import source
from pe_rlhf_jax.config import ConfigError, ModelConfig
from pe_rlhf_jax.models.architecture import DecoderConfig
from pe_rlhf_jax.models.families import UnsupportedModelError, family_of


def architecture(config: ModelConfig, model_config: Path | None = None) -> DecoderConfig:
    """Read from `model_config` (Hugging Face's `config.json`), or else from what `model.source` names; of a hub's model, that one file.

    Raises:
        ConfigError: there is no such file, it is not readable, or not a model that we have.
        WeightsError, PackageError: a source that is neither a folder nor on the hub cannot be used.
    """
    kind, _, name = config.source.partition(":")
    folder = Path(config.source).expanduser()
    if model_config is not None:
        path = model_config
    elif config.vision is not None:  # put together of two
        return source.resolve(config).config
    elif kind == "hf":
        path = _from_hub(name, config.revision)
    elif folder.is_dir():
        path = folder / "config.json"
    else:
        return source.resolve(config).config
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return family_of(values).config_from_hf(values)
    except (OSError, ValueError, UnsupportedModelError) as error:
        raise ConfigError(f"{path}: expected Hugging Face's config.json of a model that we have: {error}") from error


def _from_hub(name: str, revision: str | None) -> Path:
    try:
        return Path(huggingface_hub.hf_hub_download(name, "config.json", revision=revision))
    except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError, hub_errors.HTTPError, OSError, ValueError) as error:
        raise ConfigError(
            f"hf:{name}: its config.json is neither in the cache nor to be fetched ({type(error).__name__}). Give one with --model-config; "
            "configs/shapes has some"
        ) from error
