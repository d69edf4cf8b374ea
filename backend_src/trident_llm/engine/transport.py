"""The engine's end of the socket: decodes what doors send, and holds deltas back for doors that are slow.

One message per door and step. Knows nothing of scheduling; it never waits for a door.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from dataclasses import dataclass, field

import msgspec
import zmq

from ..protocol import CommandReply, Delta, StepDeltas, ToEngine, Welcome

logger = logging.getLogger(__name__)

SEND_HIGH_WATER_MARK = 64
"""Messages ZeroMQ may hold for one door; what comes later is merged here."""

RETRY_SECONDS = 0.05
"""Between two tries of a full door, because each try encodes everything that waits for it."""

_Key = tuple[str, int]


@dataclass(frozen=True)
class Received:
    """A message and the identity of the door that sent it."""

    door: bytes
    message: ToEngine


@dataclass(frozen=True)
class Undelivered:
    """Doors that a flush could not serve."""

    gone: list[bytes]
    """Doors that are no longer connected."""
    stalled: list[bytes]
    """Doors whose unread deltas passed the bound; what was held for them is dropped."""


@dataclass
class _Mailbox:
    """What waits for one door: single messages in order, and one merged delta per sequence."""

    messages: deque[bytes] = field(default_factory=deque)
    deltas: dict[_Key, Delta] = field(default_factory=dict)
    size: int = 0
    """Token ids and log-probabilities in ``deltas``."""
    retry_at: float = 0.0
    """When to try a door again that could not take more, on the monotonic clock."""


class DoorSocket:
    """A ROUTER socket bound at ``address``. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        address: str,
        epoch: str,
        *,
        max_pending: int = 1 << 20,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        """``max_pending``: token ids and log-probabilities held for one door before its requests are given up.
        ``context``: for doors in this process."""
        self._epoch = epoch
        self._max_pending = max_pending
        self._socket = (context or zmq.Context.instance()).socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.SNDHWM, SEND_HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        # The folder keeps other users out; so does the socket, should the folder's mode be changed.
        self._socket.setsockopt(zmq.IPC_FILTER_UID, os.getuid())
        self._socket.bind(address)
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._encoder = msgspec.msgpack.Encoder()
        self._mailboxes: dict[bytes, _Mailbox] = {}

    @property
    def has_pending(self) -> bool:
        return bool(self._mailboxes)

    def receive(self, timeout_ms: int) -> list[Received]:
        """All messages that are here, after waiting at most ``timeout_ms`` for the first; malformed ones dropped."""
        received: list[Received] = []
        if not self._socket.poll(timeout_ms, zmq.POLLIN):
            return received
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return received
            try:
                received.append(Received(frames[0], self._decoder.decode(frames[-1])))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                logger.warning("dropped a malformed message of door %r: %s", frames[0], error)

    def post(self, door: bytes, message: Welcome | CommandReply) -> None:
        self._mailbox(door).messages.append(self._encoder.encode(message))

    def post_delta(self, door: bytes, delta: Delta) -> None:
        """Queue ``delta``, which belongs to this object from now on; one delta per sequence waits at most."""
        mailbox = self._mailbox(door)
        key = (delta.request_id, delta.sample_index)
        if key in mailbox.deltas:
            _extend(mailbox.deltas[key], delta)
        else:
            mailbox.deltas[key] = delta
        mailbox.size += 1 + len(delta.token_ids) + sum(len(entry.top) for entry in delta.logprobs or ())

    def flush(self) -> Undelivered:
        """Send what can be sent without waiting."""
        gone: list[bytes] = []
        stalled: list[bytes] = []
        now = time.monotonic()
        for door, mailbox in list(self._mailboxes.items()):
            if mailbox.retry_at > now and mailbox.size <= self._max_pending:
                continue
            try:
                self._send_mailbox(door, mailbox)
                del self._mailboxes[door]
            except zmq.Again:
                mailbox.retry_at = now + RETRY_SECONDS
                if mailbox.size > self._max_pending:
                    mailbox.deltas, mailbox.size = {}, 0
                    stalled.append(door)
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                del self._mailboxes[door]
                gone.append(door)
        return Undelivered(gone, stalled)

    def close(self) -> None:
        self._socket.close(linger=0)

    def _mailbox(self, door: bytes) -> _Mailbox:
        return self._mailboxes.setdefault(door, _Mailbox())

    def _send_mailbox(self, door: bytes, mailbox: _Mailbox) -> None:
        while mailbox.messages:
            self._socket.send_multipart([door, mailbox.messages[0]], zmq.NOBLOCK)
            mailbox.messages.popleft()
        if mailbox.deltas:
            message = StepDeltas(epoch=self._epoch, deltas=list(mailbox.deltas.values()))
            self._socket.send_multipart([door, self._encoder.encode(message)], zmq.NOBLOCK)


def _extend(earlier: Delta, later: Delta) -> None:
    """Append ``later``, which follows ``earlier``, to it."""
    earlier.token_ids.extend(later.token_ids)
    if later.logprobs is not None:
        earlier.logprobs = [*(earlier.logprobs or ()), *later.logprobs]
    earlier.finish_reason = later.finish_reason
    earlier.stopped_by_token = later.stopped_by_token
    earlier.error = later.error
    earlier.num_cached_tokens = max(earlier.num_cached_tokens, later.num_cached_tokens)
