"""A configuration out of a YAML file and `--set a.b=c`, with every problem explained; and back."""

from __future__ import annotations

import difflib
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pydantic
import yaml

from pe_rlhf_jax.config.section import ConfigError, Section
from pe_rlhf_jax.config.sections import Config
from pe_rlhf_jax.files import path_of


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML configuration and applies `a.b=c` overrides. Raises ConfigError with every problem found."""
    try:
        path = path_of(path)
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a place that cannot be
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    return parse(text, overrides, origin=str(path))


def parse(text: str, overrides: Sequence[str] = (), origin: str = "configuration") -> Config:
    """Like `load`, from YAML text."""
    try:
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not valid YAML: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: expected sections such as `model:`, found {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    try:
        return Config.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{origin} cannot be used:\n" + "\n".join(f"  {_explain(e)}" for e in error.errors())) from error


def dump(config: Config) -> str:
    """The resolved configuration as YAML; `parse` reads it back to an equal one."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def differences(old: Config, new: Config) -> list[str]:
    """One line for each field that differs, as `section.field: old -> new`."""
    a, b = (dict(_flatten(c.model_dump(mode="json"))) for c in (old, new))
    return [f"{key}: {a.get(key, '(none)')} -> {b.get(key, '(none)')}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: PyYAML reads `1e-4` as a string. Keys given twice are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue  # a key that cannot be hashed, which PyYAML reports; `<<` may come more than once
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as a float, such as a run's name `1e-4`."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))


def _apply(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"--set expects a.b=value, found {override!r}")
    *parents, leaf = path.strip().split(".")
    for name in parents:
        inner = {} if values.get(name) is None else values[name]  # an empty section reads as None
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {name} is a value, not a section")
        values[name] = dict(inner)  # a copy: by YAML's anchors, several sections may be one object
        values = values[name]
    try:
        values[leaf] = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from error


def _explain(error: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "configuration"
    if error["type"] == "extra_forbidden":
        section = _section_at(error["loc"][:-1])
        names = list(section.model_fields) if section else []
        near = difflib.get_close_matches(str(error["loc"][-1]), names, n=1, cutoff=0.5)
        return f"{where}: no such key; " + (f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(names)}")
    if error["type"] == "missing":
        return f"{where}: required, but missing"
    # What a whole section holds is in the file; the message says what is wrong with it.
    found = "" if isinstance(error["input"], Mapping) and error["type"] == "value_error" else f"; found {error['input']!r}"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}{found}"


def _section_at(path: Sequence[Any]) -> type[Section] | None:
    section: type[Section] | None = Config
    for name in path:
        if isinstance(name, int):
            continue  # an item of a list, whose section is already found
        field = section.model_fields.get(str(name)) if section else None
        section = section_type(field.annotation) if field else None
    return section


def section_type(annotation: Any) -> type[Section] | None:
    candidates = typing.get_args(annotation) or (annotation,)  # of unions and lists, what they hold
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
