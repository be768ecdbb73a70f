"""`pilotq dispatcher`: the process that decides which task gets which cores, started by hand."""

from __future__ import annotations

import click

from pilotq.broker.errors import InvalidInput
from pilotq.broker.log import log_as
from pilotq.broker.pilot.directory import create
from pilotq.broker.pilot.start import SupervisorOptions, save_submit_context, saved_submit_context
from pilotq.cli.options import dir_option, server_url
from pilotq.cli.part_options import reach_part, redis_option, settings


@click.command("dispatcher")
@dir_option
@redis_option
@click.option(
    "--journal", is_flag=True, help="Also write the journal, and let commands find the pilot on your own server."
)
def dispatcher_command(directory: str | None, redis: str | None, journal: bool) -> int:
    """Run only the dispatcher of a pilot, in the foreground.

    It waits for the server for a minute. With a server of your own, DIR holds what it must remember about the tasks.
    With --journal it is the whole pilot except server and workers: other commands find it and its journal in DIR, and
    `pilotq stop` ends it together with all workers.

    \b
    Example: pilotq dispatcher --dir p
    """
    from pilotq.broker.scheduling.dispatcher import run_dispatcher

    if journal:
        return _run_with_journal(directory, redis)
    log_as("dispatcher")
    pilot, address, queue_id = reach_part(directory, redis)
    return run_dispatcher(address, queue_id, settings(), saved_submit_context(pilot))


def _run_with_journal(directory: str | None, redis: str | None) -> int:
    """A pilot on a server of the user's own, whose workers are started elsewhere; returns the exit code."""
    from pilotq.broker.pilot.supervisor import run_supervisor

    url = server_url(redis)
    if url is None or directory is None:
        raise InvalidInput("--journal needs a server of your own: give --redis (or PILOTQ_REDIS_URL) and --dir")
    pilot = create(directory)
    save_submit_context(pilot)
    return run_supervisor(SupervisorOptions(directory=pilot.directory, redis=url), lambda _directory, _node: None)
