"""The inner side of the sandbox: a script, run as ``python -I -S confine.py``, that gives up what it can and then executes a program it is sent.

It uses the standard library alone, and is started by `etude.engine.sandbox`, where it is described what protects from what.
Standard input brings one line of JSON (limits and folder), later, if the outer side agrees with the protection it reports, the length of what follows, a token, and the program.
The pipe ``result`` carries two lines of JSON out (the process's number; the protection), and the token once the program has run to its end.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
import traceback
import types
from typing import Any

TOKEN = 32
"""Bytes of the token."""
NAMESPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
"""CLONE_NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET."""
NOBODY = 65534
CLONE_THREAD = 0x10000
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
READ_ONLY, NO_SETUID, NO_DEVICES, RECURSIVE, PRIVATE = 1, 2, 4, 0x4000, 1 << 18
"""Flags of mount(2)."""
MOUNT_SETATTR, HERE, AT_RECURSIVE = 442, -100, 0x8000
ALLOW, KILL, DENY = 0x7FFF0000, 0x80000000, 0x00050000
"""What a filter of system calls answers; an error's number is added to the last."""
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
"""Instructions of a filter (classic BPF)."""

DENIED = {
    "x86_64": (
        (41, 57, 58, 59, 322, 101, 165, 166, 155, 161, 272, 308, 321, 298, 323, 310, 311, 248, 249, 250, 129, 297, 200, 29, 64, 68, 240, 319),
        {"arch": 0xC000003E, "clone": 56, "kill": 62, "tgkill": 234, "prctl": 157},
    ),
    "aarch64": (
        (198, 221, 281, 117, 40, 39, 41, 51, 97, 268, 280, 241, 282, 270, 271, 217, 218, 219, 138, 240, 130, 194, 190, 186, 180, 279),
        {"arch": 0xC00000B7, "clone": 220, "kill": 129, "tgkill": 131, "prctl": 167},
    ),
}
"""By machine, system calls that fail: socket, fork, vfork, execve, execveat, ptrace, mount, umount2, pivot_root, chroot, unshare, setns, bpf, perf_event_open, userfaultfd,
process_vm_readv and writev, add_key, request_key, keyctl, rt_sigqueueinfo, rt_tgsigqueueinfo, tkill, shmget, semget, msgget, mq_open, memfd_create, in this order
(aarch64 has no fork and vfork); and the numbers of those that need a look at their arguments."""
DENIED_EVERYWHERE = (424, 425, 428, 429, 430, 431, 432, 433, 434, 438, MOUNT_SETATTR, 447)
"""pidfd_send_signal, io_uring_setup (whose rings open sockets past any filter), open_tree, move_mount, fsopen, fsconfig, fsmount, fspick, pidfd_open, pidfd_getfd, mount_setattr, memfd_secret."""
CLONE3 = 435


def main(result: int) -> None:
    """Confine this process, report how, and execute what is sent."""
    limits = json.loads(_line())
    libc: Any = ctypes.CDLL(None, use_errno=True)
    namespaces = _attempt(_leave_namespaces, libc)
    _attempt(_end_with_parent, libc)
    read_only = namespaces and _attempt(_close_files, libc, limits)
    os.chdir(limits["folder"])
    inner = os.fork()  # the first process of the new process namespace; when it ends, so does all it left behind
    if inner:
        _tell(result, pid=inner)
        os.close(result)
        os.waitpid(inner, 0)
        os._exit(0)
    _attempt(_end_with_parent, libc)
    _limit(limits)
    _attempt(_drop_capabilities, libc)
    _tell(result, namespaces=namespaces, read_only=read_only, filtered=_attempt(_filter_calls, libc))
    _execute(result)


def _execute(result: int) -> None:
    """Run the program that is sent; what it has not run to its end sends no token."""
    leave, write = os._exit, os.write
    size = int.from_bytes(_exactly(8), "big")
    token = _exactly(TOKEN)
    program = types.ModuleType("program")
    sys.modules["program"] = program
    try:
        exec(compile(_exactly(size).decode("utf8", "surrogatepass"), "<program>", "exec", dont_inherit=True), vars(program))
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc(limit=-3)
        sys.stderr.flush()
        leave(1)
    write(result, token)
    leave(0)


def _line() -> bytes:
    """One line of standard input, and nothing that stands behind it."""
    found = b""
    while not found.endswith(b"\n"):
        found += _exactly(1)
    return found


def _exactly(size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = os.read(0, size - len(found))
        if not part:
            os._exit(2)  # the outer side did not agree, or is gone
        found += part
    return found


def _tell(result: int, **what: Any) -> None:
    os.write(result, json.dumps(what).encode() + b"\n")


def _attempt(what: Any, *arguments: Any) -> bool:
    """Whether the system permits this; a system that lacks the call altogether permits it not."""
    try:
        what(*arguments)
    except (OSError, AttributeError, KeyError):
        return False
    return True


def _checked(status: int) -> None:
    if status:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _end_with_parent(libc: Any) -> None:
    """Be killed when the process above ends, however it ends: what sleeps would outlive every limit."""
    _checked(libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL)))


def _leave_namespaces(libc: Any) -> None:
    """Namespaces of our own: users (which makes the others permitted), network (nothing but a loopback that is down), mounts, processes, shared memory, host name."""
    user, group = os.geteuid(), os.getegid()
    _checked(libc.unshare(NAMESPACES))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"), ("gid_map", f"{NOBODY} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _close_files(libc: Any, limits: dict[str, Any]) -> None:
    """Every mount becomes read-only and without devices; the folder becomes a file system in memory of its own, and /proc an empty one."""
    folder = limits["folder"].encode()
    _checked(libc.mount(b"none", b"/", None, ctypes.c_ulong(RECURSIVE | PRIVATE), None))
    attributes = struct.pack("QQQQ", READ_ONLY | NO_SETUID | NO_DEVICES, 0, 0, 0)
    _checked(libc.syscall(ctypes.c_long(MOUNT_SETATTR), ctypes.c_long(HERE), b"/", ctypes.c_long(AT_RECURSIVE), attributes, ctypes.c_long(len(attributes))))
    options = f"size={limits['folder_bytes']},nr_inodes={limits['files']},mode=700".encode()
    _checked(libc.mount(b"none", folder, b"tmpfs", ctypes.c_ulong(NO_SETUID | NO_DEVICES), options))
    _checked(libc.mount(b"none", b"/proc", b"tmpfs", ctypes.c_ulong(READ_ONLY | NO_SETUID | NO_DEVICES), b"size=4k"))


def _limit(limits: dict[str, Any]) -> None:
    """Soft and hard alike, so that they cannot be raised again."""
    wanted = {
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_NPROC: limits["processes"],
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in wanted.items():
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def _drop_capabilities(libc: Any) -> None:
    header, none = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6)
    _checked(libc.capset(header, none))


def _filter_calls(libc: Any) -> None:
    """A seccomp filter: no sockets, no new processes, no programs, no signals to others, no mounts, no outliving its parent; threads are allowed."""
    if sys.maxsize < 1 << 32 or sys.byteorder != "little":
        raise OSError("a filter is written for 64 bits, little end first")
    plain, numbers = DENIED[platform.machine()]
    refuse = (RETURN, 0, 0, DENY | errno.EPERM)
    code = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, numbers["arch"]), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    if platform.machine() == "x86_64":
        code += [(AT_LEAST, 0, 1, 0x40000000), refuse]  # the x32 numbers for the same calls
    for number in (*plain, *DENIED_EVERYWHERE):
        code += [(EQUAL, 0, 1, number), refuse]
    code += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, DENY | errno.ENOSYS)]  # then the C library takes clone, whose flags can be read
    itself = (EQUAL, 0, 1, os.getpid())
    for name, test in (("clone", (ANY_BIT, 0, 1, CLONE_THREAD)), ("kill", itself), ("tgkill", itself), ("prctl", (EQUAL, 1, 0, PR_SET_PDEATHSIG))):
        code += [(EQUAL, 0, 4, numbers[name]), (LOAD, 0, 0, 16), test, (RETURN, 0, 0, ALLOW), refuse]
    code.append((RETURN, 0, 0, ALLOW))
    body = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(body))
    _checked(libc.prctl(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)))
    _checked(libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(2), program))  # 2: SECCOMP_MODE_FILTER


if __name__ == "__main__":
    main(int(sys.argv[1]))
