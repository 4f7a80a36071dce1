"""The command line, as a user meets it: in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import charioteer as ch

pytestmark = pytest.mark.surface

Result = subprocess.CompletedProcess[str]
Script = Callable[[str], str]

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without settings of the runtime, with changes."""
    plain = {
        name: value
        for name, value in os.environ.items()
        if name not in {"CHARIOTEER_MACHINE", "CHARIOTEER_WORKERS", "CHARIOTEER_TRACE"}
    }
    return plain | {"COLUMNS": "200"} | changes


def charioteer(*arguments: str, **changes: str) -> Result:
    """Run the command line and return what became of it."""
    return subprocess.run(
        [sys.executable, "-m", "charioteer", *arguments],
        capture_output=True,
        check=False,
        env=environment(**changes),
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=50,
    )


def assert_usage_error(done: Result, *words: str) -> None:
    """The command ended with one line of explanation that has these words."""
    assert done.returncode == EXIT_USAGE, done
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "error: " in last
    for word in words:
        assert word in last


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Writes a script and returns its path."""

    def write(source: str) -> str:
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(source))
        return str(path)

    return write


# The program itself


def test_version() -> None:
    done = charioteer("--version")
    assert done.returncode == 0
    assert done.stdout == f"charioteer {ch.__version__}\n"


def test_without_a_command_it_shows_its_help() -> None:
    done = charioteer()
    assert done.returncode == 0
    for command in ("info", "run", "demo", "bench"):
        assert re.search(rf"^    {command}\b", done.stdout, re.MULTILINE)


def test_unknown_command() -> None:
    assert_usage_error(charioteer("gallop"), "gallop")


def test_demo_gets_its_own_options() -> None:
    done = charioteer("demo", "--help")
    assert done.returncode == 0
    assert "--size" in done.stdout


def test_importing_the_package_imports_neither_command_line_nor_benchmarks() -> None:
    code = "import sys, charioteer; print([m for m in sys.modules if m.startswith('charioteer.')])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True, timeout=50
    )
    assert "charioteer._core" in done.stdout
    for part in ("charioteer.cli", "charioteer.bench", "charioteer.demo"):
        assert part not in done.stdout


# info


def test_info_tells_what_a_runtime_would_use() -> None:
    done = charioteer("info", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["version"] == ch.__version__
    assert facts["python"]["executable"] == sys.executable
    assert facts["python"]["gil"] is getattr(sys, "_is_gil_enabled", lambda: True)()
    assert facts["machine"]["host"]["cores"] == len(os.sched_getaffinity(0))
    assert facts["machine"]["gpus"] == []
    [cpu] = facts["devices"]
    assert cpu["kind"] == "cpu"
    assert cpu["usable_cores"] == len(os.sched_getaffinity(0))
    assert facts["workers"] >= 1
    assert any(pool["use"] == "blas" for pool in facts["blas"])


def test_info_as_a_table() -> None:
    done = charioteer("info")
    assert done.returncode == 0, done.stderr
    assert ch.__version__ in done.stdout
    assert f"cpu x {len(os.sched_getaffinity(0))}" in done.stdout
    assert re.search(r"^workers +\d+ *$", done.stdout, re.MULTILINE)


def test_info_takes_the_workers_of_the_environment() -> None:
    facts = json.loads(charioteer("info", "--json", CHARIOTEER_WORKERS="3").stdout)
    assert facts["workers"] == 3
    # A perturbation run has a variable of its own.
    assert facts["environment"].items() >= {"CHARIOTEER_WORKERS": "3"}.items()
    assert "3 (set by CHARIOTEER_WORKERS)" in charioteer("info", CHARIOTEER_WORKERS="3").stdout
    assert "inline" in charioteer("info", CHARIOTEER_WORKERS="0").stdout


def test_info_says_whether_workers_are_pinned_and_shows_nodes() -> None:
    shown = charioteer("info", CHARIOTEER_WORKERS="2", CHARIOTEER_PIN="spread").stdout
    assert "2, pinned to cores (spread)" in shown
    assert "NUMA node 0: cores" in shown
    inline = charioteer("info", CHARIOTEER_WORKERS="0", CHARIOTEER_PIN="spread").stdout
    assert "pinned" not in inline
    assert_usage_error(charioteer("info", CHARIOTEER_PIN="loose"), "'loose'")


@pytest.mark.parametrize("value", ["many", "-1", "1.5"])
def test_info_names_a_bad_setting(value: str) -> None:
    assert_usage_error(charioteer("info", CHARIOTEER_WORKERS=value), "CHARIOTEER_WORKERS")


def test_a_reader_that_goes_away_gets_no_traceback() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "charioteer", "info"],
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(50) == EXIT_FAILED


# run


def test_run_opens_a_runtime_at_the_first_spawn(script: Script) -> None:
    path = script(
        """
        import charioteer as ch

        @ch.task
        def double(x):
            return 2 * x

        print(double(double(21 // 2)).result())
        """
    )
    done = charioteer("run", path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "40\n", "")


def test_run_waits_for_every_task_after_the_last_line(script: Script) -> None:
    path = script(
        """
        import pickle
        import sys
        import time
        import charioteer as ch

        class Thing:
            pass

        @ch.spawn
        def late():
            time.sleep(0.3)
            # Needs the script to be the module __main__ still.
            print(type(pickle.loads(pickle.dumps(Thing()))).__name__, flush=True)

        print("end of script", flush=True)
        sys.exit(0)
        """
    )
    done = charioteer("run", path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end of script\nThing\n", "")


def test_run_looks_like_the_interpreter_to_the_script(script: Script, tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("word = 'beside'\n")
    path = script(
        """
        import sys
        import neighbour
        print(__name__, __file__ == sys.argv[0], sys.argv[1:], neighbour.word)
        print(sys.modules["__main__"].__dict__ is globals())
        """
    )
    done = charioteer("run", "--workers", "1", path, "--", "-x", "--workers", "7", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "__main__ True ['--', '-x', '--workers', '7', '--help'] beside",
        "True",
    ]


def test_run_leaves_a_script_its_own_runtime(script: Script) -> None:
    path = script(
        """
        import charioteer as ch
        for workers in (None, 2):
            with ch.Runtime(workers=workers) as runtime:
                print(runtime.workers, runtime.submit(int).result())
        """
    )
    assert charioteer("run", "--workers", "3", path).stdout == "3 0\n2 0\n"
    assert charioteer("run", "--workers=0", path).stdout == "0 0\n2 0\n"


def test_run_passes_workers_to_the_runtime_it_opens(script: Script) -> None:
    path = script(
        """
        import threading
        import charioteer as ch
        print(ch.spawn(threading.get_ident).result() == threading.get_ident())
        """
    )
    assert charioteer("run", "--workers", "0", path).stdout == "True\n"
    assert charioteer("run", "--workers", "1", path).stdout == "False\n"


def test_run_opens_one_runtime_for_threads_that_spawn_at_once(script: Script) -> None:
    path = script(
        """
        import threading
        import charioteer as ch

        start = threading.Barrier(8)
        results = []

        def spawn(index):
            start.wait()
            results.append(ch.spawn(lambda: index).result())

        threads = [threading.Thread(target=spawn, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(sorted(results))
        """
    )
    done = charioteer("run", path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{list(range(8))}\n", "")


def test_run_opens_a_runtime_under_asyncio(script: Script) -> None:
    path = script(
        """
        import asyncio
        import charioteer as ch

        async def main():
            return await ch.spawn(lambda: 42)

        print(asyncio.run(main()))
        """
    )
    done = charioteer("run", path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "42\n", "")


def test_run_reports_a_task_whose_failure_nobody_received(script: Script) -> None:
    path = script(
        """
        import charioteer as ch

        @ch.spawn
        def unlucky():
            raise ValueError("thirteen")

        print("went on")
        """
    )
    done = charioteer("run", path)
    assert done.returncode == EXIT_FAILED
    assert done.stdout == "went on\n"
    assert "ValueError: thirteen" in done.stderr
    assert "in unlucky" in done.stderr


def test_run_shows_an_exception_as_the_interpreter_does(script: Script) -> None:
    path = script(
        """
        import charioteer as ch
        ch.spawn(int).result()
        def fail():
            raise KeyError("lost")
        fail()
        """
    )
    done = charioteer("run", path)
    plain = subprocess.run(
        [sys.executable, "-c", f"exec(compile(open({path!r}).read(), {path!r}, 'exec'))"],
        capture_output=True,
        check=False,
        text=True,
        timeout=50,
    )
    assert done.returncode == EXIT_FAILED
    assert "NoRuntimeError" in plain.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1] == f'  File "{path}", line 6, in <module>'
    assert lines[-1] == "KeyError: 'lost'"


def test_run_cancels_what_is_pending_when_the_script_fails(script: Script) -> None:
    path = script(
        """
        import time
        import charioteer as ch

        space = ch.TaskSpace("steps")
        ch.spawn(space[0])(lambda: time.sleep(0.2))
        ch.spawn(space[1], dependencies=[space[0]])(lambda: print("too late"))
        raise SystemExit("gave up")
        """
    )
    done = charioteer("run", "--workers", "1", path)
    assert (done.returncode, done.stdout) == (EXIT_FAILED, "")
    assert done.stderr == "gave up\n"


@pytest.mark.parametrize(("status", "code"), [("3", 3), ("None", 0), ("0", 0), ("'words'", 1)])
def test_run_hands_on_the_exit_status(script: Script, status: str, code: int) -> None:
    assert charioteer("run", script(f"raise SystemExit({status})")).returncode == code


def test_run_shows_a_syntax_error_without_its_own_frames(script: Script) -> None:
    done = charioteer("run", script("x = = 1\n"))
    assert done.returncode == EXIT_FAILED
    assert done.stderr.splitlines()[-1] == "SyntaxError: invalid syntax"
    assert "Traceback" not in done.stderr


def test_run_ends_at_an_interrupt(script: Script) -> None:
    path = script(
        """
        import signal
        import time
        import charioteer as ch

        signal.signal(signal.SIGINT, signal.default_int_handler)

        @ch.spawn
        def patient():
            context = ch.current()
            print("ready", flush=True)
            while not context.cancel_requested:
                time.sleep(0.005)
            print("asked", flush=True)

        time.sleep(30)
        """
    )
    with subprocess.Popen(
        [sys.executable, "-m", "charioteer", "run", path],
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=50)
    assert process.returncode == EXIT_INTERRUPTED
    assert stdout == "asked\n"
    assert stderr.splitlines()[-1].startswith("KeyboardInterrupt")


def test_run_prints_the_counters_of_every_runtime(script: Script) -> None:
    path = script(
        """
        import charioteer as ch
        for _ in range(2):
            with ch.Runtime():
                ch.spawn(int).result()
        ch.spawn(int).result()
        """
    )
    done = charioteer("run", "--stats", path)
    assert (done.returncode, done.stdout) == (0, "")
    for number in (1, 2, 3):
        assert f"runtime {number} of 3" in done.stderr
    idle = charioteer("run", "--stats", script("pass"))
    assert "opened no runtime" in idle.stderr


def test_run_writes_a_trace(script: Script, tmp_path: Path) -> None:
    spawning = "import charioteer as ch\nch.spawn(int).result()\n"
    own = "import charioteer as ch\nwith ch.Runtime():\n    ch.spawn(int).result()\n"
    for source in (spawning, own):
        trace = tmp_path / "events.trace"
        done = charioteer("run", "--trace", str(trace), script(source))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert trace.stat().st_size > 0
        trace.unlink()


def test_run_explains_wrong_usage(script: Script, tmp_path: Path) -> None:
    path = script("print('must not run')")
    assert_usage_error(charioteer("run"), "SCRIPT")
    assert_usage_error(charioteer("run", "absent.py"), "absent.py", "No such file")
    assert_usage_error(charioteer("run", str(tmp_path)), "directory")
    assert_usage_error(charioteer("run", "--workers", "two", path), "'two'")
    assert_usage_error(charioteer("run", "--workers", "-1", path), "0 or more")
    assert_usage_error(charioteer("run", "--trace", str(tmp_path), path), "directory")
    assert_usage_error(charioteer("run", "--trace", "/nowhere/t", path), "does not exist")
    assert_usage_error(charioteer("run", "--gallop", path), "--gallop")


MACHINE = """
charioteer-machine: 1
time: virtual
host: {cores: 3, nodes: [{cores: 0-2, memory: 1GiB}]}
gpus: [{count: 2, memory: 2GiB, name: small}]
links:
  peer: none
  pairs: [{from: host, to: gpu(1), bandwidth: 1GB/s}]
"""


def test_info_shows_a_machine(tmp_path: Path) -> None:
    path = tmp_path / "islands.yaml"
    path.write_text(MACHINE)
    done = charioteer("info", "--json", "--machine", str(path))
    machine = json.loads(done.stdout)["machine"]
    # Virtual time passes while nothing else runs.
    assert json.loads(done.stdout)["workers"] == 0
    assert (machine["name"], machine["time"]) == ("islands", "virtual")
    assert machine["gpus"] == [{"name": "small", "memory": 2**31, "capability": None}] * 2
    assert machine["links"]["peer"] is None
    pair = {"from": "cpu(0)", "to": "gpu(1)", "bandwidth": 1e9, "latency": 0.0}
    assert machine["links"]["pairs"] == [pair]
    shown = charioteer("info", "--machine", str(path)).stdout
    for line in (
        "islands, in virtual time",
        "NUMA node 0: cores 0-2, 1 GiB",
        "gpu(1): small, 2 GiB",
        "GPU and GPU: none",
        "host to gpu(1): 1GB/s, 0.0 latency",
    ):
        assert line in shown
    assert "gpu(7): virtual GPU, 4 GiB" in charioteer("info", "--machine", "virtual:8").stdout


def test_info_explains_what_is_no_machine(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("charioteer-machine: 1\nhost: {cores: none}\n")
    assert_usage_error(charioteer("info", "--machine", str(path)), "bad.yaml:2:", "cores")
    assert_usage_error(charioteer("info", "--machine", "virtual:x"), "virtual:N")
    assert_usage_error(charioteer("info", "--machine", "/nowhere.yaml"), "No such file")
    assert_usage_error(charioteer("info", CHARIOTEER_MACHINE="virtual:-1"), "virtual:N")


def test_run_names_the_machine_of_runtimes_that_name_none(script: Script, tmp_path: Path) -> None:
    (tmp_path / "islands.yaml").write_text(MACHINE)
    path = script(
        """
        import os
        import charioteer as ch
        os.chdir("/")
        with ch.Runtime() as rt:
            print(rt.machine.name, len(rt.machine.gpus), rt.workers)
        print(ch.spawn(lambda: len(ch.current().devices)).result())
        """
    )
    done = charioteer("run", "--machine", str(tmp_path / "islands.yaml"), path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "islands 2 0\n1\n", "")
    (tmp_path / "islands.yaml").write_text(MACHINE.replace("time: virtual", "time: real"))
    done = charioteer("run", "--machine", str(tmp_path / "islands.yaml"), path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "islands 2 3\n1\n", "")
    done = charioteer("run", "--workers", "1", "--machine", "virtual:5", path)
    assert done.stdout == "virtual:5 5 1\n1\n"
    assert_usage_error(charioteer("run", "--machine", "virtual:", path), "virtual:N")


PINNED = """
import os
import charioteer as ch
print(len(ch.task(os.sched_getaffinity)(0).result()))
"""


def test_run_pins_workers(script: Script) -> None:
    path = script(PINNED)
    done = charioteer("run", "--pin", "compact", path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
    done = charioteer("run", "--workers", "2", "--pin", "none", path)
    assert done.stdout == f"{len(os.sched_getaffinity(0))}\n"
    assert_usage_error(
        charioteer("run", "--pin", "loose", path), "'loose'", "none, compact, spread"
    )


CHOOSES = """
import charioteer as ch
body = ch.task(lambda: ch.current().stream.busy(1e-3), placement=[ch.gpu * 2, ch.gpu])
print([body().result() for _ in range(10)].count(None))
"""


def test_run_keeps_what_it_learns_and_info_shows_it(script: Script, tmp_path: Path) -> None:
    path, models = script(CHOOSES), tmp_path / "models.json"
    assert "No run times are known." in charioteer("info", "--models", str(models)).stdout
    run = ("run", "--machine", "virtual:2", "--policy", "round-robin", "--models", str(models))
    done = charioteer(*run, path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "10\n", "")
    known = json.loads(charioteer("info", "--json", "--models", str(models)).stdout)["models"]
    assert {model["choice"] for model in known} == {"gpu", "gpu*2"}
    assert sum(model["calls"] for model in known) == 10
    shown = charioteer("info", "--models", str(models)).stdout
    assert "<lambda>" in shown
    assert "gpu*2" in shown
    assert " ms" in shown

    assert_usage_error(charioteer("run", "--policy", "best", path), "'best'", "round-robin")
    models.write_text("{")
    for command in (("info",), ("run", path)):
        done = charioteer(command[0], "--models", str(models), *command[1:])
        assert_usage_error(done, "models.json", "no performance models")
    missing = str(tmp_path / "missing" / "models.json")
    assert_usage_error(charioteer("run", "--models", missing, path), "No such file")


# bench


def test_bench_explains_wrong_usage(tmp_path: Path) -> None:
    overhead = ("bench", "overhead")
    assert_usage_error(charioteer("bench"), "BENCHMARK")
    assert_usage_error(charioteer(*overhead, "--only", "tasks,gallop"), "'gallop'", "latency")
    assert_usage_error(charioteer(*overhead, "--peers", "pony"), "'pony'", "threadpool")
    assert_usage_error(charioteer(*overhead, "--runs", "0"), "--runs", "1 or more")
    assert_usage_error(charioteer(*overhead, "--tasks", "x"), "--tasks", "'x'")
    assert_usage_error(charioteer(*overhead, "--json", str(tmp_path)), "directory")
    assert_usage_error(charioteer(*overhead, "--json", "/nowhere/f.json"), "does not exist")
    assert_usage_error(charioteer(*overhead, "--other-python", "/nowhere/python"), "/nowhere")
    assert_usage_error(charioteer(*overhead, "--other-python", sys.executable), "both")


def test_bench_overhead_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "overhead.json"
    done = charioteer(
        *("bench", "overhead", "--quick", "--runs", "2", "--tasks", "200", "--json", str(path)),
        *("--only", "tasks,latency,start,import", "--peers", "threadpool"),
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d+ of \d+ bars met", done.stdout)
    assert "needs charioteer and Ray" in done.stdout
    assert done.stderr == ""
    entries = json.loads(path.read_text())
    assert f"{len(entries)} records in {path}" in done.stdout
    measured = {entry["runtime"] for entry in entries if entry["runs"]}
    assert measured == {"charioteer", "ThreadPoolExecutor", "NumPy"}


def test_bench_multi_device_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "devices.json"
    done = charioteer("bench", "multi-device", "--quick", "--tasks", "100", "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert "needs Ray, an actor a device" in done.stdout
    assert done.stderr == ""
    measured = [entry for entry in json.loads(path.read_text()) if entry["unit"] == "µs"]
    assert {entry["params"]["devices"] for entry in measured} == {1, 2, 4, 8}
    assert all(entry["runs"] == 2 and entry["median"] > 0 for entry in measured)
    assert_usage_error(charioteer("bench", "multi-device", "--peers", "pony"), "ray-actors")


def test_bench_metg_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "metg.json"
    done = charioteer(
        *(
            "bench",
            "metg",
            "--runs",
            "1",
            "--seconds",
            "0.001",
            "--workers",
            "1",
            "--peers",
            "none",
        ),
        *("--patterns", "stencil", "--json", str(path), "--report", str(tmp_path / "page.html")),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "page.html").read_text().count("<svg") == 1
    measured = {
        (entry["runtime"], entry["metric"]): entry["median"]
        for entry in json.loads(path.read_text())
        if entry["unit"] == "µs" and "," not in entry["metric"]
    }
    runtimes = ("charioteer", "charioteer, native bodies", "charioteer in Rust")
    levels = ("METG(50%)", "METG(90%)")
    assert set(measured) == {(name, level) for name in runtimes for level in levels}
    for name in runtimes:
        assert 0.2 < measured[name, "METG(50%)"] <= measured[name, "METG(90%)"] <= 16_000
    for wrong, word in (("--patterns=star", "stencil"), ("--peers=pony", "dask")):
        assert_usage_error(charioteer("bench", "metg", wrong), word)
    assert_usage_error(charioteer("bench", "metg", "--seconds=0"), "--seconds")


def test_bench_policies_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "policies.json"
    done = charioteer(
        *("bench", "policies", "--runs", "2", "--only", "stencil", "--json", str(path))
    )
    assert done.returncode == 0, done.stderr
    assert "list schedule" in done.stdout
    assert done.stderr == ""
    entries = json.loads(path.read_text())
    policies = {entry["params"].get("policy") for entry in entries}
    assert policies > {"eft", "locality", "load", "random", "round-robin", "in Python"}
    assert all(entry["runs"] == 2 and entry["median"] > 0 for entry in entries)
    assert_usage_error(charioteer("bench", "policies", "--only", "gallop"), "'gallop'", "mix")


def test_bench_overhead_can_be_a_check() -> None:
    short = ("bench", "overhead", "--quick", "--runs", "1", "--only", "free-threading")
    assert charioteer(*short).returncode == 0
    done = charioteer(*short, "--check")
    assert done.returncode == EXIT_FAILED
    assert "not measured" in done.stdout
