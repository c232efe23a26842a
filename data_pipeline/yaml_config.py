"""Reading YAML configuration: one parent by `extends`, dotted overrides, and all mistakes reported at once.

Every command reads its configuration through these three steps:

    values = read_yaml("configs/tiny.yaml")              # `extends` resolved, duplicate keys refused
    values = apply_overrides(values, ["data.seed=1"])    # the value is parsed as YAML
    config = validate(RunConfig, values, "configs/tiny.yaml")

Free of torch, so that submitting a job stays light.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Model = TypeVar("Model", bound=BaseModel)


class ConfigError(ValueError):
    """A configuration that cannot be used. The message lists every mistake that was found.

    Attributes:
        source: what was read (a file name, with the overrides' origin where that helps).
        mistakes: one line each, beginning with the dotted path of the value.
    """

    def __init__(self, source: str, mistakes: Sequence[str]) -> None:
        self.source = source
        self.mistakes = list(mistakes)
        count = "1 mistake" if len(self.mistakes) == 1 else f"{len(self.mistakes)} mistakes"
        super().__init__("\n  ".join([f"{source}: {count} in the configuration", *self.mistakes]))


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads `1e-4` as a number (YAML 1.1 reads a string)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice in one mapping", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(source, [f"not readable as YAML: {error}"]) from error


def read_yaml(path: str | Path, inline: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, laid over its parent when it has a top-level `extends: parent.yaml`.

    The parent's path is relative to the file that names it. Mappings are merged key by key; every other value
    replaces the parent's, and so does a mapping whose `kind` differs from the parent's.

    Args:
        inline: dotted keys whose value may be the path of another YAML file, relative to the file that names
            it; such a path is replaced by that file's content.

    Raises:
        ConfigError: the file is missing or unreadable, a key stands twice, or `extends` is circular.
    """
    return _read_yaml(Path(path), inline, ())


def _read_yaml(path: Path, inline: Sequence[str], children: tuple[Path, ...]) -> dict[str, Any]:
    source = str(path)
    if path.resolve() in children:
        raise ConfigError(source, ["extends: a file cannot extend itself, directly or through its parents"])
    if not path.is_file():
        hint = f" (extended by {children[-1].name})" if children else ""
        raise ConfigError(source, [f"no such file{hint}"])
    values = _parse(path.read_text(encoding="utf-8"), source)
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(source, ["a configuration file holds one mapping with names as keys"])
    for dotted in inline:
        *parents, last = dotted.split(".")
        node: Any = values
        for name in parents:
            node = node.get(name) if isinstance(node, dict) else None
        if isinstance(node, dict) and isinstance(node.get(last), str):
            node[last] = _read_yaml(path.parent / node[last], (), (*children, path.resolve()))
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise ConfigError(source, ["extends: must be the path of one parent file"])
    return merge(_read_yaml(path.parent / parent, inline, (*children, path.resolve())), values)


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` over `base`: mappings key by key; anything else, and a mapping of another `kind`, replaced."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            same_kind = value.get("kind", below.get("kind")) == below.get("kind")
            merged[key] = merge(below, value) if same_kind else dict(value)
        else:
            merged[key] = value
    return merged


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with every `a.b=value` applied in order; the value is parsed as YAML.

    Raises:
        ConfigError: an override has no `=`, its value is not YAML, or its path runs through a plain value.
    """
    result = dict(values)
    mistakes = []
    for override in overrides:
        path, equals, text = override.partition("=")
        names = path.strip().split(".")
        if not equals or not all(names):
            mistakes.append(f"{override!r}: an override is written a.b=value")
            continue
        try:
            value = _parse(text, override)
        except ConfigError as error:
            mistakes.append(f"{override!r}: {error.mistakes[0]}")
            continue
        node = result
        for depth, name in enumerate(names[:-1], start=1):
            below = node.get(name)
            if below is not None and not isinstance(below, Mapping):
                mistakes.append(f"{override!r}: {'.'.join(names[:depth])} is {below!r}, which has no keys")
                break
            node[name] = dict(
                below or {}
            )  # copied on the way down, so that the caller's mapping stays as it is
            node = node[name]
        else:
            node[names[-1]] = value
    if mistakes:
        raise ConfigError("command line", mistakes)
    return result


def validate(model_class: type[Model], values: Mapping[str, Any], source: str) -> Model:
    """`model_class` built from `values`.

    Args:
        source: where the values come from; begins the error message.

    Raises:
        ConfigError: lists all mistakes with their dotted paths, and for an unknown key the nearest name.
    """
    try:
        return model_class.model_validate(values)
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise ConfigError(source, [_describe(model_class, values, detail) for detail in details]) from error


def _describe(model_class: type[BaseModel], values: Any, detail: ErrorDetails) -> str:
    """One pydantic error as a line beginning with a dotted path."""
    kind, location = detail["type"], detail["loc"]
    path: list[str] = []
    models: list[type[BaseModel]] = [model_class]
    node: Any = values
    for position, name in enumerate(location):
        last = position == len(location) - 1
        if _holds(node, name):
            path.append(str(name))
            node = node[name]
        elif last and kind in ("missing", "default_type"):
            path.append(str(name))
            continue
        else:  # not in the input: the tag by which pydantic names a member of a union
            models = [model for model in models if str(name) in (model.__name__, *_tags(model))] or models
            continue
        if last and kind == "extra_forbidden":
            return _unknown(path, models)
        models = [found for model in models for found in _models_below(model, str(name))] or models
    dotted = ".".join(path) or "(top level)"
    context = detail.get("ctx", {})
    if kind == "missing":
        return f"{dotted}: missing"
    if kind == "union_tag_not_found":
        return f"{dotted}: needs the key {context.get('discriminator')} to say which kind it is"
    if kind == "union_tag_invalid":
        tag = str(context.get("tag"))
        expected = [name.strip("'\" ") for name in str(context.get("expected_tags")).split(",")]
        return f"{dotted}.{str(context.get('discriminator')).strip(chr(39))}: {tag!r} is not one of " + (
            f"{', '.join(expected)}{_nearest(tag, expected, '')}"
        )
    message = detail["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    got = detail["input"]
    shown = f" (got {got!r})" if isinstance(got, (str, int, float, bool)) or got is None else ""
    if kind == "literal_error":
        expected = re.findall(r"'([^']*)'", str(context.get("expected")))
        shown += _nearest(str(got), expected, "")
    return f"{dotted}: {message}{shown}"


def _holds(node: Any, name: int | str) -> bool:
    if isinstance(node, Mapping):
        return name in node
    return isinstance(node, (list, tuple)) and isinstance(name, int) and 0 <= name < len(node)


def _unknown(path: list[str], models: list[type[BaseModel]]) -> str:
    names = sorted({name for model in models for name in model.model_fields})
    prefix = "".join(f"{name}." for name in path[:-1])
    nearest = _nearest(path[-1], names, prefix)
    return f"{'.'.join(path)}: unknown key{nearest or '; valid here: ' + ', '.join(names)}"


def _nearest(name: str, names: Sequence[str], prefix: str) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _tags(model: type[BaseModel]) -> set[str]:
    """The values of the `kind` field, by which a member of a union is chosen."""
    field = model.model_fields.get("kind")
    return {str(value) for value in typing.get_args(field.annotation)} if field is not None else set()


def _models_below(model: type[BaseModel], name: str) -> list[type[BaseModel]]:
    """Model classes that the field's annotation mentions, through unions, lists and mappings."""
    field = model.model_fields.get(name)
    found: list[type[BaseModel]] = []
    pending = [field.annotation] if field is not None else []
    while pending:
        annotation: Any = pending.pop()
        if arguments := typing.get_args(annotation):
            pending += arguments
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
    return found
