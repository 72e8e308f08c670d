"""What the scripts of this folder share: store and data plane as processes, and GPU memory as they are told of it."""
import contextlib
import json
import os
import pathlib
import signal
import struct
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
BINARY = os.environ.get("SHADOWSERVE", str(ROOT / "target/release/shadowserve"))


class Cache:
    """A paged KV cache of torch tensors in one of the layouts that engines use.

    `tensors` has one tensor per layer, or one of all layers; `gather` gives K and V back as [layers, tokens, heads, dim].
    """

    ORDERS = ("two_nhd", "pages_nhd", "pages_hnd", "cross_layer_nhd", "interleaved")

    def __init__(self, order, layers, pages, page_tokens, heads, dim, dtype, scale=1.0):
        import torch
        self.order, self.layers, self.pages, self.page_tokens = order, layers, pages, page_tokens
        self.heads, self.dim, self.dtype, self.scale = heads, dim, dtype, scale
        shape = {
            "two_nhd": (2, pages, page_tokens, heads, dim),
            "pages_nhd": (pages, 2, page_tokens, heads, dim),
            "pages_hnd": (pages, 2, heads, page_tokens, dim),
            "cross_layer_nhd": (pages, layers, 2, page_tokens, heads, dim),
            "interleaved": (pages, page_tokens, heads, 2, dim),
        }[order]
        count = 1 if order == "cross_layer_nhd" else layers
        self.tensors = [torch.zeros(shape, dtype=dtype, device="cuda") for _ in range(count)]

    def views(self, layer):
        """K and V of a layer as [pages, tokens, heads, dim], whatever the strides."""
        tensor = self.tensors[0 if self.order == "cross_layer_nhd" else layer]
        if self.order == "two_nhd":
            return tensor[0], tensor[1]
        if self.order == "pages_nhd":
            return tensor[:, 0], tensor[:, 1]
        if self.order == "pages_hnd":
            return tensor[:, 0].transpose(1, 2), tensor[:, 1].transpose(1, 2)
        if self.order == "cross_layer_nhd":
            return tensor[:, layer, 0], tensor[:, layer, 1]
        return tensor[:, :, :, 0], tensor[:, :, :, 1]

    def description(self):
        """The cache for `Client.register_pages`."""
        import shadowserve
        layers = [self.views(layer) for layer in range(self.layers)]
        return shadowserve.describe_pages(layers, [(self.scale, self.scale)] * self.layers)

    def describe(self):
        """The same for `shadowserve bench pages`, as the control protocol has it."""
        found = self.description()

        def strides(side):
            return dict(zip(("page", "token", "head"), found[f"{side}_strides"]))

        def base(allocation, offset, scale):
            return {"allocation": allocation, "offset": offset, "scale": struct.unpack("<I", struct.pack("<f", scale))[0]}

        names = {"bf16": "Bf16", "f16": "F16", "fp8_e4m3": "Fp8E4m3"}
        same = {name: found[name] for name in ("device", "page_tokens", "pages", "kv_heads", "head_dim")}
        return {
            **same, "element": names[found["element"]], "k": strides("k"), "v": strides("v"),
            "allocations": [{"handle": [list(handle[:32]), list(handle[32:])], "bytes": size} for handle, size in found["allocations"]],
            "layers": [dict(zip("kv", (base(*place) for place in pair))) for pair in found["layers"]],
        }

    def gather(self, table, tokens):
        import torch
        index = torch.tensor(table, device="cuda")
        sides = [[], []]
        for layer in range(self.layers):
            for side, view in zip(sides, self.views(layer)):
                side.append(view[index].reshape(-1, self.heads, self.dim)[:tokens])
        return [torch.stack(side) for side in sides]

    def zero(self):
        for tensor in self.tensors:
            tensor.zero_()


class Cluster:
    """A store and a data plane, joined by net_memif, in a folder of their own."""

    def __init__(self, file, lcores, store_lcores="0", codec="int4", window=2048, slots=None, flags=(), environment=None,
                 mbufs=None, store_flags=()):
        self.folder = tempfile.TemporaryDirectory(prefix="shadowserve-perf-")
        self.file, self.codec = file, codec
        path = pathlib.Path(self.folder.name)
        self.socket = path / "control.sock"
        self.logs = {}
        port = "net_memif0,role={},socket={},socket-abstract=no,bsize=2048,rsize=11"
        memory = ["--mbufs", str(mbufs)] if mbufs else []
        plane = [
            "dataplane", "--port", port.format("server", path / "memif.sock"), "--ip", "10.99.0.2/24",
            "--store", "10.99.0.1:4791", "--socket", str(self.socket), "--lcores", lcores,
            "--window", str(window), *memory, *flags,
        ]
        if slots:
            plane += ["--slots", str(slots)]
        store = [
            "store", "--port", port.format("client", path / "memif.sock"), "--ip", "10.99.0.1/24", "--load", str(file),
            "--codec", codec, "--lcores", store_lcores, *store_flags,
        ]
        self.processes = []
        self.plane = self.start("dataplane", plane, environment)
        self.wait(self.socket.exists, "the data plane's socket", 60)
        self.start("store", store)

    def start(self, name, arguments, environment=None):
        log = pathlib.Path(self.folder.name) / f"{name}.log"
        self.logs[name] = log
        process = subprocess.Popen([BINARY, *arguments], stdout=log.open("w"), stderr=subprocess.STDOUT,
                                   env={**os.environ, **(environment or {})})
        self.processes.append((name, process))
        return process

    def wait(self, holds, what, seconds):
        limit = time.monotonic() + seconds
        while not holds():
            self.check()
            if time.monotonic() > limit:
                raise SystemExit(f"not within {seconds} s: {what}\n{self.said()}")
            time.sleep(0.02)

    def check(self):
        for name, process in self.processes:
            if process.poll() is not None:
                raise SystemExit(f"{name} ended with {process.returncode}:\n{self.said()}")

    def said(self):
        return "\n".join(f"--- {name}\n{log.read_text()[-3000:]}" for name, log in self.logs.items())

    def run(self, *arguments, timeout=60):
        """One command of the binary against this data plane; what it prints, as JSON."""
        command = [BINARY, *map(str, arguments), "--socket", str(self.socket)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: {done.returncode}\n{done.stderr[-2000:]}\n{self.said()}")
        return json.loads(done.stdout) if done.stdout.strip() else None

    def ready(self):
        """Waits until the store answers, by fetching everything once."""
        limit = time.monotonic() + 60
        arguments = ["fetch", "--tokens-from", self.file, "--codec", self.codec, "--json", "--socket", self.socket]
        while True:
            self.check()
            done = subprocess.run([BINARY, *map(str, arguments)], capture_output=True, text=True)
            if done.returncode == 0:
                return json.loads(done.stdout)
            if time.monotonic() > limit:
                raise SystemExit(f"the store does not answer: {done.stderr[-1000:]}\n{self.said()}")
            time.sleep(0.1)

    def stop(self):
        """Ends both; the exit code of the data plane."""
        for _, process in reversed(self.processes):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        codes = []
        for name, process in self.processes:
            try:
                codes.append(process.wait(20))
            except subprocess.TimeoutExpired:
                process.kill()
                raise SystemExit(f"{name} does not end\n{self.said()}") from None
        self.folder.cleanup()
        return codes[0]


@contextlib.contextmanager
def cluster(*arguments, **keywords):
    running = Cluster(*arguments, **keywords)
    try:
        yield running
    finally:
        for _, process in running.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for _, process in running.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            if process.poll() is None:
                process.kill()
        with contextlib.suppress(OSError):
            running.folder.cleanup()


def machine():
    """What the figures are to be read with."""
    def read(command):
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.check_output(command, text=True).strip().splitlines()[0]
        return None
    model = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    return {
        "cpu": model, "cpus": os.cpu_count(), "kernel": os.uname().release,
        "gpu": read(["nvidia-smi", "--query-gpu=name,driver_version,pcie.link.gen.max,pcie.link.width.max",
                     "--format=csv,noheader"]),
        "shadowserve": read([BINARY, "--version"]),
    }


def compose(chunks, folder):
    """KV in the shape of Llama-3.1-8B; see perf/compose_llama.py."""
    output = pathlib.Path(folder) / f"llama-{chunks}.safetensors"
    if not output.exists():
        subprocess.run(["python3", str(ROOT / "perf/compose_llama.py"), "--output", str(output), "--chunks", str(chunks)],
                       check=True)
    return output


def tokens_of(file):
    """Layers, tokens, heads, dim and element type of a KV file."""
    with open(file, "rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return header["k"]["shape"], header["k"]["dtype"]
