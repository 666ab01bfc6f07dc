"""Read the pickles inside weight files without unpickling: an interpreter that can only build inert values.

In: the bytes of one pickle. Out: plain Python values, :class:`TensorRef` where a tensor would stand, and
:class:`Inert` where anything else would. No module is imported, no object of a foreign class is made and nothing is
called: a global is a pair of strings, and the few that matter (``OrderedDict``, ``torch.Size``, the functions that
rebuild tensors) are recognised by name. The standard unpickler is not used because it calls what it finds and, up to
Python 3.12, allocates memory by an index that the file states.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from chiasm.errors import CheckpointError

#: A weight file of a thousand tensors has a pickle of about 200 kB; optimizer states reach a few MB.
MAX_PICKLE_BYTES = 64 * 2**20
MAX_OPCODES = 5_000_000
MAX_DIMENSIONS = 16

Scalar = (str, int, float, bool, bytes, type(None))


class ByteStream(Protocol):
    """What the interpreter reads from."""

    def read(self, n: int, /) -> bytes:
        """Return up to ``n`` bytes."""

    def readline(self) -> bytes:
        """Return the bytes up to and including the next newline."""

    def tell(self) -> int:
        """Return the position."""


@dataclass(frozen=True)
class Global:
    """The name of something that the pickle would import; it is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class Inert:
    """What stands for an object of an unknown class: its name and the values it was given.

    Attributes:
        kind: The class or function that the pickle names.
        arguments: Positional arguments of the call that would have made it.
        state: Attributes that it would have been given.
    """

    kind: str
    arguments: tuple[Any, ...] = ()
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StorageRef:
    """A flat array in the file: element type by torch's class name, key, number of elements."""

    dtype: str
    key: str
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor to be cut from a storage; the numbers are checked to be plain non-negative integers of one length."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _count(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise CheckpointError(f"a tensor has an impossible {what}")
    return value


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> TensorRef:
    if not isinstance(storage, StorageRef) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise CheckpointError("a tensor is described by values of the wrong type")
    if len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"a tensor has {len(shape)} dimensions and {len(stride)} strides")
    return TensorRef(
        storage,
        _count(offset, "offset"),
        tuple(_count(s, "shape") for s in shape),
        tuple(_count(s, "stride") for s in stride),
    )


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _tensor_with_attributes(function: Any, _type: Any, arguments: Any, *_: Any) -> Any:
    return _call(function, arguments)


def _mapping(*arguments: Any) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    pairs = arguments[-1] if arguments else ()
    for pair in pairs if isinstance(pairs, (list, tuple)) else ():
        if isinstance(pair, (list, tuple)) and len(pair) == 2:
            _set_item(result, pair[0], pair[1])
    return result


def _size(*arguments: Any) -> Any:
    return arguments[0] if arguments and isinstance(arguments[0], tuple) else tuple(*arguments[:1])


#: The only calls that have an effect here; each builds plain data.
CALLS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": _mapping,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
}


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(arguments, tuple):
        raise CheckpointError("a call in the pickle has no argument tuple")
    known = CALLS.get(str(function)) if isinstance(function, Global) else None
    if known is None:
        return Inert(str(function) if isinstance(function, Global) else "object", arguments)
    try:
        return known(*arguments)
    except TypeError as error:
        raise CheckpointError(f"`{function}` is called with the wrong arguments") from error


def _persistent(identity: Any) -> StorageRef:
    match identity:
        case ("storage", Global() as kind, str(key), _, int(numel), *rest) if rest in ([], [None]):
            return StorageRef(kind.name, key, _count(numel, "number of elements"))
        case ("storage", Global(), str(), _, int(), _view):
            raise CheckpointError("a tensor is a view in the manner of PyTorch 0.1, which is not supported")
    raise CheckpointError("the pickle refers to something outside that is not a storage")


def _set_item(target: Any, key: Any, value: Any) -> None:
    # Keys that are no scalars (tuples, say) never name weights; hashing nested ones could exhaust the C stack.
    if isinstance(target, dict) and isinstance(key, Scalar):
        target[key] = value


class _Machine:
    """The stack, the marks and the memo of one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        if not self.stack or (self.marks and len(self.stack) <= self.marks[-1]):
            raise CheckpointError("the pickle takes a value that is not there")
        return self.stack.pop()

    @property
    def top(self) -> Any:
        if not self.stack:
            raise CheckpointError("the pickle takes a value that is not there")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise CheckpointError("the pickle closes a group that was never opened")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def put(self, index: int) -> None:
        self.memo[index] = self.top

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise CheckpointError("the pickle recalls a value that was never stored")
        self.stack.append(self.memo[index])

    def set_items(self, items: list[Any]) -> None:
        target = self.top
        for key, value in zip(items[::2], items[1::2], strict=False):
            _set_item(target, key, value)

    def extend(self, items: list[Any]) -> None:
        if isinstance(self.top, list):
            self.top.extend(items)

    def make(self, kind: Any, arguments: Any) -> None:
        name = str(kind) if isinstance(kind, Global) else "object"
        if name in ("collections.OrderedDict", "collections.defaultdict"):
            self.stack.append({})
        else:
            self.stack.append(Inert(name, arguments if isinstance(arguments, tuple) else ()))

    def build(self) -> None:
        state = self.pop()
        if isinstance(state, tuple) and len(state) == 2:  # (attributes, slots)
            state = state[0]
        target = self.top
        if isinstance(target, Inert) and isinstance(state, dict):
            target.state.update({k: v for k, v in state.items() if isinstance(k, str)})

    def step(self, name: str, argument: Any) -> None:  # one line per opcode
        handler = _HANDLERS.get(name)
        if handler is None:
            raise CheckpointError(f"the pickle uses the instruction {name}, which no weight file needs")
        handler(self, argument)


def _push(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda m, _: m.stack.append(make())


def _group(make: Callable[[list[Any]], Any]) -> Callable[[_Machine, Any], None]:
    return lambda m, _: m.stack.append(make(m.pop_mark()))


def _dict_of(items: list[Any]) -> dict[Any, Any]:
    return _mapping([list(p) for p in zip(items[::2], items[1::2], strict=False)])


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    def run(m: _Machine, _: Any) -> None:
        items = [m.pop() for _ in range(count)]
        m.stack.append(tuple(reversed(items)))

    return run


def _named(m: _Machine, _: Any) -> None:
    name, module = m.pop(), m.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise CheckpointError("the pickle names a class by something that is not text")
    m.stack.append(Global(module, name))


def _global(m: _Machine, argument: str) -> None:
    module, _, name = argument.partition(" ")
    m.stack.append(Global(module, name))


def _reduce(m: _Machine, _: Any) -> None:
    arguments, function = m.pop(), m.pop()
    m.stack.append(_call(function, arguments))


def _new(m: _Machine, _: Any) -> None:
    arguments, kind = m.pop(), m.pop()
    m.make(kind, arguments)


def _new_with_keywords(m: _Machine, _: Any) -> None:
    m.pop()
    _new(m, _)


def _instance(m: _Machine, argument: str) -> None:
    module, _, name = argument.partition(" ")
    m.make(Global(module, name), tuple(m.pop_mark()))


def _object(m: _Machine, _: Any) -> None:
    kind, *arguments = m.pop_mark() or [None]
    m.make(kind, tuple(arguments))


def _set_one(m: _Machine, _: Any) -> None:
    value, key = m.pop(), m.pop()
    _set_item(m.top, key, value)


def _set_many(m: _Machine, _: Any) -> None:
    m.set_items(m.pop_mark())


def _append_many(m: _Machine, _: Any) -> None:
    m.extend(m.pop_mark())


def _literal(m: _Machine, argument: Any) -> None:
    m.stack.append(argument)


def _nothing(_m: _Machine, _: Any) -> None:
    """Opcodes that only frame the stream."""


_LITERALS = (
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINSTRING SHORT_BINSTRING "
    "BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 INT LONG FLOAT STRING UNICODE"
)
_HANDLERS: dict[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(_LITERALS.split(), _literal),
    **dict.fromkeys(("PROTO", "FRAME"), _nothing),
    "NONE": _push(lambda: None),
    "NEWTRUE": _push(lambda: True),
    "NEWFALSE": _push(lambda: False),
    "EMPTY_TUPLE": _push(tuple),
    "EMPTY_LIST": _push(list),
    "EMPTY_DICT": _push(dict),
    "EMPTY_SET": _push(lambda: Inert("builtins.set")),
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": lambda m, _: m.pop(),
    "POP_MARK": lambda m, _: m.pop_mark(),
    "DUP": lambda m, _: m.stack.append(m.top),
    "TUPLE": _group(tuple),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "LIST": _group(list),
    "DICT": _group(_dict_of),
    "FROZENSET": _group(lambda _: Inert("builtins.frozenset")),
    "APPEND": lambda m, _: m.extend([m.pop()]),
    "APPENDS": _append_many,
    "ADDITEMS": lambda m, _: m.pop_mark(),
    "SETITEM": _set_one,
    "SETITEMS": _set_many,
    "GLOBAL": _global,
    "STACK_GLOBAL": _named,
    "INST": _instance,
    "OBJ": _object,
    "REDUCE": _reduce,
    "NEWOBJ": _new,
    "NEWOBJ_EX": _new_with_keywords,
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.stack.append(_persistent(m.pop())),
    "PUT": lambda m, a: m.put(a),
    "BINPUT": lambda m, a: m.put(a),
    "LONG_BINPUT": lambda m, a: m.put(a),
    "MEMOIZE": lambda m, _: m.put(len(m.memo)),
    "GET": lambda m, a: m.get(a),
    "BINGET": lambda m, a: m.get(a),
    "LONG_BINGET": lambda m, a: m.get(a),
}


def read_pickle(stream: ByteStream) -> Any:
    """Return the value of the next pickle in a stream as plain data, :class:`TensorRef` and :class:`Inert`.

    Values that are no scalars, containers or tensors stay inert; sets keep no members; dictionary keys other than
    scalars are dropped.

    Raises:
        CheckpointError: The bytes are no pickle, are damaged, or use what no weight file uses.
    """
    machine = _Machine()
    try:
        instructions = pickletools.genops(stream)  # type: ignore[arg-type]
        for done, (opcode, argument, _) in enumerate(instructions):
            if opcode.name == "STOP":
                return machine.pop()
            if done >= MAX_OPCODES:
                raise CheckpointError(f"the pickle has more than {MAX_OPCODES:,} instructions")
            machine.step(opcode.name, argument)
    except (ValueError, OverflowError, EOFError, UnicodeError) as error:
        raise CheckpointError("the pickle is damaged") from error
    raise CheckpointError("the pickle has no end")
