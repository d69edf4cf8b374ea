"""Memory of long-lived processes, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

SHAPES = """
import psutil, torch
from trident_llm.kernels import reference
{bound}
def multiply(sizes):
    for size in sizes:
        reference.linear(torch.ones(size, 64), weight, None)
weight = reference.pack_linear(torch.ones(128, 64))
multiply(range(1, 129))
before = psutil.Process().memory_info().rss
multiply(range(129, 900))
print((psutil.Process().memory_info().rss - before) / 2**20)
"""
GARBAGE = """
import collections, gc
from trident_llm.process_memory import freeze_loaded_objects
loaded = [[] for _ in range(1_000_000)]
freeze_loaded_objects()
live = collections.deque(maxlen=20_000)
most = 0
for number in range(150_000):
    cycle = []
    cycle.append(cycle)
    live.append(cycle)
    if number % 1000 == 0:
        most = max(most, len(gc.get_objects()))
print(most)
"""


def run(code: str) -> float:
    variables = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    environment = {name: value for name, value in os.environ.items() if name not in variables}
    environment["PYTHONPATH"] = ":".join(sys.path)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return float(result.stdout)


def test_products_of_many_shapes_do_not_fill_the_memory():
    bound = "from trident_llm.process_memory import bound_onednn_caches; bound_onednn_caches()"
    assert run(SHAPES.format(bound=bound)) < 30


def test_garbage_is_collected_however_much_was_loaded():
    """20,000 objects live; without the second collection up to 150,000 were there."""
    assert run(GARBAGE) < 110_000
