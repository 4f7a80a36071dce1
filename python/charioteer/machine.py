"""``Machine``: what a runtime works with, as a value that can be written down.

Protocol. A machine is a *description*: a host with its cores, memory and NUMA nodes, GPUs with
their memory, and the links between memories. :meth:`Machine.detect` finds the one that the process
runs on, :meth:`Machine.virtual` makes one up, and :meth:`Machine.load` reads one from a YAML file,
which :meth:`Machine.to_yaml` writes. It holds no threads, no memory and no device: those exist
while somebody has it open. So machines live at module level, are compared, and serve one runtime
after another.

The GPUs of a description are virtual unless it names their driver: real streams, events and
address spaces of their own, in the memory of the host; links take their time. Those that
:meth:`Machine.detect` finds are the CUDA driver's: as many as ``CUDA_VISIBLE_DEVICES`` leaves, by
the driver's numbers. A device's context, which takes memory there, is made when the first task runs
on it.

**Files.** A file is read as a tree of nodes that know their lines, not as plain data, so that every
mistake is told with the file, the line and what is expected there; keys that are unknown or there
twice are mistakes too. The key ``charioteer-machine`` has the version of the format, which is 1.
"""

from __future__ import annotations

import atexit
import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from charioteer._quantities import (
    read_bandwidth,
    read_bytes,
    read_count,
    read_seconds,
    show_bandwidth,
    show_bytes,
    show_seconds,
)
from charioteer.devices import Device, Value, cpu, gpu
from charioteer.errors import MachineError

if TYPE_CHECKING:
    import yaml

    from charioteer._core import OpenMachine

__all__ = ["Gpu", "Host", "Link", "Links", "Machine", "Node"]

T = TypeVar("T")

FORMAT = 1
"""The version of the YAML format that is written; older ones are read."""

_KEY = "charioteer-machine"
_MEASURED = 64 << 20
"""Bytes of the copies by which links are measured."""
_MOST_GPUS = 65_534
_MOST_CORES = 65_535
_SYSTEM = Path("/sys/devices/system")


class Node(Value):
    """A NUMA node: cores and the memory that is near to them.

    Args:
        cores: the numbers that the system has for them.
        memory: in bytes.
    """

    __match_args__ = ("cores", "memory")
    cores: tuple[int, ...]
    memory: int

    def __init__(self, cores: Iterable[int], memory: int | str) -> None:
        super().__init__(cores=tuple(cores), memory=read_bytes(memory, "a node's memory"))

    def __repr__(self) -> str:
        return f"Node(cores={show_cores(self.cores)!r}, memory={show_bytes(self.memory)!r})"


class Host(Value):
    """The host: its cores over one memory.

    Args:
        cores: how many.
        memory: in bytes, or ``None`` if it is not known.
        nodes: its NUMA nodes, if they are known.
    """

    __match_args__ = ("cores", "memory", "nodes")
    cores: int
    memory: int | None
    nodes: tuple[Node, ...]

    def __init__(
        self, cores: int, memory: int | str | None = None, nodes: Iterable[Node] = ()
    ) -> None:
        super().__init__(
            cores=read_count(cores, "the number of cores", 1, most=_MOST_CORES),
            memory=None if memory is None else _memory(memory, "the host's memory"),
            nodes=tuple(nodes),
        )

    def __repr__(self) -> str:
        return f"Host(cores={self.cores}, memory={self.memory}, nodes={list(self.nodes)})"


class Gpu(Value):
    """A GPU.

    Args:
        memory: in bytes.
        name: what its maker calls it.
        capability: the compute capability of one that is CUDA's, such as ``"9.0"``.
    """

    __match_args__ = ("memory", "name", "capability")
    memory: int
    name: str
    capability: str | None

    def __init__(
        self, memory: int | str, name: str = "virtual GPU", capability: str | None = None
    ) -> None:
        super().__init__(memory=_memory(memory, "a GPU's memory"), name=name, capability=capability)

    def __repr__(self) -> str:
        capability = "" if self.capability is None else f", {self.capability!r}"
        return f"Gpu({show_bytes(self.memory)!r}, {self.name!r}{capability})"


class Link(Value):
    """What bytes go through from one memory to another, in one direction.

    Args:
        bandwidth: bytes a second, or a string such as ``"25GB/s"``; may be infinite.
        latency: what a copy takes beyond its bytes, in seconds, or a string such as ``"8us"``.
    """

    __match_args__ = ("bandwidth", "latency")
    bandwidth: float
    latency: float

    def __init__(self, bandwidth: float | str, latency: float | str = 0) -> None:
        super().__init__(
            bandwidth=read_bandwidth(bandwidth, "a link's bandwidth"),
            latency=read_seconds(latency, "a link's latency"),
        )

    def __repr__(self) -> str:
        return f"Link({show_bandwidth(self.bandwidth)!r}, {show_seconds(self.latency)!r})"


class Links(Value):
    """The links of a machine: what holds as a rule, and pairs that differ.

    What is left out is as in an ordinary server: the host over PCIe 4, GPUs over NVLink, memory of
    a terabyte a second.

    Args:
        host: between the host and each GPU, in each direction.
        peer: between any two GPUs, in each direction; ``None``: they do not reach each other.
        local: within the memory of one GPU.
        pairs: links that differ, each for one direction, by ``(from, to)``; ``ch.cpu(0)`` stands
            for the host.
    """

    __match_args__ = ("host", "peer", "local", "pairs")
    host: Link
    peer: Link | None
    local: Link
    pairs: tuple[tuple[tuple[Device, Device], Link], ...]

    def __init__(
        self,
        host: Link = Link("24GB/s", "8us"),  # noqa: B008 (it does not change)
        peer: Link | None = Link("200GB/s", "3us"),  # noqa: B008
        local: Link = Link("1TB/s", "1us"),  # noqa: B008
        pairs: dict[tuple[Device, Device], Link] | None = None,
    ) -> None:
        super().__init__(host=host, peer=peer, local=local, pairs=tuple((pairs or {}).items()))

    def between(self, source: Device, target: Device) -> Link | None:
        """The link from one memory to another, or ``None`` where there is none."""
        for ends, link in self.pairs:
            if ends == (source, target):
                return link
        if source == target:
            return self.local
        return self.host if cpu in (source.kind, target.kind) else self.peer

    def __repr__(self) -> str:
        return (
            f"Links(host={self.host}, peer={self.peer}, local={self.local},"
            f" pairs={dict(self.pairs)})"
        )


class Machine(Value):
    """The devices of one machine and what lies between them. It does not change.

    ``Machine.detect()``, ``Machine.virtual(gpus=4)`` and ``Machine.load("machine.yaml")`` make one.

    Args:
        host: its host.
        gpus: its GPUs, in the order of their numbers.
        links: the links between memories.
        time: ``"real"``: work and copies take their time; ``"virtual"``: they move a clock of the
            machine's own, which makes programs deterministic.
        name: what people call it.
        driver: whose its GPUs are: ``"virtual"``, or ``"cuda"``, in real time only.

    Raises:
        ValueError: something out of range, or a link of a device that is not there.
    """

    __match_args__ = ("host", "gpus", "links", "time", "name", "driver")
    host: Host
    gpus: tuple[Gpu, ...]
    links: Links
    time: Literal["real", "virtual"]
    name: str
    driver: Literal["virtual", "cuda"]

    def __init__(
        self,
        host: Host,
        gpus: Iterable[Gpu] = (),
        *,
        links: Links | None = None,
        time: Literal["real", "virtual"] = "real",
        name: str = "machine",
        driver: Literal["virtual", "cuda"] = "virtual",
    ) -> None:
        super().__init__(
            host=host,
            gpus=tuple(gpus),
            links=links or Links(),
            time=_time(time),
            name=name,
            driver=_driver(driver),
        )
        if self.driver != "virtual" and self.time != "real":
            raise ValueError("time is virtual on virtual GPUs alone")
        read_count(len(self.gpus), "the number of GPUs", most=_MOST_GPUS)
        for ends, _ in self.links.pairs:
            for end in ends:
                _check_end(end, len(self.gpus))
            if ends == (cpu(0), cpu(0)):
                raise ValueError("the host needs no link to itself")

    @classmethod
    def detect(cls, *, memory: int | str | None = None) -> Self:
        """The machine that the process runs on: the cores that it may use, their memory and NUMA
        nodes (one node, if Linux does not tell of any), and the GPUs of the CUDA driver, if there
        is one.

        The links of GPUs are those of an ordinary server, as far as they reach each other;
        :meth:`measured` has what they are.

        Args:
            memory: the most that a runtime takes of each GPU, in bytes or as ``"8GiB"``, for
                those that share it with others; unless said, all that it has.

        Raises:
            MachineError: there is a CUDA driver, and it cannot be used.
            TypeError: ``memory`` is no size.
            ValueError: it is not positive.
        """
        from charioteer._core import cuda_devices, host_nodes

        limit = None if memory is None else Gpu(memory).memory
        usable = sorted(os.sched_getaffinity(0))
        present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        nodes = host_nodes(_SYSTEM, usable) or [(usable, present)]
        host = Host(len(usable), present, [Node(cores, size) for cores, size in nodes])
        found = cuda_devices()
        if not found:
            return cls(host, name=os.uname().nodename)
        # Of the bytes that the memory moves a copy within it takes two for one.
        links = Links(peer=None, local=Link(min(one[3] for one in found) / 2, "1us"))
        peer = Links().peer
        assert peer is not None
        pairs = {
            (gpu(own), gpu(other)): peer
            for own, (*_, reached) in enumerate(found)
            for other in reached
        }
        return cls(
            host,
            [
                Gpu(size if limit is None else min(size, limit), name, f"{major}.{minor}")
                for name, size, (major, minor), *_ in found
            ],
            links=Links(host=links.host, peer=None, local=links.local, pairs=pairs),
            name=os.uname().nodename,
            driver="cuda",
        )

    def measured(self) -> Self:
        """The same machine with the links that its GPUs have, by copies of 64 MiB between pinned
        memory of the host and each GPU, and between GPUs that reach each other; about a second for
        each GPU. The links of virtual GPUs are what is said.

        Raises:
            MachineError: it has other GPUs than this machine.
            DeviceError: a GPU has no room, or is lost.
        """
        if self.driver == "virtual":
            return self
        pairs: dict[tuple[Device, Device], Link] = {}
        with self.open() as opened:
            for own in map(gpu, range(len(self.gpus))):
                host = cpu(0)
                pairs[host, own] = _measured(opened, None, own.index)
                pairs[own, host] = _measured(opened, own.index, None)
                for peer in map(gpu, range(len(self.gpus))):
                    if peer != own and self.links.between(peer, own) is not None:
                        opened.enable_peer(own.index, peer.index)
                        pairs[peer, own] = _measured(opened, peer.index, own.index)
        links = Links(self.links.host, self.links.peer, self.links.local, pairs)
        return type(self)(self.host, self.gpus, links=links, name=self.name, driver=self.driver)

    @classmethod
    def virtual(
        cls,
        gpus: int = 1,
        memory: int | str = "4GiB",
        link: Link | Links | str | None = None,
        time: Literal["real", "virtual"] = "real",
        cores: int | None = None,
    ) -> Self:
        """A machine with equal virtual GPUs.

        Args:
            gpus: how many.
            memory: what each has, in bytes or as ``"4GiB"``.
            link: what lies between any two memories: a :class:`Link`, or its bandwidth as
                ``"25GB/s"``; all of them as :class:`Links`. Unless said, those of an ordinary
                server.
            time: ``"virtual"``: a clock of the machine's own, which makes programs deterministic.
            cores: cores of the host; unless said, those that the process may use.

        Raises:
            TypeError: something of the wrong type.
            ValueError: something out of range.
        """
        count = read_count(gpus, "the number of GPUs", most=_MOST_GPUS)
        if isinstance(link, str):
            link = Link(link)
        if isinstance(link, Link):
            link = Links(host=link, peer=link)
        elif link is not None and not isinstance(link, Links):
            raise TypeError(f"link is a Link, Links or a bandwidth, not {type(link).__name__}")
        host = Host(len(os.sched_getaffinity(0)) if cores is None else cores)
        return cls(host, [Gpu(memory)] * count, links=link, time=time, name=f"virtual:{count}")

    @classmethod
    def load(cls, said: str | os.PathLike[str]) -> Self:
        """A machine as the command line names it: ``"virtual:8"``, or the path of a YAML file.

        Raises:
            MachineError: the file cannot be read or does not describe a machine; says where, and
                what to write there.
        """
        match = re.fullmatch(r"virtual:(.*)", os.fspath(said))
        if match is None:
            return cls.from_yaml(said)
        try:
            return cls.virtual(gpus=int(match[1]))
        except ValueError:
            raise MachineError(
                f"{said}: say virtual:N with a number of GPUs from 0 to {_MOST_GPUS},"
                " or the path of a YAML file"
            ) from None

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Self:
        """The machine that a YAML file describes.

        Raises:
            MachineError: the file cannot be read or does not describe a machine; says where, and
                what to write there.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise MachineError(f"cannot read {path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise MachineError(f"{path} is no text file in UTF-8") from error
        return cls(**_File(os.fspath(path)).read(text))

    def to_yaml(self, path: str | os.PathLike[str] | None = None) -> str:
        """The description as a YAML document, which :meth:`from_yaml` reads.

        Args:
            path: a file to write it to.

        Raises:
            OSError: the file cannot be written.
        """
        import yaml

        host: dict[str, Any] = {"cores": self.host.cores}
        if self.host.memory is not None:
            host["memory"] = show_bytes(self.host.memory)
        if self.host.nodes:
            host["nodes"] = [
                {"cores": show_cores(node.cores), "memory": show_bytes(node.memory)}
                for node in self.host.nodes
            ]
        links: dict[str, Any] = {
            "host": _show_link(self.links.host),
            "peer": "none" if self.links.peer is None else _show_link(self.links.peer),
            "local": _show_link(self.links.local),
        }
        if self.links.pairs:
            links["pairs"] = [
                {"from": _show_end(source), "to": _show_end(target), **_show_link(link)}
                for (source, target), link in self.links.pairs
            ]
        document: dict[str, Any] = {_KEY: FORMAT, "name": self.name, "time": self.time}
        if self.driver != "virtual":
            document["driver"] = self.driver
        document["host"] = host
        document["gpus"] = [
            {
                "count": count,
                "memory": show_bytes(one.memory),
                "name": one.name,
                **({} if one.capability is None else {"capability": one.capability}),
            }
            for one, count in _runs(self.gpus)
        ]
        document["links"] = links
        text = yaml.safe_dump(document, sort_keys=False)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def shrunk(self, by: int) -> Self:
        """The same machine for data that are ``by`` times smaller.

        Memories and bandwidths are divided by it, latencies stay. So a tile takes as long on a
        link, and as many of them fit, as with one ``by`` times larger on this machine: what is
        simulated in virtual time with large arrays needs small ones only.

        Args:
            by: a whole number, at least 1.

        Raises:
            TypeError: not a whole number.
            ValueError: less than 1, or so large that a GPU has less than a byte left.
        """
        by = read_count(by, "by", 1, most=1 << 40)

        def memory(size: int) -> int:
            if size < by:
                raise ValueError(f"{show_bytes(size)} cannot be shrunk by {by}")
            return size // by

        def link(link: Link) -> Link:
            return Link(link.bandwidth / by, link.latency)

        gpus = [Gpu(memory(one.memory), one.name, one.capability) for one in self.gpus]
        links = Links(
            link(self.links.host),
            None if self.links.peer is None else link(self.links.peer),
            link(self.links.local),
            {ends: link(one) for ends, one in self.links.pairs},
        )
        host = Host(self.host.cores, None if self.host.memory is None else memory(self.host.memory))
        return type(self)(host, gpus, links=links, time=self.time, name=f"{self.name} / {by}")

    def open(self) -> OpenMachine:
        """Makes the devices, for use without a runtime: ``with machine.open() as devices:``.

        Returns:
            The open machine; leaving its block, or collecting it, ends the devices.

        Raises:
            MachineError: the process sees fewer GPUs of the driver than the machine has.
        """
        from charioteer._core import OpenMachine

        opened = OpenMachine(
            self.host.cores,
            self.host.memory,
            [(one.memory, one.name) for one in self.gpus],
            host=_speed(self.links.host),
            peer=None if self.links.peer is None else _speed(self.links.peer),
            local=_speed(self.links.local),
            pairs=[
                (_number(source), _number(target), _speed(link))
                for (source, target), link in self.links.pairs
            ],
            virtual_time=self.time == "virtual",
            cuda=self.driver == "cuda",
        )
        _end_in_time()
        _open.add(opened)
        return opened

    def __repr__(self) -> str:
        gpus = f"{len(self.gpus)} GPU" + ("s" if len(self.gpus) != 1 else "")
        return f"<Machine {self.name!r}: {self.host.cores} cores, {gpus}, {self.time} time>"


# ---- open machines ----------------------------------------------------------------------------

_open: weakref.WeakSet[OpenMachine] = weakref.WeakSet()


@cache
def _end_in_time() -> None:
    """Sees to it, once, that open machines are closed before the interpreter ends."""
    atexit.register(_close_all)


def _close_all() -> None:
    """The interpreter ends: operations in Python must not run any more."""
    from charioteer._core import finish_operations

    for opened in list(_open):
        opened.close()
    finish_operations(1.0)


def _measured(opened: OpenMachine, source: int | None, target: int | None) -> Link:
    """A link, to the digits that a measurement has."""
    bandwidth, latency = opened.measure(source, target, _MEASURED)
    return Link(round(bandwidth, -8), round(latency, 7))


def _speed(link: Link) -> tuple[float, float]:
    return link.bandwidth, link.latency


def _number(device: Device) -> int:
    """Its number among those with memory of their own: the host is the first."""
    return 0 if device.kind == cpu else device.index + 1


# ---- numbers of cores -------------------------------------------------------------------------


def _read_cores(text: str) -> list[int]:
    """Numbers as Linux lists them: ``0-3,8``.

    Raises:
        ValueError: no such list.
    """
    found: list[int] = []
    for part in text.strip().split(",") if text.strip() else ():
        first, dash, last = part.partition("-")
        found += range(int(first), int(last if dash else first) + 1)
    return found


def show_cores(cores: Iterable[int]) -> str:
    """Numbers of cores as Linux lists them: ``0-3,8``."""
    parts: list[list[int]] = []
    for core in cores:
        if parts and core == parts[-1][-1] + 1:
            parts[-1][1:] = [core]
        else:
            parts.append([core])
    return ",".join("-".join(map(str, part)) for part in parts)


# ---- files ------------------------------------------------------------------------------------


class _File:
    """Reads one file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def read(self, text: str) -> dict[str, Any]:
        """The arguments of the machine that the text describes.

        Raises:
            MachineError: it describes none.
        """
        import yaml

        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = 1 if mark is None else mark.line + 1
            raise MachineError(f"{self._path}:{line}: no YAML: {error.problem}") from None
        except yaml.YAMLError as error:
            raise MachineError(f"{self._path}: no YAML: {error}") from None
        if root is None:
            raise MachineError(f"{self._path}:1: empty; begin with '{_KEY}: {FORMAT}'")
        fields = self._fields(
            root, "a machine", ("name", "time", "host", "gpus", "links", "driver", _KEY)
        )
        if _KEY not in fields:
            raise self._wrong(root, f"say which format it has, with '{_KEY}: {FORMAT}'")
        self._value(
            fields[_KEY], lambda said: read_count(said, "the format's version", 1, most=FORMAT)
        )
        if "host" not in fields:
            raise self._wrong(root, "say what the host has, as in 'host: {cores: 8}'")
        gpus = self._gpus(fields["gpus"]) if "gpus" in fields else []
        found: dict[str, Any] = {"host": self._host(fields["host"]), "gpus": gpus}
        if "links" in fields:
            found["links"] = self._links(fields["links"], len(gpus))
        if "time" in fields:
            found["time"] = self._value(fields["time"], _time)
        if "driver" in fields:
            found["driver"] = self._value(fields["driver"], _driver)
            if found["driver"] != "virtual" and found.get("time") == "virtual":
                raise self._wrong(fields["driver"], "time is virtual on virtual GPUs alone")
        name = fields.get("name")
        found["name"] = Path(self._path).stem if name is None else self._value(name, _text)
        return found

    def _host(self, node: yaml.Node) -> Host:
        fields = self._fields(node, "a host", ("cores", "memory", "nodes"), needed=("cores",))
        nodes = []
        for item in self._items(fields["nodes"], "nodes") if "nodes" in fields else ():
            parts = self._fields(item, "a NUMA node", ("cores", "memory"), ("cores", "memory"))
            nodes.append(
                Node(
                    self._value(parts["cores"], _cores),
                    self._value(parts["memory"], lambda said: _memory(said, "memory")),
                )
            )
        memory = None
        if "memory" in fields:
            memory = self._value(fields["memory"], lambda said: _memory(said, "memory"))
        cores = self._value(
            fields["cores"], lambda said: read_count(said, "cores", 1, most=_MOST_CORES)
        )
        return Host(cores, memory, nodes)

    def _gpus(self, node: yaml.Node) -> list[Gpu]:
        gpus: list[Gpu] = []
        for item in self._items(node, "gpus"):
            fields = self._fields(
                item, "a GPU", ("count", "memory", "name", "capability"), ("memory",)
            )
            memory = self._value(fields["memory"], lambda said: _memory(said, "memory"))
            named = {
                name: self._value(fields[name], _text)
                for name in ("name", "capability")
                if name in fields
            }
            room = _MOST_GPUS - len(gpus)
            count = 1
            if "count" in fields:
                count = self._value(fields["count"], partial(read_count, what="count", most=room))
            gpus += [Gpu(memory, **named)] * count
        return gpus

    def _links(self, node: yaml.Node, gpus: int) -> Links:
        import yaml

        fields = self._fields(node, "links", ("host", "peer", "local", "pairs"))
        found: dict[str, Any] = {}
        for name in ("host", "peer", "local"):
            if name not in fields:
                continue
            said = fields[name]
            none = isinstance(said, yaml.ScalarNode) and said.value == "none"
            found[name] = None if none and name == "peer" else self._link(said)
        pairs: dict[tuple[Device, Device], Link] = {}
        for item in self._items(fields["pairs"], "pairs") if "pairs" in fields else ():
            names = ("from", "to", "bandwidth", "latency")
            parts = self._fields(item, "a pair", names, ("from", "to", "bandwidth"))
            ends = tuple(self._value(parts[end], _end(gpus)) for end in ("from", "to"))
            if ends == (cpu(0), cpu(0)):
                raise self._wrong(item, "the host needs no link to itself: remove it")
            if ends in pairs:
                raise self._wrong(item, "there is a link from and to these already: keep one")
            pairs[ends[0], ends[1]] = self._parts_of_link(parts)
        return Links(**found, pairs=pairs)

    def _link(self, node: yaml.Node) -> Link:
        return self._parts_of_link(
            self._fields(node, "a link", ("bandwidth", "latency"), ("bandwidth",))
        )

    def _parts_of_link(self, fields: dict[str, yaml.Node]) -> Link:
        bandwidth = self._value(fields["bandwidth"], lambda said: read_bandwidth(said, "bandwidth"))
        latency = 0.0
        if "latency" in fields:
            latency = self._value(fields["latency"], lambda said: read_seconds(said, "latency"))
        return Link(bandwidth, latency)

    def _fields(
        self, node: yaml.Node, what: str, known: tuple[str, ...], needed: tuple[str, ...] = ()
    ) -> dict[str, yaml.Node]:
        """The values of a mapping by their keys."""
        import yaml

        if not isinstance(node, yaml.MappingNode):
            raise self._wrong(node, f"{what} has keys ({', '.join(known)}): write 'key: value'")
        found: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value not in known:
                said = repr(key.value) if isinstance(key, yaml.ScalarNode) else "this key"
                raise self._wrong(key, f"{what} has no {said}: it has {', '.join(known)}")
            if key.value in found:
                raise self._wrong(key, f"{key.value!r} is there twice: keep one")
            found[key.value] = value
        for name in needed:
            if name not in found:
                raise self._wrong(node, f"{what} needs {name!r}: add it")
        return found

    def _items(self, node: yaml.Node, what: str) -> list[yaml.Node]:
        import yaml

        if not isinstance(node, yaml.SequenceNode):
            raise self._wrong(node, f"{what} is a list: begin each item with '-'")
        return list(node.value)

    def _value(self, node: yaml.Node, read: Callable[[Any], T]) -> T:
        import yaml

        if not isinstance(node, yaml.ScalarNode):
            raise self._wrong(node, "one value is expected here, no list and no keys")
        value = yaml.constructor.SafeConstructor().construct_object(node)
        try:
            return read(value)
        except (TypeError, ValueError) as error:
            raise self._wrong(node, str(error)) from None

    def _wrong(self, node: yaml.Node, what: str) -> MachineError:
        return MachineError(f"{self._path}:{node.start_mark.line + 1}: {what}")


def _runs(gpus: Iterable[Gpu]) -> Iterator[tuple[Gpu, int]]:
    """Equal GPUs one after the other, and how many."""
    last: Gpu | None = None
    count = 0
    for one in gpus:
        if last is not None and one != last:
            yield last, count
            count = 0
        last, count = one, count + 1
    if last is not None:
        yield last, count


def _memory(said: int | str, what: str) -> int:
    size = read_bytes(said, what)
    if size == 0:
        raise ValueError(f"{what} is above zero")
    return size


def _time(said: Any) -> Literal["real", "virtual"]:
    if said == "real":
        return "real"
    if said == "virtual":
        return "virtual"
    raise ValueError(f"time is 'real' or 'virtual', not {said!r}")


def _driver(said: Any) -> Literal["virtual", "cuda"]:
    if said == "virtual":
        return "virtual"
    if said == "cuda":
        return "cuda"
    raise ValueError(f"driver is 'virtual' or 'cuda', not {said!r}")


def _text(said: object) -> str:
    if not isinstance(said, str):
        raise TypeError(f"a name is text: put {said!r} in quotes")
    return said


def _cores(said: object) -> list[int]:
    wrong = f"the cores of a node are numbers such as 0-3,8, not {said!r}"
    try:
        cores = _read_cores(str(said))
    except ValueError:
        raise ValueError(wrong) from None
    if not cores or len(set(cores)) != len(cores) or max(cores) > _MOST_CORES:
        raise ValueError(wrong)
    return cores


def _end(gpus: int) -> Callable[[Any], Device]:
    """Reads a device of a machine with so many GPUs."""

    def read(said: Any) -> Device:
        if said == "host":
            return cpu(0)
        match = re.fullmatch(r"gpu\((\d+)\)", str(said))
        if match is None:
            raise ValueError(f"a device is written host or gpu(0), not {said!r}")
        device = gpu(int(match[1]))
        _check_end(device, gpus)
        return device

    return read


def _check_end(device: Device, gpus: int) -> None:
    if device != cpu(0) and (device.kind != gpu or device.index >= gpus):
        raise ValueError(f"the machine has no {device}: it has {gpus} GPUs")


def _show_end(device: Device) -> str:
    return "host" if device.kind == cpu else repr(device)


def _show_link(link: Link) -> dict[str, Any]:
    return {"bandwidth": show_bandwidth(link.bandwidth), "latency": show_seconds(link.latency)}
