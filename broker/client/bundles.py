"""Finds the tasks of a submission that are alike, and makes bundles of them: one record for all. Pure.

A *bundle* is stored as an array whose elements have each a description of their own (`spec.Member`), in compressed
blocks, and is handed out as one. The tasks of a bundle wait in one class list, have the same number of retries, and
need nothing of their own in the server before they run: no task waits for one of them by name, and they wait for none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import msgspec

from pilotq.broker.client.commit import NO_BUNDLE, SubmitPlan
from pilotq.broker.tasks.dependencies import ALL_FIELDS, Element, Parent, Parents
from pilotq.broker.tasks.functions import Packed
from pilotq.broker.tasks.model import ARRAY_LIMIT, ArrayRange, Task
from pilotq.broker.tasks.spec import MemberPacker

MEMBER_MAX = 4096  # bytes of one description: a worker reads 1,000 at once


def bundled(plan: SubmitPlan, above: int) -> SubmitPlan:
    """The plan with a bundle in place of tasks that can be in one, where these are more than ``above``."""
    if len(plan.tasks) <= above:
        return plan
    groups = _groups(plan)
    packer, layout = MemberPacker(), bytearray([NO_BUNDLE]) * len(plan.tasks)
    members: list[list[bytes]] = []
    for numbers in groups:
        if len(numbers) <= above or len(members) == NO_BUNDLE or len(numbers) > ARRAY_LIMIT:
            continue
        packed = [packer.pack(plan.tasks[n], plan.tasks[plan.likes[n]], plan.payloads.get(n)) for n in numbers]
        small = [len(one) <= MEMBER_MAX for one in packed]
        if sum(small) <= above:
            continue
        for number, fits in zip(numbers, small, strict=True):
            if fits:
                layout[number] = len(members)
        members.append([one for one, fits in zip(packed, small, strict=True) if fits])
    return _with_bundles(plan, bytes(layout), members) if members else plan


def _groups(plan: SubmitPlan) -> Iterable[list[int]]:
    """The positions of the tasks that can share a bundle."""
    after, after_each = plan.parents.after.values(), plan.parents.after_each.values()
    parents = set(_named([d.parent for d in several] for several in after)) | set(_named(after_each))
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    fits: dict[int, bool] = {}
    for number, like in enumerate(plan.likes):
        task = plan.tasks[like]
        if like not in fits:
            fits[like] = shares_record(task)
        if fits[like] and number not in parents:
            groups[plan.classes[number], task.retries].append(number)
    return groups.values()


def _named(parents: Iterable[Iterable[Parent]]) -> Iterable[int]:
    for several in parents:
        for parent in several:
            if isinstance(parent, Element):
                yield parent.array
            elif isinstance(parent, int):
                yield parent


def shares_record(task: Task) -> bool:
    """Whether it needs nothing that only a task with a record of its own has."""
    waits = any(getattr(task, field) for field in ALL_FIELDS)
    return not (task.is_array or task.join or waits or task.memory_grow or task.time_grow or task.qcg)


def with_calls(alone: SubmitPlan, payloads: Sequence[bytes], members: Sequence[bytes]) -> SubmitPlan:
    """The plan of these calls of functions, each also packed as a `Member`; ``alone`` is that of the first one.

    What is alike in them was checked, and can share a record. Large ones have records of their own.
    """
    [first], [name] = alone.tasks, alone.classes
    layout = bytes([0 if len(member) <= MEMBER_MAX else NO_BUNDLE for member in members])
    bundle = layout.index(0)
    records = [number for number, place in enumerate(layout) if place == NO_BUNDLE or number == bundle]
    tasks = [msgspec.structs.replace(first, function=Packed(payloads[number])) for number in records]
    place, small = records.index(bundle), [member for member in members if len(member) <= MEMBER_MAX]
    tasks[place] = _record(tasks[place], len(small))
    own = {number: payloads[record] for number, record in enumerate(records) if number != place}
    parents, likes = Parents({}, {}), range(len(tasks))
    return SubmitPlan(tasks, [name] * len(tasks), parents, len(payloads), own, likes, {place: small}, layout)


def _with_bundles(plan: SubmitPlan, layout: bytes, members: list[list[bytes]]) -> SubmitPlan:
    firsts = {layout.index(bundle) for bundle in range(len(members))}
    records = [number for number, bundle in enumerate(layout) if bundle == NO_BUNDLE or number in firsts]
    places = {number: place for place, number in enumerate(records)}
    found = {places[number]: members[layout[number]] for number in firsts}
    tasks = [
        _record(plan.tasks[number], len(found[place])) if place in found else plan.tasks[number]
        for place, number in enumerate(records)
    ]
    classes = [plan.classes[number] for number in records]
    payloads = {places[number]: payload for number, payload in plan.payloads.items() if number in places}
    after = {
        places[number]: [d._replace(parent=_moved(d.parent, places)) for d in several]
        for number, several in plan.parents.after.items()
    }
    after_each = {places[n]: [_moved(p, places) for p in several] for n, several in plan.parents.after_each.items()}
    parents = Parents(after, after_each)
    return SubmitPlan(tasks, classes, parents, plan.total, payloads, range(len(tasks)), found, layout)


def _record(first: Task, number: int) -> Task:
    """The array that a bundle is to all who do not look into it."""
    return msgspec.structs.replace(first, name=None, array=ArrayRange(0, number - 1))


def _moved(parent: Parent, places: dict[int, int]) -> Parent:
    if isinstance(parent, Element):
        return Element(places[parent.array], parent.element)
    return places[parent] if isinstance(parent, int) else parent
