#!/usr/bin/env python3
"""The measurements of `make bench`, side by side in one run: rounds of A, then B, then A again.

Prints a table and, with --json, one JSON object; writes that object to perf/results/ too. docs/BENCHMARKS.md says what
each figure means. Needs only the standard library, the built program and dpdk-testpmd (Debian's package dpdk-dev).
"""
import argparse
import json
import os
import pathlib
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "perf/samples/smollm2-135m-kv-640.safetensors"
# By MTU: Ethernet, IPv4, UDP and DATA headers around the largest segment, and the memif buffers that hold such a frame.
FRAMES = {1500: {"frame_bytes": 14 + 20 + 8 + 32 + 1440, "bsize": 2048}, 9000: {"frame_bytes": 14 + 20 + 8 + 32 + 8928, "bsize": 9216}}
# The side of a memif whose own mbufs are the shared memory, so that nothing is copied there.
LENDS = "client,zero-copy=yes"
CODECS = ("raw", "lossless", "int8", "int4")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=pathlib.Path, default=SAMPLE, help="KV cache to fetch and decode [the sample]")
    parser.add_argument("--program", type=pathlib.Path, default=ROOT / "target/release/shadowserve")
    parser.add_argument("--testpmd", default="dpdk-testpmd", help="the program [dpdk-testpmd]")
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement [5]")
    parser.add_argument("--seconds", type=int, default=2, help="of each round of receiving [2]")
    parser.add_argument("--repeat", type=int, default=30, help="most fetches in each round end to end [30]")
    parser.add_argument("--fetch-mib", type=int, default=512, help="most MiB of KV fetched in each round end to end [512]")
    parser.add_argument("--cpus", default="0,1,2" if os.cpu_count() > 2 else "0,1",
                        help="receiver's CPU, sender's CPU and, if there is one, the fault proxy's [0,1 and, of more than two, 2]")
    parser.add_argument("--only", choices=("receive", "loss", "end_to_end"), action="append", help="measure this alone; may be repeated [all]")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output and nothing else")
    return parser.parse_args()


BEGAN = time.monotonic()


def progress(what):
    """Says on standard error what is being measured: a large input takes minutes."""
    print(f"[{time.monotonic() - BEGAN:5.0f} s] {what}", file=sys.stderr, flush=True)


def machine(program):
    cpu = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    doctor = json.loads(subprocess.run([program, "doctor", "--json"], check=True, capture_output=True).stdout)
    version = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout.strip()
    return {
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "dpdk": doctor["dpdk"]["found"],
        "hugepages": doctor["hugepages"]["found"],
        "program": version,
        "load_1min_at_start": os.getloadavg()[0],
    }


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}


class Pair:
    """Two processes joined by memif. Hugepages if enough are free."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.receiver_cpu, self.sender_cpu, *others = arguments.cpus.split(",")
        self.proxy_cpu = others[0] if others else None
        self.huge = os.geteuid() == 0 and free_hugepages_mib() >= 512

    def memif(self, folder, role, mtu, number=0, socket="memif"):
        """Arguments of one side; LENDS is a role too. Its mbufs go round through the ring, which the caches of both cores should hold."""
        rsize = 9 if role == LENDS else 11
        bsize = FRAMES[mtu]["bsize"]
        return f"net_memif{number},id=0,role={role},socket={folder}/{socket}.sock,socket-abstract=no,bsize={bsize},rsize={rsize}"

    def eal_memory(self, role):
        memory = ["--in-memory"] if self.huge else ["--no-huge", "--no-shconf", "-m", "256"]
        return memory + (["--single-file-segments"] if role == LENDS else [])

    def our_memory(self):
        return [] if self.huge else ["--no-huge"]

    def testpmd(self, folder, role, mode, cpu, other_cpu, mtu):
        """As many mbufs, of the same size and out of the same kind of pool, as ours; its bursts are of 32 too."""
        command = [self.arguments.testpmd, f"--lcores=0@{other_cpu},1@{cpu}", *self.eal_memory(role), "--no-pci", "--no-telemetry", "--mbuf-pool-ops-name=stack",
                   f"--file-prefix=testpmd-{mode}-{os.getpid()}", f"--vdev={self.memif(folder, role, mtu)}", "--",
                   f"--forward-mode={mode}", "--auto-start", "--stats-period=1", "--total-num-mbufs=16384",
                   f"--mbuf-size={FRAMES[mtu]['bsize'] + 128}"]
        if mode == "txonly":
            command.append(f"--txpkts={FRAMES[mtu]['frame_bytes']}")
        output = open(f"{folder}/{mode}.log", "w")
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)

    def testpmd_rate(self, mtu, zero_copy):
        """Packets per second that testpmd receives in rxonly from testpmd in txonly; `zero_copy`: into the receiver's own mbufs."""
        with tempfile.TemporaryDirectory() as folder:
            start = {
                "rxonly": lambda: self.testpmd(folder, LENDS if zero_copy else "server", "rxonly", self.receiver_cpu, self.sender_cpu, mtu),
                "txonly": lambda: self.testpmd(folder, "server" if zero_copy else "client", "txonly", self.sender_cpu, self.receiver_cpu, mtu),
            }
            # Its client connects once: the server must be there.
            server, client = ("txonly", "rxonly") if zero_copy else ("rxonly", "txonly")
            processes = {server: start[server]()}
            time.sleep(1)
            processes[client] = start[client]()
            time.sleep(self.arguments.seconds + 4)
            for process in (processes["txonly"], processes["rxonly"]):
                process.send_signal(signal.SIGINT)
                process.wait(timeout=20)
            text = pathlib.Path(f"{folder}/rxonly.log").read_text()
            rates = [int(rate) for rate in re.findall(r"Rx-pps:\s+(\d+)", text) if int(rate) > 0]
            if len(rates) < 2:
                sys.exit(f"testpmd received nothing:\n{text}\n{pathlib.Path(f'{folder}/txonly.log').read_text()}")
            # The first second is part of the start, the last of the end.
            return statistics.median(rates[1:-1] or rates)

    def our_rate(self, mtu, zero_copy=True, loss=None):
        """What the data plane's receive path counts, fed by a store; `zero_copy`: into its own mbufs; `loss` puts a proxy between the two that
        loses that share of the packets each way."""
        with tempfile.TemporaryDirectory() as folder:
            helpers = []

            def start(name, *command):
                log = open(f"{folder}/{name}.log", "w")
                helpers.append(subprocess.Popen([self.arguments.program, *command], stdout=subprocess.DEVNULL, stderr=log))

            store_role = "server" if zero_copy and loss is None else "client"
            if loss is not None:
                start("proxy", "fault-proxy", *self.our_memory(), "--lcore", self.proxy_cpu, "--loss", str(loss),
                      "--port", self.memif(folder, "server", mtu), "--port", self.memif(folder, "server", mtu, 1, "other"))
            start("store", "store", *self.our_memory(), "--codec", "raw", "--load", SAMPLE, "--lcores", self.sender_cpu,
                  "--mtu", str(mtu), "--ip", "10.99.0.1/24", "--port", self.memif(folder, store_role, mtu))
            role = LENDS if zero_copy else "server" if loss is None else "client"
            ours = self.memif(folder, role, mtu, 0, "memif" if loss is None else "other")
            receiver = subprocess.run(
                [self.arguments.program, "bench", "rx", *self.our_memory(), "--tokens-from", SAMPLE, "--lcore", self.receiver_cpu,
                 "--mtu", str(mtu), "--seconds", str(self.arguments.seconds), "--ip", "10.99.0.2/24", "--store", "10.99.0.1:4791",
                 "--port", ours],
                capture_output=True, text=True)
            for process in reversed(helpers):
                process.send_signal(signal.SIGTERM)
                process.wait(timeout=20)
            if receiver.returncode != 0:
                logs = [path.read_text() for path in pathlib.Path(folder).glob("*.log")]
                sys.exit(f"bench rx failed:\n{receiver.stderr}\n{logs}")
            counted = json.loads(receiver.stdout)
            return {
                "pps": counted["packets"] / counted["ns"] * 1e9,
                "goodput_gbps": counted["encoded_bytes"] * 8 / counted["ns"],
                "busy": counted["busy_ns"] / counted["ns"],
            }


def free_hugepages_mib():
    total = 0
    for pool in pathlib.Path("/sys/kernel/mm/hugepages").glob("hugepages-*kB"):
        total += int((pool / "free_hugepages").read_text()) * int(pool.name.split("-")[1][:-2]) // 1024
    return total


def receive(pair, rounds, mtu):
    """Our receive path beside testpmd's, same memif, same frames, same two CPUs: copied out of shared memory, and received into mbufs that
    are the shared memory."""
    testpmd, ours = {False: [], True: []}, {False: [], True: []}
    for number in range(rounds):
        progress(f"receiving, MTU {mtu}: round {number + 1} of {rounds}")
        for zero_copy in (False, True):
            testpmd[zero_copy].append(pair.testpmd_rate(mtu, zero_copy))
            ours[zero_copy].append(pair.our_rate(mtu, zero_copy))
    frame_bytes = FRAMES[mtu]["frame_bytes"]
    result = {"frame_bytes": frame_bytes}
    for zero_copy, name in ((False, "copied"), (True, "zero_copy")):
        result[name] = {
            "testpmd_rxonly_pps": spread(testpmd[zero_copy]),
            "receive_path_pps": spread([figures["pps"] for figures in ours[zero_copy]]),
            "receive_path_goodput_gbps": spread([figures["goodput_gbps"] for figures in ours[zero_copy]]),
            "receive_path_busy_share": spread([figures["busy"] for figures in ours[zero_copy]]),
        }
    for name, to in (("copied", "copied"), ("zero_copy", "copied"), ("zero_copy", "zero_copy")):
        testpmd_pps = result[to]["testpmd_rxonly_pps"]["median"]
        goodput = result[name]["receive_path_goodput_gbps"]["median"]
        result[f"{name}_to_testpmd_{to}"] = {
            "packets": result[name]["receive_path_pps"]["median"] / testpmd_pps,
            "goodput": goodput * 1e9 / (testpmd_pps * frame_bytes * 8),
        }
    return result


def loss(pair, rounds, share=0.01):
    """Goodput through the fault proxy, without loss and with `share` of the packets lost each way: the proxy is in both."""
    if pair.proxy_cpu is None:
        return {"skipped": "the fault proxy needs a CPU of its own: name three in --cpus"}
    without, lossy = [], []
    for number in range(rounds):
        progress(f"loss: round {number + 1} of {rounds}")
        without.append(pair.our_rate(1500, loss=0.0)["goodput_gbps"])
        lossy.append(pair.our_rate(1500, loss=share)["goodput_gbps"])
    return {
        "loss": share,
        "goodput_gbps_without": spread(without),
        "goodput_gbps_with": spread(lossy),
        "ratio": statistics.median(lossy) / statistics.median(without),
    }


def bare_loop(arguments):
    """Times of loops over the same planes that only decompress, and only decode, by codec."""
    cpu = arguments.cpus.split(",")[0]
    command = [arguments.program, "bench", "codec", "--json", "--codecs", ",".join(CODECS), "--compressions", "none,zstd", "--cpus", cpu,
               "--slots", "4", "--rounds", "3", "--input", str(arguments.input.resolve())]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    figures = {}
    for result in report["results"]:
        if result["compression"] == ("none" if result["codec"] == "raw" else "zstd"):
            # Nothing is to be decompressed of raw planes: they are copied.
            bare = result["fused_cached_us"] if result["codec"] == "raw" else result["bare_us"]
            figures[result["codec"]] = {"ratio": result["ratio"], "bare_us": bare, "fused_us": result["whole_us"]}
    return figures


def end_to_end(arguments):
    """A whole data plane on one lcore beside a loop that only decompresses the same planes."""
    receiver_cpu, sender_cpu = arguments.cpus.split(",")[:2]
    repeat = min(arguments.repeat, max(3, (arguments.fetch_mib << 20) // arguments.input.stat().st_size))
    goodput = {codec: [] for codec in CODECS}
    bare = {codec: [] for codec in CODECS}
    fused = {codec: [] for codec in CODECS}
    memory = {}
    for number in range(arguments.rounds):
        progress(f"end to end: round {number + 1} of {arguments.rounds}: loops over planes in memory")
        figures = bare_loop(arguments)
        for codec in CODECS:
            progress(f"end to end: round {number + 1} of {arguments.rounds}: {repeat} fetches of {codec}")
            command = [arguments.program, "demo", "--json", "--repeat", str(repeat), "--codec", codec, "--input", arguments.input,
                       "--lcores", ",".join(f"{stage}@{receiver_cpu}" for stage in ("rx", "decode", "dma")), "--store-lcore", sender_cpu]
            report = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            plane_bits = report["encoded_bytes"] * 8 / report["planes"]
            goodput[codec].append(report["goodput_gbps"])
            bare[codec].append(plane_bits / figures[codec]["bare_us"] / 1e3)
            fused[codec].append(plane_bits / figures[codec]["fused_us"] / 1e3)
            memory = report["memory"]
    table = {}
    for codec in CODECS:
        table[codec] = {
            "goodput_gbps": spread(goodput[codec]),
            "bare_decompress_gbps": spread(bare[codec]),
            "bare_decode_gbps": spread(fused[codec]),
            "ratio_to_bare_decompress": statistics.median(goodput[codec]) / statistics.median(bare[codec]),
            "ratio_to_bare_decode": statistics.median(goodput[codec]) / statistics.median(fused[codec]),
        }
    return table, memory


def print_table(result):
    print("machine:", ", ".join(f"{name} {value}" for name, value in result["machine"].items()))
    for rx in result.get("receive", {}).values():
        print(f"\nreceiving frames of {rx['frame_bytes']} bytes over memif, Mpps: median (min to max)")
        for name, what in (("copied", "copied out of shared memory"), ("zero_copy", "into mbufs that are shared memory")):
            print(f"  {what}")
            for measured in ("testpmd_rxonly_pps", "receive_path_pps"):
                figure = rx[name][measured]
                print(f"    {measured[:-4]:18} {figure['median'] / 1e6:6.2f}  ({figure['min'] / 1e6:.2f} to {figure['max'] / 1e6:.2f})")
            print(f"    encoded goodput    {rx[name]['receive_path_goodput_gbps']['median']:6.1f} Gbps")
        for name, to, what in (("copied", "copied", "copied, of testpmd"), ("zero_copy", "copied", "zero copy, of testpmd that copies"),
                               ("zero_copy", "zero_copy", "zero copy, of testpmd with zero copy")):
            ratio = rx[f"{name}_to_testpmd_{to}"]
            print(f"  {what:38} {ratio['packets']:.2f} of the packets, {ratio['goodput']:.2f} of the bits as encoded goodput")
    if "ratio" in result.get("loss", {}):
        figure = result["loss"]
        print(f"\nthrough the fault proxy, encoded Gbps: {figure['goodput_gbps_without']['median']:.1f} without loss, "
              f"{figure['goodput_gbps_with']['median']:.1f} with {figure['loss']:.0%} lost each way, ratio {figure['ratio']:.2f}")
    elif "loss" in result:
        print(f"\nloss: skipped, {result['loss']['skipped']}")
    if "end_to_end" not in result:
        return
    print("\nend to end on one data-plane lcore, encoded Gbps, medians, beside loops on the same planes")
    print("  codec     goodput  bare decompress  ratio  bare decode  ratio")
    for codec, row in result["end_to_end"].items():
        print(f"  {codec:8} {row['goodput_gbps']['median']:8.2f} {row['bare_decompress_gbps']['median']:16.2f} "
              f"{row['ratio_to_bare_decompress']:6.2f} {row['bare_decode_gbps']['median']:12.2f} {row['ratio_to_bare_decode']:6.2f}")
    memory = result["memory"]
    print(f"\nmemory of the data plane at its peak: {memory['hugepages_mib']:.0f} MiB of hugepages for budgets (mbufs, slots) of "
          f"{memory['budget_mib']:.0f} MiB; {memory['ordinary_mib']:.0f} MiB of ordinary memory, program and engine tables included")


def memory_report(memory):
    """What mbufs and slots may take by their flags, beside what the process had."""
    mbuf_bytes = 2176 + 128
    return memory | {
        "budget_mib": (memory["mbufs"] * mbuf_bytes + memory["slots"] * memory["slot_bytes"]) / 2**20,
        "hugepages_mib": memory["hugetlb_kib"] / 1024,
        "ordinary_mib": memory["resident_peak_kib"] / 1024,
    }


def main():
    arguments = parse_arguments()
    result = {"machine": machine(arguments.program), "input": arguments.input.name}
    pair = Pair(arguments)
    result["machine"]["measured_on"] = "hugepages" if pair.huge else "ordinary pages (no hugepages: slower)"
    chosen = arguments.only or ("receive", "loss", "end_to_end")
    if "receive" in chosen:
        result["receive"] = {f"mtu_{mtu}": receive(pair, arguments.rounds, mtu) for mtu in FRAMES}
    if "loss" in chosen:
        result["loss"] = loss(pair, arguments.rounds)
    if "end_to_end" in chosen:
        result["end_to_end"], memory = end_to_end(arguments)
        result["memory"] = memory_report(memory)
    slug = re.sub(r"[^a-z0-9]+", "-", f"{result['machine']['cpu']}-{result['machine']['cpus']}-cpus".lower()).strip("-")
    folder = ROOT / "perf/results"
    folder.mkdir(exist_ok=True)
    if not arguments.only:
        (folder / f"{slug}.json").write_text(json.dumps(result, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(result))
    else:
        print_table(result)


if __name__ == "__main__":
    main()
