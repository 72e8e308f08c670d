#!/usr/bin/env python3
"""Kills, in mid-copy, the process whose GPU memory is written to, or the client, or both; the data plane must go on and serve others.

`survive.py [--chunks N] [--folder DIR]`; one JSON object on standard output.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

from lib import BINARY, ROOT, cluster, compose, machine, tokens_of


class Holder:
    """A process with GPU memory; several are started at once and then waited for."""

    def __init__(self, folder, name, shape):
        self.file = pathlib.Path(folder) / f"{name}.json"
        command = [sys.executable, str(ROOT / "perf/gpu/holder.py"), str(self.file), "--shape", ",".join(map(str, shape))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ready(self):
        assert self.process.stdout.readline().strip() == "ready", "the process that holds GPU memory ended"
        return self

    def equal(self, reference):
        self.process.stdin.write(f"{reference}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip() == "equal"

    def kill(self):
        self.process.kill()
        self.process.wait()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--folder", default="/dev/shm")
    options = parser.parse_args()
    file = compose(options.chunks, options.folder)
    shape, _ = tokens_of(file)
    results = []
    with cluster(file, "rx@1,dma@2,decode@3-8", slots=32, mbufs=32768, window=4096) as running, \
            tempfile.TemporaryDirectory() as folder:
        running.ready()
        reference = pathlib.Path(folder) / "reference.safetensors"
        running.run("fetch", "--tokens-from", file, "--out", reference, "--json")

        def start(holder):
            return subprocess.Popen([BINARY, "bench", "pages", "--pages", str(holder.file), "--tokens-from", str(file),
                                     "--duration-ms", "2500", "--chunks", "1", "--fetches", "4",
                                     "--socket", str(running.socket)],
                                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

        for victims in (["memory"], ["client"], ["memory", "client"], ["client", "memory"]):
            holders = [Holder(folder, name, shape) for name in ("bystander", "victim", "fresh")]
            bystander, victim, fresh = [holder.ready() for holder in holders]
            other, client = start(bystander), start(victim)
            time.sleep(1)
            for name in victims:
                if name == "memory":
                    victim.kill()
                else:
                    client.kill()
            client_said = client.communicate(timeout=30)[1][-300:]
            other_said = other.communicate(timeout=30)
            running.check()
            running.run("bench", "pages", "--pages", fresh.file, "--tokens-from", file)
            results.append({
                "killed": victims, "client_said": client_said, "client_code": client.returncode,
                "bystander_went_on": other.returncode == 0, "bystander_said": other_said[1][-300:],
                "fresh_equal": fresh.equal(reference), "bystander_equal": bystander.equal(reference),
            })
            for holder in holders:
                holder.kill()
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
        code = running.stop()
    ok = code == 0 and all(r["bystander_went_on"] and r["fresh_equal"] and r["bystander_equal"] for r in results)
    print(json.dumps({"machine": machine(), "ok": ok, "data_plane_exit": code, "cases": results}))
    raise SystemExit(0 if ok else 1)


if __name__ == "__main__":
    main()
