"""Whose turn it is among waiting sequences of different users. Knows neither blocks nor budgets."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterator
from collections.abc import Sequence as Row

from .sequence import Sequence, Status


def in_turn(waiting: Row[Sequence], running: Row[Sequence]) -> Iterator[Sequence]:
    """The sequences of ``waiting``, which is in order of service, so that users share what there is room for.

    Among equally urgent ones the user with the fewest running sequences is next, and of that user the first that came;
    who names no user shares with all who do not. A sequence counts as soon as the consumer has made it run.
    """
    if not any(seq.user for seq in waiting):
        yield from tuple(waiting)
        return
    num_running = Counter(seq.user for seq in running)
    for _, equally_urgent in itertools.groupby(tuple(waiting), key=lambda seq: seq.order[:2]):
        queues: dict[str, deque[Sequence]] = {}
        for seq in equally_urgent:
            queues.setdefault(seq.user, deque()).append(seq)
        while queues:
            user = min(queues, key=lambda name: (num_running[name], queues[name][0].arrival))
            seq = queues[user].popleft()
            if not queues[user]:
                del queues[user]
            yield seq
            num_running[user] += seq.status is Status.RUNNING
