#!/usr/bin/env python3
"""Plots what `sim table --json` measured: each scenario's goodput for every design, and goodput against loss.

`transport_plot.py TABLE.json OUT.png`; `make transport` runs both. Bars are medians over the seeds in the file, whiskers
reach from the least to the largest. Needs matplotlib.
"""
import collections
import json
import statistics
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DESIGNS = {"ours": ("ShadowServe", "#1b6ca8"), "fixed-window": ("fixed window", "#e0a458"), "tcp-like": ("TCP-like", "#9a9a9a")}
LOSSES = {"loss-0": 0.0, "loss-0.1": 0.1, "loss-1": 1.0, "loss-5": 5.0}


def read(path):
    """{scenario: {design: [share of the ideal goodput, one per seed]}}, in the file's order."""
    shares = collections.OrderedDict()
    for row in json.load(open(path)):
        shares.setdefault(row["scenario"], {}).setdefault(row["design"], []).append(row["of_ideal"])
    return shares


def plot_scenarios(axes, shares):
    width = 0.8 / len(DESIGNS)
    for number, (design, (label, color)) in enumerate(DESIGNS.items()):
        places, medians, below, above = [], [], [], []
        for place, by_design in enumerate(shares.values()):
            if design in by_design:
                values = by_design[design]
                median = statistics.median(values)
                places.append(place + (number - 1) * width)
                medians.append(median)
                below.append(median - min(values))
                above.append(max(values) - median)
        axes.bar(places, medians, width, yerr=[below, above], label=label, color=color, error_kw={"linewidth": 0.8})
    axes.set_xticks(range(len(shares)), shares, rotation=40, ha="right", fontsize=8)
    axes.set_ylabel("goodput / what the link can carry")
    axes.set_ylim(0, 1.05)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=8, frameon=False)


def plot_losses(axes, shares):
    for design, (label, color) in DESIGNS.items():
        points = [(loss, statistics.median(shares[name][design])) for name, loss in LOSSES.items()
                  if design in shares.get(name, {})]
        axes.plot([loss for loss, _ in points], [share for _, share in points], "o-", label=label, color=color)
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xticks(list(LOSSES.values()), [f"{loss:g}" for loss in LOSSES.values()])
    axes.set_xlabel("packets lost each way, % (100 Gbps, 50 us)")
    axes.set_ylim(0, 1.05)
    axes.grid(alpha=0.3)


def main():
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    shares = read(sys.argv[1])
    # What needs replicas or decoders has no second design to compare with, and no ideal that is the link's.
    compared = {name: by_design for name, by_design in shares.items() if len(by_design) > 1}
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6), width_ratios=[2.6, 1], sharey=True)
    plot_scenarios(left, compared)
    plot_losses(right, shares)
    figure.tight_layout()
    figure.savefig(sys.argv[2], dpi=110)


if __name__ == "__main__":
    main()
