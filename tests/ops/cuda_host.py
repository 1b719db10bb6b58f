"""The CUDA kernels on the CPU: their sources, unchanged, compiled against the stand-ins of ``cuda_on_host``.

A GPU's threads are fibers there. That proves indexing, arithmetic and the order of sums; a barrier that is missing, or
that some threads never reach, mostly shows as well, because a fiber runs until it must wait and orders can be chosen.
It does not prove what asynchronous memory does on hardware, nor speed.
"""

import ctypes
import subprocess
from contextlib import contextmanager
from pathlib import Path

from fastalign.ops.backends import cuda

HERE = Path(__file__).resolve().parent / "cuda_on_host"
CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = [*sorted((CSRC / "cuda").glob("*.cu")), *sorted(HERE.glob("*.cpp"))]
# Without optimisation the fibers crawl; with the checks of glibc's fortification they may not jump between stacks.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall"]
FLAGS += ["-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{HERE}", f"-I{CSRC}", "-DLEVEL=scalar", "-DLEVEL_scalar"]
HOPPER = {"multiprocessors": 6, "shared": 227 << 10, "cache": 1 << 20, "largest_cluster": 8, "order": 0}


def build(cxx: str, folder: Path) -> Path:
    """The shared library, every source compiled at the same time."""
    objects = {folder / f"{source.name}.o": source for source in SOURCES}
    running = [subprocess.Popen([cxx, *FLAGS, "-x", "c++", "-c", x, "-o", o]) for o, x in objects.items()]
    assert [process.wait() for process in running] == [0] * len(running), "see the compiler's output"
    library = folder / "cuda_on_host.so"
    subprocess.run([cxx, "-shared", *objects, "-o", library], check=True)
    return library


class HostKernels:
    """What ``_C.cuda`` offers, on the device of ``set_device``; ``blocks`` overrules how many share a row."""

    def __init__(self, library: Path):
        self.library, self.blocks = ctypes.CDLL(str(library)), None
        for name in ("token_logps_forward", "token_logps_backward", "policy_loss", "use_device"):
            getattr(self.library, f"fastalign_{name}_cuda").restype = ctypes.c_char_p
        self.library.fastalign_scratch_cuda.restype = ctypes.c_int64
        self.set_device()

    def set_device(self, **attributes):
        self.library.set_device(*(HOPPER | attributes).values())
        self.set_readable(0, 0)

    def set_readable(self, low, high):
        """Wide loads and copies from global memory outside of these addresses fail; (0, 0): none does."""
        self.library.set_readable(ctypes.c_uint64(low), ctypes.c_uint64(high))

    def last_launch(self):
        """Blocks, threads per block, blocks per cluster, and the number of launches so far."""
        values = (ctypes.c_int * 4)()
        self.library.last_launch(values)
        return tuple(values)

    @contextmanager
    def on_stream(self, x):
        yield self, 0

    def blocks_per_row(self, rows, vocabulary):
        count = self.library.fastalign_blocks_per_row_cuda(ctypes.c_int64(rows), ctypes.c_int64(vocabulary))
        return self.blocks or count

    def scratch(self, op):
        return self.library.fastalign_scratch_cuda(ctypes.c_void_p(op.address))

    def token_logps_forward(self, op, blocks, scratch, stream):
        addresses = ctypes.c_void_p(op.address), blocks, ctypes.c_void_p(scratch), ctypes.c_uint64(stream)
        check(self.library.fastalign_token_logps_forward_cuda(*addresses))

    def token_logps_backward(self, op, blocks, stream):
        addresses = ctypes.c_void_p(op.address), blocks, ctypes.c_uint64(stream)
        check(self.library.fastalign_token_logps_backward_cuda(*addresses))

    def policy_loss_cluster(self, op):
        return self.library.fastalign_policy_loss_cluster_cuda(ctypes.c_void_p(op.address))

    def policy_loss(self, op, cluster, stream):
        check(self.library.fastalign_policy_loss_cuda(ctypes.c_void_p(op.address), cluster, ctypes.c_uint64(stream)))


def check(error):
    if error:
        raise RuntimeError(error.decode())


def serve(kernels, patch):
    """Lets ``fastalign.ops.backends.cuda.token_logps`` compute CPU tensors with these kernels."""
    patch.setattr(cuda, "DEVICE", "cpu")
    patch.setattr(cuda, "on_stream", kernels.on_stream)
