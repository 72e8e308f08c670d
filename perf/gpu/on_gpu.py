#!/usr/bin/env python3
"""Decompression on the GPU, the baseline of `interference.py`: nvCOMP undoes zstd, a Triton kernel dequantizes and scatters.

`on_gpu.py [--chunks N] [--folder DIR]`: decodes chunks that `shadowserve encode` wrote, compares every bit with what `shadowserve decode`
makes of them, and measures how much it delivers with nothing else on the GPU; one JSON object on standard output.

It takes our own encoded chunks as they are: one copy brings them to the GPU, one call decompresses all their zstd frames (of 128 KiB
of codes each), and one kernel makes bf16 of codes, scales and offsets, and writes it to its pages. Checksums are not looked at.

nvCOMP is `pip install nvidia-libnvcomp-cu13`, or the library that NVCOMP names.
"""
import argparse
import contextlib
import ctypes
import json
import os
import pathlib
import statistics
import struct
import subprocess
import tempfile
import time

import torch
import triton
import triton.language as tl
from lib import BINARY, compose, machine, tokens_of

LAYERS, HEADS, DIM, CHUNK, PAGE = 32, 8, 128, 256, 16
PLANES, PAGES = 2 * LAYERS, CHUNK // PAGE
CODE_BYTES = CHUNK * HEADS * DIM // 2
ENTRY, INT4, PER_CHANNEL, BF16, ZSTD = struct.Struct("<QIIBBBBB3x"), 3, 1, 1, 1


class Options(ctypes.Structure):
    """nvcompBatchedZstdDecompressOpts_t: the backend, and room for more. 2 is the implementation in kernels."""

    _fields_ = [("backend", ctypes.c_int), ("reserved", ctypes.c_char * 60)]


class Nvcomp:
    """The two functions that are needed, of nvCOMP 5 and 6."""

    def __init__(self):
        self.lib = ctypes.CDLL(self.path())
        self.options = Options(backend=2)

    @staticmethod
    def path():
        if "NVCOMP" in os.environ:
            return os.environ["NVCOMP"]
        import nvidia.libnvcomp
        found = sorted(pathlib.Path(nvidia.libnvcomp.__path__[0]).glob("lib64/libnvcomp.so.*"))
        return str(found[-1])

    def version(self):
        class Properties(ctypes.Structure):
            _fields_ = [("version", ctypes.c_uint32), ("cudart", ctypes.c_uint32)]
        found = Properties()
        self.check(self.lib.nvcompGetProperties(ctypes.byref(found)), "nvcompGetProperties")
        return found.version

    def check(self, status, call):
        if status:
            raise RuntimeError(f"{call}: nvCOMP status {status}")

    def temporary_bytes(self, frames, frame_bytes):
        needed = ctypes.c_size_t()
        self.check(self.lib.nvcompBatchedZstdDecompressGetTempSize(
            ctypes.c_size_t(frames), ctypes.c_size_t(frame_bytes), self.options, ctypes.byref(needed),
            ctypes.c_size_t(frames * frame_bytes), None), "nvcompBatchedZstdDecompressGetTempSize")
        return needed.value

    def decompress(self, batch, stream):
        """All frames of a batch; see the header `nvcomp/zstd.h`."""
        def pointer(tensor):
            return ctypes.c_void_p(tensor.data_ptr())
        self.check(self.lib.nvcompBatchedZstdDecompressAsync(
            pointer(batch.frame_pointers), pointer(batch.frame_bytes), pointer(batch.code_bytes), pointer(batch.found_bytes),
            ctypes.c_size_t(batch.frames), pointer(batch.temporary), ctypes.c_size_t(batch.temporary.numel()),
            pointer(batch.code_pointers), self.options, pointer(batch.statuses), ctypes.c_void_p(stream.cuda_stream)),
            "nvcompBatchedZstdDecompressAsync")


@triton.jit
def dequantize(encoded, planes, codes, table, pages, layers, page_count,
               TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr):
    """One page of one plane: 4-bit codes, each with its scale and offset, to bf16. Multiplied, then added, as the format says."""
    plane, page = tl.program_id(0), tl.program_id(1)
    half: tl.constexpr = DIM // 2
    rows_of_page: tl.constexpr = PAGE * HEADS
    side, layer = plane % 2, (plane // 2) % layers
    row = tl.arange(0, rows_of_page)[:, None]
    byte = tl.arange(0, half)[None, :]
    at = page * rows_of_page + row
    packed = tl.load(codes + plane.to(tl.int64) * (TOKENS * HEADS * half) + at * half + byte).to(tl.int32)
    # K has a scale and an offset per channel, V per token and head.
    groups = tl.where(side == 0, HEADS * DIM, TOKENS * HEADS)
    scales = encoded + tl.load(planes + plane) // 2
    number = tl.load(table + (plane // (2 * layers)) * (TOKENS // PAGE) + page).to(tl.int64)
    out = pages + ((layer.to(tl.int64) * page_count + number) * 2 + side) * (rows_of_page * DIM)
    for upper in tl.static_range(2):
        code = ((packed >> (4 * upper)) & 15).to(tl.float32)
        channel = (row % HEADS) * DIM + byte + upper * half
        group = tl.where(side == 0, channel, at + 0 * byte)
        scale = tl.load(scales + group).to(tl.float32)
        offset = tl.load(scales + groups + group).to(tl.float32)
        tl.store(out + row * DIM + byte + upper * half, (code * scale + offset).to(tl.bfloat16))


def read_chunks(path):
    """Of every chunk in a file: its planes' bytes, and where in each the frame begins. See docs/FORMAT.md."""
    content = pathlib.Path(path).read_bytes()
    at, chunks = 0, []
    while at < len(content):
        (chunk_bytes,) = struct.unpack_from("<Q", content, at + 64)
        layers, heads, dim, tokens = struct.unpack_from("<4H", content, at + 48)
        assert (layers, heads, dim, tokens) == (LAYERS, HEADS, DIM, CHUNK), "chunks of another shape"
        planes = []
        for plane in range(PLANES):
            offset, size, _, codec, quantizer, scales, compression, _ = ENTRY.unpack_from(content, at + 96 + 24 * plane)
            assert (codec, scales, compression) == (INT4, BF16, ZSTD) and quantizer == (1 if plane % 2 == 0 else 2)
            groups = HEADS * DIM if quantizer == PER_CHANNEL else CHUNK * HEADS
            assert size - 4 * groups < CODE_BYTES, "a section that is stored"
            planes.append((content[at + offset : at + offset + size], 4 * groups))
        chunks.append(planes)
        at += chunk_bytes
    return chunks


class Batch:
    """Some chunks, always the same, from pinned host memory to the pages of `table`."""

    def __init__(self, nvcomp, chunks, pages, table):
        planes = [plane for chunk in chunks for plane in chunk]
        self.nvcomp, self.pages, self.frames = nvcomp, pages, len(planes)
        starts, frames, sizes, total = [], [], [], 0
        for content, frame in planes:
            starts.append(total)
            frames.append(total + frame)
            sizes.append(len(content) - frame)
            total += -(-len(content) // 16) * 16
        self.encoded_bytes = sum(len(content) for content, _ in planes)
        self.host = torch.zeros(total, dtype=torch.uint8, pin_memory=True)
        for start, (content, _) in zip(starts, planes):
            self.host[start : start + len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        self.encoded = torch.empty(total, dtype=torch.uint8, device="cuda")
        self.codes = torch.empty(self.frames * CODE_BYTES, dtype=torch.uint8, device="cuda")

        def numbers(values):
            return torch.tensor(list(values), dtype=torch.int64, device="cuda")

        self.starts, self.frame_bytes = numbers(starts), numbers(sizes)
        self.frame_pointers = numbers(self.encoded.data_ptr() + frame for frame in frames)
        self.code_pointers = numbers(self.codes.data_ptr() + CODE_BYTES * index for index in range(self.frames))
        self.code_bytes = numbers([CODE_BYTES] * self.frames)
        self.found_bytes = numbers([0] * self.frames)
        self.statuses = torch.full([self.frames], -1, dtype=torch.int32, device="cuda")
        needed = nvcomp.temporary_bytes(self.frames, CODE_BYTES)
        self.temporary = torch.empty(max(needed, 8), dtype=torch.uint8, device="cuda")
        self.table = torch.tensor(table[: len(chunks) * PAGES], dtype=torch.int32, device="cuda")
        self.delivered_bytes = self.frames * CODE_BYTES * 4

    def start(self, stream, marks=None):
        """Everything of one delivery, put on a stream, and marks before, between and behind its three parts."""
        def mark(number):
            if marks:
                marks[number].record(stream)

        with torch.cuda.stream(stream):
            mark(0)
            self.encoded.copy_(self.host, non_blocking=True)
            mark(1)
            self.nvcomp.decompress(self, stream)
            mark(2)
            dequantize[(self.frames, PAGES)](
                self.encoded.view(torch.bfloat16), self.starts, self.codes, self.table, self.pages, LAYERS, self.pages.shape[1],
                TOKENS=CHUNK, HEADS=HEADS, DIM=DIM, PAGE=PAGE, num_warps=8, enable_fp_fusion=False)
            mark(3)

    def check(self):
        torch.cuda.synchronize()
        wrong = int((self.statuses != 0).sum()) + int((self.found_bytes != CODE_BYTES).sum())
        if wrong:
            raise SystemExit(f"nvCOMP failed on some of {self.frames} frames: statuses {set(self.statuses.tolist())}")


class OnGpu:
    """Deliveries at a rate, two under way: one is copied while the other is decompressed."""

    def __init__(self, encoded_file, chunks_per_batch):
        chunks = read_chunks(encoded_file)
        chunks = [chunks[index % len(chunks)] for index in range(chunks_per_batch)]
        count = 2 * chunks_per_batch * PAGES
        self.pages = torch.zeros(LAYERS, count, 2, PAGE, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        self.table = torch.randperm(count)[: chunks_per_batch * PAGES].tolist()
        nvcomp = Nvcomp()
        self.batches = [Batch(nvcomp, chunks, self.pages, self.table) for _ in range(2)]
        self.streams = {priority: [torch.cuda.Stream(priority=priority) for _ in self.batches] for priority in (0, -1)}
        self.stop = False
        for batch, stream in zip(self.batches, self.streams[0]):
            batch.start(stream)
            batch.check()

    def run(self, delivered_gbps=None, seconds=None, priority=0):
        """Keeps to the rate, or to none, for some time or until told to stop; what it delivered, Gbps. Streams of priority -1
        go before others.
        """
        lanes, bits = list(zip(self.batches, self.streams[priority])), self.batches[0].delivered_bytes * 8
        begun, done, pending = time.perf_counter(), 0, []
        while not self.stop and (seconds is None or time.perf_counter() - begun < seconds):
            if delivered_gbps and done * bits > (time.perf_counter() - begun) * delivered_gbps * 1e9:
                time.sleep(2e-5)
                continue
            if len(pending) == len(lanes):
                pending.pop(0).synchronize()
            batch, stream = lanes[done % len(lanes)]
            batch.start(stream)
            pending.append(stream.record_event())
            done += 1
        for event in pending:
            event.synchronize()
        return done * bits / (time.perf_counter() - begun) / 1e9

    def parts_us(self, repeats=20):
        """What copy, decompression and kernel take of a batch, median, with nothing else on the GPU."""
        batch, stream, times = self.batches[0], self.streams[0][0], []
        for _ in range(repeats):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
            batch.start(stream, marks)
            torch.cuda.synchronize()
            times.append([a.elapsed_time(b) * 1000 for a, b in zip(marks, marks[1:])])
        return dict(zip(("copy", "decompress", "dequantize"), map(statistics.median, zip(*times))))


def encode(file, output):
    subprocess.run([BINARY, "encode", "--input", str(file), "--codec", "int4", "--compression", "zstd", "--out", str(output)], check=True,
                   stdout=subprocess.DEVNULL)


def same(on_gpu, file, chunks):
    """Whether the pages hold what the CPU decodes from the same chunks, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        encoded, decoded = pathlib.Path(folder) / "chunks", pathlib.Path(folder) / "decoded.safetensors"
        encode(file, encoded)
        subprocess.run([BINARY, "decode", "--input", str(encoded), "--out", str(decoded)], check=True,
                       stdout=subprocess.DEVNULL)
        from safetensors.torch import load_file
        expected = load_file(decoded, device="cuda")
    index = torch.tensor(on_gpu.table, device="cuda")
    tokens = chunks * CHUNK
    for side, name in enumerate("kv"):
        found = on_gpu.pages[:, index, side].reshape(LAYERS, tokens, HEADS, DIM)
        if not torch.equal(found.view(torch.int16), expected[name][:, :tokens].view(torch.int16)):
            return False
    return True


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--folder", default="/dev/shm")
    options = parser.parse_args()
    file, results = compose(options.chunks, options.folder), []
    assert tokens_of(file)[0] == [LAYERS, options.chunks * CHUNK, HEADS, DIM]
    with tempfile.NamedTemporaryFile() as encoded:
        encode(file, encoded.name)
        equal = None
        for count in (1, 2, 4, 8):
            on_gpu = OnGpu(encoded.name, count)
            batch = on_gpu.batches[0]
            if count == options.chunks:
                equal = same(on_gpu, file, count)
            results.append({"chunks_per_batch": count, "delivered_gbps": on_gpu.run(seconds=1), "us": on_gpu.parts_us(),
                            "ratio": batch.delivered_bytes / batch.encoded_bytes, "temporary_bytes": batch.temporary.numel()})
            del on_gpu, batch
    version = None
    with contextlib.suppress(AttributeError, RuntimeError):
        version = Nvcomp().version()
    print(json.dumps({"machine": machine(), "nvcomp": version, "equal_bit_for_bit": equal, "batches": results}))
    raise SystemExit(0 if equal else 1)


if __name__ == "__main__":
    main()
