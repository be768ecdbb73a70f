"""Views of tasks, made from a record in Redis or from an entry of the journal. Pure.

>>> array_of("7f_3")
'7f'
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pilotq.broker.client.views import TaskView
from pilotq.broker.os_strings import printable
from pilotq.broker.store import keys
from pilotq.broker.store.journal import JournalEntry
from pilotq.broker.store.leases import LeasedElement
from pilotq.broker.store.resources import class_info
from pilotq.broker.store.store import from_iso
from pilotq.broker.tasks.array_indices import Indices
from pilotq.broker.tasks.array_outcomes import count_indices, outcome_of
from pilotq.broker.tasks.states import ENDED

VIEW_FIELDS = (
    "status", "description", "origin", "pq_name", "pq_reason", "pq_exit", "pq_exec", "pq_node", "pq_cpus",
    "pq_queued_at", "enqueued_at", "started_at", "ended_at", "pq_retries", "pq_array", "pq_next", "pq_array_of",
    "pq_running", "pq_class", "pq_bundle", "pq_joining", "pq_process_ended", "pq_children", "pq_open_children",
)  # fmt: skip
_HEAD = re.compile(r"[0-9]+:[0-9]+:([0-9]{1,16})(?= |$)")  # of pq_array
_ELEMENT = re.compile(r"(.+)_(0|[1-9][0-9]{0,15})")  # an index has one spelling, and at most 16 digits (INDEX_LIMIT)


def text_of(value: bytes | None) -> str:
    return value.decode("utf-8", "replace") if value else ""


# Others can write to records: what is damaged in one is shown as if it were not there, and hides no other task.
def _number(text: str) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def whole_of(text: str | bytes | None) -> int:
    try:
        return int(text or 0)
    except ValueError:
        return 0


def _time(text: str) -> float | None:
    try:
        return from_iso(text)
    except ValueError:
        return None


def size_of(text: str) -> int:
    """The number of the elements of an array; 0 of what is none."""
    found = _HEAD.match(text)
    return int(found[1]) if found else 0


def indices_in(text: str) -> Indices | None:
    """The indices of an array as its record has them; None where that is damaged."""
    try:
        return Indices.read(text)
    except ValueError:
        return None


def view_of_record(task_id: str, values: Sequence[bytes | None]) -> TaskView:
    """A view of a task from the fields VIEW_FIELDS of its record."""
    f = dict(zip(VIEW_FIELDS, map(text_of, values), strict=True))
    status = f["status"]
    exit_text = f["pq_exit"]
    reason = f["pq_reason"]
    if status == "started" and not f["pq_array"]:
        reason = "running" if f["pq_running"] else "handed"
    joining = status == "deferred" and bool(f["pq_joining"])
    if joining:
        reason = "joining"
    # Until a launch is reported, started_at is the time at which the task was assigned; the journal has both.
    launched = status in ENDED or f["pq_running"] or joining
    view = TaskView(
        id=task_id,
        name=f["pq_name"],
        status=status,
        reason=reason,
        # That of what has finished with 0 is not written.
        exit_code=whole_of(exit_text) if exit_text else 0 if status == "finished" and f["pq_cpus"] else None,
        # What a lease held until it finished has no other number than 1 if none is written.
        execution=whole_of(f["pq_exec"]) or int(status == "finished" and bool(f["pq_cpus"])),
        node=(f["pq_node"].rpartition(":")[0] or f["pq_cpus"].partition("[")[0]) if status != "queued" else "",
        cores=f["pq_cpus"],
        times={
            "queued": _number(f["pq_queued_at"]) or _time(f["enqueued_at"]),
            "handed": None if launched else _time(f["started_at"]),
            "started": _time(f["started_at"]) if launched else None,
            "ended": _time(f["ended_at"]),
        },
        queue=keys.queue_of(f["origin"]),
        command=f["description"],
        retries=whole_of(f["pq_retries"]),
        array=f["pq_array_of"],
        index=whole_of(task_id.rpartition("_")[2]) if f["pq_array_of"] else None,
        ended=status in ENDED,
    )
    if f["pq_process_ended"]:
        view.times["joining"] = _time(f["pq_process_ended"])
    view.children, view.open_children = whole_of(f["pq_children"]), whole_of(f["pq_open_children"])
    view.array_size, view.is_bundle = size_of(f["pq_array"]), bool(f["pq_bundle"])
    if view.array_size:  # its record has the times of its last element
        view.times.update(handed=None, started=None)
    if view.array_size and (info := class_info(f["pq_class"])) is not None:
        view.array_limit = info.at_most
    return view


def view_of_entry(entry: JournalEntry) -> TaskView:
    """A view of an ended task from its last entry in the journal."""
    view = TaskView(
        id=entry.id,
        name=entry.name,
        command=entry.command,
        status=entry.status,
        reason=entry.reason,
        exit_code=entry.exit_code,
        signal=entry.signal,
        execution=entry.execution,
        node=entry.node,
        cores=entry.cpus,
        times={"queued": entry.queued, "handed": entry.handed, "started": entry.started, "ended": entry.ended},
        message=entry.message,
        max_rss=entry.max_rss,
        cpu=entry.cpu,
        array=entry.array,
        index=entry.index,
        array_size=sum(map(count_indices, entry.elements.values())),
        elements=entry.elements,
        is_bundle=entry.bundle,
        stdout_tail=_tail(entry.stdout),
        stderr_tail=_tail(entry.stderr),
        ended=entry.final,
    )
    if entry.joining is not None:
        view.times["joining"] = entry.joining
    return view


def _tail(data: str | bytes) -> str:
    return printable(data)


def element_view(entry: JournalEntry, task_id: str) -> TaskView | None:
    """A view of an element that never ran, from the entry of its array; None when that had no such element."""
    index = int(task_id.rpartition("_")[2])
    status = outcome_of(entry.elements, index)
    if status is None:
        return None
    times = {"queued": entry.queued, "ended": entry.ended}
    return TaskView(
        id=task_id, name=entry.name, status=status, array=entry.id, index=index, command=entry.command,
        reason=why_never_run(entry.reason) if status == "canceled" else "", times=times, ended=True,
    )  # fmt: skip


def why_never_run(reason: str, else_why: str = "canceled") -> str:
    """Why an element was canceled before a node had it, by the reason of its array."""
    return reason if reason in ("canceled", "dependency", "failures") else else_why


def leased_view(element: LeasedElement, array: TaskView) -> TaskView:
    """A view of an element that a lease holds, by that of its array."""
    lease = element.lease
    times = {"queued": array.times["queued"], "handed": _time(lease.started)}
    return TaskView(
        id=element.id, name=array.name, status="started", reason="handed", execution=lease.execution,
        node=lease.address.rpartition(":")[0], queue=array.queue, command=array.command, retries=array.retries,
        array=array.id, index=int(element.id.rpartition("_")[2]), times=times,
    )  # fmt: skip


def array_of(task_id: str) -> str | None:
    """The array of an element: ``7f_3`` -> ``7f``; None when the text has not the form of an element's id."""
    found = _ELEMENT.fullmatch(task_id)
    return found and found[1]


def add_journal_facts(view: TaskView, entry: JournalEntry) -> TaskView:
    """Add to a view of Redis what only the journal has of an ended task."""
    view.signal, view.message = entry.signal, entry.message
    view.max_rss, view.cpu = entry.max_rss, entry.cpu
    view.stdout_tail, view.stderr_tail = _tail(entry.stdout), _tail(entry.stderr)
    view.elements = view.elements or entry.elements
    return view


def age_of(task_id: str) -> tuple[int, int]:
    """The place of an id in the order of submission; ids that are not ours come first of all."""
    number, _, index = task_id.partition("_")
    try:
        return int(number, 32), int(index or 0)
    except ValueError:
        return -1, 0
