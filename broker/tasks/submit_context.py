"""The context of a submission: environment, directory, umask and soft limits of the process that submits.

`capture_context` records it once; all tasks of the submission refer to the one record by the hash of its content.
"""

from __future__ import annotations

import hashlib
import os
import resource
import sys
from collections.abc import Mapping
from typing import Final

import msgspec

from pilotq.broker.errors import InvalidInput

POLICIES: Final = ("submit", "worker", "clean")
# How names begin of what a worker sets for one execution: a task that submits must not pass its own on to the new one.
WORKER_VARIABLES: Final = (b"PILOTQ_", b"QCG_PM_")
# By which vendors' runtimes choose GPUs: a task has its own, not those of its submitter.
GPU_VARIABLES: Final = frozenset({
    b"CUDA_VISIBLE_DEVICES", b"ROCR_VISIBLE_DEVICES", b"HIP_VISIBLE_DEVICES", b"GPU_DEVICE_ORDINAL", b"ZE_AFFINITY_MASK"
})  # fmt: skip
CLEAN_VARIABLES: Final = frozenset({b"HOME", b"LANG", b"LOGNAME", b"PATH", b"SHELL", b"TMPDIR", b"TZ", b"USER"})
RESOURCE_LIMITS: Final = tuple(
    sorted({getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")})
)
# What a login node limits for its own sake: tasks elsewhere would end by SIGXCPU, or lose RDMA.
HOST_LIMITS: Final = frozenset({resource.RLIMIT_CPU, resource.RLIMIT_MEMLOCK, resource.RLIMIT_AS})


class SubmitContext(msgspec.Struct, array_like=True):
    """What the tasks of a submission have in common: where and how the process that submitted them ran.

    ``limits`` are soft limits by number of ``resource.RLIMIT_*``; environment and paths are bytes, as the system has
    them.
    """

    env: dict[bytes, bytes]
    cwd: bytes
    umask: int
    limits: dict[int, int]
    path: bytes = b""  # the directory of the program that submits, where functions are searched after cwd

    def key(self) -> str:
        """The hash of the content, by which the record is stored."""
        content = (sorted(self.env.items()), self.cwd, self.umask, sorted(self.limits.items()), self.path)
        return hashlib.sha256(msgspec.msgpack.encode(content)).hexdigest()[:24]


def capture_context(policy: str = "submit", *, functions: bool = False) -> SubmitContext:
    """The context of this process, as tasks shall have it.

    ``submit`` takes the environment as it is here, ``clean`` only CLEAN_VARIABLES and the locale, ``worker`` none:
    an empty environment stands for the worker's own. Directory, umask and soft limits are always of this process.
    What a worker sets for each execution is left out. Raises InvalidInput for an unknown policy, or when the current
    directory does not exist any more.
    """
    if policy not in POLICIES:
        raise InvalidInput(f"the environment policy {policy!r} is unknown: use {', '.join(POLICIES)}")
    try:
        cwd = os.getcwdb()
    except FileNotFoundError:
        raise InvalidInput("the current directory does not exist any more: change to one that does") from None
    env = {} if policy == "worker" else environment(os.environb)
    if policy == "clean":
        env = {name: value for name, value in env.items() if name in CLEAN_VARIABLES or name.startswith(b"LC_")}
    limits = {n: resource.getrlimit(n)[0] for n in RESOURCE_LIMITS}
    return SubmitContext(
        env=env, cwd=cwd, umask=_umask(), limits=limits, path=_program_folder(cwd) if functions else b""
    )


def _program_folder(cwd: bytes) -> bytes:
    """Where this program's own modules lie, if that is not ``cwd``: the folder that Python puts first on its path."""
    folder = os.fsencode(os.path.abspath(sys.path[0])) if sys.path and sys.path[0] else cwd
    return folder if folder != cwd and os.path.isdir(folder) else b""


def environment(source: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """``source`` without what a worker sets for each execution, and without a choice of GPUs."""
    # Inside a task OMP_NUM_THREADS is ours when it says how many cores the task has; else it is the user's own.
    cpus = source.get(b"PILOTQ_CPUS", b"")
    threads = b"%d" % len(cpus.split(b",")) if cpus else None
    variables = getattr(source, "_data", source)  # what is behind os.environb: through that it takes ten times as long
    return {
        name: value
        for name, value in variables.items()
        if not (
            name.startswith(WORKER_VARIABLES)
            or name in GPU_VARIABLES
            or (value == threads and name == b"OMP_NUM_THREADS")
        )
    }


def without_host_limits(context: SubmitContext) -> SubmitContext:
    """The context without the limits that belong to the host of the process that submits: the pilot is on another."""
    limits = {number: soft for number, soft in context.limits.items() if number not in HOST_LIMITS}
    return msgspec.structs.replace(context, limits=limits)


def without_secret(context: SubmitContext, secret: str) -> SubmitContext:
    """The context without variables that hold the pilot's password (`pilotq exec` sets some): tasks do not need them.

    A short one, of a server that somebody else made, could occur in any value by chance.
    """
    sought = secret.encode()
    if len(secret) < 16 or not any(sought in value for value in context.env.values()):
        return context
    env = {name: value for name, value in context.env.items() if sought not in value}
    return msgspec.structs.replace(context, env=env)


def _umask() -> int:
    """This process's umask, read without changing it where /proc has it (other threads may create files)."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("Umask:"):
                    return int(line.split()[1], 8)
    except OSError:
        pass  # no /proc: the other way is always there
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
