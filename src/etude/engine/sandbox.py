"""Execution of programs that nobody has read: in a process of their own, with as little as the system lets us take away.

What protects, and from what (`etude.engine.confine` is the inner side):

- **Namespaces** (Linux, where user namespaces are permitted): a network of its own without any way out; a process namespace, in which no other process can be seen or
  signalled, and all of which ends with its first process; every mount read-only and without devices, the working folder a small file system in memory, /proc empty.
  This is what keeps files as they are: without it nothing does, for the program runs as the user who started Étude.
- **A filter of system calls** (seccomp; Linux on x86-64 and aarch64): no sockets, which covers those with a path in the file system too; no new processes and no other programs,
  whoever the user is (RLIMIT_NPROC does not hold root); no signals to others; no mounts, namespaces, tracing.  Threads are allowed.
- **Limits**: wall-clock time (the process group is killed), processor time, address space, size and number of files, processes, output.  All systems have these; they protect from accidents alone.
- All capabilities are dropped, the environment is empty, Python runs isolated (-I -S) without site packages.

What does not protect: the program may *read* every file that the user may read (it has no way to send it anywhere, except into its output); the kernel is shared, so that a hole in it
is a hole in the sandbox; and the processor's caches are shared.  For programs by somebody who means harm take a virtual machine.

Nothing runs if the network or the files are not protected, unless the caller allows that.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any, Literal

from etude.engine import confine
from etude.values.errors import InputError

STARTING = 30.0
"""Seconds within which the inner side must have confined itself."""
ALWAYS = {"files": 256, "open_files": 64, "processes": 64}
"""Files and folders that the working folder holds; open ones; processes and threads."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.  Defaults: 3 seconds as in OpenAI's human-eval (execution.py, ``timeout``); the others are ours."""

    seconds: float = 3.0
    """Wall-clock time; processor time may be up to two seconds more, for all threads together."""
    memory_bytes: int = 512 << 20
    """Address space."""
    file_bytes: int = 16 << 20
    """One file, and where there are namespaces the working folder as a whole."""
    output_bytes: int = 64 << 10
    """Standard output and standard error together."""

    def __post_init__(self) -> None:
        if not (0 < self.seconds < math.inf and self.memory_bytes >= 64 << 20 and self.file_bytes >= 1 and self.output_bytes >= 1):
            raise ValueError(f"limits are positive and finite, with memory_bytes at least {64 << 20}, which Python itself needs; got {self}")


@dataclass(frozen=True)
class Protection:
    """What the system permitted, besides limits, which are always in force."""

    namespaces: bool
    """Users, network, processes, mounts of its own."""
    read_only: bool
    """No file outside of the working folder can be altered."""
    filtered: bool
    """System calls are filtered: no sockets, no new processes."""

    @property
    def network(self) -> bool:
        """Whether the network is out of reach."""
        return self.namespaces or self.filtered

    def check(self, allow_network: bool, allow_writes: bool) -> None:
        """Raises InputError if something is unprotected that was not allowed to be."""
        for protected, allowed, what, name in ((self.network, allow_network, "the network", "allow_network"), (self.read_only, allow_writes, "files", "allow_writes")):
            if not protected and not allowed:
                raise InputError(
                    f"a sandboxed program could reach {what} here: the system permits neither namespaces nor what would stand in for them, and so nothing was run",
                    remedy=f"Run on Linux with user namespaces (in a container: let it use unshare and mount), or say {name}: true if this machine has nothing to lose.",
                )


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    ended: Literal["passed", "failed", "time", "output"]
    """``passed``: it ran to its end.  ``failed``: it raised, exited early or was killed by a limit.  ``time`` and ``output``: it was killed for too much of these."""
    output: str
    """What it wrote to standard output and standard error, as far as that is allowed."""
    protection: Protection

    @property
    def passed(self) -> bool:
        return self.ended == "passed"


def run(program: str, limits: Limits | None = None, *, allow_network: bool = False, allow_writes: bool = False) -> Outcome:
    """Execute Python source; it passes if execution reaches its end.

    A token of 128 random bits, which the program is not told, goes back through a pipe after the program's last line: leaving early by sys.exit or os._exit, or printing anything, is no pass.
    The token lies in the same process, though, so a program that knows this sandbox and goes through its frames finds it, as it could replace what the asserts compare.
    Raises InputError, before any of the program is run, if network or files are not protected and that is not allowed (what can be protected is protected even so).
    Cost: about 60 ms and whatever the program takes.
    """
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="etude-sandbox-", ignore_cleanup_errors=True) as folder:
        reading, writing = os.pipe()
        command = [sys.executable, "-I", "-S", "-B", confine.__file__, str(writing)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={}, cwd=folder, bufsize=0, pass_fds=(writing,), start_new_session=True
        )  # fmt: skip
        os.close(writing)
        inner: list[int] = []
        try:
            return _converse(process, reading, inner, program, limits, folder, allow_network, allow_writes)
        finally:
            os.close(reading)
            _end(process, inner)


def _converse(process: subprocess.Popen[bytes], result: int, inner: list[int], program: str, limits: Limits, folder: str, allow_network: bool, allow_writes: bool) -> Outcome:
    """Send limits, hear of the protection, send the program, hear how it ended; the inner process's number is put into `inner` as soon as it is known."""
    assert process.stdin
    assert process.stdout
    told = ALWAYS | {
        "folder": os.path.realpath(folder), "folder_bytes": limits.file_bytes, "cpu_seconds": math.ceil(limits.seconds) + 1, "memory_bytes": limits.memory_bytes, "file_bytes": limits.file_bytes,
    }  # fmt: skip
    _send(process, json.dumps(told).encode() + b"\n")
    heard = _hear(result, time.monotonic() + STARTING)
    inner.append(heard.pop("pid"))
    protection = Protection(**heard)
    protection.check(allow_network, allow_writes)
    token, source = secrets.token_hex(confine.TOKEN // 2).encode(), program.encode("utf8", "surrogatepass")
    _send(process, len(source).to_bytes(8, "big") + token + source)
    process.stdin.close()
    output, said, cut = _listen(process.stdout.fileno(), result, time.monotonic() + limits.seconds, limits.output_bytes)
    ended: Literal["passed", "failed", "time", "output"] = cut or ("passed" if said == token else "failed")
    return Outcome(ended, output.decode(errors="replace"), protection)


def _send(process: subprocess.Popen[bytes], data: bytes) -> None:
    """All of it; an inner side that died meanwhile is found out by what it does not answer."""
    assert process.stdin
    rest = memoryview(data)
    with contextlib.suppress(BrokenPipeError):
        while rest:
            rest = rest[process.stdin.write(rest) :]


def _hear(result: int, deadline: float) -> dict[str, Any]:
    """The inner side's two lines as one mapping.  Raises InputError if they do not come."""
    said = b""
    with selectors.DefaultSelector() as selector:
        selector.register(result, selectors.EVENT_READ)
        while said.count(b"\n") < 2:
            part = os.read(result, 4096) if selector.select(max(0.0, deadline - time.monotonic())) else b""
            if not part:
                raise InputError("the sandbox did not start", remedy="Is there memory and room for processes, and can this Python be run with -I -S?")
            said += part
    first, second = said.splitlines()
    return json.loads(first) | json.loads(second)


def _listen(output: int, result: int, deadline: float, most: int) -> tuple[bytes, bytes, Literal["time", "output"] | None]:
    """What comes out of both pipes until both are closed, and whether the time or the output was too much."""
    found = {output: b"", result: b""}
    with selectors.DefaultSelector() as selector:
        for pipe in found:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready or time.monotonic() > deadline:
                return found[output], found[result], "time"
            for key, _ in ready:
                part = os.read(key.fd, 1 << 16)
                found[key.fd] += part
                if not part:
                    selector.unregister(key.fd)
                if len(found[key.fd]) > most:
                    return found[output][:most], found[result], "output"
    return found[output], found[result], None


def _end(process: subprocess.Popen[bytes], inner: list[int]) -> None:
    """Kill the inner process, and with it its namespace, then the group, which both are in; wait until they are gone."""
    if process.poll() is None:  # it waits for the inner process, whose number is thus still its own
        for pid in inner:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()
    process.wait()
