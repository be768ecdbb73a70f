"""Every interval and bound, named, with its unit in the name and the reason for the number."""

from __future__ import annotations

import msgspec


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds. Tests shorten them through ``PILOTQ_SETTINGS`` (a JSON object of these names)."""

    backfill_wait_s: float = 1.0  # W: how long the first blocked task may be overtaken
    ahead_s: float = 0.2  # work handed ahead per lane: hides the round trip, bounds the inversion of priorities
    ahead_after_ends: int = 5  # nothing is handed ahead before so many ends of the class were seen
    ahead_max: int = 200  # tasks handed ahead per lane, whatever their length
    line_s: float = 0.02  # of it a launcher is told at once: more than a turn takes, less than anybody minds
    line_max: int = 16  # ... and never more tasks per lane
    recall_s: float = 1.0  # handed ahead, not started for so long, and would fit elsewhere: taken back
    gather_s: float = 5.0  # how long a new dispatcher waits for the nodes its pilot began with
    report_s: float = 0.02  # ends wait so long for company while their lanes go on with tasks handed ahead
    report_max: int = 64  # ... or until there are so many
    started_after_s: float = 0.1  # a launch is reported by itself only when the task lives so long
    interpreter_calls: int = 100_000  # after so many an interpreter is replaced: what functions leak has a bound
    kill_grace_s: float = 10.0  # between SIGTERM and SIGKILL
    unkillable_s: float = 30.0  # what lives so long after the first SIGKILL hangs in the kernel: it keeps its cores
    launch_confirm_s: float = 10.0  # a launch not confirmed by then: the launcher is put aside
    confirm_s: float = 30.0  # after the kill grace: a node that does not say that it is swept by then keeps its cores
    beat_s: float = 2.0  # a worker's heartbeat
    reconcile_s: float = 1.0
    contact_s: float = 120.0  # a worker out of touch for so long ends its tasks; 0: never, on a unix socket
    contact_margin_s: float = 5.0  # so long after that, and after its grace, they are given to others
    reply_s: float = 10.0  # a worker makes a connection again on which an answer takes longer
    connect_s: float = 2.0  # how long a worker may be held up by a server that takes no connection
    stage_ttl_s: int = 600  # an uncommitted submit vanishes after this
    finished_ttl_s: int = 3600
    failed_ttl_s: int = 7 * 86_400
    keep_records: int = 100_000  # ended records of one kind that Redis keeps for a queue
    server_wait_s: float = 60.0  # how long a part waits for a server that does not answer
    journal_fsync_s: float = 1.0
    restart_limit: int = 5  # restarts of a part ...
    restart_window_s: float = 60.0  # ... within this time, then the pilot ends
    crash_limit: int = 3  # unexplained losses of one task
    aside_after: int = 3  # different tasks in a row that failed at once: their node is doubted; 0: it never is
    aside_parts: int = 0  # 1: so may be nodes that the supervisor made of its own machine
    aside_quick_s: float = 5.0  # what fails sooner has failed at once: importing a program's libraries may take seconds
    aside_pause_s: float = 30.0  # before a node that was put aside is tried with one task; twice as long each time ...
    aside_pause_max_s: float = 600.0  # ... up to this
    stop_wait_s: float = 30.0  # how long `stop` waits for workers to end
    nodes_wait_s: float = 60.0  # how long the least number of nodes may take to join
    retry_node_s: float = 1.0  # before a node whose worker did not start is tried again; twice as long each time
    deadline_s: float = 60.0  # how often Slurm is asked when the allocation ends


def load(text: str | None) -> Settings:
    """Settings from the text of ``PILOTQ_SETTINGS``; unknown names and wrong types raise msgspec.ValidationError."""
    if not text:
        return Settings()
    msgspec.json.decode(text, type=dict[str, float | int])
    unknown = set(msgspec.json.decode(text)) - set(Settings.__struct_fields__)
    if unknown:
        raise msgspec.ValidationError(f"PILOTQ_SETTINGS: unknown names {', '.join(sorted(unknown))}")
    return msgspec.json.decode(text, type=Settings)
