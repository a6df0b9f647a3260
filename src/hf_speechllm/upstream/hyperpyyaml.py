"""A reader of HyperPyYAML as data: what the file would build is described, and nothing is built, imported or run.

CosyVoice's packs configure themselves in HyperPyYAML, a yaml whose tags call Python: `!new:module.Class` builds,
`!name:module.function` makes a partial, `!apply:module.function` calls, `!ref <key>` refers to another value, also
inside arithmetic. Here the first three become a [`Call`] and the last is replaced by what it stands for.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike

from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from .errors import ConversionError, UnsafeArtifactError
from .files import read_utf8
from .yaml_config import MAX_YAML_BYTES, PlainLoader, construct_mapping, typed_yaml_errors


_CALL_TAG = re.compile(r"!(new|name|apply):([A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*)")
_REFERENCE = re.compile(r"<([^<>\[\]]+)((?:\[[^<>\[\]]+\])*)>")
_MAX_NUMBER = 1e15
_MAX_RESOLVED_DEPTH = 64
_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


@dataclass(frozen=True)
class Call:
    """What a tag would call.

    Args:
        kind: `"new"`, `"name"` or `"apply"`.
        target: dotted name, as text; it is never looked up.
        arguments: the keyword arguments; positional ones, which only `!apply` has in CosyVoice's files, as a list.
    """

    kind: str
    target: str
    arguments: dict[str, object] | list[object]

    @property
    def name(self) -> str:
        """Last part of the dotted name: the class or function."""
        return self.target.rpartition(".")[2]


@dataclass(frozen=True)
class _Reference:
    text: str
    line: int


def read_hyperpyyaml(path: str | PathLike[str]) -> dict[str, object]:
    """Reads one HyperPyYAML document whose root is a mapping.

    Returns:
        Null, booleans, numbers, strings, lists, mappings and [`Call`]s, references resolved.
    Raises:
        UnsafeArtifactError: another tag, an unsafe size or nesting (see [`read_yaml_mapping`]), a reference to itself.
        ConversionError: a reference to nothing, arithmetic on something else than numbers, or a root that is no
            mapping.
    """
    with typed_yaml_errors(path):
        document = construct_mapping(_HyperLoader(read_utf8(path, MAX_YAML_BYTES), path))
        return _Resolver(document, path).resolve(document, 0)


class _HyperLoader(PlainLoader):
    """Plain data and HyperPyYAML's tags, scalars read as yaml 1.2 (`1e-06` is a number, `no` is a string)."""

    def accepts_tag(self, tag: str) -> bool:
        return super().accepts_tag(tag) or tag == "!ref" or _CALL_TAG.fullmatch(tag) is not None

    def construct_call(self, suffix: str, node: Node) -> Call:
        kind, target = _CALL_TAG.fullmatch(node.tag).groups()
        if isinstance(node, MappingNode):
            arguments: dict[str, object] | list[object] = self.construct_mapping(node, deep=True)
        elif isinstance(node, SequenceNode):
            arguments = self.construct_sequence(node, deep=True)
        elif node.value == "":
            arguments = {}
        else:
            raise self.refuse("arguments of a tag are a single value", node, actual=node.value)
        return Call(kind, target, arguments)

    def construct_reference(self, node: Node) -> _Reference:
        if not isinstance(node, ScalarNode):
            raise self.refuse("reference is not text", node)
        return _Reference(node.value, node.start_mark.line + 1)


_HyperLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":int"))]
    for first, resolvers in PlainLoader.yaml_implicit_resolvers.items()
}
_HyperLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"
)
_HyperLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), "-+0123456789")
_HyperLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"),
    "-+.0123456789",
)
_HyperLoader.add_multi_constructor("!new:", _HyperLoader.construct_call)
_HyperLoader.add_multi_constructor("!name:", _HyperLoader.construct_call)
_HyperLoader.add_multi_constructor("!apply:", _HyperLoader.construct_call)
_HyperLoader.add_constructor("!ref", _HyperLoader.construct_reference)
# The constructor of yaml 1.1 reads a leading zero as octal.
_HyperLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))


class _Resolver:
    """Replaces references by what they stand for; a value that is referred to twice is shared, not copied."""

    def __init__(self, document: dict[str, object], path: str | PathLike[str]) -> None:
        self.document = document
        self.path = path
        self.resolved: dict[str, object] = {}
        self.open: set[str] = set()

    def resolve(self, value: object, depth: int) -> object:
        if depth > _MAX_RESOLVED_DEPTH:
            raise UnsafeArtifactError(
                "nested too deeply", file=self.path, expected=f"at most {_MAX_RESOLVED_DEPTH} levels"
            )
        if isinstance(value, _Reference):
            return self.reference(value, depth)
        if isinstance(value, Call):
            return Call(value.kind, value.target, self.resolve(value.arguments, depth + 1))
        if isinstance(value, dict):
            return {key: self.resolve(entry, depth + 1) for key, entry in value.items()}
        if isinstance(value, list):
            return [self.resolve(entry, depth + 1) for entry in value]
        return value

    def reference(self, reference: _Reference, depth: int) -> object:
        text = reference.text.strip()
        if whole := _REFERENCE.fullmatch(text):
            return self.look_up(whole, reference, depth)
        expression = _REFERENCE.sub(lambda found: self.number(found, reference, depth), text)
        try:
            return self.evaluate(ast.parse(expression, mode="eval").body, reference)
        except (SyntaxError, ZeroDivisionError, MemoryError):
            raise self.error("reference is not arithmetic", reference) from None

    def look_up(self, found: re.Match[str], reference: _Reference, depth: int) -> object:
        key, brackets = found.groups()
        if key not in self.document:
            raise self.error("reference to a key that the file does not have", reference)
        if key in self.open:
            raise UnsafeArtifactError("reference contains itself", file=self.path, key=f"line {reference.line}")
        if key not in self.resolved:
            self.open.add(key)
            self.resolved[key] = self.resolve(self.document[key], depth + 1)
            self.open.discard(key)
        value = self.resolved[key]
        for entry in re.findall(r"\[([^\[\]]+)\]", brackets):
            if not isinstance(value, dict) or entry not in value:
                raise self.error("reference to a key that the file does not have", reference)
            value = value[entry]
        return value

    def number(self, found: re.Match[str], reference: _Reference, depth: int) -> str:
        value = self.look_up(found, reference, depth)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error("arithmetic on something else than a number", reference)
        return f"({value!r})"

    def evaluate(self, node: ast.expr, reference: _Reference) -> float:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            value = node.value
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = -self.evaluate(node.operand, reference)
        elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            value = _BINARY[type(node.op)](self.evaluate(node.left, reference), self.evaluate(node.right, reference))
        else:
            raise self.error("reference is not arithmetic", reference)
        if not -_MAX_NUMBER <= value <= _MAX_NUMBER:
            raise self.error("arithmetic leaves the range of a setting", reference)
        return value

    def error(self, message: str, reference: _Reference) -> ConversionError:
        return ConversionError(message, file=self.path, key=f"line {reference.line}", actual=reference.text)
