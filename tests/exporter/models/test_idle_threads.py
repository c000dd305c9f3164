"""PyTorch works with fewer threads while others work, and with all again when they have ended."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from exporter.models.idle_threads import IdleThreads
from exporter.processes import CpuTimes

pytestmark = pytest.mark.torch

CORES = 4


class Machine:
    """Time passes where it is waited for; others take so many of the cores in it."""

    def __init__(self) -> None:
        self.others = 0.0
        self.looks = 0
        self._now = self._busy = 0.0

    def pass_by(self, seconds: float) -> None:
        self._now += seconds
        self._busy += seconds * self.others

    def clock(self) -> float:
        return self._now

    def times(self) -> CpuTimes:
        self.looks += 1
        return CpuTimes(total=CORES * self._now, busy=self._busy, own=0.0)


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(CORES)
    yield
    torch.set_num_threads(before)


def test_threads_follow_the_idle_cores() -> None:
    import torch

    machine = Machine()
    threads = IdleThreads(machine.clock, machine.pass_by, machine.times)
    found = []
    for others in (3.0, 4.0, 0.0, 1.0):
        machine.others = others
        for _ in range(2):
            threads.fit()
            found.append(torch.get_num_threads())
            machine.pass_by(10)
    assert found == [1, 1, 1, 1, 1, 4, 4, 3]


def test_it_looks_now_and_then() -> None:
    machine = Machine()
    threads = IdleThreads(machine.clock, machine.pass_by, machine.times)
    for _ in range(5):
        threads.fit()
    assert machine.looks == 2
    machine.pass_by(10)
    threads.fit()
    assert machine.looks == 3


def test_where_the_kernel_tells_nothing_all_threads_stay() -> None:
    import torch

    machine = Machine()
    machine.others = 4.0
    IdleThreads(machine.clock, machine.pass_by, lambda: None).fit()
    assert torch.get_num_threads() == CORES
    IdleThreads(machine.clock, machine.pass_by, machine.times).fit()
    assert torch.get_num_threads() == 1


def test_one_thread_stays_one() -> None:
    import torch

    torch.set_num_threads(1)
    machine = Machine()
    threads = IdleThreads(machine.clock, machine.pass_by, machine.times)
    for _ in range(3):
        threads.fit()
        machine.pass_by(10)
    assert torch.get_num_threads() == 1


def test_what_someone_else_has_set_is_the_most_from_then_on() -> None:
    import torch

    machine = Machine()
    threads = IdleThreads(machine.clock, machine.pass_by, machine.times)
    threads.fit()
    assert torch.get_num_threads() == CORES
    torch.set_num_threads(2)
    for others, wanted in ((0.0, 2), (3.0, 1), (0.0, 2)):
        machine.others = others
        machine.pass_by(10)
        threads.fit()
        assert torch.get_num_threads() == wanted
