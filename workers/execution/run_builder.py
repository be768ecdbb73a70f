"""Finds what the elements of a lease have in common, and builds launches of runs of them.

Alike are programs of one process that need no file written before they start. They may differ by index and value, and
by where their output goes; tasks of a bundle by command and name, too.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

import msgspec

from pilotq.broker.errors import PilotqError
from pilotq.broker.log import log
from pilotq.broker.os_strings import UNREADABLE, decode
from pilotq.broker.store.journal_runs import INDEX_PLACE
from pilotq.broker.store.messages import Lease
from pilotq.broker.store.resources import class_info
from pilotq.broker.tasks.model import ONE_PROCESS_MODELS, one_line
from pilotq.broker.tasks.spec import (
    FLAG_ARRAY,
    FLAG_ATTEMPT,
    FLAG_BUNDLE,
    FLAG_FUNCTION,
    FLAG_ID,
    FLAG_QCG,
    FLAG_RQ_JOB,
    FLAG_VALUES,
    Spec,
    command_text,
    is_bundle,
)
from pilotq.workers.execution.launch_builder import (
    LaunchBuilder,
    NotYetError,
    PackedMember,
    UnlaunchableError,
    below,
    command_line,
    directory_of,
    refusal,
    task_environment,
)
from pilotq.workers.execution.leased_runs import HeldLease, LeasedRun, Own, Template
from pilotq.workers.execution.templating import Variables, has_variables, render
from pilotq.workers.protocol import (
    INDEX_MARK,
    NUMBER_MARK,
    OWN_MARKS,
    Call,
    CallRun,
    Element,
    Launch,
    LaunchBase,
    LaunchRun,
    LaunchSlot,
    fill_marks,
)

APART_FLAGS = FLAG_QCG | FLAG_RQ_JOB  # such need more than a start
SIGN = "\N{WHITE SQUARE CONTAINING BLACK SMALL SQUARE}"  # for an index, in a command that is shown
SHOWN_MAX = 160  # characters of such a command: with each index it is as long as a listing shows
TEXT_MAX = 4096  # bytes of a command, of which a listing shows the begin
INDEX, VALUE = INDEX_MARK.decode(), OWN_MARKS[0].decode()
_NOTHING = msgspec.Raw(b"")
_encode = msgspec.msgpack.Encoder().encode
_read_fields = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode
# The fields of a packed `Spec` in which tasks of a bundle may differ: arguments, script, and the four paths.
OWN_FIELDS = 6
_OWN_HEAD = bytes([0x90 | OWN_FIELDS])
_read_own = msgspec.msgpack.Decoder(tuple[list[bytes], bytes, bytes, bytes, bytes, bytes]).decode


class _NotAlike(Exception):
    """The elements of a lease are not alike."""


class RunBuilder:
    """Builds the launches of elements that are alike; ``builder`` builds those of all others."""

    def __init__(self, builder: LaunchBuilder) -> None:
        self._builder = builder

    def hold(self, lease: Lease) -> HeldLease | None:
        """What the elements of a lease have in common, if they are alike."""
        try:
            return self._hold_bundle(lease) if is_bundle(lease.spec) else self._hold_array(lease)
        except (_NotAlike, NotYetError, UnlaunchableError, PilotqError, ValueError, *UNREADABLE):
            return None  # what is wrong with one of them is said when that is built
        except Exception:  # noqa: BLE001  # the boundary of its tasks
            log(f"elements of {lease.array} are launched one by one:\n{traceback.format_exc()}", level="error")
            return None

    def _hold_array(self, lease: Lease) -> HeldLease:
        spec = self._builder.spec_of(lease.spec)
        if spec.flags & FLAG_FUNCTION:
            raise _NotAlike
        varies, valued = has_variables(spec), bool(spec.flags & FLAG_VALUES)
        marked = _marked(lease, spec, valued=valued)
        shown = _shown(lease, spec, marked)
        outputs = self._outputs(lease, marked)
        if not valued and not outputs and shown:
            return HeldLease(lease, spec, marked, shown, varies=varies)
        text = b"" if shown else _text_of(marked)[:TEXT_MAX]
        own = []
        for number in range(lease.number):
            value = self._builder.value_of(lease.array, lease.first + number) if valued else b""
            marks = {INDEX_MARK: b"%d" % (lease.index + lease.step * number), OWN_MARKS[0]: value}
            fields = _filled(outputs, marks)
            if not shown:
                fields["command"] = one_line(fill_marks(text, marks))
            if b"\0" in value:
                raise _NotAlike
            strings = msgspec.Raw(_encode([value])) if valued else _NOTHING
            own.append(Own(strings, fields, decode(value) if valued else None))
        return HeldLease(lease, spec, marked, shown, varies=varies, own=own)

    def _hold_bundle(self, lease: Lease) -> HeldLease:
        """All that is packed behind command and paths must be the same."""
        first = bytes(self._builder.member_of(lease.array, lease.first).spec)
        fields = [bytes(field) for field in _read_fields(first)]
        tail = b"".join(fields[OWN_FIELDS:])
        head = first[: len(first) - sum(map(len, fields))]
        spec = self._builder.spec_of(first)
        if not tail or spec.flags & (FLAG_ARRAY | FLAG_ATTEMPT | FLAG_BUNDLE):
            raise _NotAlike
        marked = msgspec.structs.replace(_marked(lease, spec, valued=False), argv=[], script=b"")
        usual = command_text(spec)
        root = self._builder.context(lease.shared).cwd
        own = []
        for number in range(lease.number):
            member = self._builder.member_of(lease.array, lease.first + number)
            packed = bytes(member.spec)
            if not packed.startswith(head) or not packed.endswith(tail):
                raise _NotAlike
            one = Spec(*_read_own(_OWN_HEAD + packed[len(head) : len(packed) - len(tail)]), flags=spec.flags)
            if spec.flags & FLAG_ID:
                one = render(one, Variables(lease.run(number).id))
            if spec.flags & FLAG_FUNCTION:
                if (one.cwd, one.stdin, one.stdout, one.stderr) != (spec.cwd, spec.stdin, b"", b""):
                    raise _NotAlike
                own.append(Own(_NOTHING, _named(lease, member, one, usual), spec=packed, payload=one.argv[0]))
            else:
                own.append(_own_of(lease, member, one, packed, root, usual))
        return HeldLease(lease, spec, marked, usual, varies=False, own=own)

    def _outputs(self, lease: Lease, marked: Spec) -> dict[str, bytes]:
        """The fields of entries that say where the output is: field -> path with marks."""
        if not marked.stdout and not marked.stderr:
            return {}
        if lease.execution > 1:
            raise _NotAlike  # files of later executions are published by themselves
        cwd = directory_of(marked, self._builder.context(lease.shared).cwd)
        paths = {"stdout_at": marked.stdout, "stderr_at": marked.stderr}
        return {field: below(cwd, path) for field, path in paths.items() if path}

    def build_run(self, run: LeasedRun, after: int) -> tuple[LaunchBase, LaunchSlot, LaunchRun | CallRun]:
        """The launches or calls of a run in a slot, and what they name. ``after`` and what it raises are as of
        `LaunchBuilder.build`."""
        held = run.held
        template = held.templates.get(run.allocation)
        if template is None:
            try:
                template = held.templates[run.allocation] = self._template(held, run.allocation)
            except Exception as error:  # noqa: BLE001  # the boundary of its tasks
                raise refusal(error) from None
        index = held.lease.index + held.lease.step * run.number
        if isinstance(template.launch, Call):
            call = msgspec.structs.replace(template.launch, key=run.key, after=after)
            payloads = [own.payload for own in held.own[run.number : run.number + run.count]]
            return template.base, template.slot, CallRun(index, call, payloads)
        element = Element(index, held.place_of(run.allocation), held.lease.handed)
        launch = msgspec.structs.replace(template.launch, key=run.key, after=after, element=element)
        own = held.strings(run.number, run.count)
        return template.base, template.slot, LaunchRun(run.count, held.lease.step, launch, own)

    def _template(self, held: HeldLease, allocation: str) -> Template:
        lease, spec = held.lease, held.marked
        context = self._builder.context(lease.shared)
        known = class_info(lease.class_name)
        reservation = self._builder.reservation(allocation, known.request.numa if known is not None else "")
        run = msgspec.structs.replace(lease.run(0), id=f"{lease.array}_{INDEX}")
        own_env = spec.env or {}
        cwd = directory_of(spec, context.cwd)
        stdin, stdout, stderr = (below(cwd, path) for path in (spec.stdin, spec.stdout, spec.stderr))
        if held.is_function:
            call = Call(
                0, run.id, run.execution, lease.shared, reservation.slot.name, dict(own_env), cwd, stdin,
                submission=lease.submission,
            )  # fmt: skip
            return Template(context.base, reservation.slot, call)
        if is_bundle(lease.spec):
            run.array, run.index, run.position = "", -1, 0  # as if it had been submitted by itself
            cwd, stdin, stdout, stderr = OWN_MARKS
        valued = spec.flags & FLAG_VALUES
        env = task_environment(run, spec, reservation.slot.env, OWN_MARKS[0] if valued else INDEX_MARK)
        if run.array:
            env |= {b"PILOTQ_INDEX": INDEX_MARK, **own_env}
        if b"QCG_PM_STEP_ID" not in own_env:
            env[b"QCG_PM_STEP_ID"] = env[b"QCG_PM_STEP_ID"][: -len(b"%08x" % 0)] + NUMBER_MARK
        launch = Launch(
            0, run.id, run.execution, lease.shared, reservation.slot.name, command_line(spec)[0], env, cwd,
            stdin, stdout, stderr,
        )  # fmt: skip
        return Template(context.base, reservation.slot, launch)


def _named(lease: Lease, member: PackedMember, spec: Spec, usual: str) -> dict[str, Any]:
    """Fields of the entry of one of a bundle: its command, if that is not the usual one, and its name."""
    fields: dict[str, Any] = {}
    if (command := command_text(spec)) != usual:
        fields["command"] = command
    if member.name != lease.name:
        fields["name"] = member.name
    return fields


def _own_of(lease: Lease, member: PackedMember, spec: Spec, packed: bytes, root: bytes, usual: str) -> Own:
    """What one of a bundle has for itself. Raises _NotAlike."""
    argv, script = command_line(spec)
    cwd = directory_of(spec, root)
    paths = below(cwd, spec.stdin), below(cwd, spec.stdout), below(cwd, spec.stderr)
    strings = [cwd, *paths, *argv]
    if script or not argv or not argv[0] or any(b"\0" in text for text in strings):
        raise _NotAlike
    outputs = {field: [path] for field, path in zip(("stdout_at", "stderr_at"), paths[1:], strict=True) if path}
    if outputs and lease.execution > 1:
        raise _NotAlike  # files of later executions are published by themselves
    fields = _named(lease, member, spec, usual) | outputs
    return Own(msgspec.Raw(_encode(strings)), fields, spec=packed)


def _marked(lease: Lease, spec: Spec, *, valued: bool) -> Spec:
    """A specification that all elements can share, with marks for what differs. Raises _NotAlike."""
    known = class_info(lease.class_name)
    one = spec.model in ONE_PROCESS_MODELS and known is not None and known.request.nodes is None
    arguments = () if spec.flags & FLAG_FUNCTION else spec.argv
    texts = *arguments, *spec.env, *spec.env.values(), spec.cwd, spec.stdin, spec.stdout, spec.stderr
    if not one or spec.flags & APART_FLAGS or command_line(spec)[1] or any(b"\0" in text for text in texts):
        raise _NotAlike
    marks = Variables(f"{lease.array}_{INDEX}", lease.execution, index_text=INDEX, value=VALUE if valued else None)
    marked = render(spec, marks)
    # A value may be empty, or an absolute path.
    files = marked.stdin, marked.stdout, marked.stderr
    if any(path.startswith(OWN_MARKS[0]) for path in (marked.cwd, *files)):
        raise _NotAlike
    if OWN_MARKS[0] in marked.cwd and any(files):
        raise _NotAlike
    return marked


def _text_of(spec: Spec) -> bytes:
    """What `command_text` makes one line of."""
    return b" ".join(spec.argv) if spec.argv else spec.script.strip()


def _shown(lease: Lease, spec: Spec, marked: Spec) -> str:
    """The command as it is shown, with `INDEX_PLACE` for the index; empty where it is not the same for all."""
    if OWN_MARKS[0] in _text_of(marked) or SIGN in command_text(spec):
        return ""
    # With a sign that it shows as it is for the index, which has another length in each of them.
    signs = Variables(lease.array, lease.execution, index_text=SIGN, value="" if spec.flags & FLAG_VALUES else None)
    shown = command_text(render(spec, signs))
    return shown.replace(SIGN, INDEX_PLACE) if len(shown) <= SHOWN_MAX else ""


def _filled(outputs: Mapping[str, bytes], marks: Mapping[bytes, bytes]) -> dict[str, Any]:
    """Fields of the entry of an element."""
    return {field: [fill_marks(path, marks)] for field, path in outputs.items()}
