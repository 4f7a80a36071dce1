"""Do C functions run as tasks, whatever library they come from, and do wrong calls say so?"""

from __future__ import annotations

import array
import contextvars
import ctypes
import errno
import functools
import gc
import sys
import sysconfig
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support import anything, eventually, no_op

import charioteer as ch

LIBM = ctypes.CDLL("libm.so.6")
LIBC = ctypes.CDLL(None)


FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
needs_wheel = pytest.mark.skipif(
    FREE_THREADED, reason="has no wheel for free-threaded CPython 3.13"
)

# Here, since the compiler's threads are nobody's leak.
if not FREE_THREADED:
    import cffi
    import numba

    COMPILED = numba.cfunc("float64(float64, float64)")(lambda x, y: x * y)


power = ch.native(LIBM.pow, ("f8", "f8"), returns="f8")
copy = ch.native(LIBC.memcpy, (ch.Out, ch.In, "u8"))
usleep = ch.native(LIBC.usleep, ("u4",), returns="i4", check="zero")


def callback(result: Any, *parameters: Any) -> Callable[[Callable[..., Any]], Any]:
    """A C function that calls the Python function."""
    return lambda function: ctypes.CFUNCTYPE(result, *parameters)(function)


# What it is to be a task function.


def test_calling_spawns(rt_any: ch.Runtime) -> None:
    task = power(2, 10.0)
    assert isinstance(task, ch.Task)
    assert task.result() == 1024.0 and type(task.result()) is float
    assert task.name == "pow"
    assert task.done() and task.exception() is None


def test_fn_calls_on_the_spot() -> None:
    assert power.fn(2, 0.5) == 2**0.5
    with pytest.raises(TypeError, match="pow takes 2 arguments, not 1"):
        power.fn(2)


def test_options_and_map(rt_any: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    first = ch.spawn(no_op)
    named = power.options(space[3], dependencies=[first], priority=3, retries=1)(3, 2)
    assert named == space[3] and space[3].result() == 9
    assert power.options("cube")(3, 3).name == "cube"
    assert power.map([1, 2, 3], [2, 2, 2]).result() == [1, 4, 9]
    assert ch.spawn_many(ch.native(LIBC.abs, ("i4",), returns="i4"), [-1, 2]).result() == [1, 2]
    assert rt_any.submit(anything(power), 2, 2).result() == 4
    assert list(rt_any.map(anything(power), [2], [3])) == [8]


def test_options_of_the_maker(rt2: ch.Runtime) -> None:
    made = ch.native(LIBM.pow, ("f8", "f8"), returns="f8", name="raise", placement=ch.cpu * 2)
    task = made(2, 2)
    assert task.result() == 4 and task.name == "raise"
    with pytest.raises(TypeError, match="raise takes 2 arguments"):
        made(2)
    with pytest.raises(ch.PlacementError):
        power.options(placement=ch.cpu * 64)(2, 2)


def test_the_order_of_dependencies(rt_any: ch.Runtime) -> None:
    seen: list[int] = []
    note = callback(None, ctypes.c_int)(seen.append)
    task = ch.native(note, ("i4",))
    space = ch.TaskSpace("T")
    for i in range(50):
        task.options(space[i], dependencies=space[i - 1])(i)
    space.result()
    assert seen == list(range(50))


def test_inline_spawns_need_no_arguments(rt_any: ch.Runtime) -> None:
    space = ch.TaskSpace("T")
    for spawn in (ch.spawn(space[0]), ch.spawn(share=0), ch.spawn):
        with pytest.raises(TypeError, match=r"pow takes 2 arguments.*pow\.options\(\.\.\.\)"):
            spawn(anything(power))
    answer = ch.native(callback(ctypes.c_int)(lambda: 42), returns="i4", name="answer")
    assert ch.spawn(space[0])(anything(answer)).result() == 42
    assert space[0].result() == 42
    assert anything(ch.spawn(answer)).result() == 42


def test_the_undecorated_function_is_a_callable_like_others(rt_any: ch.Runtime) -> None:
    assert anything(ch.task(functools.partial(power.fn, 2)))(3).result() == 8
    assert ch.task(power.fn)(2, 4).result() == 16
    with rt_any.executor() as executor:
        assert executor.submit(power.fn, 2, 5).result() == 32


def test_it_says_what_it_is() -> None:
    assert anything(power).__name__ == "pow"
    assert anything(power).__doc__ == "pow(f8, f8) -> f8"
    assert "pow(f8, f8) -> f8" in repr(power) and "native" in repr(power.fn)
    described = ch.native(LIBC.memcpy, (ch.Out["f8"], "const *f8", "&i4", "u8"))
    assert anything(described).__doc__ == 'memcpy(Out["f8"], const *f8, &i4, u8) -> void'


def test_membership_in_groups(rt: ch.Runtime) -> None:
    with ch.TaskGroup():
        task = usleep(1000)
    assert task.done()


# Handles as arguments.


def test_handles_are_dependencies_and_replaced(rt_any: ch.Runtime) -> None:
    two = ch.spawn(lambda: 2)
    assert power(two, power(two, 1.0)).result() == 4
    made = ch.spawn(lambda: np.arange(4.0))
    target = np.zeros(4)
    copy(target, made, 32).result()
    np.testing.assert_array_equal(target, np.arange(4.0))


def test_results_are_arguments_of_python_bodies(rt_any: ch.Runtime) -> None:
    assert ch.task(lambda x: x + 1)(power(2, 3)).result() == 9


def test_a_handle_whose_result_does_not_fit(rt_any: ch.Runtime) -> None:
    task = power(ch.spawn(lambda: "text"), 1)
    with pytest.raises(TypeError, match="pow: argument 1: expects a number, not str"):
        task.result()


def test_failures_travel(rt_any: ch.Runtime) -> None:
    failing = ch.native(LIBC.abs, ("i4",), returns="i4", check="zero")
    dependent = power(failing(-3), 2)
    error = dependent.exception()
    assert isinstance(error, ch.DependencyError)
    assert isinstance(error.__cause__, ch.NativeError) and error.__cause__.code == 3


# Where functions come from.


def test_ctypes_callbacks(rt_any: ch.Runtime) -> None:
    add = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int)(lambda a, b: a + b)
    assert ch.native(add, ("i4", "i4"), returns="i4")(2, 3).result() == 5


def test_addresses(rt_any: ch.Runtime) -> None:
    address = ctypes.cast(LIBM.cos, ctypes.c_void_p).value
    assert address is not None
    cosine = ch.native(address, ("f8",), returns="f8")
    assert cosine(0.0).result() == 1.0
    assert cosine(0.0).name == f"function_{address:#x}"


@needs_wheel
def test_cffi(rt_any: ch.Runtime) -> None:
    ffi = cffi.FFI()
    ffi.cdef("double cos(double x); int printf(const char *, ...); extern int *errors;")
    library = ffi.dlopen("libm.so.6")
    cosine = ch.native(library.cos, ("f8",), returns="f8", name="cos")
    assert cosine(0.0).result() == 1.0
    doubled = ffi.callback("double(double)", lambda x: 2 * x)
    assert ch.native(doubled, ("f8",), returns="f8")(4).result() == 8
    with pytest.raises(ValueError, match="takes 1 parameters by its own declaration"):
        ch.native(library.cos, ("f8", "f8"))
    with pytest.raises(TypeError, match="not a C function"):
        ch.native(ffi.new("int *"))
    with pytest.raises(TypeError, match="fixed number of parameters"):
        ch.native(ffi.dlopen(None).printf, ("p",))


@needs_wheel
def test_numba(rt_any: ch.Runtime) -> None:
    product = ch.native(COMPILED, ("f8", "f8"), returns="f8")
    assert product(3, 4).result() == 12
    with pytest.raises(ValueError, match="by its own declaration"):
        ch.native(COMPILED, ("f8",))


def test_what_looks_like_a_numba_function(rt_any: ch.Runtime) -> None:
    class Compiled:
        address = ctypes.cast(LIBM.cos, ctypes.c_void_p).value
        native_name = "compiled_cos"

    cosine = ch.native(Compiled(), ("f8",), returns="f8")
    assert cosine(0.0).result() == 1.0
    assert cosine(0.0).name == "compiled_cos"
    with pytest.raises(TypeError, match="not a C function: type"):
        ch.native(Compiled)


def test_low_level_callables(rt_any: ch.Runtime) -> None:
    import scipy

    prototype = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_double)
    cosine = scipy.LowLevelCallable(ctypes.cast(LIBM.cos, prototype))
    assert ch.native(cosine, ("f8",), returns="f8")(0.0).result() == 1.0
    data = ctypes.cast((ctypes.c_double * 1)(), ctypes.c_void_p)
    with pytest.raises(ValueError, match="user_data"):
        ch.native(scipy.LowLevelCallable(ctypes.cast(LIBM.cos, prototype), data), ("f8",))


def capsule(name: bytes | None) -> Any:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = (
        ctypes.py_object,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
    )
    return new(ctypes.cast(LIBM.cos, ctypes.c_void_p), name, None)


@pytest.mark.parametrize("name", [None, b"double (double)"])
def test_capsules(rt_any: ch.Runtime, name: bytes | None) -> None:
    assert ch.native(capsule(name), ("f8",), returns="f8")(0.0).result() == 1.0


# Values.


INTEGERS = {
    "i1": ctypes.c_int8, "i2": ctypes.c_int16, "i4": ctypes.c_int32, "i8": ctypes.c_int64,
    "u1": ctypes.c_uint8, "u2": ctypes.c_uint16, "u4": ctypes.c_uint32, "u8": ctypes.c_uint64,
}  # fmt: skip


@pytest.mark.parametrize("code", INTEGERS)
def test_integers(rt_any: ch.Runtime, code: str) -> None:
    bits = 8 * int(code[1])
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if code[0] == "i" else (0, 2**bits - 1)
    same = ch.native(callback(INTEGERS[code], INTEGERS[code])(lambda x: x), (code,), returns=code)
    values = [low, 0, 1, high]
    assert same.map(values).result() == values
    assert same(np.int16(7)).result() == 7
    for wrong in (low - 1, high + 1, 10**30):
        with pytest.raises(ValueError, match=rf"argument 1: {wrong} is out of range for {code}"):
            same(wrong)
    for wrong_type in (1.0, "1", None):
        with pytest.raises(TypeError, match="expects an integer"):
            same(wrong_type)


def test_floats(rt_any: ch.Runtime) -> None:
    half = ch.native(
        callback(ctypes.c_float, ctypes.c_float)(lambda x: x / 2), ("f4",), returns="f4"
    )
    assert half(3).result() == 1.5
    assert half(float("inf")).result() == float("inf")
    assert np.isnan(half(float("nan")).result())
    with pytest.raises(ValueError, match="out of range for f4"):
        half(1e300)
    with pytest.raises(ValueError, match="out of range for f8"):
        power(10**400, 1)
    with pytest.raises(TypeError, match="expects a number, not complex"):
        power(1j, 1)


def test_bools_characters_pointers(rt_any: ch.Runtime) -> None:
    invert = ch.native(
        callback(ctypes.c_bool, ctypes.c_bool)(lambda x: not x), ("bool",), returns="bool"
    )
    assert invert(True).result() is False and invert(np.False_).result() is True
    with pytest.raises(TypeError, match="expects a bool, not int"):
        invert(1)

    upper = ch.native(
        callback(ctypes.c_char, ctypes.c_char)(lambda c: c.upper()), ("c1",), returns="c1"
    )
    assert upper("x").result() == upper(b"x").result() == b"X"
    for wrong in ("", "xy", b"xy", "\u00e9"):
        with pytest.raises(ValueError, match="expects one ASCII character"):
            upper(wrong)
    with pytest.raises(TypeError, match="expects a character, not int"):
        upper(120)

    length = ch.native(LIBC.strnlen, ("p", "u8"), returns="u8")
    text = ctypes.create_string_buffer(b"four")
    assert length(ctypes.addressof(text), 100).result() == 4
    find = ch.native(LIBC.memchr, ("p", "i4", "u8"), returns="p")
    assert find(ctypes.addressof(text), ord("u"), 4).result() == ctypes.addressof(text) + 2
    assert find(None, 0, 0).result() == 0
    with pytest.raises(TypeError, match="expects an integer, not str"):
        find("text", 0, 0)
    with pytest.raises(ValueError, match="out of range for an address"):
        find(-1, 0, 0)


def test_values_by_reference(rt_any: ch.Runtime) -> None:
    seen = []

    @callback(
        None,
        ctypes.POINTER(ctypes.c_int32),
        ctypes.POINTER(ctypes.c_char),
        ctypes.POINTER(ctypes.c_double),
        ctypes.POINTER(ctypes.c_double),
        ctypes.POINTER(ctypes.c_float),
    )
    def look(i: Any, c: Any, d: Any, z: Any, f: Any) -> None:
        seen.append((i[0], c[0], d[0], complex(z[0], z[1]), complex(f[0], f[1])))
        i[0] = 99

    task = ch.native(look, ("&i4", "&c1", "&f8", "&c16", "&c8"))
    task(7, "N", 2.5, 1 + 2j, 3 - 4j).result()
    task(7, b"N", 2, 1, np.complex64(1j)).result()
    assert seen == [(7, b"N", 2.5, 1 + 2j, 3 - 4j), (7, b"N", 2.0, 1 + 0j, 1j)]
    with pytest.raises(TypeError, match="argument 4: expects a number, not str"):
        task(7, "N", 2.5, "1", 0)


def test_retries_see_the_arguments_as_they_were(rt_any: ch.Runtime) -> None:
    seen = []

    def fail_twice(x: Any) -> int:
        seen.append(x[0])
        x[0] = 99
        return int(len(seen) < 3)

    function = callback(ctypes.c_int, ctypes.POINTER(ctypes.c_int32))(fail_twice)
    task = ch.native(function, ("&i4",), returns="i4", check="zero", retries=2)(7)
    assert task.result() == 0
    assert seen == [7, 7, 7]


def test_many_parameters(rt_any: ch.Runtime) -> None:
    prototype = [ctypes.c_double, ctypes.c_int64] * 20
    add = callback(ctypes.c_double, *prototype)(lambda *all: sum(all))
    values = list(range(40))
    assert ch.native(add, ("f8", "i8") * 20, returns="f8")(*values).result() == sum(values)


# Arrays.


def test_what_is_an_array(rt_any: ch.Runtime) -> None:
    class Interface:
        def __init__(self, array: Any) -> None:
            self.array = array
            self.__array_interface__ = array.__array_interface__

    source = np.arange(4.0)
    for given in (source, memoryview(source), array.array("d", source), Interface(source),
                  source.tobytes(), (ctypes.c_double * 4)(*source)):  # fmt: skip
        target = np.zeros(4)
        copy(target, given, 32).result()
        np.testing.assert_array_equal(target, source)
    store = bytearray(32)
    copy(store, source, 32).result()
    assert bytes(store) == source.tobytes()


def test_wrong_arrays(rt_any: ch.Runtime) -> None:
    fine = np.zeros(4)
    frozen = np.zeros(4)
    frozen.flags.writeable = False
    packed = np.zeros(4, dtype=[("a", "i1"), ("b", "f8")])["b"]
    unaligned = np.frombuffer(bytearray(33), np.uint8)[1:].view(np.float64)
    for wrong, kind, text in [
        ([0.0], TypeError, "expects an array, not list"),
        (1.0, TypeError, "expects an array, not float"),
        (None, TypeError, "expects an array, not NoneType"),
        (fine[::2], ValueError, r"not C-contiguous: shape \(2,\), strides \(16,\)"),
        (np.zeros((3, 3), order="F"), ValueError, "not C-contiguous"),
        (packed, ValueError, "not C-contiguous"),
        (frozen, ValueError, "argument 1: the array is read-only"),
        (b"bytes", ValueError, "argument 1: the array is read-only"),
        (unaligned, ValueError, "not aligned"),
        (fine.astype(">f8"), TypeError, "machine's order of bytes, not of >f8"),
        (np.array([None]), TypeError, "no Python objects, not of object"),
    ]:
        with pytest.raises(kind, match=text):
            copy(wrong, fine, 0)
    copy(fine, frozen, 32).result()


def test_dtypes_that_were_said(rt_any: ch.Runtime) -> None:
    for f8 in (ch.InOut["f8"], ch.InOut[np.float64], ch.Out["float64"], "*f8"):
        task = ch.native(LIBC.memset, (f8, "i4", "u8"))
        target = np.ones(3)
        task(target, 0, 24).result()
        assert not target.any()
        with pytest.raises(TypeError, match="expects an array of f8, not of float32"):
            task(np.zeros(3, np.float32), 0, 0)
    for read in ("const *i8", ch.In[np.int64]):
        look = ch.native(LIBC.strnlen, (read, "u8"), returns="u8")
        for same in (np.zeros(1, np.longlong), np.zeros(1, np.int_)):
            assert look(same, 8).result() == 0
        with pytest.raises(TypeError, match="expects an array of i8, not of uint64"):
            look(np.zeros(1, np.uint64), 8)
    for code in ("bool", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8", "c8", "c16"):
        look = ch.native(LIBC.strnlen, (ch.In[code], "u8"), returns="u8")
        assert look(np.zeros(2, code), 1).result() == 0


def test_orders(rt_any: ch.Runtime) -> None:
    c, f, neither = np.zeros((3, 3)), np.zeros((3, 3), order="F"), np.zeros((6, 6))[::2, ::2]
    for order, good, bad in [
        ("C", [c], [f, neither]),
        ("F", [f], [c, neither]),
        ("A", [c, f], [neither]),
        ("any", [c, f, neither], []),
    ]:
        look = ch.native(LIBC.strnlen, (ch.In, "u8"), returns="u8", order=order)
        assert [look(array, 1).result() for array in good] == [0] * len(good)
        for wrong in bad:
            with pytest.raises(ValueError, match="contiguous"):
                look(wrong, 1)


def test_arrays_live_until_the_task_is_done_and_no_longer(rt1: ch.Runtime) -> None:
    seen = []
    gate = threading.Event()

    @callback(None, ctypes.POINTER(ctypes.c_double))
    def look(x: Any) -> None:
        assert gate.wait(30)
        seen.append(x[0])

    class Kept(np.ndarray):  # can be referred to weakly, as any array can
        pass

    values = np.full(1, 7.0).view(Kept)
    reference = weakref.ref(values)
    task = ch.native(look, (ch.In,))(values)
    del values
    gc.collect()
    assert reference() is not None
    gate.set()
    task.result()
    eventually(lambda: reference() is None, "the array is freed")
    assert seen == [7.0]


def test_nothing_is_leaked(rt: ch.Runtime) -> None:
    source, target, store = np.arange(4.0), np.zeros(4), bytearray(32)
    before = sys.getrefcount(source), sys.getrefcount(target), sys.getrefcount(store)
    tasks = [copy(target, source, 32) for _ in range(200)]
    tasks += [copy(store, source, 32) for _ in range(200)]
    tasks += [copy(target, ch.spawn(lambda: source), 32) for _ in range(50)]
    ch.gather(tasks).result()
    del tasks
    with pytest.raises(TypeError):
        copy(target, None, 0)
    with pytest.raises(ValueError, match="contiguous"):
        copy(target, source[::2], 0)
    eventually(
        lambda: (
            (sys.getrefcount(source), sys.getrefcount(target), sys.getrefcount(store)) == before
        ),
        "the references are given back",
    )
    store.append(0)  # no buffer is exported any more


def test_a_function_is_kept_and_freed(rt_any: ch.Runtime) -> None:
    class Owner:
        address = ctypes.cast(LIBM.cos, ctypes.c_void_p).value

    owner = Owner()
    reference = weakref.ref(owner)
    function = ch.native(owner, ("f8",), returns="f8")
    anything(owner).cycle = function  # what the collector has to see through
    del owner
    gc.collect()
    assert reference() is not None
    task = function(0.0)
    del function
    assert task.result() == 1.0
    del task
    eventually(lambda: reference() is None, "the owner is freed")


# Failures.


def test_a_return_value_that_is_not_zero(rt_any: ch.Runtime) -> None:
    task = ch.native(LIBC.abs, ("i4",), returns="i4", check="zero")
    assert task(0).result() == 0
    failed = task.options("named")(-5)
    with pytest.raises(ch.NativeError, match="abs failed: it returned 5") as caught:
        failed.result()
    error = caught.value
    assert (error.function, error.code, error.how) == ("abs", 5, "returned")
    assert isinstance(error, ch.CharioteerError) and isinstance(error, RuntimeError)
    with pytest.raises(ch.NativeError):
        task.fn(-5)


def test_errno(rt_any: ch.Runtime) -> None:
    close = ch.native(LIBC.close, ("i4",), returns="i4", check="errno")
    with pytest.raises(ch.NativeError, match="close failed with errno 9: Bad file") as caught:
        close(-1).result()
    assert caught.value.code == errno.EBADF
    # Where no integer is returned, errno itself tells.
    logarithm = ch.native(LIBM.log, ("f8",), returns="f8", check="errno")
    ctypes.set_errno(errno.EIO)
    assert logarithm(1.0).result() == 0.0
    with pytest.raises(ch.NativeError) as caught:
        logarithm(-1.0).result()
    assert caught.value.code == errno.EDOM
    # A null pointer.
    resolve = ch.native(LIBC.realpath, (ch.In, "p"), returns="p", check="errno")
    with pytest.raises(ch.NativeError) as caught:
        resolve(b"/no/such/file\0", None).result()
    assert caught.value.code == errno.ENOENT


def test_unsigned_minus_one(rt_any: ch.Runtime) -> None:
    for code, kind in (("u2", ctypes.c_uint16), ("u8", ctypes.c_uint64)):
        function = callback(kind, kind)(lambda x: x)
        task = ch.native(function, (code,), returns=code, check="errno")
        most = 2 ** (8 * int(code[1])) - 1
        assert task(most - 1).result() == most - 1
        assert isinstance(task(most).exception(), ch.NativeError)


def test_info(rt_any: ch.Runtime) -> None:
    @callback(None, ctypes.c_int, ctypes.POINTER(ctypes.c_int32))
    def fill(value: int, info: Any) -> None:
        assert info[0] == 0
        info[0] = value

    task = ch.native(fill, ("i4", "info"), name="fill")
    assert task(0).result() is None
    for code in (3, -2):
        with pytest.raises(ch.NativeError, match=f"fill failed with info = {code}") as caught:
            task(code).result()
        assert caught.value.code == code


def test_the_runtime_raises_what_nobody_received() -> None:
    task = ch.native(LIBC.abs, ("i4",), returns="i4", check="zero")
    with pytest.raises(ExceptionGroup) as caught:
        with ch.Runtime(workers=1):
            task(4)
    (error,) = caught.value.exceptions
    assert isinstance(error, ch.NativeError) and error.code == 4


def test_wrong_calls(rt_any: ch.Runtime) -> None:
    with pytest.raises(TypeError, match="pow takes 2 arguments, not 3"):
        power(1, 2, 3)
    with pytest.raises(TypeError, match="pow takes no keyword arguments"):
        power(1, y=2)
    with pytest.raises(TypeError, match="pow takes no keyword arguments"):
        power.fn(1, y=2)
    with pytest.raises(TypeError, match="no keyword arguments"):
        power(ch.spawn(no_op), y=2).result()
    with pytest.raises(TypeError, match="pow takes 2 arguments, not 1"):
        power.map([1])


def test_no_runtime() -> None:
    with pytest.raises(ch.NoRuntimeError):
        power(1, 2)


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: ch.native(print), TypeError, "a Python function is a task as it is"),
        (lambda: ch.native(no_op), TypeError, "not a C function: function"),
        (lambda: ch.native(None), TypeError, "not a C function: NoneType"),
        (lambda: ch.native(True), TypeError, "not a C function: bool"),
        (lambda: ch.native(power), TypeError, "a task function already"),
        (lambda: ch.native(power.fn), TypeError, "a task function already"),
        (lambda: ch.native(0), ValueError, "null pointer"),
        (lambda: ch.native(-1), ValueError, "not an address"),
        (lambda: ch.native(ctypes.pythonapi.Py_IncRef), TypeError, "needs the GIL"),
        (lambda: ch.native(ctypes.PYFUNCTYPE(None)(no_op)), TypeError, "needs the GIL"),
        (lambda: ch.native(LIBM.cos, "f8"), TypeError, "a sequence of parameters"),
        (lambda: ch.native(LIBM.cos, ("f8", "f9")), ValueError, "parameter 2: no code 'f9'"),
        (lambda: ch.native(LIBM.cos, ("&p8",)), ValueError, "parameter 1: no code '&p8'"),
        (lambda: ch.native(LIBM.cos, (float,)), TypeError, "parameter 1: a code such as"),
        (lambda: ch.native(LIBM.cos, (ch.In["x"],)), TypeError, "is no dtype"),
        (lambda: ch.native(LIBM.cos, (ch.In["f2"],)), ValueError, "C has no type"),
        (lambda: ch.native(LIBM.cos, ("*c1",)), ValueError, "no dtype of arrays"),
        (lambda: ch.native(LIBM.cos, ("c8",)), ValueError, "passed by reference"),
        (lambda: ch.native(LIBM.cos, returns="f3"), ValueError, "returns has no such code"),
        (lambda: ch.native(LIBM.cos, returns="c8"), ValueError, "cannot be returned"),
        (lambda: ch.native(LIBM.cos, returns=anything(None)), TypeError, "returns is a code"),
        (lambda: ch.native(LIBM.cos, check="zero"), ValueError, 'say which, returns="i4"'),
        (lambda: ch.native(LIBM.cos, check="one"), ValueError, "check is None"),
        (
            lambda: ch.native(LIBM.cos, returns="bool", check="errno"),
            ValueError,
            "no value of bool",
        ),
        (
            lambda: ch.native(LIBM.cos, ("info",), returns="i4", check="zero"),
            ValueError,
            'the parameter "info" is the check',
        ),
        (lambda: ch.native(LIBM.cos, order="K"), ValueError, "order is"),
        (lambda: ch.native(LIBM.cos, name=anything(3)), TypeError, "name is a string"),
        (lambda: ch.native(LIBM.cos, priority=anything("x")), TypeError, "priority is"),
        (
            lambda: ch.native(callback(None, ctypes.c_int)(no_op), ("i4", "i4")),
            ValueError,
            "takes 1 parameters by its own declaration, params has 2",
        ),
    ],
)
def test_wrong_makes(make: Callable[[], object], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        make()


# Without the GIL.


def test_bodies_run_while_another_thread_holds_the_gil(rt2: ch.Runtime) -> None:
    """A body that sleeps ends though the main thread never lets the GIL go."""
    interval = sys.getswitchinterval()
    tasks = [usleep(1000) for _ in range(2)]
    ch.gather(tasks).result()
    sys.setswitchinterval(1000)
    try:
        started = time.perf_counter()
        usleep.map([50_000] * 2).result()
        assert time.perf_counter() - started < 5
    finally:
        sys.setswitchinterval(interval)


def test_bodies_run_side_by_side(rt2: ch.Runtime) -> None:
    """Two bodies that meet in C: neither could end alone."""
    barrier = (ctypes.c_byte * 64)()
    assert LIBC.pthread_barrier_init(barrier, None, 2) == 0
    meet = ch.native(LIBC.pthread_barrier_wait, ("p",), returns="i4")
    assert sorted(meet.map([ctypes.addressof(barrier)] * 2).result()) == [-1, 0]


def test_a_waiting_body_runs_a_native_one_on_its_own_stack(rt1: ch.Runtime) -> None:
    assert ch.spawn(lambda: power(2, 3).result()).result() == 8


def test_the_gateway_counts_detached_calls() -> None:
    with ch.Runtime(workers=0) as runtime:
        before = runtime.stats()["gateway"]["native"]["visits"]
        power.map([1.0] * 10, [1.0] * 10).result()
        assert runtime.stats()["gateway"]["native"]["visits"] == before + 10


def test_workers_do_not_attach_for_native_bodies() -> None:
    with ch.Runtime(workers=2) as runtime:
        before = {name: site["visits"] for name, site in runtime.stats()["gateway"].items()}
        tasks = power.map([2.0] * 200, [3.0] * 200)
        while not tasks.done():  # nobody detaches meanwhile, or attaches
            pass
        after = {name: site["visits"] for name, site in runtime.stats()["gateway"].items()}
    assert {name for name in after if after[name] != before[name]} <= {"stand_back", "drop"}
    assert tasks.result() == [8.0] * 200


def test_callbacks_into_python_find_the_interpreter(rt_any: ch.Runtime) -> None:
    variable = contextvars.ContextVar[int]("variable", default=0)
    seen = []

    def body(x: int) -> int:
        seen.append(variable.get())
        return sum(range(x))

    token = variable.set(5)
    task = ch.native(callback(ctypes.c_int, ctypes.c_int)(body), ("i4",), returns="i4")
    assert task.map(range(20)).result() == [sum(range(x)) for x in range(20)]
    variable.reset(token)
    assert len(seen) == 20


def test_regions_are_ordered_by_their_modes(rt: ch.Runtime) -> None:
    copy = ch.native(LIBC.memcpy, (ch.Out["f8"], ch.In["f8"], "u8"))
    A = ch.zeros((3, 4))
    B = A.tiles((1, 4))
    A[0] = [1.0, 2.0, 3.0, 4.0]
    copy(B[1, 0], B[0, 0], 32)
    A[0] = 0.0
    copy(B[2, 0], B[1, 0], 16)
    copy(ch.unordered(B[1, 0]), np.full(4, 5.0), 0)
    assert A.numpy().tolist() == [[0, 0, 0, 0], [1, 2, 3, 4], [1, 2, 0, 0]]
    with pytest.raises(ValueError, match="C-contiguous"):
        copy(A[:, 0], B[0, 0], 24)
    with pytest.raises(TypeError, match="expects an integer, not Region"):
        copy(B[0, 0], B[1, 0], anything(A[0]))
    with pytest.raises(ch.AccessError, match="overlap"):
        ch.native(LIBC.memmove, (ch.Out["f8"], ch.InOut["f8"], "u8"))(A[0], A[0, 1:], 8)
    assert A.numpy()[0].tolist() == [0, 0, 0, 0]
