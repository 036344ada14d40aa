"""Reads a pickle as plain data: nothing that it names is imported, nothing that it requests is called.

A pickle is a program for a small stack machine, and Python's own machine imports what a file names and calls it. This
one cannot import or call. A requested call is returned as a `PickledCall`: the name, the arguments and the state, as
values. A name outside a short list ends the reading, so that a hostile file is refused by name rather than silently
disarmed. The work is bounded by a `Budget`, which all pickles of one file share.

The opcodes are those that Python documents in `pickletools`, whose `genops` splits the bytes.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from fedface.errors import WeightsError
from fedface.text import sanitize_text

MAX_STEPS: Final = 300_000  # opcodes; a 1024 px generator twice and its discriminator take 60,000
# Entries of modules, a tensor counts as ten; a published checkpoint has about ten thousand
MAX_PARTS: Final = 50_000
MAX_NAME: Final = 200  # characters of a dotted name; published ones have about forty
_MAX_KEY: Final = 10_000  # numbers as keys: optimizers number their parameters

ALLOWED_GLOBALS: Final = frozenset({
    "__builtin__.dict", "builtins.dict", "__builtin__.object", "builtins.object",
    "__builtin__.set", "builtins.set", "__builtin__.frozenset", "builtins.frozenset",
    "copy_reg._reconstructor", "copyreg._reconstructor",
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
_DICTS: Final = frozenset(
    {"__builtin__.dict", "builtins.dict", "collections.OrderedDict", "dnnlib.util.EasyDict"}
)


@dataclass(frozen=True, slots=True)
class PickledGlobal:
    """A class or function that a pickle names, such as torch.FloatStorage; never looked up."""

    name: str


@dataclass(slots=True, eq=False)
class PickledCall:
    """A call of `name` that a pickle requests: never executed, only recorded."""

    name: str
    args: tuple[Any, ...]
    state: Any = None


class PickleRefused(WeightsError):
    """A pickle that is damaged, too large, or requests what weights do not need; the text is the reason."""


class Budget:
    """The work that may be spent on one file: any file of 10 MB is read or refused within about two CPU seconds.

    Args:
        size: Bytes of the file. What is copied out of it may have four times as many, and 1 MiB.
    """

    def __init__(self, size: int) -> None:
        self._steps, self._parts, self._bytes = MAX_STEPS, MAX_PARTS, 4 * size + 2**20

    def spend(self, *, steps: int = 0, parts: int = 0, size: int = 0) -> None:
        """Subtract opcodes, parts of networks and bytes; raises PickleRefused where none are left."""
        self._steps -= steps
        self._parts -= parts
        self._bytes -= size
        if self._steps < 0:
            raise PickleRefused(
                f"takes more than {MAX_STEPS:,} instructions, which is more than weights need"
            )
        if self._parts < 0:
            raise PickleRefused(f"has more than {MAX_PARTS:,} parts, which is more than any network has")
        if self._bytes < 0:
            raise PickleRefused("names tensors that are together much larger than itself")


def check_name(name: str) -> str:
    """The name of a weight; a long one is refused, because comparing and copying it for every part takes long."""
    if len(name) > MAX_NAME:
        raise PickleRefused(
            f"has a name of {len(name):,} characters, {sanitize_text(name, 40)}; "
            f"names of weights have {MAX_NAME} at most"
        )
    return name


def _refuse_persistent(key: Any) -> NoReturn:
    raise PickleRefused("refers to something outside itself by a persistent id, which weights here do not")


def _refuse_nested(content: bytes) -> NoReturn:
    raise PickleRefused("calls torch.storage._load_from_bytes where no weights need it")


def read_pickle(
    stream: Any,
    budget: Budget,
    *,
    persistent: Callable[[Any], Any] = _refuse_persistent,
    nested: Callable[[bytes], Any] = _refuse_nested,
) -> Any:
    """One pickle from a stream, as plain values, with `PickledGlobal` and `PickledCall` for classes and calls.

    Guarantees:
        * Nothing is imported, called or set on any object of the program, whatever the bytes are.
        * Time and memory are at most proportional to the bytes read and the instructions spent from `budget`.

    Args:
        stream: Has read, readline and tell over bytes in memory; left after the pickle's last byte.
        budget: Of the file that the pickle is in.
        persistent: Returns what a persistent id stands for.
        nested: Returns what stands for the bytes given to torch.storage._load_from_bytes, which are pickles of their
            own.

    Raises:
        PickleRefused: The bytes are cut short, exceed the budget, or name something not in `ALLOWED_GLOBALS`.
    """
    machine = _Machine(budget, persistent, nested)
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            budget.spend(steps=1)
            if opcode.name == "STOP":
                return machine.pop()
            if opcode.name == "INST":
                _refuse_global(str(argument).replace(" ", ".", 1))
            if opcode.name not in _STEPS:
                raise PickleRefused(f"uses the instruction {opcode.name}, which no weights need")
            _STEPS[opcode.name](machine, argument)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as error:
        raise PickleRefused(
            f"is damaged or cut short ({sanitize_text(str(error))}): download or copy it again"
        ) from error
    raise PickleRefused("is cut short: it has no end")


def _refuse_global(name: str) -> NoReturn:
    shown = sanitize_text(name)
    if name.startswith("dnnlib.tflib"):
        raise PickleRefused(
            f"holds {shown}, a network of NVIDIA's TensorFlow release, whose loading runs the source text in it; "
            "convert it to a PyTorch .pkl with legacy.py of stylegan2-ada-pytorch, on a machine where you would "
            "run code of its author, and import that"
        )
    raise PickleRefused(f"names {shown}, which no weights need; nothing of the file was run")


_MARK: Final = object()  # the opcode MARK on the stack


@dataclass
class _Machine:
    """The stack and the memo; every method is one instruction, or a part of one."""

    budget: Budget
    persistent: Callable[[Any], Any]
    nested: Callable[[bytes], Any]
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def top(self) -> Any:
        if self.stack[-1] is _MARK:
            raise ValueError("a value is missing")
        return self.stack[-1]

    def pop(self) -> Any:
        value = self.top()
        del self.stack[-1]
        return value

    def pop_many(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

    def since_mark(self) -> list[Any]:
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                values = self.stack[place + 1 :]
                del self.stack[place:]
                return values
        raise ValueError("a mark is missing")

    def get(self, place: Any) -> None:
        self.push(self.memo[place])

    def put(self, place: Any) -> None:
        # Picklers count; numbers with equal hashes would make the memo slow.
        if not 0 <= place <= MAX_STEPS:
            raise ValueError("a place in the memo is out of range")
        self.memo[place] = self.top()

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
            # A tuple hashes whatever is in it, and large numbers can be chosen to have equal hashes.
            if not isinstance(key, str) and not (isinstance(key, int) and 0 <= key < _MAX_KEY):
                raise PickleRefused(f"has {_describe(key)} as a key, where weights have names")
            target[check_name(key) if isinstance(key, str) else key] = value

    def new_dict(self, values: list[Any]) -> None:
        self.push({})
        self.set_items(values)

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleRefused("names a class by something other than text")
        if f"{module}.{name}" not in ALLOWED_GLOBALS:
            _refuse_global(f"{module}.{name}")
        self.push(PickledGlobal(f"{module}.{name}"))

    def call(self, target: Any, args: Any) -> None:
        if not isinstance(target, PickledGlobal):
            raise PickleRefused(f"calls {_describe(target)}, which no weights need")
        if not isinstance(args, tuple):
            raise PickleRefused(
                f"calls {target.name} with {_describe(args)} where a list of arguments belongs"
            )
        match target.name:
            case name if name in _DICTS:
                self.new_dict(self._pairs(name, args))
            case "copy_reg._reconstructor" | "copyreg._reconstructor":
                self.push(self._reconstructed(args))
            case "_codecs.encode":
                self.push(self._encoded(args))
            case "torch.storage._load_from_bytes":
                if len(args) != 1 or not isinstance(args[0], bytes):
                    raise PickleRefused("calls torch.storage._load_from_bytes on something other than bytes")
                self.push(self.nested(args[0]))
            case "numpy.dtype":
                self.push(_dtype(args))
            case name:
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

    def _pairs(self, name: str, args: tuple[Any, ...]) -> list[Any]:
        """What Python 2 gave to OrderedDict: one list of pairs."""
        match args:
            case ():
                return []
            case ([*pairs],) if all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
                self.budget.spend(steps=len(pairs))  # one list may be named again and again
                return [value for pair in pairs for value in pair]
            case _:
                raise PickleRefused(f"makes {name} of something other than a list of pairs")

    def _reconstructed(self, args: tuple[Any, ...]) -> Any:
        """How protocols 0 and 1 write objects: a class, the built-in class under it, and the value of that."""
        match args:
            case (PickledGlobal(name), PickledGlobal("__builtin__.object" | "builtins.object"), None):
                return PickledCall(name, ())
            case (PickledGlobal(name), PickledGlobal(base), dict(content)) if (
                name in _DICTS and base in _DICTS
            ):
                self.budget.spend(steps=len(content))  # one dictionary may be named again and again
                return dict(content)
            case _:
                raise PickleRefused(
                    "calls copy_reg._reconstructor for no object or dictionary that weights need"
                )

    def _encoded(self, args: tuple[Any, ...]) -> bytes:
        """How the older protocols write bytes: text in Latin-1."""
        if len(args) != 2 or not isinstance(args[0], str) or args[1] not in ("latin1", "latin-1"):
            raise PickleRefused("calls _codecs.encode for something other than bytes in latin1")
        self.budget.spend(size=len(args[0]))  # one text may be named again and again
        return args[0].encode("latin1")


def _dtype(args: tuple[Any, ...]) -> PickledCall:
    """Arrays of numbers only: an array of objects is filled by unpickling each."""
    code = args[0] if args and isinstance(args[0], str) else "?"
    if code[:4].lstrip("<>=|") not in _NUMBERS or len(code) > 3:
        raise PickleRefused(f"names numpy.dtype({sanitize_text(code, 20)!r}), which is not a numeric type")
    return PickledCall("numpy.dtype", args)


def _describe(value: Any) -> str:
    """The type of a value; never its own text, which may be long."""
    match value:
        case PickledGlobal(name):
            return name
        case PickledCall(name):
            return f"a {name}"
        case _:
            return f"a {type(value).__name__}"


_STEPS: Final[Mapping[str, Callable[[_Machine, Any], Any]]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, _: None),  # how the bytes are laid out, which genops knows
    **dict.fromkeys(
        (
            "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT",
            "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
            "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
        ),
        _Machine.push,
    ),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_SET"), lambda machine, _: machine.push([])),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "MARK": lambda machine, _: machine.push(_MARK),
    "POP": lambda machine, _: machine.pop(),
    "POP_MARK": lambda machine, _: machine.since_mark(),
    "DUP": lambda machine, _: machine.push(machine.top()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.push((machine.pop(),)),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.pop_many(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.pop_many(3))),
    **dict.fromkeys(("LIST", "FROZENSET"), lambda machine, _: machine.push(machine.since_mark())),
    "DICT": lambda machine, _: machine.new_dict(machine.since_mark()),
    "APPEND": lambda machine, _: machine.extend([machine.pop()]),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda machine, _: machine.extend(machine.since_mark())),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop_many(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    "GLOBAL": lambda machine, argument: machine.name(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.name(*machine.pop_many(2)),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda machine, _: machine.call(*machine.pop_many(2))),
    "BUILD": lambda machine, _: machine.build(machine.pop()),
    "PERSID": lambda machine, key: machine.push(machine.persistent(key)),
    "BINPERSID": lambda machine, _: machine.push(machine.persistent(machine.pop())),
}  # fmt: skip
