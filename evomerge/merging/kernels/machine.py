"""The small language that the CPU kernels are written in: vectors with Python's operators, loops,
and a compiler for this machine (LLVM).

Every operation is an IEEE operation of its own in the order written: nothing is contracted or
reassociated. Knows no merge.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()
POINTER = ir.PointerType()

_COMPILING = threading.Lock()
_ENGINES: list[Any] = []  # machine code lives as long as its engine


@cache
def lanes() -> int:
    """How many 32-bit lanes a vector has on this machine."""
    features = llvm.get_host_cpu_features()
    return 16 if features.get("avx512bw") and features.get("avx512dq") else 8


class Value:
    """A scalar or a vector of LLVM. Operators compile to one instruction each; integers are
    unsigned in `>>`, signed in comparisons."""

    __slots__ = ("builder", "raw")

    def __init__(self, builder: Any, raw: Any) -> None:
        self.builder, self.raw = builder, raw

    @property
    def type(self) -> Any:
        return self.raw.type

    @property
    def _real(self) -> bool:
        element = getattr(self.type, "element", self.type)
        return isinstance(element, ir.FloatType | ir.DoubleType)

    def _of(self, other: Any) -> Any:
        return other.raw if isinstance(other, Value) else constant(self.type, other)

    def _by(self, name: str, other: Any) -> Value:
        made = getattr(self.builder, name)(self.raw, self._of(other))
        return Value(self.builder, made)

    def __add__(self, other: Any) -> Value:
        return self._by("fadd" if self._real else "add", other)

    def __sub__(self, other: Any) -> Value:
        return self._by("fsub" if self._real else "sub", other)

    def __mul__(self, other: Any) -> Value:
        return self._by("fmul" if self._real else "mul", other)

    def __truediv__(self, other: Any) -> Value:
        return self._by("fdiv", other)

    def __and__(self, other: Any) -> Value:
        return self._by("and_", other)

    def __or__(self, other: Any) -> Value:
        return self._by("or_", other)

    def __xor__(self, other: Any) -> Value:
        return self._by("xor", other)

    def __lshift__(self, other: Any) -> Value:
        return self._by("shl", other)

    def __rshift__(self, other: Any) -> Value:
        return self._by("lshr", other)

    def __invert__(self) -> Value:
        return self ^ -1

    def _compared(self, sign: str, other: Any) -> Value:
        compare = self.builder.fcmp_ordered if self._real else self.builder.icmp_signed
        return Value(self.builder, compare(sign, self.raw, self._of(other)))

    def __gt__(self, other: Any) -> Value:
        return self._compared(">", other)

    def __ge__(self, other: Any) -> Value:
        return self._compared(">=", other)

    def __lt__(self, other: Any) -> Value:
        return self._compared("<", other)

    def __le__(self, other: Any) -> Value:
        return self._compared("<=", other)

    def equals(self, other: Any) -> Value:
        return self._compared("==", other)

    def below(self, other: Any) -> Value:
        """Unsigned <."""
        return Value(self.builder, self.builder.icmp_unsigned("<", self.raw, self._of(other)))

    def above_or_nan(self, other: Any) -> Value:
        """Of floats: >, or one of them is NaN."""
        raw = self.builder.fcmp_unordered(">", self.raw, self._of(other))
        return Value(self.builder, raw)

    def is_nan(self) -> Value:
        return Value(self.builder, self.builder.fcmp_unordered("uno", self.raw, self.raw))

    def select(self, then: Value, otherwise: Any) -> Value:
        """`then` where this is true."""
        return Value(self.builder, self.builder.select(self.raw, then.raw, then._of(otherwise)))

    def fused(self, factor: Any, more: Any) -> Value:
        """self·factor + more, rounded once or twice: where that makes no difference."""
        name, kind = "llvm.fmuladd", self.type
        function = _intrinsic(self.builder, f"{name}.{_suffix(kind)}", kind, [kind] * 3)
        raw = self.builder.call(function, [self.raw, self._of(factor), self._of(more)])
        return Value(self.builder, raw)

    def cast(self, kind: Any) -> Value:
        """The same bits as another type."""
        return Value(self.builder, self.builder.bitcast(self.raw, kind))

    def widened(self, kind: Any) -> Value:
        """The same number in a wider type; integers are unsigned."""
        return Value(
            self.builder,
            (self.builder.fpext if self._real else self.builder.zext)(self.raw, kind),
        )

    def cut(self, kind: Any) -> Value:
        """The low bits."""
        return Value(self.builder, self.builder.trunc(self.raw, kind))

    def shuffled(self, other: Value, places: list[int]) -> Value:
        """Elements of self and other, seen as one row."""
        mask = ir.Constant(ir.VectorType(I32, len(places)), places)
        return Value(self.builder, self.builder.shuffle_vector(self.raw, other.raw, mask))

    def splat(self, count: int) -> Value:
        """A scalar in every lane."""
        kind = ir.VectorType(self.type, count)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), self.raw, I32(0))
        return Value(self.builder, one).shuffled(Value(self.builder, one), [0] * count)

    def word(self) -> Value:
        """A mask as the bits of an int64."""
        return self.cast(ir.IntType(self.type.count)).widened(I64)

    def lowest(self) -> Value:
        """The place of the lowest bit that is set; not of 0."""
        return Value(self.builder, self.builder.cttz(self.raw, I1(1)))

    def ones(self) -> Value:
        """How many lanes of a mask are set, as int64."""
        return Value(self.builder, self.builder.ctpop(self.word().raw))

    def any(self) -> Value:
        """Whether a lane of a mask is set."""
        return ~self.word().equals(0)


def constant(kind: Any, value: Any) -> Any:
    """A number of a scalar type, or in every lane of a vector; or a list of lanes."""
    if isinstance(kind, ir.VectorType):
        values = value if isinstance(value, list) else [value] * kind.count
        return ir.Constant(kind, [ir.Constant(kind.element, v) for v in values])
    return ir.Constant(kind, value)


class Kernel:
    """A function int64 f(int64 *table, int64 begin, int64 end) while it is written."""

    def __init__(self) -> None:
        self._module = ir.Module()
        kind = ir.FunctionType(I64, [POINTER, I64, I64])
        self._function = ir.Function(self._module, kind, "kernel")
        self.builder = ir.IRBuilder(self._function.append_basic_block())
        self._entry = self.builder.block
        self.table, self.begin, self.end = (Value(self.builder, a) for a in self._function.args)

    def value(self, kind: Any, number: Any) -> Value:
        return Value(self.builder, constant(kind, number))

    def room(self, kind: Any, count: int = 1) -> Value:
        """Memory of the stack."""
        with self.builder.goto_block(self._entry):
            raw = self.builder.alloca(kind, count)
            raw.align = 64
            return _pointer(self.builder, raw)

    def variable(self, start: Value) -> Variable:
        return Variable(self, start)

    def at(self, pointer: Value, offset: Value | int) -> Value:
        """The address so many bytes further."""
        number = offset if isinstance(offset, Value) else self.value(I64, offset)
        raw = self.builder.gep(pointer.raw, [number.raw], source_etype=I8)
        return _pointer(self.builder, raw)

    def load(self, kind: Any, pointer: Value, offset: Value | int = 0) -> Value:
        place = self.at(pointer, offset)
        return Value(self.builder, self.builder.load(place.raw, typ=kind, align=_align(kind)))

    def store(self, value: Value, pointer: Value, offset: Value | int = 0) -> None:
        place = self.at(pointer, offset)
        self.builder.store(value.raw, place.raw, align=_align(value.type))

    def slot(self, index: int, kind: Any = I64) -> Value:
        """A number of the table."""
        return self.load(kind, self.table, 8 * index)

    def set_slot(self, index: int, value: Value) -> None:
        self.store(value, self.table, 8 * index)

    def address(self, index: int) -> Value:
        """An address of the table."""
        return Value(self.builder, self.builder.inttoptr(self.slot(index).raw, POINTER))

    def copy(self, to: Value, source: Value, size: Value) -> None:
        self._memory("memcpy", [POINTER, POINTER, I64], [to, source, size])

    def clear(self, to: Value, size: int) -> None:
        nothing, count = self.value(I8, 0), self.value(I64, size)
        self._memory("memset", [POINTER, I8, I64], [to, nothing, count])

    def _memory(self, name: str, kinds: list[Any], arguments: list[Value]) -> None:
        suffix = ".".join("p0" if kind is POINTER else "i64" for kind in kinds if kind is not I8)
        function = _intrinsic(self.builder, f"llvm.{name}.{suffix}", ir.VoidType(), [*kinds, I1])
        self.builder.call(function, [*(a.raw for a in arguments), I1(0)])

    def prefetch(self, pointer: Value, index: Value, size: int) -> None:
        """Fetches an element of so many bytes ahead of its use; it need not exist."""
        place = self.at(pointer, index * size)
        kinds = [POINTER, I32, I32, I32]
        function = _intrinsic(self.builder, "llvm.prefetch.p0", ir.VoidType(), kinds)
        self.builder.call(function, [place.raw, I32(0), I32(3), I32(1)])

    def increment(self, counts: Value, index: Value) -> None:
        """Adds 1 to an int64 of an array."""
        self.store(self.load(I64, counts, index << 3) + 1, counts, index << 3)

    def least(self, a: Value, b: Value) -> Value:
        smaller: Value = (a < b).select(a, b)
        return smaller

    @contextmanager
    def loop(self, start: Value, stop: Value, step: int = 1) -> Iterator[Value]:
        """`for i in range(start, stop, step)`."""
        place = self.variable(start)
        with self.repeat(lambda: place.value < stop):
            yield place.value
            place.value = place.value + step

    @contextmanager
    def repeat(self, condition: Callable[[], Value]) -> Iterator[None]:
        """`while condition()`."""
        head, body, after = (self._function.append_basic_block() for _ in range(3))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        self.builder.cbranch(condition().raw, body, after)
        self.builder.position_at_end(body)
        yield
        self.builder.branch(head)
        self.builder.position_at_end(after)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with self.builder.if_then(condition.raw):
            yield

    def give(self, value: Value) -> None:
        """Return."""
        self.builder.ret(value.raw)

    def compiled(self) -> Callable[[int, int, int], int]:
        """The machine code; a call takes the address of the table, and holds no lock of Python."""
        with _COMPILING:
            module = llvm.parse_assembly(str(self._module))
            machine = _target()
            _tidied(module, machine)
            engine = llvm.create_mcjit_compiler(module, machine)
            engine.finalize_object()
            _ENGINES.append(engine)
        signature = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 3)
        code: Callable[[int, int, int], int] = signature(engine.get_function_address("kernel"))
        return code


class Variable:
    """A value that loops change."""

    def __init__(self, kernel: Kernel, start: Value) -> None:
        self._kernel, self._kind = kernel, start.type
        self._place = kernel.room(start.type)
        self.value = start

    @property
    def value(self) -> Value:
        builder = self._kernel.builder
        return Value(builder, builder.load(self._place.raw, typ=self._kind))

    @value.setter
    def value(self, value: Value) -> None:
        self._kernel.builder.store(value.raw, self._place.raw)


def _pointer(builder: Any, raw: Any) -> Value:
    raw.type = POINTER  # llvmlite gives it the type of what it points to
    return Value(builder, raw)


def _intrinsic(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    module = builder.module
    kind = ir.FunctionType(result, arguments)
    return module.globals.get(name) or ir.Function(module, kind, name)


def _suffix(kind: Any) -> str:
    element = getattr(kind, "element", kind)
    letter = "f32" if isinstance(element, ir.FloatType) else "f64"
    return f"v{kind.count}{letter}" if isinstance(kind, ir.VectorType) else letter


def _align(kind: Any) -> int:
    """What any operand has: its elements' size."""
    element = getattr(kind, "element", kind)
    if isinstance(kind, ir.VectorType):
        return 2
    return {I8: 1, I16: 2, I32: 4, F32: 4}.get(element, 8)


@cache
def _target() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=2,
        jit=True,
    )


def _tidied(module: Any, machine: Any) -> None:
    """Variables into registers; what does not change out of loops."""
    passes = llvm.create_new_module_pass_manager()
    passes.add_sroa_pass()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=0))
    passes.run(module, builder)
