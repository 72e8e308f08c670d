//! What `demo` and `fetch` measured: as one JSON object, or as a table for a person.

use std::time::Duration;

use comfy_table::{CellAlignment, Table, TableComponent, presets};
use serde_json::{Value, json};

use crate::out::print_line;

/// The outcome of one or more fetches of the same chunks.
#[derive(Debug, Clone)]
pub(crate) struct Report {
    pub(crate) codec: String,
    pub(crate) chunks: usize,
    /// Planes of one fetch.
    pub(crate) planes: u64,
    /// Decoded bytes of one fetch.
    pub(crate) raw_bytes: u64,
    /// Encoded bytes of one fetch.
    pub(crate) encoded_bytes: u64,
    /// Time of each fetch, from the request to its end as the client saw it.
    pub(crate) times: Vec<Duration>,
    /// Planes that differ from what the codec must give; `None` if nothing was compared.
    pub(crate) mismatched_planes: Option<u64>,
    /// What the data plane counted.
    pub(crate) stats: Value,
}

impl Report {
    /// Whether everything was compared and nothing differs.
    pub(crate) fn verified(&self) -> Option<bool> {
        self.mismatched_planes.map(|planes| planes == 0)
    }

    /// The median fetch.
    fn seconds(&self) -> f64 {
        let mut times = self.times.clone();
        times.sort_unstable();
        times.get(times.len() / 2).map_or(f64::NAN, Duration::as_secs_f64)
    }

    pub(crate) fn to_json(&self) -> Value {
        let seconds = self.seconds();
        json!({
            "codec": self.codec,
            "chunks": self.chunks,
            "planes": self.planes,
            "raw_bytes": self.raw_bytes,
            "encoded_bytes": self.encoded_bytes,
            "ratio": ratio(self.raw_bytes, self.encoded_bytes),
            "fetches": self.times.len(),
            "seconds": seconds,
            "goodput_gbps": gbps(self.encoded_bytes, seconds),
            "delivered_gbps": gbps(self.raw_bytes, seconds),
            "verified": self.verified(),
            "mismatched_planes": self.mismatched_planes,
            "counters": self.stats["counters"],
            "stages": self.stats["stages"],
            "memory": self.stats["memory"],
            "lcores": self.stats["lcores"],
            "port": self.stats["port"],
            "compress_device": self.stats["compress_device"],
        })
    }

    /// Prints two tables: the fetch, and where a plane's time goes.
    pub(crate) fn print(&self) -> anyhow::Result<()> {
        let seconds = self.seconds();
        let mut table = new_table(&["", "value", "unit"]);
        let mut row = |name: &str, value: String, unit: &str| {
            table.add_row([name, value.as_str(), unit]);
        };
        row("codec", self.codec.clone(), "");
        row("chunks x planes", format!("{} x {}", self.chunks, self.planes / self.chunks.max(1) as u64), "");
        row("decoded", mib(self.raw_bytes), "MiB");
        row("encoded", mib(self.encoded_bytes), "MiB");
        row("ratio", format!("{:.2}", ratio(self.raw_bytes, self.encoded_bytes)), "x");
        row(&format!("time, median of {}", self.times.len()), format!("{:.2}", seconds * 1e3), "ms");
        row("goodput (encoded)", format!("{:.2}", gbps(self.encoded_bytes, seconds)), "Gbps");
        row("delivered (decoded)", format!("{:.2}", gbps(self.raw_bytes, seconds)), "Gbps");
        print_line!("{table}")?;

        let mut table = new_table(&["a plane's way", "p50 us", "p99 us", "planes"]);
        for span in ["receive", "decode_wait", "decode", "dma_wait", "dma", "total"] {
            let span_stats = &self.stats["stages"][span];
            let us = |name: &str| format!("{:.1}", span_stats[name].as_f64().unwrap_or(f64::NAN));
            table.add_row([span.into(), us("p50_us"), us("p99_us"), span_stats["count"].to_string()]);
        }
        print_line!("{table}")?;
        self.print_device()
    }

    /// Who decompressed, where a compression device was asked for.
    fn print_device(&self) -> anyhow::Result<()> {
        let device = &self.stats["compress_device"];
        let (Some(name), Some(counters)) = (device["name"].as_str(), device["counters"].as_object()) else {
            return Ok(());
        };
        let mut table = new_table(&[&format!("{name}, since its start"), "count"]);
        for (counter, count) in counters {
            table.add_row([counter.replace('_', " "), count.to_string()]);
        }
        print_line!("{table}")
    }
}

/// The model of this machine's CPU.
pub(crate) fn machine() -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name"));
    model.map_or(std::env::consts::ARCH, |model| model.trim_start_matches(['\t', ':', ' '])).to_owned()
}

pub(crate) fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY).set_header(header);
    // No line between rows: the eye needs none, and the table stays as short as it is.
    for line in [TableComponent::HorizontalLines, TableComponent::MiddleIntersections] {
        table.remove_style(line);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

#[expect(clippy::cast_precision_loss, reason = "sizes need no more than 53 bits")]
fn ratio(raw_bytes: u64, encoded_bytes: u64) -> f64 {
    raw_bytes as f64 / encoded_bytes as f64
}

#[expect(clippy::cast_precision_loss, reason = "sizes need no more than 53 bits")]
fn gbps(bytes: u64, seconds: f64) -> f64 {
    bytes as f64 * 8e-9 / seconds
}

#[expect(clippy::cast_precision_loss, reason = "sizes need no more than 53 bits")]
fn mib(bytes: u64) -> String {
    format!("{:.2}", bytes as f64 / f64::from(1 << 20))
}
