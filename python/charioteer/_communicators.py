"""Collective operations among the GPUs of a set: NCCL's on GPUs of the CUDA driver, and the same on
virtual ones.

Protocol. A *clique* is NCCL's communicators for one ordered set of GPUs, made together when the
first body asks, and kept until the runtime closes. A body gets a :class:`Communicator`, which is a
clique with the streams of its task. One thread works for all members, so each operation is a group:
``ncclGroupStart``, a call a member, ``ncclGroupEnd``. NCCL is that of the process, which CuPy or
PyTorch brought, or one beside them.

No two operations block each other. The kernel of an operation waits on its GPU for those of its
peers, so that of two which share GPUs each could hold what the other one waits for. The ledger
keeps apart tasks that take their GPUs whole, and lets others run at once. So

1. groups are issued one after the other, under one lock of the process; no code of the program runs
   under it. So there is one order of all groups.
2. On each GPU a group's stream first waits for the group that was issued there last, by an event
   that was recorded behind that, unless it is on the same stream. So the order on each GPU is part
   of that one order.

Take the first group that is not complete. On its streams are, before it, waits and kernels that
were issued earlier. A wait is for an event that was recorded before the wait was issued, and a
kernel waits for its stream only; so by induction on the time of issue all that the group stands
behind was issued before it, and none of that is a group that is not complete. That also holds of
work behind which the hardware puts it, since streams that share a channel are served in the order
of issue. So its kernels begin on all its GPUs, and it ends. Connections that NCCL makes in a group
wait for nothing but that.

A runtime that closes has no work left, and gives its communicators back. Those of a GPU that is
lost are aborted when it is, so that kernels of its peers, which would wait for it for ever, end:
under the lock, so that nobody uses them any more, and each on a thread of its own, since NCCL may
wait for the kernel of one before that of another is told to end.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from charioteer import _core
from charioteer.errors import CommunicatorError, DeviceError, DeviceLostError

if TYPE_CHECKING:
    import ctypes

    from charioteer.devices import Device

__all__ = ["Communicator", "Communicators", "communicator"]

_Arrays = Sequence[Any]

_OPERATIONS = {"sum": 0, "prod": 1, "max": 2, "min": 3}
_TYPES = {
    "int8": 0,
    "uint8": 1,
    "int32": 2,
    "uint32": 3,
    "int64": 4,
    "uint64": 5,
    "float16": 6,
    "float32": 7,
    "float64": 8,
    "bfloat16": 9,
}


class _Buffer(NamedTuple):
    """An array as an operation sees it."""

    address: int
    elements: int
    dtype: str
    device: int | None
    """Of a GPU, if the array says so."""
    is_contiguous: bool
    is_writable: bool


class Communicator:
    """Collective operations among the GPUs of a task, in the order of its set:
    ``ctx.communicator``.

    Operations are enqueued on the task's streams, and take a list or a tuple with one array for
    each GPU, in order and on it: of CuPy, PyTorch or anything with a ``__cuda_array_interface__``,
    and on virtual GPUs of ``charioteer.virtual``. Arrays are C-contiguous, of one type of elements:
    integers of 8, 32 and 64 bits and floating-point numbers. It is for the body that asked for it
    alone.

    Methods raise ``TypeError`` and ``ValueError`` for arrays that do not fit, ``RuntimeError``
    outside of the body, and :class:`charioteer.CommunicatorError` for what NCCL refuses.
    """

    def __init__(self, context: Any, devices: tuple[Device, ...], places: tuple[int, ...]) -> None:
        self._context = context
        self._devices = devices
        self._places = places

    @property
    def devices(self) -> tuple[Device, ...]:
        """Its GPUs, in the order of the set."""
        return self._devices

    @property
    def size(self) -> int:
        """How many GPUs."""
        return len(self._devices)

    def all_reduce(self, send: _Arrays, receive: _Arrays | None = None, op: str = "sum") -> None:
        """Gives each GPU the sum of all arrays, element by element.

        Args:
            send: the arrays.
            receive: where the sums go, of the same sizes; in place unless said.
            op: ``"sum"``, ``"prod"``, ``"min"`` or ``"max"``.
        """
        number = _operation(op)
        sent = self._read("send", send)
        target = send if receive is None else receive
        got = self._read("receive", target, written=True)
        count = _same("send and receive", [*sent, *got])
        self._enqueue("AllReduce", sent, got, (count, _type(sent[0]), number), send, target)

    def reduce(self, send: _Arrays, receive: Any = None, root: int = 0, op: str = "sum") -> None:
        """Gives one GPU the sum of all arrays, element by element.

        Args:
            send: the arrays.
            receive: the array on the root where the sum goes; in place unless said.
            root: the place of that GPU in the set.
            op: ``"sum"``, ``"prod"``, ``"min"`` or ``"max"``.
        """
        number = _operation(op)
        root = self._root(root)
        sent = self._read("send", send)
        target = list(send)
        if receive is not None:
            target[root] = receive
        got = list(sent)
        got[root] = self._read_one("receive", target[root], root, written=True)
        count = _same("send and receive", [*sent, got[root]])
        self._enqueue("Reduce", sent, got, (count, _type(sent[0]), number, root), send, target)

    def broadcast(self, arrays: _Arrays, root: int = 0) -> None:
        """Copies the array of one GPU into those of all others.

        Args:
            arrays: the arrays, of one size.
            root: the place of that GPU in the set.
        """
        root = self._root(root)
        read = self._read("arrays", arrays, written=True)
        count = _same("arrays", read)
        self._enqueue("Broadcast", read, read, (count, _type(read[0]), root), arrays, arrays)

    def all_gather(self, send: _Arrays, receive: _Arrays) -> None:
        """Gives each GPU all arrays, one behind the other in the order of the set.

        Args:
            send: the arrays, of one size.
            receive: where they go, each as large as all of them.
        """
        sent = self._read("send", send)
        got = self._read("receive", receive, written=True)
        count = _same("send", sent)
        if _same("receive", got) != count * self.size or got[0].dtype != sent[0].dtype:
            raise ValueError(
                f"receive has {self.size} times the elements of send, of its type: not"
                f" {got[0].elements} of {got[0].dtype} for {count} of {sent[0].dtype}"
            )
        self._enqueue("AllGather", sent, got, (count, _type(sent[0])), send, receive)

    def reduce_scatter(self, send: _Arrays, receive: _Arrays, op: str = "sum") -> None:
        """Sums all arrays, element by element, and gives each GPU its part of the sum.

        Args:
            send: the arrays, of one size.
            receive: where the parts go, in the order of the set, all of one size.
            op: ``"sum"``, ``"prod"``, ``"min"`` or ``"max"``.
        """
        number = _operation(op)
        sent = self._read("send", send)
        got = self._read("receive", receive, written=True)
        count = _same("receive", got)
        if _same("send", sent) != count * self.size or got[0].dtype != sent[0].dtype:
            raise ValueError(
                f"send has {self.size} times the elements of receive, of its type: not"
                f" {sent[0].elements} of {sent[0].dtype} for {count} of {got[0].dtype}"
            )
        self._enqueue("ReduceScatter", sent, got, (count, _type(sent[0]), number), send, receive)

    def __repr__(self) -> str:
        return f"<communicator of {', '.join(map(repr, self._devices))}>"

    # ---- what is given ------------------------------------------------------------------------

    def _root(self, root: int) -> int:
        if isinstance(root, bool) or not isinstance(root, int):
            raise TypeError(f"root is a place in the set, not {type(root).__name__}")
        if not 0 <= root < self.size:
            raise ValueError(f"root is a place in a set of {self.size}, not {root}")
        return root

    def _read(self, what: str, arrays: _Arrays, *, written: bool = False) -> list[_Buffer]:
        if not isinstance(arrays, (list, tuple)):
            raise TypeError(
                f"{what} is a list or a tuple with an array for each GPU, not"
                f" {type(arrays).__name__}"
            )
        if len(arrays) != self.size:
            raise ValueError(f"{what} has {len(arrays)} arrays, for {self.size} GPUs")
        return [
            self._read_one(what, array, place, written=written)
            for place, array in enumerate(arrays)
        ]

    def _read_one(self, what: str, array: Any, place: int, *, written: bool) -> _Buffer:
        read = self._buffer(array)
        if read is None:
            raise TypeError(f"{what}: {type(array).__name__} is no array on a GPU")
        device = self._devices[place]
        if read.device is not None and read.device != device.index:
            raise ValueError(f"{what}: the array at {place} is on gpu({read.device}), not {device}")
        if not read.is_contiguous:
            raise ValueError(f"{what}: the array at {place} is not C-contiguous")
        if written and not read.is_writable:
            raise ValueError(f"{what}: the array at {place} is read-only")
        return read

    def _check_task(self) -> None:
        """Its streams are the task's, and somebody else's after it."""
        try:
            running = _core.current_context().task
        except RuntimeError:
            running = None
        if running != self._context.task:
            raise RuntimeError(
                f"the communicator is for the body of {self._context.task!r} that asked for it"
            )

    def _enqueue(
        self,
        name: str,
        sent: list[_Buffer],
        got: list[_Buffer],
        words: tuple[int, ...],
        send: _Arrays,
        receive: _Arrays,
    ) -> None:
        """Carries an operation out, unless there are no elements.

        Args:
            name: as NCCL has it.
            sent: what each member sends.
            got: where each member gets something.
            words: what its call has behind the addresses, elements first.
            send: the arrays of ``sent``.
            receive: those of ``got``.
        """
        self._check_task()
        if words[0]:
            self._carry_out(name, sent, got, words, send, receive)

    # ---- what differs -------------------------------------------------------------------------

    def _buffer(self, array: Any) -> _Buffer | None:
        raise NotImplementedError

    def _carry_out(
        self,
        name: str,
        sent: list[_Buffer],
        got: list[_Buffer],
        words: tuple[int, ...],
        send: _Arrays,
        receive: _Arrays,
    ) -> None:
        raise NotImplementedError


def _operation(op: str) -> int:
    number = _OPERATIONS.get(op)
    if number is None:
        raise ValueError(f'op is "sum", "prod", "min" or "max", not {op!r}')
    return number


def _type(buffer: _Buffer) -> int:
    number = _TYPES.get(buffer.dtype)
    if number is None:
        raise TypeError(f"arrays of {buffer.dtype} have no collective operations")
    return number


def _same(what: str, buffers: list[_Buffer]) -> int:
    """How many elements each has, of the one type that all have."""
    first = buffers[0]
    for one in buffers:
        if (one.elements, one.dtype) != (first.elements, first.dtype):
            raise ValueError(
                f"{what} have one size and one type: not {first.elements} elements of {first.dtype}"
                f" beside {one.elements} of {one.dtype}"
            )
    return first.elements


# ---- NCCL ---------------------------------------------------------------------------------------

_issuing = threading.Lock()


class _Clique:
    """NCCL's communicators of an ordered set of GPUs."""

    def __init__(self, nccl: Any, devices: tuple[int, ...]) -> None:
        import ctypes

        self.nccl = nccl
        self.devices = devices
        handles = (ctypes.c_void_p * len(devices))()
        numbers = (ctypes.c_int * len(devices))(*devices)
        _check(nccl, nccl.ncclCommInitAll(handles, len(devices), numbers))
        self.handles = tuple(handles)
        self.lost: int | None = None
        """The GPU for which it was aborted."""

    def abort(self, device: int) -> None:
        """Ends what is under way, since a GPU is lost."""
        self.lost = device
        for handle in self.handles:
            # Nobody waits for them: what they wait for may be gone.
            name = "charioteer-nccl"
            threading.Thread(
                target=self.nccl.ncclCommAbort, args=(handle,), name=name, daemon=True
            ).start()

    def destroy(self) -> None:
        """Nothing is enqueued on it, and nothing will be."""
        for handle in self.handles:
            # Whatever it answers, there is nobody who could do anything about it.
            self.nccl.ncclCommDestroy(handle)


class Communicators:
    """Those of a runtime.

    Args:
        when_lost: has a function called when the GPU with that number is lost.
        load: gives NCCL.
    """

    def __init__(
        self,
        when_lost: Callable[[int, Callable[[], object]], object],
        load: Callable[[], Any] | None = None,
    ) -> None:
        self._when_lost = when_lost
        self._load = load or _library
        self._watched: set[int] = set()
        self._cliques: dict[tuple[int, ...], _Clique] = {}
        self._last: dict[int, tuple[Any, Any]] = {}
        """The stream and the event of the group that was issued last, by GPU."""

    def clique(self, devices: tuple[int, ...]) -> _Clique:
        """Makes it with the first call.

        Raises:
            CommunicatorError: there is no NCCL, or it refuses.
        """
        known = self._cliques.get(devices)
        if known is not None:
            return known
        # As an operation: it waits for what is on the GPUs, perhaps.
        with _issuing:
            known = self._cliques.get(devices)
            if known is None:
                known = self._cliques[devices] = _Clique(self._load(), devices)
            for device in devices:
                if device not in self._watched:
                    self._watched.add(device)
                    self._when_lost(device, functools.partial(self._abort, device))
        return known

    def _abort(self, device: int) -> None:
        with _issuing:
            for clique in self._cliques.values():
                if device in clique.devices and clique.lost is None:
                    clique.abort(device)

    def issue(
        self,
        clique: _Clique,
        streams: Sequence[Any],
        name: str,
        calls: Sequence[tuple[int, ...]],
    ) -> None:
        """Enqueues one operation: the words before the communicator and the stream, for each
        member."""
        nccl = clique.nccl
        function = getattr(nccl, f"nccl{name}")
        with _issuing:
            if clique.lost is not None:
                raise DeviceLostError(f"gpu({clique.lost})", "its communicators were aborted")
            for device, stream in zip(clique.devices, streams, strict=True):
                before = self._last.get(device)
                if before is not None and before[0] != stream:
                    stream.wait(before[1])
            _check(nccl, nccl.ncclGroupStart())
            said = 0
            try:
                for words, handle, stream in zip(calls, clique.handles, streams, strict=True):
                    said = said or function(*words, handle, stream.handle)
            finally:
                ended = nccl.ncclGroupEnd()
            for device, stream in zip(clique.devices, streams, strict=True):
                self._last[device] = (stream, stream.record())
            # The end repeats what a member said.
            _check(nccl, ended or said)

    def close(self) -> None:
        """Gives the communicators back: all that was enqueued is done."""
        with _issuing:
            cliques, self._cliques = self._cliques, {}
            for clique in cliques.values():
                if clique.lost is not None:
                    continue
                lost = [device for device in clique.devices if self._is_lost(device)]
                if lost:
                    clique.abort(lost[0])  # nobody came to tell yet
                else:
                    clique.destroy()

    def _is_lost(self, device: int) -> bool:
        known = self._last.get(device)
        try:
            return known is not None and not known[1].is_complete()
        except DeviceError:
            return True


class _OnCuda(Communicator):
    def __init__(
        self,
        context: Any,
        devices: tuple[Device, ...],
        places: tuple[int, ...],
        communicators: Communicators,
    ) -> None:
        super().__init__(context, devices, places)
        self._communicators = communicators
        self._clique = communicators.clique(tuple(device.index for device in devices))
        self._streams = context.streams

    def _buffer(self, array: Any) -> _Buffer | None:
        torch: Any = sys.modules.get("torch")
        if torch is not None and _is_tensor(torch, array):
            if not array.is_cuda:
                return None
            name = str(array.dtype).removeprefix("torch.")
            contiguous = array.is_contiguous()
            return _Buffer(
                array.data_ptr(), array.numel(), name, array.device.index, contiguous, True
            )
        interface = getattr(array, "__cuda_array_interface__", None)
        if interface is None:
            return None
        import numpy as np

        shape, dtype = interface["shape"], np.dtype(interface["typestr"])
        address, read_only = interface["data"]
        contiguous = _is_contiguous(shape, interface.get("strides"), dtype.itemsize)
        device = getattr(array, "device", None)
        # CuPy has objects for them.
        number = getattr(device, "id", device)
        return _Buffer(
            address or 0,
            math.prod(shape),
            dtype.name,
            number if isinstance(number, int) else None,
            contiguous,
            not read_only,
        )

    def _carry_out(
        self,
        name: str,
        sent: list[_Buffer],
        got: list[_Buffer],
        words: tuple[int, ...],
        send: _Arrays,
        receive: _Arrays,
    ) -> None:
        calls = [(a.address, b.address, *words) for a, b in zip(sent, got, strict=True)]
        self._communicators.issue(self._clique, self._streams, name, calls)


def _is_tensor(torch: Any, array: Any) -> bool:
    # While PyTorch is imported by another thread it may have no tensors yet.
    return isinstance(array, getattr(torch, "Tensor", ()))


def _is_contiguous(shape: Sequence[int], strides: Sequence[int] | None, item: int) -> bool:
    if strides is None or 0 in shape:
        return True
    expected = item
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent != 1 and stride != expected:
            return False
        expected *= extent
    return True


def _check(nccl: Any, said: int) -> None:
    if said:
        text: bytes = nccl.ncclGetErrorString(said)
        raise CommunicatorError(f"NCCL: {text.decode(errors='replace')}")


@functools.cache
def _library() -> ctypes.CDLL:
    """NCCL, with the types of its functions.

    Raises:
        CommunicatorError: it is not there.
    """
    import ctypes

    for path in _candidates():
        try:
            nccl = ctypes.CDLL(path)
            _declare(nccl)
        except (OSError, AttributeError):
            continue
        return nccl
    raise CommunicatorError(
        "NCCL is not found: import CuPy or PyTorch with it, or install the package nvidia-nccl-cu13"
        " or nvidia-nccl-cu12"
    )


def _candidates() -> Iterator[str]:
    import ctypes

    # What the process has already is what its other libraries use.
    try:
        ctypes.CDLL(_NAME, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        pass
    else:
        yield _NAME
    for folder in sys.path:
        yield os.path.join(folder, "nvidia", "nccl", "lib", _NAME)
    yield _NAME
    for variable in ("NCCL_HOME", "CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            yield os.path.join(home, "lib", _NAME)
            yield os.path.join(home, "lib64", _NAME)


_NAME = "libnccl.so.2"


def _declare(nccl: Any) -> None:
    from ctypes import POINTER, c_char_p, c_int, c_size_t, c_void_p

    memory, count, kind, operation, root, last = (
        *([c_void_p, c_void_p], c_size_t, c_int, c_int, c_int),
        [c_void_p, c_void_p],
    )
    types = {
        "CommInitAll": [POINTER(c_void_p), c_int, POINTER(c_int)],
        "CommDestroy": [c_void_p],
        "CommAbort": [c_void_p],
        "GroupStart": [],
        "GroupEnd": [],
        "AllReduce": [*memory, count, kind, operation, *last],
        "Reduce": [*memory, count, kind, operation, root, *last],
        "Broadcast": [*memory, count, kind, root, *last],
        "AllGather": [*memory, count, kind, *last],
        "ReduceScatter": [*memory, count, kind, operation, *last],
        "GetErrorString": [c_int],
    }
    for name, arguments in types.items():
        function = getattr(nccl, f"nccl{name}")
        function.argtypes = arguments
        function.restype = c_int
    nccl.ncclGetErrorString.restype = c_char_p


# ---- virtual GPUs -------------------------------------------------------------------------------


class _OnVirtual(Communicator):
    """Each GPU fetches what it needs over its links, and combines it in the order of the set."""

    def _buffer(self, array: Any) -> _Buffer | None:
        from charioteer import virtual

        if not isinstance(array, virtual.ndarray):
            return None
        contiguous = _is_contiguous(array.shape, array.strides, array.dtype.itemsize)
        return _Buffer(
            0, array.size, array.dtype.name, array.device.index, contiguous, array._writable
        )

    def _carry_out(
        self,
        name: str,
        sent: list[_Buffer],
        got: list[_Buffer],
        words: tuple[int, ...],
        send: _Arrays,
        receive: _Arrays,
    ) -> None:
        context = self._context
        before = context.make_current(self._places[0])
        try:
            context.barrier()
            made = []
            for place, at in enumerate(self._places):
                context.make_current(at)
                made.append(self._made(name, words, place, send))
            # Nobody overwrites what another one has still to fetch.
            context.barrier()
            for at, array, target in zip(self._places, made, receive, strict=True):
                if array is not None:
                    context.make_current(at)
                    target[...] = array.reshape(target.shape)
        finally:
            context.make_current(before)

    def _made(self, name: str, words: tuple[int, ...], place: int, send: _Arrays) -> Any:
        """What the member gets, on its GPU, flat; ``None`` for nothing."""
        from charioteer import virtual

        count = words[0]

        def fetched(array: Any) -> Any:
            here = virtual.empty(array.shape, array.dtype)
            here[...] = array
            return here.reshape(-1)

        match name:
            case "Broadcast":
                return None if place == words[2] else fetched(send[words[2]])
            case "Reduce" if place != words[3]:
                return None
            case "AllGather":
                gathered = virtual.empty(count * self.size, send[0].dtype)
                for at, array in enumerate(send):
                    gathered[at * count : (at + 1) * count] = fetched(array)
                return gathered
        total = fetched(send[0])
        for array in send[1:]:
            total = _combine(words[2])(total, fetched(array))
        return total[place * count : (place + 1) * count] if name == "ReduceScatter" else total


def _combine(operation: int) -> Any:
    import numpy as np

    return (np.add, np.multiply, np.maximum, np.minimum)[operation]


# ---- who asks -----------------------------------------------------------------------------------


def communicator(context: Any, is_virtual: bool) -> Communicator:
    """That of a running task with GPUs.

    Raises:
        CommunicatorError: there is no NCCL, or it refuses.
    """
    members = [
        (at, device) for at, device in enumerate(context.devices) if device.kind.name == "gpu"
    ]
    places = tuple(at for at, _ in members)
    devices = tuple(device for _, device in members)
    if is_virtual:
        return _OnVirtual(context, devices, places)
    return _OnCuda(context, devices, places, _of_the_runtime())


_making = threading.Lock()


def _of_the_runtime() -> Communicators:
    from charioteer import _runtime

    # A task runs, so there is one.
    runtime = _runtime._opened
    assert runtime is not None
    with _making:
        if runtime._communicators is None:
            assert runtime.devices is not None
            runtime._communicators = Communicators(runtime.devices.when_lost)
        return runtime._communicators
