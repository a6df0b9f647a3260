"""A yaml reader for configurations from strangers: plain data, bounded in size, depth and expansion."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from .errors import ConversionError, UnsafeArtifactError
from .files import read_utf8


MAX_YAML_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_EXPANDED_NODES = 100_000
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


def read_yaml_mapping(path: str | PathLike[str]) -> dict[str, object]:
    """Reads one yaml document whose root is a mapping.

    Only nulls, booleans, integers, floats, strings, lists and mappings with string keys; no tags, merge keys or dates.

    Raises:
        UnsafeArtifactError: anything else, more than 1 MiB, deeper than 64 levels, a duplicate key, or aliases that
            expand to more than 100,000 nodes or to themselves.
        ConversionError: the root is not a mapping.
    """
    with typed_yaml_errors(path):
        return construct_mapping(PlainLoader(read_utf8(path, MAX_YAML_BYTES), path))


@contextmanager
def typed_yaml_errors(path: str | PathLike[str]) -> Iterator[None]:
    """Turns what is raised for a document that is not valid into an `UnsafeArtifactError` that names the file."""
    try:
        yield
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = None if mark is None else f"line {mark.line + 1}"
        raise UnsafeArtifactError("not valid yaml", file=path, key=where, actual=str(error).splitlines()[0]) from None
    except (ValueError, RecursionError, OverflowError) as error:
        if isinstance(error, ConversionError):
            raise
        raise UnsafeArtifactError("not valid yaml", file=path, actual=type(error).__name__) from None


def construct_mapping(loader: PlainLoader) -> dict[str, object]:
    """The one document of a loader, which is used up.

    Raises:
        ConversionError: its root is not a mapping. UnsafeArtifactError, YAMLError, ValueError: it is not valid.
    """
    try:
        node = loader.get_single_node()
        if not isinstance(node, MappingNode):
            raise ConversionError(
                "root of the document is not a mapping", file=loader.path, key="<root>", expected="mapping"
            )
        loader.check_expansion(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


class PlainLoader(yaml.SafeLoader):
    """`SafeLoader` that also refuses depth, tags, duplicate keys and exploding aliases."""

    def __init__(self, text: str, path: str | PathLike[str]) -> None:
        self.path = path
        self.depth = 0
        super().__init__(text)

    def refuse(self, message: str, node: Node | None, **details: object) -> UnsafeArtifactError:
        where = None if node is None else f"line {node.start_mark.line + 1}"
        return UnsafeArtifactError(message, file=self.path, key=where, **details)

    def accepts_tag(self, tag: str) -> bool:
        return tag in _PLAIN_TAGS

    def compose_node(self, parent: Node | None, index: object) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.refuse("nested too deeply", None, expected=f"at most {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if not self.accepts_tag(node.tag):
            raise self.refuse("tag is not plain data", node, actual=node.tag)
        return node

    def check_expansion(self, root: Node) -> None:
        """Counts the nodes that a copy of the document would have, each alias counted as what it stands for."""
        sizes: dict[int, int] = {}
        open_nodes: set[int] = set()

        def size(node: Node) -> int:
            if isinstance(node, ScalarNode):
                return 1
            if id(node) in open_nodes:
                raise self.refuse("alias contains itself", node)
            if id(node) not in sizes:
                open_nodes.add(id(node))
                children = (
                    node.value if isinstance(node, SequenceNode) else [part for pair in node.value for part in pair]
                )
                sizes[id(node)] = 1 + sum(size(child) for child in children)
                open_nodes.discard(id(node))
                if sizes[id(node)] > MAX_EXPANDED_NODES:
                    raise self.refuse("aliases expand too far", node, expected=f"at most {MAX_EXPANDED_NODES} nodes")
            return sizes[id(node)]

        size(root)

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[str, object]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise self.refuse("key is not a string", key, actual=getattr(key, "value", None))
            if key.value in seen:
                raise self.refuse("key occurs twice", key, actual=key.value)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)
