"""An application that uses RQ and does not know pilotq: `pilotq exec -- python app.py`."""

from __future__ import annotations

import os
import time

from jobs import cores, hits, note, once_broken, pi
from redis import Redis
from rq import Callback, Queue, Retry

TRIES = 20_000


def main() -> None:
    connection = Redis.from_url(os.environ.get("RQ_REDIS_URL", "redis://localhost:6379"))
    queue = Queue("numbers", connection=connection)
    parts = queue.enqueue_many([Queue.prepare_data(hits, (seed, TRIES)) for seed in range(64)])
    ids = [part.id for part in parts]
    total = queue.enqueue(pi, ids, TRIES, depends_on=parts, on_success=Callback(note))
    # Stock RQ ignores what pilotq reads in `meta`: this job gets two cores of its own.
    wide = queue.enqueue(cores, meta={"cores": 2})
    broken = queue.enqueue(once_broken, retry=Retry(max=2))
    for job in (total, wide, broken):
        while not (job.is_finished or job.is_failed or job.is_canceled):
            time.sleep(0.05)
    print(f"pi is about {total.return_value():.2f}")
    print(f"a job with two cores saw {wide.return_value()}")
    print(f"a job that broke was tried {broken.return_value()} times")
    print("the callback noted a result" if connection.get(f"pi:{total.id}") else "nothing was noted")


if __name__ == "__main__":
    main()
