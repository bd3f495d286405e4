"""What may happen to a file that several processes write: one of them is killed, or the system takes no more bytes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from hf_unfreeze._disk import DiskStore

ROOM = 1 << 30
WRITER = """
import sys, torch
from test_store_harm import ROOM, row_of
from hf_unfreeze._disk import DiskStore
store = DiskStore(sys.argv[1], ROOM)
for number in range(int(sys.argv[2]), 1 << 30, 4):
    store.put(row_of(each) for each in range(number, number + 4))
    if number == int(sys.argv[2]):
        print("writes", flush=True)
"""
READER = """
import sys, time
from test_store_harm import ROOM, row_of
from hf_unfreeze._disk import DiskStore
store = DiskStore(sys.argv[1], ROOM)
reading = store._env.begin()
print(store._env.readers().count(sys.argv[2]), flush=True)
time.sleep(600 if sys.argv[2] == "nobody" else 0)
"""
FULL = """
import resource, sys, warnings
from test_store_harm import ROOM, row_of
from hf_unfreeze._disk import DiskStore
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
store = DiskStore(sys.argv[1], ROOM)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for number in range(0, 400, 4):
        store.put(row_of(each) for each in range(number, number + 4))
found = store.get([row_of(number)[0] for number in range(400)])
print(*(warning.message for warning in told), sum(row is not None for row in found))
"""


def row_of(number):
    """A key and a row that says whose it is; some are longer than a page of the file."""
    return number.to_bytes(8, "big"), torch.full((1 + number % 7 * 1000,), float(number))


def assert_right(store, numbers):
    """Each row is there as it was written, or not at all; return how many are there."""
    expected = dict(map(row_of, numbers))
    found = store.get([*expected])
    assert all(row is None or torch.equal(row, expected[key]) for key, row in zip(expected, found, strict=True))
    return sum(row is not None for row in found)


def launched(script, folder, *arguments):
    command = [sys.executable, "-c", script, str(folder), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_writer_that_is_killed_harms_neither_the_file_nor_the_others(tmp_path):
    store, own, found = DiskStore(tmp_path, ROOM), 1 << 40, 0
    for turn in range(4):
        first = turn << 20
        child = launched(WRITER, tmp_path, first)
        assert child.stdout.readline() == "writes\n", child.communicate()[1]
        for _ in range(20 + 7 * turn):
            store.put([row_of(own)])
            own += 1
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        child.communicate()
        began = time.monotonic()
        store.put([row_of(own)])  # the lock that it may have held is free
        own += 1
        assert time.monotonic() - began < 30
        found += assert_right(store, range(first, first + 4000))
    assert found >= 4 * 4
    assert assert_right(store, range(1 << 40, own)) == own - (1 << 40)
    assert store.max_bytes == ROOM and 0 < store.nbytes < ROOM


def test_a_reader_that_is_killed_is_forgotten(tmp_path):
    """Each would keep one of 512 places, and old pages from being used again."""
    store = DiskStore(tmp_path, ROOM)
    store.put([row_of(0)])
    child = launched(READER, tmp_path, "nobody")
    assert child.stdout.readline() == "0\n"
    child.kill()
    child.communicate()
    assert str(child.pid) in store._env.readers()
    assert launched(READER, tmp_path, child.pid).communicate()[0] == "0\n"


def test_a_disk_that_takes_no_more_bytes_ends_the_writing_only(tmp_path):
    child = launched(FULL, tmp_path)
    output, errors = child.communicate()
    assert child.returncode == 0, errors
    told, _, found = output.strip().rpartition(" ")
    assert told.startswith("the frozen-prefix cache writes no more to")
    store = DiskStore(tmp_path, ROOM)
    assert assert_right(store, range(400)) == int(found) > 0
    store.put([row_of(401)])
    assert assert_right(store, [401]) == 1
