"""Is a machine what was found, made up or written down, and is every mistake told with its line?"""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from support import anything

import charioteer as ch
from charioteer import cpu, gpu, machine
from charioteer.machine import Gpu, Host, Link, Links, Machine, Node


def test_what_is_found() -> None:
    found = Machine.detect()
    assert found.host.cores == len(os.sched_getaffinity(0))
    assert found.host.memory is not None and found.host.memory >= 2**28
    assert found.gpus == ()
    cores = [core for node in found.host.nodes for core in node.cores]
    assert len(set(cores)) == len(cores)
    assert set(cores) == os.sched_getaffinity(0)  # one node, if Linux tells of none
    assert Machine.from_yaml.__doc__


def test_nodes_are_read_as_linux_lists_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, cores in ((0, "0-2,8\n"), (10, "12-15\n"), (2, "3-7\n")):
        folder = tmp_path / "node" / f"node{number}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cores)
        (folder / "meminfo").write_text(f"Node {number} MemTotal:  {1024 * (number + 1)} kB\n")
    alone = tmp_path / "node" / "node11"  # memory without cores
    alone.mkdir()
    (alone / "cpulist").write_text("\n")
    (alone / "meminfo").write_text("Node 11 MemTotal:  1 kB\n")
    monkeypatch.setattr(machine, "_SYSTEM", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 4, 8, 12, 13})
    assert Machine.detect().host.nodes == (
        Node((0, 1, 2, 8), 2**20),
        Node((4,), 3 * 2**20),
        Node((12, 13), 11 * 2**20),
    )


def test_a_host_of_which_nothing_is_told_is_one_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_SYSTEM", tmp_path / "nowhere")
    found = Machine.detect().host
    assert found.memory is not None
    assert found.nodes == (Node(sorted(os.sched_getaffinity(0)), found.memory),)


def test_what_is_made_up() -> None:
    made = Machine.virtual(gpus=3, memory="2GiB", link="10GB/s", time="virtual", cores=5)
    assert made.host == Host(5)
    assert made.gpus == (Gpu(2**31),) * 3
    assert made.time == "virtual"
    assert made.links.between(cpu(0), gpu(1)) == made.links.between(gpu(2), gpu(0)) == Link(1e10)
    assert made.links.between(gpu(1), gpu(1)) == Links().local
    assert Machine.virtual().gpus == (Gpu("4GiB"),)
    assert Machine.virtual(link=Links(peer=None)).links.between(gpu(0), gpu(1)) is None
    assert Machine.load("virtual:8") == Machine.virtual(gpus=8)
    assert Machine.virtual(gpus=0).gpus == ()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"gpus": -1}, ValueError, "GPUs is between 0 and 65534, not -1"),
        ({"gpus": 1.0}, TypeError, "GPUs is a whole number, not float"),
        ({"memory": 0}, ValueError, "memory is above zero"),
        ({"memory": "lots"}, ValueError, "'lots'"),
        ({"memory": 4e9}, TypeError, "not float"),
        ({"link": "25GB"}, ValueError, "'25GB'"),
        ({"link": 25}, TypeError, "not int"),
        ({"time": "later"}, ValueError, "'real' or 'virtual', not 'later'"),
        ({"cores": 0}, ValueError, "cores is between"),
        ({"link": Links(pairs={(gpu(0), gpu(1)): Link(1)})}, ValueError, r"no gpu\(1\)"),
        ({"link": Links(pairs={(cpu(0), cpu(0)): Link(1)})}, ValueError, "itself"),
        ({"link": Links(pairs={(cpu(1), gpu(0)): Link(1)})}, ValueError, r"no cpu\(1\)"),
    ],
)
def test_what_cannot_be_made_up(arguments: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        Machine.virtual(**arguments)


FILE = """\
charioteer-machine: 1
name: two islands
time: virtual
host:
  cores: 8
  memory: 64GiB
  nodes:
    - {cores: "0-3", memory: 32GiB}
    - {cores: '4-6,7', memory: 32GiB}
gpus:
  - {count: 2, memory: 4GiB}
  - memory: 16GB
    name: big
links:
  host: {bandwidth: 24GB/s, latency: 8us}
  peer: none
  pairs:
    - {from: gpu(0), to: gpu(1), bandwidth: 50GB/s, latency: 1us}
    - {from: host, to: gpu(2), bandwidth: .inf}
"""


def read(folder: Path, text: str) -> Machine:
    path = folder / "machine.yaml"
    path.write_text(text)
    return Machine.load(path)


def test_a_file(tmp_path: Path) -> None:
    found = read(tmp_path, FILE)
    assert found == Machine(
        Host(8, "64GiB", [Node(range(4), "32GiB"), Node(range(4, 8), "32GiB")]),
        [Gpu("4GiB"), Gpu("4GiB"), Gpu("16GB", "big")],
        links=Links(
            host=Link(24e9, 8e-6),
            peer=None,
            pairs={
                (gpu(0), gpu(1)): Link(50e9, 1e-6),
                (cpu(0), gpu(2)): Link(float("inf")),
            },
        ),
        time="virtual",
        name="two islands",
    )
    assert found.links.between(gpu(1), gpu(0)) is None
    assert read(tmp_path, "charioteer-machine: 1\nhost: {cores: 2}\n") == Machine(
        Host(2), name="machine"
    )


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("charioteer-machine: 1\n", "", 1, "'charioteer-machine: 1'"),
        ("machine: 1", "machine: 2", 1, "version is between 1 and 1, not 2"),
        ("time: virtual", "time: later", 3, "'real' or 'virtual', not 'later'"),
        ("name: two islands", "name: 7", 2, "put 7 in quotes"),
        ("name: two islands", "nmae: x", 2, "no 'nmae': it has name, time, host"),
        ("cores: 8", "cores: many", 5, "cores is a whole number, not str"),
        ("cores: 8", "cores: 0", 5, "cores is between 1"),
        ("cores: 8", "cores: [8]", 5, "one value"),
        ("  cores: 8\n", "", 5, "a host needs 'cores'"),
        ("memory: 64GiB", "memory: 64 hedgehogs", 6, "'64 hedgehogs'"),
        ("memory: 64GiB", "cores: 9", 6, "'cores' is there twice"),
        ("4-6,7", "4-x", 9, "numbers such as 0-3,8, not '4-x'"),
        ("4-6,7", "4-6,5", 9, "numbers such as"),
        ("{count: 2, memory: 4GiB}", "{count: 2}", 11, "a GPU needs 'memory'"),
        ("count: 2", "count: -1", 11, "count is between 0"),
        ("count: 2", "count: 65535", 11, "count is between 0 and 65534"),
        ("  - memory: 16GB\n    name: big\n", "  - 7\n", 12, "a GPU has keys"),
        ("memory: 16GB", "memory: 1.5", 12, "not float"),
        ("24GB/s", "24GB", 15, "bandwidth such as '25GB/s', not '24GB'"),
        ("latency: 8us", "latency: soon", 15, "not 'soon'"),
        ("peer: none", "peer: no", 16, "a link has keys"),
        ("to: gpu(1)", "to: gpu(7)", 18, r"no gpu\(7\): it has 3 GPUs"),
        ("to: gpu(1)", "to: cpu", 18, "host or gpu"),
        ("from: host, to: gpu(2)", "from: gpu(0), to: gpu(1)", 19, "already"),
        ("from: host, to: gpu(2)", "from: host, to: host", 19, "itself"),
        ("gpus:\n", "gpus: {}\nx:\n", 11, "no 'x'"),
        ("time: virtual", "time: [", 5, "no YAML"),
    ],
)
def test_what_is_wrong_with_a_file(
    tmp_path: Path, old: str, new: str, line: int, says: str
) -> None:
    assert old in FILE
    with pytest.raises(ch.MachineError, match=says) as info:
        read(tmp_path, FILE.replace(old, new, 1))
    assert f"machine.yaml:{line}: " in str(info.value)
    assert isinstance(info.value, ValueError)


def test_files_that_are_none(tmp_path: Path) -> None:
    for text in ("", "# nothing\n"):
        with pytest.raises(ch.MachineError, match="empty; begin with"):
            read(tmp_path, text)
    for text in ("just words", "- 1\n"):
        with pytest.raises(ch.MachineError, match="a machine has keys"):
            read(tmp_path, text)
    with pytest.raises(ch.MachineError, match="say what the host has"):
        read(tmp_path, "charioteer-machine: 1\n")
    with pytest.raises(ch.MachineError, match="No such file"):
        Machine.load(tmp_path / "absent.yaml")
    with pytest.raises(ch.MachineError, match="Is a directory"):
        Machine.load(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ch.MachineError, match="UTF-8"):
        Machine.load(tmp_path / "binary")
    (tmp_path / "control").write_text("a: \x07")
    with pytest.raises(ch.MachineError, match="no YAML"):
        Machine.load(tmp_path / "control")
    for said in ("virtual:", "virtual:x", "virtual:-1", "virtual:70000"):
        with pytest.raises(ch.MachineError, match="virtual:N"):
            Machine.load(said)


LINKS = st.builds(
    Link,
    st.floats(min_value=1e-3, allow_nan=False),
    st.floats(min_value=0, allow_infinity=False, allow_nan=False),
)
NODES = st.builds(
    Node, st.lists(st.integers(0, 999), min_size=1, unique=True), st.integers(1, 2**50)
)


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    gpus = draw(st.lists(st.builds(Gpu, st.integers(1, 2**50), st.text(max_size=5)), max_size=4))
    ends = [cpu(0), *map(gpu, range(len(gpus)))]
    pairs = st.tuples(st.sampled_from(ends), st.sampled_from(ends)).filter(
        lambda ends: ends != (cpu(0), cpu(0))
    )
    return Machine(
        Host(
            draw(st.integers(1, 256)),
            draw(st.none() | st.integers(1, 2**50)),
            draw(st.lists(NODES, max_size=2)),
        ),
        gpus,
        links=Links(
            draw(LINKS),
            draw(st.none() | LINKS),
            draw(LINKS),
            draw(st.dictionaries(pairs, LINKS, max_size=3)) if gpus else None,
        ),
        time=anything(draw(st.sampled_from(["real", "virtual"]))),
        name=draw(st.text(min_size=1, max_size=8)),
    )


@given(machines())
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, made: Machine) -> None:
    path = tmp_path_factory.mktemp("machines") / "written.yaml"
    text = made.to_yaml(path)
    assert path.read_text(encoding="utf-8") == text
    assert Machine.load(path) == made
    assert copy.copy(made) == pickle.loads(pickle.dumps(made)) == made
    assert hash(copy.deepcopy(made)) == hash(made)


def test_a_machine_does_not_change() -> None:
    with pytest.raises(AttributeError, match="does not change"):
        anything(Machine.virtual()).time = "virtual"
    assert "virtual:2" in repr(Machine.virtual(2))


def test_a_runtime_has_a_machine(rt: ch.Runtime) -> None:
    assert rt.machine == Machine.detect()


def test_a_machine_with_too_many_devices_is_refused_when_it_is_opened() -> None:
    runtime = ch.Runtime(Machine.virtual(gpus=65), workers=1)
    with pytest.raises(ch.MachineError, match="65 GPUs, and a runtime can use 64"):
        runtime.open()
    with ch.Runtime(Machine.virtual(gpus=64), workers=1):

        @ch.spawn(placement=gpu(63))
        def last() -> int:
            return ch.current().device.index or 0

        assert last.result(timeout=60) == 63


def test_a_file_may_say_whose_gpus_they_are(tmp_path: Path) -> None:
    machine = Machine(
        Host(4), [Gpu("80GiB", "NVIDIA H100", "9.0")] * 2, name="server", driver="cuda"
    )
    path = tmp_path / "server.yaml"
    text = machine.to_yaml(path)
    assert "driver: cuda" in text
    assert Machine.from_yaml(path) == machine
    assert Machine.from_yaml(path) != Machine(Host(4), machine.gpus, name="server")
    path.write_text(text.replace("time: real", "time: virtual"))
    with pytest.raises(ch.MachineError, match=r":\d+: time is virtual on virtual GPUs alone"):
        Machine.from_yaml(path)
    path.write_text(text.replace("driver: cuda", "driver: metal"))
    with pytest.raises(ch.MachineError, match=r":\d+: driver is 'virtual' or 'cuda'"):
        Machine.from_yaml(path)
    with pytest.raises(ValueError, match="virtual GPUs alone"):
        Machine(Host(1), driver="cuda", time="virtual")


def test_gpus_that_are_not_there_are_named() -> None:
    there = len(Machine.detect().gpus)
    more = Machine(Host(1), [Gpu("1GiB")] * (there + 1), driver="cuda")
    with pytest.raises(ch.MachineError, match=f"has {there + 1} CUDA devices, .* sees {there}"):
        more.open()
    with pytest.raises(ch.MachineError), ch.Runtime(more):
        pass


def test_links_of_virtual_gpus_are_as_they_are_said() -> None:
    machine = Machine.virtual(gpus=2)
    assert machine.measured() is machine
    with machine.open() as devices, pytest.raises(ch.DeviceError, match="as described"):
        devices.measure(None, 0, 1 << 20)
