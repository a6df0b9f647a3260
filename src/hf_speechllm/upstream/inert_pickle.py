"""Reading pickles without running them: the opcodes are followed here, and what they would call is only written down.

Python's own unpickler calls what a file names. This one knows numbers, text, lists, tuples, sets (as lists) and
dictionaries (whose keys are numbers or text); everything else becomes an [`InertObject`] that holds the name and the
arguments. No module is imported, no attribute of anything is looked up, no function of the file is called.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from .errors import UnsafeArtifactError


# Deeper configurations do not exist; a file can make them without end.
MAX_DEPTH = 32
MAX_NODES = 100_000

_MARK = object()
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# Sets are lists here: hashing a nested tuple takes time without end, or the stack.
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_SET": list}
_KEYS = (str, int, float, bytes, type(None))


@dataclass(frozen=True)
class InertGlobal:
    """A function or class that a pickle names: `module` and `name` as written there."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, repr=False)
class InertObject:
    """What a pickle would have made.

    Args:
        made_by: what it would have called. arguments: what with.
        state: what the object's state would have been set to.
        items: pairs of key and value, or single values, that would have been added to it.
    """

    made_by: object
    arguments: tuple = ()
    state: object = None
    items: list = field(default_factory=list)

    def __repr__(self) -> str:
        # Not what it holds: that may be as large as a stranger likes.
        return f"<{self.kind}>"

    @property
    def kind(self) -> str:
        """Dotted name of what made it."""
        return str(self.made_by) if isinstance(self.made_by, InertGlobal) else "?"


def read_inert_pickle(
    stream: BinaryIO,
    path: Path,
    *,
    resolve_reference: Callable[[object], object] | None = None,
    after_build: Callable[[InertObject, BinaryIO], object] | None = None,
) -> object:
    """The value of the pickle that starts at the position of `stream`, which is left behind its end.

    Args:
        path: the file, for messages.
        resolve_reference: given a persistent id, its value; without it such ids are refused.
        after_build: called with an object whose state has just been set, and the stream behind that opcode. What it
            returns takes the object's place, and it may read on: joblib writes arrays there.

    Raises:
        UnsafeArtifactError: a damaged pickle, or an opcode that a stranger's file has no need of.
    """
    try:
        return _follow(stream, path, resolve_reference, after_build)
    except UnsafeArtifactError:
        raise
    except Exception as error:  # pickletools and a malformed stack raise many kinds
        raise UnsafeArtifactError("damaged pickle", file=path, actual=f"{type(error).__name__}: {error}") from None


def _follow(
    stream: BinaryIO,
    path: Path,
    resolve_reference: Callable[[object], object] | None,
    after_build: Callable[[InertObject, BinaryIO], object] | None,
) -> object:
    stack: list[object] = []
    memo: dict[int, object] = {}

    def pop_to_mark() -> list[object]:
        # By identity: an array compares itself with a mark element by element.
        position = next(place for place in range(len(stack) - 1, -1, -1) if stack[place] is _MARK)
        items = stack[position + 1 :]
        del stack[position:]
        return items

    def make(made_by: object, arguments: object) -> object:
        if made_by == InertGlobal("collections", "OrderedDict") and arguments == ():
            return {}
        if not isinstance(arguments, tuple):
            raise ValueError(f"arguments are no tuple but {type(arguments).__name__}")
        return InertObject(made_by, arguments)

    def add(target: object, items: list[object]) -> None:
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, InertObject):
            target.items.extend(items)
        else:
            raise ValueError(f"items for {type(target).__name__}")

    def add_pairs(target: object, values: list[object]) -> None:
        pairs = list(zip(values[::2], values[1::2], strict=True))
        if isinstance(target, dict):
            target.update(pair for pair in pairs if isinstance(pair[0], _KEYS))
        elif isinstance(target, InertObject):
            target.items.extend(pairs)
        else:
            raise ValueError(f"pairs for {type(target).__name__}")

    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "STOP":
            return stack.pop()
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            pop_to_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "TUPLE":
            stack.append(tuple(pop_to_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            items = tuple(stack[-count:])
            del stack[-count:]
            stack.append(items)
        elif name == "LIST":
            stack.append(pop_to_mark())
        elif name == "DICT":
            table: dict = {}
            add_pairs(table, pop_to_mark())
            stack.append(table)
        elif name == "FROZENSET":
            stack.append(pop_to_mark())
        elif name == "APPEND":
            item = stack.pop()
            add(stack[-1], [item])
        elif name == "APPENDS":
            items = pop_to_mark()
            add(stack[-1], items)
        elif name == "ADDITEMS":
            items = pop_to_mark()
            add(stack[-1], items)
        elif name == "SETITEM":
            pair = stack[-2:]
            del stack[-2:]
            add_pairs(stack[-1], pair)
        elif name == "SETITEMS":
            items = pop_to_mark()
            add_pairs(stack[-1], items)
        elif name == "GLOBAL":
            stack.append(InertGlobal(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            if not isinstance(attribute, str) or not isinstance(module, str):
                raise ValueError("a global without a name")
            stack.append(InertGlobal(module, attribute))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = stack.pop()
            stack.append(make(stack.pop(), arguments))
        elif name == "NEWOBJ_EX":
            named, arguments = stack.pop(), stack.pop()
            stack.append(make(stack.pop(), (*arguments, *((named,) if named else ()))))
        elif name == "OBJ":
            made_by, *arguments = pop_to_mark()
            stack.append(make(made_by, tuple(arguments)))
        elif name == "INST":
            stack.append(make(InertGlobal(*argument.split(" ", 1)), tuple(pop_to_mark())))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], InertObject):
                stack[-1].state = state
                if after_build is not None:
                    stack[-1] = after_build(stack[-1], stream)
            elif not isinstance(stack[-1], dict):  # a state dict's `_metadata`, which nothing here needs
                raise ValueError(f"a state for {type(stack[-1]).__name__}")
        elif name == "BINPERSID" and resolve_reference is not None:
            stack.append(resolve_reference(stack.pop()))
        else:
            raise UnsafeArtifactError("pickle opcode that is not followed", file=path, key=name)
    raise ValueError("no end")


class PlainValues:
    """Configurations in a pickle as plain data: dictionaries, lists, text and numbers.

    An `argparse.Namespace` and an omegaconf node become what they hold, a member of an enumeration its value. Anything
    else becomes `None`.

    Args:
        path: the file, for messages.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._nodes = path, 0

    def of(self, value: object, depth: int = 0) -> object:
        """`value` as plain data.

        Raises:
            UnsafeArtifactError: nested too deeply, or too large (a pickle may hold itself).
        """
        self._nodes += 1
        if depth > MAX_DEPTH or self._nodes > MAX_NODES:
            raise UnsafeArtifactError("configuration is too deep or too large", file=self.path)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, dict):
            return {str(key): self.of(item, depth + 1) for key, item in value.items() if isinstance(key, str | int)}
        if isinstance(value, list | tuple):
            return [self.of(item, depth + 1) for item in value]
        if isinstance(value, InertObject):
            return self._of_object(value, depth + 1)
        return None

    def _of_object(self, value: InertObject, depth: int) -> object:
        if value.kind == "argparse.Namespace":
            return self.of(value.state, depth)
        if value.kind.startswith("omegaconf."):
            state = value.state if isinstance(value.state, dict) else {}
            return self.of(state["_content"] if "_content" in state else state.get("_val"), depth)
        if value.state is None and len(value.arguments) == 1:  # a member of an enumeration, by its value
            return self.of(value.arguments[0], depth)
        return None
