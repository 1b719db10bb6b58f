"""The process that isolates a program, see `fastalign.rl.sandbox`. Run by its path, it imports nothing of fastalign.

Every run is a new process, made in this order (see `enter`), each step by the kernel:

1. new user, pid, mount, network, ipc, uts and cgroup namespaces. The program is process 1 of its own: it sees no other
   process, and when it ends the kernel kills all that it may have started. Its network has not even a loopback.
2. a file system of its own in memory, 16 MB: the program, `/tmp`, and read-only `/usr`, `/lib*` and the folder of this
   Python. No `/proc`, no `/dev`, no home. It begins with an empty environment and no open file but input and output.
3. the user nobody, or where fastalign does not run as root its own user, without any capability in either case.
4. limits of memory, CPU time, file size, open files and threads; wall-clock time and output are limited from outside.
5. `no_new_privs`, and a seccomp filter that knows the few system calls of a program which computes, reads and writes.
   All others do not exist for it: no sockets, no second process, no signals to others, no mounts, no tracing.

What it protects: files, secrets, network, processes and memory of the machine, from a program that a language model
wrote by chance or to gain reward. What it does not: it is no virtual machine, so a program that exploits an error of
the kernel in those few system calls gets out; it can read what is below `/usr` and see which Python runs; it measures
time, so it can learn about the machine's load; and its memory limit is per run, not over all runs that go on at once.
A test that runs in the same process as the program can be cheated by it: see `fastalign.rl.code_rewards`.

It is a process of its own since forking the training process, with its threads and its GPU, is slow and not safe.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import platform
import resource
import select
import signal
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

NEW_NAMESPACES = 0x7E020000  # CLONE_NEW{USER, PID, NS, NET, IPC, UTS, CGROUP}
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 0x1000, 0x4000, 0x40000
AT_FDCWD, AT_RECURSIVE, MNT_DETACH = -100, 0x8000, 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_FILTER = 1, 22, 38, 2
NOBODY = 65534
TREES = ("/usr", "/lib", "/lib64", "/nix")
"""What a Python needs besides its own folder: the C library, wherever the distribution has it."""
STAGE = "/proc"
"""Where the new root is put together: a folder that exists everywhere and holds nothing that the program may see."""
PYTHON, PREFIX = os.path.realpath(sys.executable), os.path.realpath(sys.base_prefix)
"""The interpreter itself, not that of a virtual environment, and its folder."""
PROGRAM = "/program.py"

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# fmt: off
CALLS = {
    "x86_64": {
        "read": 0, "write": 1, "readv": 19, "writev": 20, "pread64": 17, "pwrite64": 18, "lseek": 8, "close": 3,
        "close_range": 436, "open": 2, "openat": 257, "stat": 4, "fstat": 5, "lstat": 6, "newfstatat": 262,
        "statx": 332, "access": 21, "faccessat": 269, "faccessat2": 439, "readlink": 89, "readlinkat": 267,
        "getcwd": 79, "chdir": 80, "getdents": 78, "getdents64": 217, "dup": 32, "dup2": 33, "dup3": 292, "fcntl": 72,
        "pipe": 22, "pipe2": 293, "poll": 7, "ppoll": 271, "select": 23, "pselect6": 270, "mkdir": 83, "mkdirat": 258,
        "unlink": 87, "unlinkat": 263, "rmdir": 84, "rename": 82, "renameat": 264, "renameat2": 316, "ftruncate": 77,
        "umask": 95, "brk": 12, "mmap": 9, "munmap": 11, "mprotect": 10, "mremap": 25, "madvise": 28, "futex": 202,
        "set_robust_list": 273, "set_tid_address": 218, "rseq": 334, "arch_prctl": 158, "sched_yield": 24,
        "sched_getaffinity": 204, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "sigaltstack": 131,
        "tgkill": 234, "alarm": 37, "setitimer": 38, "getitimer": 36, "getpid": 39, "gettid": 186, "getppid": 110,
        "getuid": 102, "geteuid": 107, "getgid": 104, "getegid": 108, "getpgrp": 111, "getrlimit": 97,
        "prlimit64": 302, "getrusage": 98, "times": 100, "uname": 63, "sysinfo": 99, "getrandom": 318,
        "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "nanosleep": 35, "gettimeofday": 96,
        "time": 201, "restart_syscall": 219, "execve": 59, "exit": 60, "exit_group": 231,
    },
    "aarch64": {
        "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67, "pwrite64": 68, "lseek": 62, "close": 57,
        "close_range": 436, "openat": 56, "fstat": 80, "newfstatat": 79, "statx": 291, "faccessat": 48,
        "faccessat2": 439, "readlinkat": 78, "getcwd": 17, "chdir": 49, "getdents64": 61, "dup": 23, "dup3": 24,
        "fcntl": 25, "pipe2": 59, "ppoll": 73, "pselect6": 72, "mkdirat": 34, "unlinkat": 35, "renameat": 38,
        "renameat2": 276, "ftruncate": 46, "umask": 166, "brk": 214, "mmap": 222, "munmap": 215, "mprotect": 226,
        "mremap": 216, "madvise": 233, "futex": 98, "set_robust_list": 99, "set_tid_address": 96, "rseq": 293,
        "sched_yield": 124, "sched_getaffinity": 123, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139,
        "sigaltstack": 132, "tgkill": 131, "setitimer": 103, "getitimer": 102, "getpid": 172, "gettid": 178,
        "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177, "getrlimit": 163,
        "prlimit64": 261, "getrusage": 165, "times": 153, "uname": 160, "sysinfo": 179, "getrandom": 278,
        "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115, "nanosleep": 101, "gettimeofday": 169,
        "restart_syscall": 128, "execve": 221, "exit": 93, "exit_group": 94,
    },
}
"""The system calls that the program has, besides `clone` for threads. What is not here answers ENOSYS."""
# fmt: on
CLONE = {"x86_64": 56, "aarch64": 220}
IOCTL = {"x86_64": 16, "aarch64": 29}
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
MOUNT_SETATTR = 442
LIBC = ctypes.PyDLL(None, use_errno=True)
"""Keeps Python's lock during a call: after `clone` there is nobody to give it back."""


class Limits(NamedTuple):
    """What one run may use.

    Attributes:
        seconds: of wall-clock time; one more of CPU time.
        memory_mb: address space, of which Python itself takes about 30 MB.
        output_kb: what it prints, standard error included.
        isolated: False runs it as an ordinary process of this user, with the limits alone.
    """

    seconds: float = 5.0
    memory_mb: int = 512
    output_kb: int = 1024
    isolated: bool = True


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        status: ``ok``: with exit code 0; ``error``: with another, or killed by the kernel; ``timeout``; ``output``: it
            printed too much.
        stdout, stderr: what it printed, up to the limit.
    """

    status: str
    stdout: str
    stderr: str


def main() -> None:
    """Reads program and limits, then what each run gets, one JSON value a line; answers each with its outcome."""
    program, limits = json.loads(sys.stdin.readline())
    for line in sys.stdin:
        stdin, tail = json.loads(line)
        try:
            outcome = launch(program + tail, Limits(*limits), stdin)
        except OSError as error:
            outcome = ("refused", "", error.strerror)
        print(json.dumps(outcome), flush=True)


def launch(program: str, limits: Limits, stdin: str) -> tuple[str, str, str]:
    """One run."""
    (out, to_out), (err, to_err), (problem, to_problem), (ready, go) = (os.pipe() for _ in range(4))
    pid = clone() if limits.isolated else os.fork()
    if pid == 0:
        try:
            os.close(go)
            os.read(ready, 1)
            enter(program, limits, (file_of(stdin), to_out, to_err), ready)
        except BaseException as error:
            os.write(to_problem, str(getattr(error, "strerror", error)).encode())
        finally:
            os._exit(1)
    for end in (to_out, to_err, to_problem, ready):
        os.close(end)
    try:
        if limits.isolated:
            map_users(pid)
        os.write(go, b"x")
        refused = os.read(problem, 4096).decode()  # empty when execve closes the other end
        status, stdout, stderr = collect(pid, out, err, limits)
    finally:
        end_all(pid, limits)
        for end in (out, err, problem, go):
            os.close(end)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if refused:
        return "refused", "", refused
    return status or ("ok" if code == 0 else "error"), stdout, stderr


def clone() -> int:
    """As ``os.fork``, with the child in new namespaces, the first process of its own."""
    if (machine := platform.machine()) not in CALLS:
        raise OSError(errno.ENOSYS, f"no filter of system calls is known for {machine}")
    return call("make namespaces", CLONE[machine], NEW_NAMESPACES | signal.SIGCHLD, 0, 0, 0, 0)


def map_users(pid: int) -> None:
    """Says who the users of the child's namespace are outside: where root may, nobody is nobody; else this user."""
    uid, gid = os.geteuid(), os.getegid()
    try:
        write(f"/proc/{pid}/uid_map", f"0 {uid} 1\n{NOBODY} {NOBODY} 1\n")
        write(f"/proc/{pid}/gid_map", f"0 {gid} 1\n{NOBODY} {NOBODY} 1\n")
    except OSError:
        write(f"/proc/{pid}/setgroups", "deny")
        write(f"/proc/{pid}/uid_map", f"{NOBODY} {uid} 1\n")
        write(f"/proc/{pid}/gid_map", f"{NOBODY} {gid} 1\n")


def enter(program: str, limits: Limits, streams: Sequence[int], parent: int) -> None:
    """Turns this process into the program; all files but its streams close with ``execve``, as Python opens them so."""
    path, source = PROGRAM, -1
    os.setsid()
    if limits.isolated:
        new_root(program)
        become_nobody()
    else:
        source = file_of(program)
        path = f"/proc/self/fd/{source}"
    for target, fd in enumerate(streams):
        os.dup2(fd, target)
    os.chdir("/tmp")
    limit(limits)
    end_with(parent)
    if limits.isolated:
        filter_calls()
    else:
        os.set_inheritable(source, True)
    os.execve(PYTHON, [PYTHON, "-I", "-X", "utf8", path], {})


def new_root(program: str) -> None:
    """Makes a file system in memory the only one that this process sees."""
    mount("", "/", "", MS_REC | MS_PRIVATE)  # nothing of what follows is seen outside
    mount("tmpfs", STAGE, "tmpfs", MS_NOSUID | MS_NODEV, "size=16m,nr_inodes=4096,mode=755")
    for tree in (*TREES, PREFIX):
        if os.path.exists(tree) and not os.path.lexists(STAGE + tree):
            show(tree, STAGE + tree)
    with open(STAGE + PROGRAM, "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(program)
    os.mkdir(f"{STAGE}/tmp")
    os.chmod(f"{STAGE}/tmp", 0o777)
    for fixed in (STAGE + PROGRAM, STAGE):
        os.chmod(fixed, 0o555)
    os.chdir(STAGE)
    call("change the root", PIVOT_ROOT[platform.machine()], b".", b".")  # the old root now lies on the new one
    call_libc("umount2", b".", MNT_DETACH)


def show(tree: str, place: str) -> None:
    """Makes a folder visible at a place, read-only with all that is mounted below it; a link is made anew."""
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.islink(tree):
        return os.symlink(os.readlink(tree), place)
    os.mkdir(place)
    mount(tree, place, "", MS_BIND | MS_REC)
    attributes = ctypes.create_string_buffer(struct.pack("4Q", MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0))
    call(f"make {tree} read-only", MOUNT_SETATTR, AT_FDCWD, place.encode(), AT_RECURSIVE, attributes, 32)


def become_nobody() -> None:
    """Gives up root and with it all capabilities; who is not root has been nobody since `map_users`."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def limit(limits: Limits) -> None:
    """The kernel's limits of this process."""
    megabyte = 1 << 20
    values = {
        resource.RLIMIT_AS: limits.memory_mb * megabyte,
        resource.RLIMIT_CPU: math.ceil(limits.seconds) + 1,
        resource.RLIMIT_FSIZE: 16 * megabyte,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    if limits.isolated:  # outside it would count the user's other processes
        values[resource.RLIMIT_NPROC] = 64
    for name, value in values.items():
        resource.setrlimit(name, (value, value))


def end_with(parent: int) -> None:
    """Lets the kernel end this process with the trusted one, whose end of the pipe ``parent`` has gone if it has."""
    call_libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    poll = select.poll()
    poll.register(parent, 0)
    if poll.poll(0):
        os._exit(1)


def filter_calls() -> None:
    """Leaves this process the system calls in `CALLS` alone, and threads."""
    program = seccomp_program(platform.machine())
    filters = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(filters))
    call_libc("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call_libc("prctl", PR_SET_SECCOMP, SECCOMP_FILTER, ctypes.create_string_buffer(described), 0, 0)


def seccomp_program(machine: str) -> bytes:
    """The filter in the kernel's instructions ``(code, jump if true, jump if false, operand)``."""
    load, equal, has_bits, answer = 0x20, 0x15, 0x45, 0x06
    allow, kill, eperm, enotty, enosys = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050019, 0x00050026
    number, architecture, first_argument, a_thread = 0, 4, 16, 0x00010000
    lines = [(load, 0, 0, architecture), (equal, 1, 0, AUDIT_ARCH[machine]), (answer, 0, 0, kill), (load, 0, 0, number)]
    for allowed in CALLS[machine].values():
        lines += [(equal, 0, 1, allowed), (answer, 0, 0, allow)]
    lines += [(equal, 0, 4, CLONE[machine]), (load, 0, 0, first_argument), (has_bits, 0, 1, a_thread)]
    lines += [(answer, 0, 0, allow), (answer, 0, 0, eperm)]
    lines += [(equal, 0, 1, IOCTL[machine]), (answer, 0, 0, enotty), (answer, 0, 0, enosys)]  # no file is a terminal
    return b"".join(struct.pack("HBBI", *line) for line in lines)


def collect(pid: int, out: int, err: int, limits: Limits) -> tuple[str, str, str]:
    """What the program prints until it ends or reaches a limit: which (or nothing), its output, its errors."""
    deadline, printed = time.monotonic() + limits.seconds, {out: bytearray(), err: bytearray()}
    poll, process, ended = select.poll(), os.pidfd_open(pid), False
    for fd in (out, err, process):
        poll.register(fd, select.POLLIN)
    try:
        while ready := [fd for fd, _ in poll.poll(0 if ended else max(0.0, deadline - time.monotonic()) * 1000)]:
            for fd in ready:
                chunk = b"" if fd == process else os.read(fd, 1 << 16)
                if not chunk:
                    poll.unregister(fd)
                    ended = ended or fd == process
                else:
                    printed[fd] += chunk
            if sum(map(len, printed.values())) > limits.output_kb << 10:
                break
    finally:
        os.close(process)
    full = sum(map(len, printed.values())) > limits.output_kb << 10
    stdout, stderr = (text[: limits.output_kb << 10].decode("utf-8", "replace") for text in printed.values())
    return "output" if full else "" if ended else "timeout", stdout, stderr


def end_all(pid: int, limits: Limits) -> None:
    """Ends the program and what it started: with the first process of a namespace all of it ends."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        if not limits.isolated:
            os.killpg(pid, signal.SIGKILL)


def file_of(text: str) -> int:
    """A file in memory that can only be read."""
    memory = os.memfd_create("input")
    with open(memory, "wb", closefd=False) as file:
        file.write(text.encode("utf-8", "surrogatepass"))
    return os.open(f"/proc/self/fd/{memory}", os.O_RDONLY)


def write(path: str, text: str) -> None:
    """One write, as the kernel wants it for these files."""
    with open(path, "w") as file:
        file.write(text)


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """The system call."""
    call_libc("mount", source.encode(), target.encode(), kind.encode(), flags, data.encode())


def call_libc(name: str, *arguments: Any) -> int:
    """A function of the C library; raises what it reports."""
    return checked(name, getattr(LIBC, name)(*map(wide, arguments)))


def call(what: str, number: int, *arguments: Any) -> int:
    """A system call by its number."""
    return checked(what, LIBC.syscall(number, *map(wide, arguments)))


def wide(argument: Any) -> Any:
    """Numbers as the C library reads them from variable arguments: 64 bits."""
    return ctypes.c_long(argument) if isinstance(argument, int) else argument


def checked(what: str, result: int) -> int:
    """A result that is not -1."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


if __name__ == "__main__":
    main()
