"""Two ranks or more: messages of many sizes with their content checked, a reduction, one-sided puts. No mpicc needed:
the calls go through Open MPI's library, whose handles are the addresses of its objects."""

import ctypes

mpi = ctypes.CDLL("libmpi.so.40", mode=ctypes.RTLD_GLOBAL)


def handle(name):
    return ctypes.byref(ctypes.c_char.in_dll(mpi, name))


def call(name, *arguments):
    code = getattr(mpi, name)(*arguments)
    if code:
        raise SystemExit(f"{name}: {code}")


WORLD, BYTE = handle("ompi_mpi_comm_world"), handle("ompi_mpi_byte")
LONG, SUM, INFO_NULL = handle("ompi_mpi_long"), handle("ompi_mpi_op_sum"), handle("ompi_mpi_info_null")

call("MPI_Init", None, None)
rank, size = ctypes.c_int(), ctypes.c_int()
call("MPI_Comm_rank", WORLD, ctypes.byref(rank))
call("MPI_Comm_size", WORLD, ctypes.byref(size))
rank, size = rank.value, size.value
right, left = (rank + 1) % size, (rank - 1) % size


def pattern(seed, length):
    return bytes((seed * 31 + i * 7) % 251 for i in range(min(length, 4096))) * (length // 4096 + 1)


# Around the ring, eager and by rendezvous.
for length in [0, 1, 8, 4096, 65536, 1 << 20]:
    for turn in range(3):
        sent = pattern(rank + turn, length)[:length]
        got = ctypes.create_string_buffer(max(length, 1))
        call("MPI_Sendrecv", sent, length, BYTE, right, 1, got, length, BYTE, left, 1, WORLD, None)
        if got.raw[:length] != pattern(left + turn, length)[:length]:
            raise SystemExit(f"rank {rank}: {length} bytes came changed")

mine, total = ctypes.c_long(rank + 1), ctypes.c_long()
for _ in range(20):
    call("MPI_Allreduce", ctypes.byref(mine), ctypes.byref(total), 1, LONG, SUM, WORLD)
    if total.value != size * (size + 1) // 2:
        raise SystemExit(f"rank {rank}: a sum of {total.value}")

# Into the neighbour's window.
memory = ctypes.create_string_buffer(1 << 16)
window = ctypes.c_void_p()
call(
    "MPI_Win_create", memory, ctypes.c_ssize_t(len(memory)), 1, INFO_NULL, WORLD, ctypes.byref(window)
)
call("MPI_Win_fence", 0, window)
data = pattern(rank + 9, 1 << 16)[: 1 << 16]
call("MPI_Put", data, 1 << 16, BYTE, right, ctypes.c_ssize_t(0), 1 << 16, BYTE, window)
call("MPI_Win_fence", 0, window)
if memory.raw != pattern(left + 9, 1 << 16)[: 1 << 16]:
    raise SystemExit(f"rank {rank}: a put did not arrive")
call("MPI_Win_free", ctypes.byref(window))
call("MPI_Finalize")
print(f"rank {rank} of {size}: well", flush=True)
