"""Reads a pickle as plain data: nothing that it names is imported, nothing that it requests is called.

A pickle is a program for a small stack machine, and Python's own machine imports what a file names and calls it. This
one cannot import or call. Every requested call is returned as a `PickledCall`: the name, the arguments and the state,
as values. Names outside a short list end the reading, so that a hostile file is refused by
name rather than silently disarmed.

The opcodes are those that Python documents in `pickletools`, whose `genops` splits the bytes.
"""

from __future__ import annotations

import io
import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from fedface.errors import WeightsError
from fedface.text import sanitize_text

MAX_STEPS: Final = (
    300_000  # instructions of one pickle; a 1024 px generator twice and its discriminator take a tenth
)

ALLOWED_GLOBALS: Final = frozenset({
    "__builtin__.set", "builtins.set", "__builtin__.frozenset", "builtins.frozenset",
    "_codecs.encode", "argparse.Namespace", "collections.OrderedDict",
    "dnnlib.util.EasyDict", "torch_utils.persistence._reconstruct_persistent_obj",
    "numpy.dtype", "numpy.ndarray",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "torch.Size", "torch.device", "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2", "torch.storage._load_from_bytes",
    "torch.DoubleStorage", "torch.FloatStorage", "torch.HalfStorage", "torch.BFloat16Storage",
    "torch.LongStorage", "torch.IntStorage", "torch.ShortStorage", "torch.CharStorage", "torch.ByteStorage",
    "torch.BoolStorage",
})  # fmt: skip
_NUMBERS: Final = frozenset({"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"})
_DICTS: Final = frozenset({"collections.OrderedDict", "dnnlib.util.EasyDict"})
_SETS: Final = frozenset(name for name in ALLOWED_GLOBALS if name.endswith("set"))


@dataclass(frozen=True, slots=True)
class PickledGlobal:
    """A class or function that a pickle names; only ever two strings."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class PickledCall:
    """A call of `name` that a pickle requests: never executed, only recorded."""

    name: str
    args: tuple[Any, ...]
    state: Any = None


class PickleRefused(WeightsError):
    """A pickle that is damaged, too large, or requests what weights do not need; the text is the reason."""


class _Mark:
    """The opcode MARK on the stack."""


_MARK: Final = _Mark()


def _is_key(key: Any) -> bool:
    """Whether hashing this is cheap: a tuple hashes whatever is in it, and long numbers can be made to collide."""
    return isinstance(key, str | bytes | None) or (isinstance(key, int) and 0 <= key < 2**60)


def read_pickle(
    stream: Any,
    *,
    persistent: Callable[[Any], Any] | None = None,
    nested: Callable[[bytes], Any] | None = None,
    most_steps: int = MAX_STEPS,
) -> Any:
    """One pickle from a stream, as plain values, with `PickledGlobal` and `PickledCall` for classes and calls.

    Guarantees:
        * Nothing is imported, called or set on any object of the program, whatever the bytes are.
        * At most `most_steps` instructions are followed, and memory is at most proportional to the bytes read
            and the instructions followed.

    Args:
        stream: Has read, readline and tell over bytes in memory; left after the pickle's last byte.
        persistent: What a persistent id stands for; a pickle with one is refused if None.
        nested: What stands for the bytes given to torch.storage._load_from_bytes, which are pickles of their own;
            a pickle with such a call is refused if None.
        most_steps: How many instructions are followed.

    Raises:
        PickleRefused: The bytes are no whole pickle, take too many steps, or name something not in `ALLOWED_GLOBALS`.
    """
    machine = _Machine(persistent, nested, most_steps)
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            machine.spend(1)
            if opcode.name == "STOP":
                return machine.pop()
            step = _STEPS.get(opcode.name)
            if step is None:
                _refuse_opcode(opcode.name, argument)
            step(machine, argument)
    except PickleRefused:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, struct.error) as error:
        raise PickleRefused(f"is damaged or cut short ({sanitize_text(str(error))})") from error
    raise PickleRefused("is cut short: it has no end")


def pickle_stream(content: bytes) -> io.BytesIO:
    """A stream for `read_pickle`; reading past the end returns what there is, without allocating more."""
    return io.BytesIO(content)


def _refuse_opcode(name: str, argument: Any) -> NoReturn:
    if name == "INST":
        requested = sanitize_text(str(argument).replace(" ", "."))
        raise PickleRefused(f"asks for {requested}, which no weights need; nothing of the file was run")
    raise PickleRefused(f"uses the instruction {name}, which no weights need")


class _Machine:
    """The stack and the memo; every method is one instruction."""

    def __init__(
        self,
        persistent: Callable[[Any], Any] | None,
        nested: Callable[[bytes], Any] | None,
        most_steps: int,
    ) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._persistent, self._nested = persistent, nested
        self._left = self._most = most_steps

    def spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise PickleRefused(
                f"takes more than {self._most:,} instructions, which is more than weights need"
            )

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a value is missing")
        return value

    def top(self) -> Any:
        if self._stack[-1] is _MARK:
            raise ValueError("a value is missing")
        return self._stack[-1]

    def since_mark(self) -> list[Any]:
        for place in range(len(self._stack) - 1, -1, -1):
            if self._stack[place] is _MARK:
                values = self._stack[place + 1 :]
                del self._stack[place:]
                return values
        raise ValueError("a mark is missing")

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def get(self, place: Any) -> None:
        self.push(self._memo[int(place)])

    def put(self, place: Any) -> None:
        self._memo[int(place)] = self.top()

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self.top()

    def extend(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, list):
            raise PickleRefused(f"appends to {_describe(target)}, which no weights need")
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, dict):
            raise PickleRefused(f"sets items of {_describe(target)}, which no weights need")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not _is_key(key):
                raise PickleRefused(f"has {_describe(key)} as a key, where weights have words")
            target[key] = value

    def new_dict(self, values: list[Any]) -> None:
        self.push({})
        self.set_items(values)

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleRefused("names a class by something that is no word")
        named = PickledGlobal(module, name)
        if str(named) not in ALLOWED_GLOBALS:
            raise PickleRefused(_why_not(named))
        self.push(named)

    def call(self, target: Any, args: Any) -> None:
        if not isinstance(target, PickledGlobal):
            raise PickleRefused(f"calls {_describe(target)}, which no weights need")
        if not isinstance(args, tuple):
            raise PickleRefused(f"calls {target} with {_describe(args)} where a list of arguments belongs")
        name = str(target)
        if name in _DICTS:
            self.new_dict([])
            self.set_items(self._pairs(name, args))
        elif name in _SETS:
            self.push(
                list(args[0])
                if args and isinstance(args[0], list) and not args[0]
                else PickledCall(name, args)
            )
        elif name == "_codecs.encode":
            self.push(self._encoded(args))
        elif name == "torch.storage._load_from_bytes":
            self.push(self._inside(args))
        else:
            if name == "numpy.dtype":
                _check_dtype(args)
            self.push(PickledCall(name, args))

    def build(self, state: Any) -> None:
        target = self.top()
        if isinstance(target, dict):
            return  # attributes of a dictionary, such as a state dict's `_metadata`
        if not isinstance(target, PickledCall):
            raise PickleRefused(f"sets attributes of {_describe(target)}, which no weights need")
        if target.state is not None:
            raise PickleRefused(f"sets the attributes of one {target.name} twice")
        target.state = state

    def persistent(self, key: Any) -> None:
        if self._persistent is None:
            raise PickleRefused(
                "refers to something outside itself by a persistent id, which weights here do not"
            )
        self.push(self._persistent(key))

    def _inside(self, args: tuple[Any, ...]) -> Any:
        if self._nested is None or len(args) != 1 or not isinstance(args[0], bytes):
            raise PickleRefused("asks for torch.storage._load_from_bytes where no weights need it")
        return self._nested(args[0])

    def _pairs(self, name: str, args: tuple[Any, ...]) -> list[Any]:
        """What Python 2 gave to OrderedDict: one list of pairs."""
        if not args:
            return []
        if len(args) != 1 or not isinstance(args[0], list):
            raise PickleRefused(f"makes {name} of {_describe(args[0])}")
        self.spend(len(args[0]))  # one list may be named again and again
        pairs = [pair for pair in args[0] if isinstance(pair, list | tuple) and len(pair) == 2]
        if len(pairs) != len(args[0]):
            raise PickleRefused(f"makes {name} of something that is no list of pairs")
        return [value for pair in pairs for value in pair]

    def _encoded(self, args: tuple[Any, ...]) -> bytes:
        """How the older protocols write bytes: text in Latin-1."""
        if len(args) != 2 or not isinstance(args[0], str) or args[1] not in ("latin1", "latin-1"):
            raise PickleRefused("calls _codecs.encode for something other than bytes in latin1")
        self.spend(1 + len(args[0]) // 64)  # one text may be named again and again
        return args[0].encode("latin1")


def _check_dtype(args: tuple[Any, ...]) -> None:
    """Arrays of numbers only: an array of objects is filled by unpickling each."""
    code = args[0] if args and isinstance(args[0], str) else "?"
    if code.lstrip("<>=|") not in _NUMBERS:
        raise PickleRefused(f"asks for numpy.dtype({sanitize_text(code, 20)!r}), which is no kind of number")


def _describe(value: Any) -> str:
    """The type of a value; never its own text, which may be long."""
    if isinstance(value, PickledGlobal):
        return str(value)
    if isinstance(value, PickledCall):
        return f"a {value.name}"
    return f"a {type(value).__name__}"


def _why_not(named: PickledGlobal) -> str:
    shown = sanitize_text(str(named))
    if named.module.startswith("dnnlib.tflib"):
        return (
            f"holds {shown}, a network of NVIDIA's TensorFlow release, whose loading runs the source text in it; "
            "convert it to a PyTorch .pkl with legacy.py of stylegan2-ada-pytorch, on a machine where you would "
            "run code of its author, and import that"
        )
    return f"asks for {shown}, which no weights need; nothing of the file was run"


_Step = Callable[[_Machine, Any], None]


def _push(machine: _Machine, argument: Any) -> None:
    machine.push(argument)


def _nothing(machine: _Machine, argument: Any) -> None:
    """PROTO and FRAME say how the bytes are laid out, which genops knows."""


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.pop(), machine.pop()
    machine.name(module, name)


def _reduce(machine: _Machine, _: Any) -> None:
    args, target = machine.pop(), machine.pop()
    machine.call(target, args)


def _set_item(machine: _Machine, _: Any) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


_STEPS: Final[Mapping[str, _Step]] = {
    "PROTO": _nothing,
    "FRAME": _nothing,
    **dict.fromkeys(
        (
            "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT",
            "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
            "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
        ),
        _push,
    ),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_SET": lambda machine, _: machine.push([]),
    "MARK": lambda machine, _: machine.push(_MARK),
    "POP": lambda machine, _: _drop(machine),
    "POP_MARK": lambda machine, _: _drop_marked(machine),
    "DUP": lambda machine, _: machine.push(machine.top()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "LIST": lambda machine, _: machine.push(machine.since_mark()),
    "DICT": lambda machine, _: machine.new_dict(machine.since_mark()),
    "FROZENSET": lambda machine, _: machine.push(machine.since_mark()),
    "APPEND": lambda machine, _: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "ADDITEMS": lambda machine, _: machine.extend(machine.since_mark()),
    "SETITEM": _set_item,
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "GET": lambda machine, argument: machine.get(argument),
    "BINGET": lambda machine, argument: machine.get(argument),
    "LONG_BINGET": lambda machine, argument: machine.get(argument),
    "PUT": lambda machine, argument: machine.put(argument),
    "BINPUT": lambda machine, argument: machine.put(argument),
    "LONG_BINPUT": lambda machine, argument: machine.put(argument),
    "MEMOIZE": lambda machine, _: machine.memoize(),
    "GLOBAL": lambda machine, argument: machine.name(*argument.split(" ", 1)),
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "BUILD": lambda machine, _: machine.build(machine.pop()),
    "PERSID": lambda machine, argument: machine.persistent(argument),
    "BINPERSID": lambda machine, _: machine.persistent(machine.pop()),
}  # fmt: skip


def _drop(machine: _Machine) -> None:
    machine.pop()


def _drop_marked(machine: _Machine) -> None:
    machine.since_mark()
