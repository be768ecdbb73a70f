"""Every interval and bound of a pilot, with its unit in the name and the reason for the number."""

from __future__ import annotations

import msgspec


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Intervals and bounds; those whose names end in ``_s`` are in seconds.

    Tests shorten them through ``PILOTQ_SETTINGS``, a JSON object of these names: ``{"heartbeat_s": 0.2}``.
    """

    # -- placement and prefetch ---------------------------------------------------------------------------------------

    # The first task that finds no place may be overtaken for so many seconds; then resources are kept for it.
    backfill_wait_s: float = 1.0
    # A slot prefetches so many seconds of work: this hides the round trip, and bounds how long a priority is inverted.
    prefetch_s: float = 0.2
    # Nothing is prefetched before so many tasks of the class have ended: their mean run time is not known earlier.
    prefetch_after: int = 5
    # A slot prefetches at most so many tasks, however short they are.
    prefetch_max: int = 500
    # A prefetched task that has not started after so many seconds is retracted where it would fit elsewhere.
    retract_after_s: float = 1.0
    # A launcher is given chains of so many seconds of work: longer than a turn of the worker, too short to be noticed.
    chain_s: float = 0.02
    # A chain has at most so many tasks.
    chain_max: int = 256
    # A new dispatcher waits so many seconds for the nodes its pilot began with.
    initial_nodes_wait_s: float = 5.0

    # -- what workers report ------------------------------------------------------------------------------------------

    # Ends are collected for so many seconds before they are reported, while slots go on with prefetched tasks.
    report_batch_s: float = 0.02
    # Ends are reported earlier when there are so many.
    report_batch_max: int = 64
    # Ends of which only their lines in the journal are to be kept wait for so many seconds ...
    plain_batch_s: float = 0.05
    # ... or until there are so many: the server is called seldom, and a node has work for longer.
    plain_batch_max: int = 256
    # A start is reported on its own only if the task runs for so many seconds.
    started_after_s: float = 0.1

    # -- executions on a node -----------------------------------------------------------------------------------------

    # A Python interpreter is replaced after so many calls, which bounds what functions leak.
    interpreter_calls: int = 100_000
    # SIGKILL follows SIGTERM after so many seconds.
    kill_grace_s: float = 10.0
    # A process that lives so many seconds after the first SIGKILL hangs in the kernel: its task keeps its cores.
    unkillable_s: float = 30.0
    # A launcher that does not confirm a launch within so many seconds is replaced.
    launch_confirm_s: float = 10.0
    # A launch that a passing shortage prevents (of processes, memory, descriptors) is tried again for so many seconds.
    shortage_s: float = 60.0
    # A node of a multinode task that does not confirm within so many seconds after the kill grace that it is swept
    # keeps its cores reserved.
    sweep_confirm_s: float = 30.0

    # -- contact with the server --------------------------------------------------------------------------------------

    # A worker sends a heartbeat every so many seconds.
    heartbeat_s: float = 2.0
    # The dispatcher compares its state with the server's every so many seconds.
    reconcile_s: float = 1.0
    # A worker that is out of touch for so many seconds ends its tasks; 0: never, which is used on a unix socket.
    node_timeout_s: float = 120.0
    # Other nodes get these tasks so many seconds after that, and after the kill grace.
    node_timeout_margin_s: float = 5.0
    # A worker makes a connection anew on which an answer takes longer than so many seconds.
    reply_s: float = 10.0
    # A server that accepts no connection may hold a worker up for so many seconds.
    connect_s: float = 2.0
    # A process of the pilot waits so many seconds for a server that does not answer.
    server_wait_s: float = 60.0

    # -- submitting ---------------------------------------------------------------------------------------------------

    # Where a submission has more tasks than so many that are alike, these share a record, as elements of an array do.
    bundle_above: int = 1000
    # The same for calls of an executor, whose results go to it and nowhere else: so nobody needs a record of each.
    bundle_calls_above: int = 4

    # -- how long records are kept ------------------------------------------------------------------------------------

    # A submission that was not committed vanishes after so many seconds.
    stage_ttl_s: int = 600
    # The record of a finished task is kept for so many seconds.
    finished_ttl_s: int = 3600
    # The record of a failed task is kept for so many seconds.
    failed_ttl_s: int = 7 * 86_400
    # Redis keeps at most so many ended records of one kind for a queue.
    keep_records: int = 100_000
    # A class whose list is empty is forgotten after so many seconds; an RQ tool holds a list elsewhere for a moment.
    idle_class_s: float = 60.0
    # The journal is put onto the disk every so many seconds.
    journal_fsync_s: float = 1.0

    # The memory of a running task is measured at least every so many seconds; near its limit oftener.
    memory_sample_s: float = 1.0

    # -- failures -----------------------------------------------------------------------------------------------------

    # A process of the pilot may be restarted so many times within the window; one more time, and the pilot ends.
    restart_limit: int = 5
    # The window of the restarts, in seconds.
    restart_window_s: float = 60.0
    # A task is given up after so many losses that nothing else explains.
    crash_limit: int = 3
    # A node is suspected after so many different tasks in a row that failed quickly; 0: never.
    quarantine_after: int = 3
    # 1: this holds for nodes, too, that the supervisor has made of its own machine.
    quarantine_local_nodes: int = 0
    # A failure within so many seconds is quick; importing a program's libraries may take some.
    quick_failure_s: float = 5.0
    # A quarantined node is probed with one task after so many seconds, and after twice as long each next time.
    probe_after_s: float = 30.0
    # The wait between two probes of a node is at most so many seconds.
    probe_after_max_s: float = 600.0

    # -- start and end of a pilot -------------------------------------------------------------------------------------

    # `stop` waits so many seconds for workers to end, beside the kill grace.
    stop_wait_s: float = 30.0
    # The least number of nodes must have joined after so many seconds.
    nodes_wait_s: float = 60.0
    # A worker that did not start is started again after so many seconds, and after twice as long each next time.
    worker_restart_s: float = 1.0
    # Slurm is asked every so many seconds when the allocation ends.
    allocation_poll_s: float = 60.0


def load(text: str | None) -> Settings:
    """Settings from the text of ``PILOTQ_SETTINGS``; unknown names and wrong types raise msgspec.ValidationError."""
    if not text:
        return Settings()
    msgspec.json.decode(text, type=dict[str, float | int])
    unknown = set(msgspec.json.decode(text)) - set(Settings.__struct_fields__)
    if unknown:
        raise msgspec.ValidationError(f"PILOTQ_SETTINGS: unknown names {', '.join(sorted(unknown))}")
    return msgspec.json.decode(text, type=Settings)
