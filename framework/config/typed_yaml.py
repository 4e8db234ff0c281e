"""YAML read against a tree of dataclasses: each scalar as its field wants it, and as it was written.

YAML 1.1, which PyYAML speaks, reads 012 as 10, 12:30:45 as 45045 and off as False. Here a field of text takes
the characters that stand there, a number or a truth value takes YAML 1.2's notation and nothing else, and
every message names the key and the line.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
import types
import typing
import unicodedata
from collections.abc import Iterator
from typing import Any, Literal

import yaml
from omegaconf import MISSING

from ..._aliases import current_value
from ...errors import InputError

MAX_NODES, MAX_DEPTH = 10_000, 20
PREFIX = "tag:yaml.org,2002:"
COMMAND_LINE = "the command line"

# YAML 1.2's notation, less the leading zeros that YAML 1.1 read as octal. Whole numbers fit 64 bits, and come
# before numbers, which match them too.
NOTATIONS: dict[Any, tuple[str, str, str]] = {
    bool: ("bool", r"true|True|TRUE|false|False|FALSE", "true or false"),
    type(None): ("null", r"~|null|Null|NULL|", "null"),
    int: ("int", r"[-+]?(0|[1-9][0-9]{0,17})|0o[0-7]{1,20}|0x[0-9a-fA-F]{1,15}", "a whole number"),
    float: (
        "float",
        r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        "a number",
    ),
}
TAGS = {"str": str, "seq": list, "map": dict, **{tag: kind for kind, (tag, _, _) in NOTATIONS.items()}}


class Loader(yaml.SafeLoader):
    """Knows the scalars of `NOTATIONS` and no others: no sexagesimals, dates, or yes and no."""

    def fetch_flow_collection_start(self, token: Any) -> None:
        """Notice depth early: the scanner's work grows with its square."""
        if self.flow_level > MAX_DEPTH:
            raise yaml.scanner.ScannerError(None, None, f"nested more than {MAX_DEPTH} deep", self.get_mark())
        super().fetch_flow_collection_start(token)


class Dumper(yaml.SafeDumper):
    """Quotes a string that either YAML 1.1 or `Loader` would read as something else."""


Loader.yaml_implicit_resolvers = {}
Dumper.yaml_implicit_resolvers = copy.deepcopy(yaml.SafeDumper.yaml_implicit_resolvers)
for _tag, _pattern, _ in NOTATIONS.values():
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(PREFIX + _tag, re.compile(rf"(?:{_pattern})\Z"), None)


def read_document(text: str, kind: Any, source: str) -> Any:
    """Read a whole file as the dataclass ``kind``.

    Returns:
        Nested dicts with just the keys that are written; interpolations (``${...}``) stay text.

    Raises:
        InputError: names the key, ``source`` and the line.
    """
    node = _compose(text, "config", source)
    if node is None:
        raise InputError("config", source, "is empty", "write at least model, data and train.steps")
    return _Reader(kind, source).read(node, kind, "")


def type_of(key: str, text: str, root: Any) -> Any:
    """The type of the field ``key`` of the dataclass ``root``, for which the command line gives ``text``.

    Raises:
        InputError: there is no such field.
    """
    parts, kind = key.split("."), root
    for depth, part in enumerate(parts):
        known, base = fields(kind), base_of(kind)
        if known is None and base not in (Any, dict):
            raise InputError(key, text, f"{'.'.join(parts[:depth])} has no keys of its own ({COMMAND_LINE})")
        if not part or (known is not None and part not in known):
            raise unknown(".".join(parts[: depth + 1]), root, COMMAND_LINE)
        kind = known[part] if known is not None else (*typing.get_args(_without_none(kind))[1:], Any)[0]
    return kind


def read_override(key: str, text: str, root: Any) -> dict[str, Any]:
    """Read ``key=text`` of a command line against the dataclass ``root``.

    Where the field is text, ``text`` is its value, whatever characters it has: the shell has had its quotes.

    Returns:
        Nested dicts with that one key.
    """
    kind = type_of(key, text, root)
    if base_of(kind) is str:
        value: Any = text
        if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
            value = text[1:-1]
    elif "${" in text and base_of(kind) is not Any and fields(kind) is None:
        value = text
    else:
        node = _compose(text, key, text) or yaml.ScalarNode(PREFIX + "null", "")
        value = _Reader(root, COMMAND_LINE).read(node, kind, key)
    for part in reversed(key.split(".")):
        value = {part: value}
    return typing.cast(dict[str, Any], value)


def dump(tree: Any) -> str:
    """Write plain values as YAML that `read_document` and any YAML 1.1 reader understand alike."""
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def fields(kind: Any) -> dict[str, Any] | None:
    """Return {name: type} of a dataclass, also of an optional one; None for any other type."""
    section = _without_none(kind)
    if not dataclasses.is_dataclass(section):
        return None
    hints = typing.get_type_hints(section)
    return {item.name: hints[item.name] for item in dataclasses.fields(section)}


def base_of(kind: Any) -> Any:
    """Return the bare type: list of ``list[int] | None``; a Literal is its own."""
    inner = _without_none(kind)
    origin = typing.get_origin(inner)
    return origin if origin in (list, tuple, dict) else inner


def keys(kind: Any, prefix: str = "") -> Iterator[str]:
    """Yield every key of a tree of dataclasses, with dots."""
    for name, inner in (fields(kind) or {}).items():
        yield prefix + name
        yield from keys(inner, f"{prefix}{name}.")


def unknown(key: str, root: Any, where: str) -> InputError:
    """Name the nearest key of ``root``: one that ends alike, or one that is spelt alike."""
    leaf = key.rsplit(".", 1)[-1]
    alike = [name for name in keys(root) if name.rsplit(".", 1)[-1] == leaf]
    near = difflib.get_close_matches(key, alike or list(keys(root)), 1, 0.0 if alike else 0.6)
    fix = f"did you mean {near[0]}?" if near else f"the sections are {', '.join(fields(root) or ())}"
    return InputError(key, leaf, f"is not a key of the configuration ({where})", fix)


class _Reader:
    """Turns YAML nodes into plain values of a given type."""

    def __init__(self, root: Any, source: str) -> None:
        self.root, self.source = root, source
        self.num_nodes = self.depth = 0

    def read(self, node: yaml.Node, kind: Any, key: str) -> Any:
        """Return the value of ``node`` as ``kind``; ``key`` is its place, for messages."""
        self.num_nodes, self.depth = self.num_nodes + 1, self.depth + 1
        if self.num_nodes > MAX_NODES or self.depth > MAX_DEPTH:
            allowed = f"has more than {MAX_NODES} values, or is nested more than {MAX_DEPTH} deep"
            raise InputError("config", self.source, allowed, "an alias (*name) counts as all it stands for")
        if node.tag.removeprefix(PREFIX) not in TAGS:
            tag = node.tag.replace(PREFIX, "!!")
            raise InputError(key or "config", tag, f"tags are not allowed ({self._where(node)})", "remove it")
        base, value = base_of(kind), None
        if isinstance(node, yaml.ScalarNode):
            value = self._scalar(node, kind, key)
        elif isinstance(node, yaml.MappingNode) and (base in (Any, dict) or fields(kind) is not None):
            value = self._mapping(node, kind, key)
        elif isinstance(node, yaml.SequenceNode) and base in (Any, list, tuple):
            item = (*typing.get_args(_without_none(kind)), Any)[0]
            value = [self.read(child, item, f"{key}[{i}]") for i, child in enumerate(node.value)]
        else:
            given = "a mapping" if isinstance(node, yaml.MappingNode) else "a list"
            raise self._wrong(node, key, given, base)
        self.depth -= 1
        return value

    def _scalar(self, node: yaml.ScalarNode, kind: Any, key: str) -> Any:
        text, base = current_value(key, str(node.value)), base_of(kind)
        tag = node.tag.removeprefix(PREFIX)
        if any(unicodedata.category(one) in ("Cc", "Cs") for one in text):
            raise InputError(key or "config", text, f"must be text without control characters ({self._where(node)})")
        if key and ("${" in text or text == MISSING):
            return text  # OmegaConf resolves it, and checks what comes out
        if tag == "null" and (base is Any or type(None) in typing.get_args(kind)):
            return None
        if base is Any:
            base = TAGS[tag]
        if base is str or (typing.get_origin(base) is Literal and text in typing.get_args(base)):
            return text
        quoted = node.style in ("'", '"')
        if base not in NOTATIONS or quoted or not re.fullmatch(NOTATIONS[base][1], text):
            raise self._wrong(node, key, text, base)
        if base is bool:
            return text.lower() == "true"
        return int(text, 0) if base is int else float(text.replace(".inf", "inf").replace(".nan", "nan"))

    def _mapping(self, node: yaml.MappingNode, kind: Any, key: str) -> dict[str, Any]:
        known = fields(kind)
        other = (*typing.get_args(_without_none(kind))[1:], Any)[0]  # the values' type in dict[str, T]
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for name_node, child in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                raise InputError(key or "config", "?", f"a key must be a word ({self._where(name_node)})")
            name, line = str(name_node.value), name_node.start_mark.line + 1
            full = f"{key}.{name}" if key else name
            if name in lines:
                allowed = f"is given twice ({self.source}, lines {lines[name]} and {line})"
                raise InputError(full, name, allowed, "keep one of them")
            if known is not None and name not in known:
                raise unknown(full, self.root, self._where(name_node))
            lines[name] = line
            values[name] = self.read(child, known[name] if known is not None else other, full)
        return values

    def _where(self, node: yaml.Node) -> str:
        if self.source == COMMAND_LINE or node.start_mark is None:
            return self.source
        return f"{self.source}, line {node.start_mark.line + 1}"

    def _wrong(self, node: yaml.Node, key: str, given: str, base: Any) -> InputError:
        wanted = {list: "a list", tuple: "a list", str: "text", dict: "a mapping"}.get(base)
        if base in NOTATIONS:
            wanted = NOTATIONS[base][2]
        elif typing.get_origin(base) is Literal:
            wanted = f"one of {', '.join(typing.get_args(base))}"
        fix = ""
        if base in NOTATIONS and getattr(node, "style", None) in ("'", '"'):
            fix = "remove the quotes"
        elif base in (int, float) and re.match(r"[-+]?0[0-9]", given):
            fix = "write it without leading zeros" + ", or an octal number as 0o17" * (base is int)
        elif base is int and re.fullmatch(r"[0-9]+(\.[0-9]+)?[eE][0-9]{1,2}|[0-9]{1,3}([,_][0-9]{3})+", given):
            number = float(re.sub("[,_]", "", given))
            fix = f"write {int(number)}" if number.is_integer() and number < 1e15 else ""
        elif (
            base is list and key[-1:] != "]" and isinstance(node, yaml.ScalarNode) and re.fullmatch(r"[\w./-]+", given)
        ):
            fix = f"write '{key}=[{given}]'" if self.source == COMMAND_LINE else f"write [{given}]"
        allowed = f"must be {wanted or 'a mapping of its keys'} ({self._where(node)})"
        return InputError(key or "config", given, allowed, fix)


def _compose(text: str, what: str, value: str) -> yaml.Node | None:
    """Parse YAML into a graph of nodes; None where there is nothing but comments."""
    try:
        return typing.cast("yaml.Node | None", yaml.compose(text, Loader=Loader))
    except RecursionError:
        raise InputError(what, value, "is nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
        raise InputError(what, value, f"is not YAML: {' '.join(str(problem).split())}{where}") from None


def _without_none(kind: Any) -> Any:
    """Return ``T`` of ``T | None``, Any for a union of several types, other types as they are."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return kind
    rest = [item for item in typing.get_args(kind) if item is not type(None)]
    return rest[0] if len(rest) == 1 else Any
