#!/usr/bin/env python3
"""The tables of docs/GPU.md out of the results of `run.sh`: `tables.py [FOLDER]`."""
import json
import pathlib
import sys

FOLDER = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parents[1] / "results/gpu-h100")


def table(head, rows):
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print()


def end_to_end(found):
    def busy(run, stage):
        return f"{run['busy'][stage]:.2f}" if stage in run["busy"] else ""

    table(["compression", "decode lcores", "queues", "encoded", "delivered", "limit", "busy: rx", "decode", "dma"],
          [(run.get("compression", "zstd"), run["decode_lcores"], run["queues"], f"{run['encoded_gbps']:.1f}", f"{run['delivered_gbps']:.1f}",
            run["limiting_stage"], *(busy(run, stage) for stage in ("rx", "decode", "dma"))) for run in found["runs"]])


def interference(found):
    def over(row, name):
        return ", ".join(f"{row[f'{name}_over_alone_{part}']:.3f}" for part in ("p50", "mean", "p99") if f"{name}_over_alone_{part}" in row)

    names = [name for name in ("on_gpu", "on_gpu_first") if f"{name}_delivered_gbps" in found["rates"][0]]
    table(["encoded", "delivered", "ours", *(f"{name}{what}" for name in names for what in ("", ", delivered"))],
          [(f"{row['encoded_gbps']:.0f}", f"{row['delivered_gbps']:.0f}", over(row, "ours"),
            *(cell for name in names for cell in (over(row, name), f"{row[f'{name}_delivered_gbps']:.0f}"))) for row in found["rates"]])
    whole = found["end_to_end"] if isinstance(found["end_to_end"], list) else [found["end_to_end"]]
    table(["whole data plane", "encoded", "delivered", "p50"],
          [(run.get("compression", "zstd"), f"{run['encoded_gbps']:.1f}", f"{run['delivered_gbps']:.1f}", f"{run['ours_over_alone_p50']:.3f}")
           for run in whole])


def save(found):
    def pair(name, key, digits):
        values = found["beside_fetches"]["summary"][name][key]
        return f"{values['without_saves']:.{digits}f}, {values['beside_saves']:.{digits}f}"

    table(["fetches", "encoded, without and beside saves", "p50 of a fetch, us", "p99", "saved meanwhile"],
          [(name, pair(name, "encoded_gbps", 2), pair(name, "fetch_p50_us", 0), pair(name, "fetch_p99_us", 0), pair(name, "saved_gbps", 1))
           for name in found["beside_fetches"]["summary"]])


def main():
    for name, show in (("end_to_end", end_to_end), ("interference", interference), ("save", save)):
        path = FOLDER / f"{name}.json"
        if path.exists():
            found = json.loads(path.read_text())
            print(f"{name}: {found['machine']}\n")
            show(found)


if __name__ == "__main__":
    main()
