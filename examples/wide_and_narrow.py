"""Wide and narrow tasks in one queue, on a clock of the machine's own.

Tasks that hold one, two, four or all eight GPUs come in random order, and nobody knows how long
they take. Give every free GPU to whoever wants one, and the wide tasks starve. Keep GPUs free until
the next wide task fits, and they idle. The runtime promises that no task is overtaken by more than
a bound, and within it keeps the devices busy.

    pip install charioteer
    python examples/wide_and_narrow.py
    python examples/wide_and_narrow.py --tasks 20000 --seed 7

The machine is virtual and so is its time: hours of eight GPUs pass in a second, and every run with
the same seed comes to the same figures. The script tells how much of the devices' time was used and
how late tasks of each width were: the time when one was complete, against the time when all work
spawned up to and with it could have been. It exits with 1 if the devices were idle for more than a
fifth of the time, or if wide tasks came more than a tenth of the whole run later than narrow ones.
"""

import argparse
import collections
import random
import statistics
import sys
from collections.abc import Sequence

import charioteer as ch

GPUS = 8
WIDTHS = (1, 2, 4, 8)
SECOND = 1e9
"""The clock counts nanoseconds."""


def work(seconds: float) -> None:
    """Keeps all devices of the task busy for so long."""
    context = ch.current()
    for _ in context.each():
        context.stream.busy(seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the mix, and tell how well the devices were used."""
    parser = argparse.ArgumentParser(description="tasks over 1, 2, 4 or 8 of 8 devices")
    parser.add_argument("--tasks", type=int, default=2_000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the random order and lengths")
    options = parser.parse_args(arguments)

    chance = random.Random(options.seed)
    mix = [(chance.choice(WIDTHS), chance.expovariate(1.0)) for _ in range(options.tasks)]
    functions = {width: ch.task(work, placement=ch.gpu * width) for width in WIDTHS}
    late: dict[int, list[float]] = collections.defaultdict(list)
    spawned = 0.0  # seconds of devices
    tasks: list[ch.Task[None]] = []

    # Without workers everything happens in the order of the clock.
    with ch.Runtime(ch.Machine.virtual(gpus=GPUS, time="virtual"), workers=0) as runtime:
        machine = runtime.devices
        assert machine is not None
        clock = machine.clock
        for width, seconds in mix:
            spawned += width * seconds

            def done(_: ch.Task[None], width: int = width, ideal: float = spawned / GPUS) -> None:
                late[width].append(clock.now / SECOND - ideal)

            tasks.append(functions[width](seconds))
            tasks[-1].add_done_callback(done)
        ch.wait(tasks)
        makespan = clock.now / SECOND

    used = spawned / (GPUS * makespan)
    print(
        f"{len(tasks)} tasks, {spawned / 3600:.1f} hours of GPUs, done after"
        f" {makespan / 3600:.2f} hours: {used:.1%} of the devices' time was used"
    )
    print("width  tasks  late by (s): median    most")
    for width in WIDTHS:
        print(
            f"{width:5}  {len(late[width]):5}  {statistics.median(late[width]):19.1f}"
            f"  {max(late[width]):6.1f}"
        )
    behind = max(late[max(WIDTHS)]) - max(late[min(WIDTHS)])
    return 0 if used >= 0.8 and behind <= 0.1 * makespan else 1


if __name__ == "__main__":
    sys.exit(main())
