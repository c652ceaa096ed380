"""Run a command and follow it with all its descendants: CPU seconds and memory, moment by moment.

Linux only: reads /proc. Knows nothing of what the command does.

CPU time is exact but for the last tick of a sampling interval. We become the subreaper, so that no
daemon escapes: a descendant whose parent ends becomes our child, and the kernel tells us its time
when we reap it. A process's time passes to the parent that waits for it; where the parent ignores
SIGCHLD the kernel drops it, and there the last sample counts (Ray's raylet may do so to workers).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_GRACE_S = 10.0
_IGNORES_CHILDREN = 1 << (signal.SIGCHLD - 1)


@dataclass(frozen=True)
class Sample:
    """`at` is Unix time; `cpu_s` is all that was used so far; `printed` counts bytes of output."""

    at: float
    cpu_s: float
    printed: int


@dataclass(frozen=True)
class Usage:
    """What a command used. Memory is summed over its processes, in bytes, at its peak.

    `peak_rss` counts pages of mapped files too, `peak_anonymous` only what is private to the
    processes. `output` is the command's standard output.
    """

    returncode: int
    cpu_s: float
    wall_s: float
    peak_rss: int
    peak_anonymous: int
    output: bytes
    errors: str
    samples: Sequence[Sample]

    def cpu_at(self, moment: float) -> float:
        """CPU seconds used until a Unix time, interpolated between samples."""
        index = bisect_left(self.samples, moment, key=lambda sample: sample.at)
        if index == 0 or index == len(self.samples):
            return self.samples[min(index, len(self.samples) - 1)].cpu_s
        before, after = self.samples[index - 1], self.samples[index]
        share = (moment - before.at) / (after.at - before.at)
        return before.cpu_s + share * (after.cpu_s - before.cpu_s)

    def cpu_when_printed(self, offset: int) -> float:
        """CPU seconds used when the byte at `offset` of the output was first seen to be there."""
        return next(sample.cpu_s for sample in self.samples if sample.printed > offset)


def measure(
    command: Sequence[str],
    scratch: Path,
    environment: Mapping[str, str],
    *,
    interval_s: float = 0.05,
) -> Usage:
    """Run `command` in the folder `scratch` to its end, descendants included.

    What is left of them ten seconds after the command itself ended is killed, and everything if
    we are interrupted or terminated.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1):
        raise OSError("the kernel cannot make us a subreaper")
    started = time.time()
    with open(scratch / "stdout", "wb") as output, open(scratch / "stderr", "wb") as errors:
        root = subprocess.Popen(
            command, cwd=scratch, env=environment, stdin=subprocess.DEVNULL,
            stdout=output, stderr=errors,
        )  # fmt: skip
    tree = _Tree(root, scratch / "stdout")
    try:
        _follow(tree, interval_s)
    finally:
        tree.kill()
    return Usage(
        returncode=root.returncode,
        cpu_s=tree.samples[-1].cpu_s,
        wall_s=tree.ended - started,
        peak_rss=tree.peak_rss,
        peak_anonymous=tree.peak_anonymous,
        output=(scratch / "stdout").read_bytes(),
        errors=(scratch / "stderr").read_text(errors="replace"),
        samples=tree.samples,
    )


def _follow(tree: _Tree, interval_s: float) -> None:
    while tree.sample():
        over = tree.root.returncode is not None
        if over and time.time() - tree.ended > _GRACE_S:
            return
        time.sleep(interval_s)


@dataclass(frozen=True)
class _Process:
    """`cpu_s` includes the time of children that were waited for."""

    pid: int
    started: int
    parent: int
    zombie: bool
    cpu_s: float
    ignores_children: bool
    rss: int
    anonymous: int


@dataclass
class _Tree:
    root: subprocess.Popen[bytes]
    stdout: Path
    samples: list[Sample] = field(default_factory=list)
    ended: float = 0.0
    peak_rss: int = 0
    peak_anonymous: int = 0
    reaped_s: float = 0.0
    lost_s: float = 0.0
    live: dict[tuple[int, int], _Process] = field(default_factory=dict)

    def sample(self) -> bool:
        """Look once; whether anything is left."""
        before, self.live = self.live, _descendants()
        ignoring = {p.pid for p in before.values() if p.ignores_children}
        for key in before.keys() - self.live.keys():
            if before[key].parent in ignoring:
                self.lost_s += before[key].cpu_s
        self._reap()
        processes = self.live.values()
        self.peak_rss = max(self.peak_rss, sum(p.rss for p in processes))
        self.peak_anonymous = max(self.peak_anonymous, sum(p.anonymous for p in processes))
        cpu_s = self.reaped_s + self.lost_s + sum(p.cpu_s for p in processes)
        self.samples.append(Sample(time.time(), cpu_s, self.stdout.stat().st_size))
        return bool(self.live)

    def _reap(self) -> None:
        for key, process in list(self.live.items()):
            if process.zombie and process.parent == os.getpid():
                _, status, usage = os.wait4(process.pid, 0)
                self.reaped_s += usage.ru_utime + usage.ru_stime
                del self.live[key]
                if process.pid == self.root.pid:
                    self.root.returncode = os.waitstatus_to_exitcode(status)
                    self.ended = time.time()

    def kill(self) -> None:
        """End whatever is left, parents before children until there are none."""
        while self.sample():
            for process in self.live.values():
                if not process.zombie:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.01)


def _descendants() -> dict[tuple[int, int], _Process]:
    """Every process below us, by its number and start."""
    stats = {
        int(entry): s for entry in os.listdir("/proc") if entry.isdigit() and (s := _stat(entry))
    }
    below = {os.getpid()}
    while more := {pid for pid, fields in stats.items() if int(fields[1]) in below} - below:
        below |= more
    processes = [_process(pid, stats[pid]) for pid in below - {os.getpid()}]
    return {(p.pid, p.started): p for p in processes}


def _stat(entry: str) -> list[str]:
    """The fields of /proc/PID/stat after the name, which may hold anything; none if it is gone."""
    return _contents(f"/proc/{entry}/stat").rpartition(")")[2].split()


def _process(pid: int, fields: list[str]) -> _Process:
    status = _contents(f"/proc/{pid}/status")
    lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    return _Process(
        pid=pid,
        started=int(fields[19]),
        parent=int(fields[1]),
        zombie=fields[0] == "Z",
        cpu_s=sum(map(int, fields[11:15])) * _TICK_S,
        ignores_children=bool(int(lines.get("SigIgn", "0"), 16) & _IGNORES_CHILDREN),
        rss=_bytes(lines.get("VmRSS")),
        anonymous=_bytes(lines.get("RssAnon")),
    )


def _contents(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _bytes(value: str | None) -> int:
    return 0 if value is None else int(value.split()[0]) * 1024
