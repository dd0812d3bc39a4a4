import ctypes
import sys

import pytest

from utils import memory
from utils.memory import FreedMemory, resident_bytes

MIB = 1 << 20


def test_trims_when_the_process_has_grown_by_half(monkeypatch):
    sizes, trims = [], []
    monkeypatch.setattr(memory, "resident_bytes", lambda: sizes.pop(0))
    freed = FreedMemory()
    freed._trim = trims.append
    for size in (100, 149, 90):
        sizes.append(size)
        freed.give_back()
    assert trims == []
    sizes += [151, 80]
    freed.give_back()
    assert trims == [0]
    sizes += [150, 160, 140]  # what is held has really grown: the limit follows
    freed.give_back()
    freed.give_back()
    assert trims == [0, 0]
    sizes += [209]
    freed.give_back()
    assert trims == [0, 0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc_trim and /proc")
def test_holes_are_given_back():
    """Every other block of a large heap is freed: glibc keeps them all, malloc_trim gives them back."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    freed = FreedMemory()
    freed.give_back()
    before = resident_bytes()
    blocks = [libc.malloc(64 << 10) for _ in range(2 * before // (64 << 10))]
    for block in blocks:
        ctypes.memset(block, 1, 64 << 10)
    for block in blocks[::2]:
        libc.free(block)
    grown = resident_bytes()
    assert grown > 2 * before
    freed.give_back()
    after = resident_bytes()
    for block in blocks[1::2]:
        libc.free(block)
    assert grown - after > before / 2


def test_without_proc(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(memory.Path, "read_text", missing)
    assert resident_bytes() == 0
    FreedMemory().give_back()
