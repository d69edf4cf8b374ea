"""Gives the requests of a door ``drain_timeout`` to finish when its model is being unloaded, or has been loaded anew
beside it: the server itself waits for them as long as they take, and tells the door nothing until then.

Knows when, and for how long; neither how the server is asked nor how requests are answered.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from .engine_client import EngineClient, being_unloaded
from .model_loads import ModelLoad

logger = logging.getLogger(__name__)

ASK_INTERVAL = 0.5
"""Seconds between two looks. The server is asked only while requests run."""


class UnloadWatch:
    """One thread of a door, which may end its requests and release it."""

    def __init__(
        self,
        client: EngineClient,
        load: ModelLoad,
        *,
        ask_state: Callable[[], str],
        num_running: Callable[[], int],
        release: Callable[[float], None],
    ) -> None:
        """``ask_state``: READY, LOADING, UNLOADING or UNAVAILABLE, by the server's index of models; empty: it does not
        say. ``num_running``: requests that still wait for something. ``release``: gives up all that the door has of the
        engine, given the seconds that have passed since its model was found to be unloaded; called once at most."""
        self._client = client
        self._load = load
        self._ask_state = ask_state
        self._num_running = num_running
        self._release = release
        self._seconds = ASK_INTERVAL
        """Until the next look."""
        self._has_failed = False
        self._was_ready = False
        self._looked_replaced = False
        self._is_released = False
        self._is_unloaded = False
        self._since: float | None = None
        """When this load was found to be going, on the monotonic clock."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="unload-watch", daemon=True)
        self._thread.start()

    @property
    def drained_for(self) -> float:
        """Seconds since the model was found to be unloaded; 0 if it was not."""
        return 0.0 if self._since is None or not self._is_unloaded else time.monotonic() - self._since

    def close(self) -> None:
        """The server takes this door away. That takes a second for each, so the others of its load hear the reason."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(self._seconds):
            self._attempt(self._look)
        self._attempt(self._tell_others)

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:
            if not self._has_failed:
                logger.exception("it cannot be told whether the model is being unloaded; its requests go on")
            self._has_failed = True

    def _tell_others(self) -> None:
        if not self._is_unloaded and self._ask_state() == "UNLOADING":
            self._load.mark_unloaded()

    def _look(self) -> None:
        """End what has run out of time."""
        self._seconds = ASK_INTERVAL
        if self._since is None:
            if not self._is_going():
                return
            self._since = time.monotonic()
        is_running = self._num_running() > 0
        remaining = self._since + self._client.drain_timeout - time.monotonic()
        if is_running and remaining > 0:
            self._seconds = min(remaining, ASK_INTERVAL)
        elif is_running:
            self._client.end_all(being_unloaded())
        elif self._is_unloaded and not self._is_released:
            # A client that keeps its connection open would otherwise keep the engine, too.
            self._is_released = True
            self._release(self.drained_for)

    def _is_going(self) -> bool:
        """Whether this load will be taken away when its requests have ended. Never true by mistake: a server that does
        not answer says nothing."""
        if self._load.is_unloaded:
            self._is_unloaded = True
            return True
        if not self._num_running():
            self._looked_replaced = False
            return False
        state = self._ask_state()
        # A load that serves stays READY in the index while another is being loaded to take its place.
        if state == "UNLOADING" or (self._was_ready and state in ("LOADING", "UNAVAILABLE")):
            self._is_unloaded = True
            self._load.mark_unloaded()
            return True
        self._was_ready = self._was_ready or state == "READY"
        # Twice: the server takes the new doors a moment after the last of them is ready.
        looked_replaced, self._looked_replaced = self._looked_replaced, self._load.is_replaced
        return looked_replaced and self._looked_replaced
