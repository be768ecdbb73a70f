"""The real dispatcher in a thread of a test."""

from __future__ import annotations

import threading

from pilotq.broker.scheduling.dispatcher import Dispatcher
from tests.support.engine import QUEUE_ID, Engine


class RunningDispatcher:
    """The real dispatcher, in a thread; ``error`` is what ended it."""

    def __init__(self, engine: Engine) -> None:
        self.dispatcher = Dispatcher(engine.running.address, QUEUE_ID, engine.settings)
        self.error: Exception | None = None
        self._engine = engine
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> RunningDispatcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.dispatcher.stop = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.dispatcher.run()
        except Exception as error:  # noqa: BLE001 - the boundary of the thread: the test looks at it
            self.error = error
        finally:
            self.dispatcher.close()
