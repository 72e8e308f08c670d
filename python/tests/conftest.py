"""A store and a data plane as processes, joined by net_memif on ordinary pages; no privilege needed."""

import json
import os
import pathlib
import signal
import struct
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("SHADOWSERVE", str(ROOT / "target/release/shadowserve"))
SAMPLE = ROOT / "perf/samples/smollm2-135m-kv-640.safetensors"
PATIENCE_SECONDS = 60


class Kv:
    """A .safetensors file's tensors, as bytes and shapes."""

    def __init__(self, path):
        content = path.read_bytes()
        (header_bytes,) = struct.unpack_from("<Q", content)
        self.header = json.loads(content[8 : 8 + header_bytes])
        self.data = content[8 + header_bytes :]

    def bytes(self, name):
        begin, end = self.header[name]["data_offsets"]
        return self.data[begin:end]

    def shape(self, name):
        return self.header[name]["shape"]

    @property
    def tokens(self):
        raw = self.bytes("tokens")
        return list(struct.unpack(f"<{len(raw) // 4}i", raw))


class Cluster:
    """One store, with the sample, raw, unless told otherwise, and one data plane."""

    codec = "raw"

    def __init__(self, folder, store=None):
        self.folder = folder
        self.socket = folder / "control.sock"
        self.processes = {}
        self.start("dataplane", "server", "10.99.0.2/24", "--store", "10.99.0.1:4791", "--socket", str(self.socket),
                   "--lcores", "rx@0,decode@0,dma@0")
        self.start("store", "client", "10.99.0.1/24", *(store or ["--load", str(SAMPLE), "--codec", self.codec]))
        self.wait_until("the data plane listens", self.socket.exists)

    def start(self, role, memif_role, address, *flags):
        port = f"net_memif0,role={memif_role},socket={self.folder}/memif.sock,socket-abstract=no"
        arguments = [PROGRAM, role, "--no-huge", "--idle-sleep-us", "20", "--ip", address, "--port", port, *flags]
        log = open(self.folder / f"{role}.log", "wb")
        self.processes[role] = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def wait_until(self, what, reached):
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not reached():
            for role, process in self.processes.items():
                assert process.poll() is None, f"{role} ended: {(self.folder / f'{role}.log').read_text()}"
            assert time.monotonic() < deadline, f"waited in vain until {what}"
            time.sleep(0.01)

    def kill(self, role):
        process = self.processes.pop(role)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def stop(self):
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.wait(timeout=PATIENCE_SECONDS)


@pytest.fixture(scope="session")
def kv():
    return Kv(SAMPLE)


@pytest.fixture
def new_cluster(tmp_path):
    """Makes a cluster, with flags of one's own for its store."""
    made = []

    def make(**options):
        made.append(Cluster(tmp_path, **options))
        return made[-1]

    yield make
    for cluster in made:
        cluster.stop()


@pytest.fixture
def cluster(new_cluster):
    return new_cluster()
