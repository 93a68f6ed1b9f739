"""Python's multiprocessing beside registered memory: parent and children keep their own. Run by tests/memory.rs."""

import ctypes
import multiprocessing
import sys

LEN = 5 * 4096 + 123
ACCESS = 1 | 2 | 4  # LOCAL_WRITE, REMOTE_WRITE, REMOTE_READ


def child(number):
    """Works on memory of its own."""
    return sum(bytearray([number]) * 100_000)


def look(memory, queue):
    """In a forked child: sees what the parent registered, and writes to its own copy."""
    seen = memory.raw == b"\x11" * LEN
    ctypes.memset(memory, 0x22, LEN)
    queue.put(seen and memory.raw == b"\x22" * LEN)


def register(verbs, memory):
    """Opens the first device and registers the memory."""
    for name in ("ibv_get_device_list", "ibv_open_device", "ibv_alloc_pd", "ibv_reg_mr"):
        getattr(verbs, name).restype = ctypes.c_void_p
    devices = verbs.ibv_get_device_list(None)
    device = ctypes.c_void_p.from_address(devices)
    context = ctypes.c_void_p(verbs.ibv_open_device(device))
    pd = ctypes.c_void_p(verbs.ibv_alloc_pd(context))
    mr = ctypes.c_void_p(verbs.ibv_reg_mr(pd, memory, ctypes.c_size_t(LEN), ACCESS))
    assert context.value and pd.value and mr.value, "no MR"
    return mr


def main():
    verbs = ctypes.CDLL("libibverbs.so.1", use_errno=True)
    memory = ctypes.create_string_buffer(b"\x11" * LEN, LEN)
    mr = register(verbs, memory)
    for way in ("fork", "spawn"):
        context = multiprocessing.get_context(way)
        with context.Pool(3) as pool:
            assert pool.map(child, range(6)) == [100_000 * n for n in range(6)], way
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    one = fork.Process(target=look, args=(memory, queue))
    one.start()
    assert queue.get(timeout=20), "the child saw other bytes, or could not write them"
    one.join()
    assert memory.raw == b"\x11" * LEN, "a child wrote into its parent's memory"
    assert verbs.ibv_dereg_mr(mr) == 0
    assert memory.raw == b"\x11" * LEN, "deregistration changed the bytes"
    print("OK")


if __name__ == "__main__":
    main()
    sys.exit(0)
