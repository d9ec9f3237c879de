"""Programs that try what a sandbox must not let them do; each attempt is shown to succeed outside of it, or would leave a trace that is looked for.

Layers are tested alone too, by an inner side from which the others were cut.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from etude.engine import confine, sandbox
from etude.engine.sandbox import Limits, Protection, run
from etude.values.errors import InputError

SHORT = Limits(seconds=1.0)
WITHOUT = {
    "namespaces": ("namespaces = _attempt(_leave_namespaces, libc)", "namespaces = False"),
    "read_only": ("read_only = namespaces and _attempt(_close_files, libc, limits)", "read_only = False"),
    "filtered": ("filtered=_attempt(_filter_calls, libc)", "filtered=False"),
}


@pytest.fixture(scope="module")
def here() -> Protection:
    """What this machine permits."""
    try:
        return run("", allow_network=True, allow_writes=True).protection
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture
def only(monkeypatch, tmp_path, here):
    """Leaves these protections, and skips where the machine does not permit them."""

    def cut(*kept: str) -> None:
        if not all(getattr(here, name) for name in kept):
            pytest.skip("this machine does not permit it")
        source = Path(confine.__file__).read_text()
        for name in WITHOUT.keys() - set(kept):
            assert source.count(WITHOUT[name][0]) == 1
            source = source.replace(*WITHOUT[name])
        (tmp_path / "confine.py").write_text(source)
        monkeypatch.setattr(confine, "__file__", str(tmp_path / "confine.py"))

    return cut


@pytest.fixture
def whole(here):
    """A machine that permits everything; what is asked of the sandbox as a whole is asked there."""
    if not (here.namespaces and here.read_only and here.filtered):
        pytest.skip("this machine does not permit all that protects")


def outside(program: str) -> int:
    return subprocess.run([sys.executable, "-c", program], capture_output=True).returncode


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "print('passed', flush=True); import os; os._exit(0)",
        "import os\nfor pipe in range(3, 64):\n    try: os.write(pipe, b'0' * 32)\n    except OSError: pass\nos._exit(0)",
        "import os\nfor pipe in range(3, 64):\n    try: os.write(pipe, b'0' * 32)\n    except OSError: pass",
        "import atexit; atexit.register(print, 'passed'); assert 0",
        "assert 1 == 2",
        "raise KeyboardInterrupt",
        "import no_such_module",
        "def f(:",
        "x = '\\ud800'; x.encode()",
        "\ud800",
        "import os, signal; os.kill(os.getpid(), signal.SIGSEGV); import ctypes; ctypes.string_at(0)",
    ],
)
def test_only_what_runs_to_its_end_passes(program):
    outcome = run(program, SHORT)
    assert (outcome.ended, outcome.passed) == ("failed", False)


ALLOWED = """
from __future__ import annotations
import os, pickle, threading
from dataclasses import dataclass

@dataclass
class Pair:
    x: int = 0

assert pickle.loads(pickle.dumps(Pair(3))) == Pair(3)
open('a.txt', 'w').write('x')
assert os.listdir() == ['a.txt']
seen = []
thread = threading.Thread(target=seen.append, args=(1,))
thread.start()
thread.join()
assert seen == [1]
assert set(os.environ) <= {'LC_CTYPE'}  # which Python sets itself
assert __name__ != '__main__'
print('é')
"""


@pytest.mark.usefixtures("whole")
def test_what_runs_to_its_end_passes_and_may_use_files_threads_and_classes_of_its_own():
    outcome = run(ALLOWED)
    assert (outcome.ended, outcome.output) == ("passed", "é\n")
    assert run("print(1)\n" * 40_000).passed is False, "its output is too long"
    assert run("#" * 300_000 + "\nprint(2)").output == "2\n", "a program longer than a pipe holds"


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)", "import os, time; os.setsid(); os.close(1); os.close(2); time.sleep(60)"])
def test_endless_programs_are_killed_in_time(program):
    assert run(program, SHORT).ended == "time"


def test_a_program_that_slips_out_of_all_that_kills_its_kin_is_killed_itself(only, monkeypatch):
    """Out of the process group, and of the signal that comes when its parent ends."""
    only("namespaces", "read_only")
    program = "import ctypes, os, time; assert ctypes.CDLL(None).prctl(1, 0) == 0; os.setsid(); time.sleep(60)"
    seen, end = [], sandbox._end

    def ending(process, inner):
        seen.extend(psutil.Process(number) for number in (process.pid, *inner))
        end(process, inner)

    monkeypatch.setattr(sandbox, "_end", ending)
    start = time.monotonic()
    assert run(program, SHORT).ended == "time"
    assert 1 <= time.monotonic() - start < 10
    assert len(seen) == 2
    assert psutil.wait_procs(seen, timeout=5)[1] == []


@pytest.mark.usefixtures("whole")
def test_processor_time_is_limited_for_all_threads_together():
    assert run("import resource; print(resource.getrlimit(resource.RLIMIT_CPU), resource.getrlimit(resource.RLIMIT_CORE))", Limits(seconds=1.5)).output == "(3, 3) (0, 0)\n"


@pytest.mark.usefixtures("whole")
def test_memory_is_limited():
    program = "a = bytearray(300 << 20)"
    assert run(program).passed
    outcome = run(program, Limits(memory_bytes=256 << 20))
    assert outcome.ended == "failed"
    assert "MemoryError" in outcome.output


@pytest.mark.usefixtures("whole")
def test_files_are_limited_in_size_and_number():
    write = "file = open('a', 'wb', buffering=0)\nfor part in range(%d): assert file.write(bytes(1 << 20)) == 1 << 20"
    assert run(write % 2, Limits(file_bytes=3 << 20)).passed
    assert not run(write % 4, Limits(file_bytes=3 << 20)).passed
    two = "for name in 'ab': open(name, 'wb').write(bytes(2 << 20))"
    assert "No space left" in run(two, Limits(file_bytes=3 << 20)).output
    assert "No space left" in run("for name in range(1000): open(str(name), 'w').close()").output
    assert "PermissionError" in run("import os; os.memfd_create('a')").output, "files in memory that no folder counts"
    assert "Too many open files" in run("kept = [open('a', 'w') for _ in range(100)]").output


def test_a_file_is_limited_where_its_folder_is_not(only):
    only("filtered")
    outcome = run("open('a', 'wb').write(bytes(4 << 20))", Limits(file_bytes=3 << 20), allow_writes=True)
    assert "File too large" in outcome.output


@pytest.mark.usefixtures("whole")
def test_output_is_cut():
    outcome = run("while True: print('x' * 1000)", Limits(output_bytes=5000))
    assert (outcome.ended, outcome.output.replace("\n", "")[:10], len(outcome.output)) == ("output", "x" * 10, 5000)


FORK = "import os\nchild = os.fork()\nif not child: os._exit(0)\nassert os.waitpid(child, 0)[1] == 0"


def test_no_process_and_no_program_is_started(only):
    only("filtered")
    assert outside(FORK) == 0
    outcome = run(FORK, allow_writes=True)
    assert "PermissionError" in outcome.output
    start = "import os; os.posix_spawn('/bin/true', ['true'], {})"
    assert outside(start) == 0
    assert "PermissionError" in run(start, allow_writes=True).output
    replace = "import os; os.execv('/bin/true', ['true'])"
    assert "PermissionError" in run(replace, allow_writes=True).output


@pytest.mark.usefixtures("whole")
def test_a_fork_bomb_comes_to_nothing():
    """It goes on when it is refused; a process that got through would count."""
    outcome = run("import os\nmade = 0\nwhile True:\n    try:\n        made += os.fork() >= 0\n        os.write(1, b'forked')\n    except OSError: pass", SHORT)
    assert (outcome.ended, outcome.output) == ("time", "")


@pytest.mark.parametrize("kept", [("namespaces",), ("filtered",), ("namespaces", "read_only", "filtered")])
def test_a_server_on_this_machine_hears_nothing(kept, only):
    only(*kept)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.3)
        program = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=1).close()"
        assert outside(program) == 0
        server.accept()[0].close()
        outcome = run(program, allow_writes=True)
        assert outcome.ended == "failed"
        assert ("Operation not permitted" if "filtered" in kept else "Network is unreachable") in outcome.output
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_socket_with_a_path_is_out_of_reach_too(only):
    """A namespace of networks does not hold these, the filter does: a daemon that listens at one would do what it is asked."""
    only("filtered")
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{folder}/s")
        server.listen()
        program = f"import socket; socket.socket(socket.AF_UNIX).connect({f'{folder}/s'!r})"
        assert outside(program) == 0
        assert "Operation not permitted" in run(program, allow_writes=True).output


@pytest.mark.parametrize(
    "program",
    [
        "open({old!r}, 'a').write('changed')",
        "open({old!r}, 'w').close()",
        "open({new!r}, 'w').close()",
        "import os; os.remove({old!r})",
        "import os; os.rename({old!r}, 'mine')",
        "import os; os.rename({old!r}, {new!r})",
        "import os; os.chmod({old!r}, 0)",
        "import os; os.utime({old!r}, (1, 1))",
        "import os; os.symlink('x', {new!r})",
        "import os; os.link({old!r}, {new!r})",
        "import os; os.mkdir({new!r})",
    ],
)
@pytest.mark.parametrize("kept", [("namespaces", "read_only"), ("namespaces", "read_only", "filtered")])
def test_nothing_outside_of_its_folder_is_altered(program, kept, only, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"

    def state():
        return old.exists() and (old.read_text(), old.stat().st_mode, old.stat().st_mtime_ns), sorted(one.name for one in tmp_path.iterdir() if one.name != "confine.py")

    old.write_text("as it was")
    only(*kept)
    before, source = state(), program.format(old=str(old), new=str(new))
    assert run(source).ended == "failed"
    assert state() == before
    if "'mine'" not in program:
        assert outside(source) == 0
        assert state() != before, "the attempt itself does nothing"


@pytest.mark.usefixtures("whole")
def test_mounts_devices_and_other_processes_are_out_of_reach():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert outside(f"import os; os.kill({other.pid}, 0)") == 0
        assert "PermissionError" in run(f"import os; os.kill({other.pid}, 0)").output
        assert run("import os; assert os.listdir('/proc') == [] and os.getpid() == 1; os.kill(1, 0)").passed
    assert outside("open('/dev/null', 'w')") == 0
    assert "Permission denied" in run("open('/dev/null', 'w')").output
    mount = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.{call} == -1 and ctypes.get_errno() == 1"
    for call in ("mount(b'none', b'/', None, 4096 | 32, None)", "umount2(b'/proc', 2)", "prctl(1, 0)", "unshare(0x10000000)", "syscall(425, 8, None)", "syscall(435, None, 0)"):
        passed = run(mount.format(call=call)).passed
        assert passed is ("435" not in call), call  # clone3 answers that it does not exist
    assert run(mount.format(call="syscall(435, None, 0)").replace("== 1", "== 38")).passed


def test_namespaces_alone_hide_other_processes(only):
    only("namespaces", "read_only")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert "ProcessLookupError" in run(f"import os; os.kill({other.pid}, 0)").output


@pytest.mark.usefixtures("whole")
def test_a_program_has_no_capabilities_and_cannot_get_any():
    names = "import ctypes, struct\nheader, data = struct.pack('Ii', 0x20080522, 0), ctypes.create_string_buffer(24)\nctypes.CDLL(None).capget(header, data)\nprint(any(data.raw))"
    assert run(names).output == "False\n"
    assert "not allowed to raise" in run("import resource; resource.setrlimit(resource.RLIMIT_CPU, (60, 60))").output


def test_an_unprotected_program_is_not_run(only, tmp_path, monkeypatch):
    trace = tmp_path / "trace"
    program = f"open({str(trace)!r}, 'w').close()"
    only()
    with pytest.raises(InputError, match="could reach the network") as caught:
        run(program)
    assert "allow_network: true" in caught.value.remedy
    with pytest.raises(InputError, match="could reach files"):
        run(program, allow_network=True)
    assert not trace.exists()
    outcome = run(program, allow_network=True, allow_writes=True)
    assert (outcome.ended, outcome.protection) == ("passed", Protection(False, False, False))
    assert trace.exists()


def test_its_folder_is_removed(monkeypatch, tmp_path, only):
    only("filtered")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "folders"))
    (tmp_path / "folders").mkdir()
    outcome = run("import os; open('a', 'w').close(); print(os.getcwd())", allow_writes=True)
    assert outcome.output.startswith(str(tmp_path / "folders"))
    assert list((tmp_path / "folders").iterdir()) == []


@pytest.mark.usefixtures("whole")
def test_nothing_is_left_when_its_starter_is_killed(tmp_path):
    """But for an empty folder, which nobody is there to remove."""
    program = "from etude.engine.sandbox import Limits, run; run('import time; time.sleep(60)', Limits(seconds=60.0))"
    with subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"TMPDIR": str(tmp_path)}) as starter:
        deadline, below = time.monotonic() + 60, []
        while len(below) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
            below = psutil.Process(starter.pid).children(recursive=True)
        time.sleep(0.2)
        assert len(below) == 2
        starter.kill()
    assert psutil.wait_procs(below, timeout=10)[1] == []


def test_an_inner_side_that_does_not_start_is_reported(monkeypatch, tmp_path):
    (tmp_path / "confine.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(confine, "__file__", str(tmp_path / "confine.py"))
    with pytest.raises(InputError, match="did not start"):
        sandbox.run("")


def test_limits_that_are_none_are_refused():
    for wrong in ({"seconds": 0.0}, {"seconds": float("inf")}, {"memory_bytes": 1}, {"file_bytes": 0}, {"output_bytes": 0}):
        with pytest.raises(ValueError, match="limits are positive"):
            Limits(**wrong)
