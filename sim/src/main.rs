//! `sim`: runs the scenarios and the seeds of the simulator.

use std::fs;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};
use comfy_table::{Table, presets};

use sim::catalogue::{ENTRIES, Entry, Figures, Row};
use sim::scenario::Design;
use sim::seeds::{self, Outcome};

/// A deterministic network simulator around ShadowServe's protocol engines.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Replay this seed, as `replay --seed` does.
    #[arg(long)]
    seed: Option<u64>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Name the scenarios.
    List,
    /// Measure all scenarios with all designs.
    Table {
        /// Only these designs.
        #[arg(long, value_delimiter = ',')]
        designs: Vec<Design>,
        /// Only scenarios whose name contains one of these.
        #[arg(long, value_delimiter = ',')]
        only: Vec<String>,
        /// Divide the bytes that are fetched by this.
        #[arg(long, default_value_t = 1)]
        scale: u32,
        /// The first seed.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Seeds of each scenario and design: the table shows medians, the files every run.
        #[arg(long, default_value_t = 1)]
        seeds: u64,
        /// Write all figures to this file as JSON.
        #[arg(long)]
        json: Option<PathBuf>,
        /// Write all figures to this file as CSV.
        #[arg(long)]
        csv: Option<PathBuf>,
    },
    /// Measure one scenario and print all its figures as JSON.
    Run {
        /// Its name, as `list` prints it.
        name: String,
        /// With this design.
        #[arg(long, default_value = "ours")]
        design: Design,
        /// Seed of the run.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Divide the bytes that are fetched by this.
        #[arg(long, default_value_t = 1)]
        scale: u32,
    },
    /// Run one seed; it fails where it failed before.
    Replay {
        /// Which.
        #[arg(long)]
        seed: u64,
        /// Print the scenario, what happens and every packet that arrives.
        #[arg(long)]
        trace: bool,
    },
    /// Run many seeds, until one fails; says every ten seconds how many held. Several processes share a range by --first and --seeds.
    Soak {
        /// The first.
        #[arg(long, default_value_t = 0)]
        first: u64,
        /// How many.
        #[arg(long, default_value_t = 10_000)]
        seeds: u64,
        /// Threads; all CPUs if absent.
        #[arg(long)]
        threads: Option<usize>,
        /// Stop after this many seconds, however many seeds were run by then.
        #[arg(long)]
        seconds: Option<u64>,
        /// Go on after a seed that fails.
        #[arg(long)]
        keep_going: bool,
        /// Print the outcome as JSON.
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("sim: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<bool> {
    match (arguments.seed, arguments.command) {
        (Some(seed), None) => Ok(replay(seed, false)),
        (None, Some(Command::List)) => {
            ENTRIES.iter().for_each(|entry| println!("{:<18} {}", entry.name, entry.about));
            Ok(true)
        }
        (None, Some(Command::Table { designs, only, scale, seed, seeds, json, csv })) => {
            let designs = if designs.is_empty() { Design::ALL.to_vec() } else { designs };
            let rows = measure(&designs, &only, scale, seed..seed + seeds.max(1))?;
            println!("{}", table(&rows));
            if let Some(path) = json {
                let text = serde_json::to_string_pretty(&rows)?;
                fs::write(&path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
            }
            if let Some(path) = csv {
                fs::write(&path, comma_separated(&rows)?)
                    .with_context(|| format!("cannot write {}", path.display()))?;
            }
            Ok(true)
        }
        (None, Some(Command::Run { name, design, seed, scale })) => {
            let Some(entry) = ENTRIES.iter().find(|entry| entry.name == name) else {
                bail!("there is no scenario {name:?}; `sim list` names them");
            };
            let clock = Instant::now();
            let row = entry.run(design, seed, scale);
            let rate = rate(row.figures.packets, clock);
            println!("{}", serde_json::to_string_pretty(&row)?);
            eprintln!("{rate:.2} million packets a second");
            Ok(true)
        }
        (None, Some(Command::Replay { seed, trace })) => Ok(replay(seed, trace)),
        (None, Some(Command::Soak { first, seeds, threads, seconds, keep_going, json })) => {
            let cpus = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
            let threads = threads.unwrap_or_else(cpus).max(1);
            soak(&Soak { seeds: first..first + seeds, threads, seconds, keeps_going: keep_going }, json)
        }
        (Some(_), Some(_)) => bail!("--seed stands alone or behind a command"),
        (None, None) => bail!("nothing to do; see --help"),
    }
}

fn replay(seed: u64, trace: bool) -> bool {
    match catch_unwind(|| seeds::run(seed, trace)) {
        Ok(outcome) => {
            println!("seed {seed} holds: {outcome:?}");
            true
        }
        Err(_) => {
            println!("seed {seed} failed");
            false
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn rate(packets: u64, since: Instant) -> f64 {
    packets as f64 / since.elapsed().as_secs_f64() / 1e6
}

/// A soak's seeds, and when it ends.
struct Soak {
    seeds: Range<u64>,
    threads: usize,
    seconds: Option<u64>,
    keeps_going: bool,
}

/// What has come of a soak so far.
#[derive(Default)]
struct Total {
    outcome: Outcome,
    failed: Vec<u64>,
}

impl Soak {
    fn run(&self, clock: Instant) -> Total {
        let (next, total) = (AtomicU64::new(self.seeds.start), Mutex::new(Total::default()));
        let is_over = || {
            let is_late = self.seconds.is_some_and(|seconds| clock.elapsed().as_secs() >= seconds);
            is_late || (!self.keeps_going && !lock(&total).failed.is_empty())
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.threads)
                .map(|_| {
                    scope.spawn(|| {
                        while !is_over() {
                            let seed = next.fetch_add(1, Ordering::Relaxed);
                            if seed >= self.seeds.end {
                                return;
                            }
                            run_seed(seed, &total);
                        }
                    })
                })
                .collect();
            let mut told = Instant::now();
            while !threads.iter().all(std::thread::ScopedJoinHandle::is_finished) {
                std::thread::sleep(Duration::from_millis(50));
                if told.elapsed() >= TELL_EVERY {
                    told = Instant::now();
                    self.tell(&lock(&total), clock);
                }
            }
        });
        let mut total = total.into_inner().unwrap_or_else(PoisonError::into_inner);
        total.failed.sort_unstable();
        total
    }

    fn tell(&self, total: &Total, clock: Instant) {
        let Total { outcome, failed } = total;
        eprintln!(
            "{} of {} seeds from {} held, {} failed; {} s, {:.2} million packets a second",
            outcome.runs,
            self.seeds.end - self.seeds.start,
            self.seeds.start,
            failed.len(),
            clock.elapsed().as_secs(),
            rate(outcome.packets, clock)
        );
    }
}

/// How often a soak says how far it is.
const TELL_EVERY: Duration = Duration::from_secs(10);

fn lock(total: &Mutex<Total>) -> MutexGuard<'_, Total> {
    total.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run_seed(seed: u64, total: &Mutex<Total>) {
    match catch_unwind(AssertUnwindSafe(|| seeds::run(seed, false))) {
        Ok(outcome) => lock(total).outcome.add(&outcome),
        Err(_) => {
            eprintln!("seed {seed} failed; again: cargo run -p sim --release -- --seed {seed}");
            lock(total).failed.push(seed);
        }
    }
}

fn soak(soak: &Soak, json: bool) -> anyhow::Result<bool> {
    let clock = Instant::now();
    let Total { outcome, failed } = soak.run(clock);
    let million_packets_per_second = rate(outcome.packets, clock);
    let (first, threads) = (soak.seeds.start, soak.threads);
    if json {
        let report = serde_json::json!({
            "first": first,
            "outcome": outcome,
            "failed_seeds": failed,
            "seconds": clock.elapsed().as_secs_f64(),
            "threads": threads,
            "million_packets_per_second": million_packets_per_second,
        });
        println!("{report}");
    } else {
        println!("{outcome:#?}");
        println!(
            "{} seeds from {first} held, {} failed {failed:?}; {:.1} s on {threads} threads, {:.2} million packets a second",
            outcome.runs,
            failed.len(),
            clock.elapsed().as_secs_f64(),
            million_packets_per_second
        );
    }
    Ok(failed.is_empty())
}

fn measure(designs: &[Design], only: &[String], scale: u32, seeds: Range<u64>) -> anyhow::Result<Vec<Row>> {
    let is_wanted =
        |entry: &&Entry| only.is_empty() || only.iter().any(|part| entry.name.contains(part.as_str()));
    let entries: Vec<&Entry> = ENTRIES.iter().filter(is_wanted).collect();
    if entries.is_empty() {
        bail!("no scenario has such a name; `sim list` names them");
    }
    let mut rows = Vec::new();
    for entry in entries {
        for design in designs.iter().filter(|design| entry.is_for(**design)) {
            rows.extend(seeds.clone().map(|seed| entry.run(*design, seed, scale)));
        }
    }
    Ok(rows)
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN).set_header([
        "scenario",
        "design",
        "Gbps",
        "of ideal",
        "lost %",
        "resent %",
        "resent/lost",
        "queue us",
        "Jain",
        "p99 us",
        "p99/alone",
        "not done",
    ]);
    for runs in rows.chunk_by(|one, other| (one.scenario, one.design) == (other.scenario, other.design)) {
        let of = |figure: fn(&Figures) -> Option<f64>, digits: usize| {
            let mut values: Vec<f64> = runs.iter().filter_map(|run| figure(&run.figures)).collect();
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 2).map_or(String::new(), |median| format!("{median:.digits$}"))
        };
        table.add_row([
            runs[0].scenario.to_string(),
            runs[0].design.name().to_string(),
            of(|figures| Some(figures.goodput_gbps), 2),
            of(|figures| Some(figures.of_ideal), 3),
            of(|figures| Some(figures.lost_percent), 2),
            of(|figures| Some(figures.resent_percent), 2),
            of(|figures| figures.resent_per_lost, 2),
            of(|figures| Some(figures.queue_peak_us), 0),
            of(|figures| figures.jain, 3),
            of(|figures| figures.p99_us, 0),
            of(|figures| figures.p99_of_alone, 2),
            runs.iter().map(|run| run.figures.not_done).sum::<u64>().to_string(),
        ]);
    }
    table
}

/// The rows as CSV: the columns are the fields of the JSON.
fn comma_separated(rows: &[Row]) -> anyhow::Result<String> {
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        let serde_json::Value::Object(mut fields) = serde_json::to_value(row)? else {
            bail!("a row is an object")
        };
        fields.remove("counters");
        if index == 0 {
            let names: Vec<&str> = fields.keys().map(String::as_str).collect();
            text += &(names.join(",") + "\n");
        }
        let cell = |value: &serde_json::Value| match value {
            serde_json::Value::Null => String::new(),
            serde_json::Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let cells: Vec<String> = fields.values().map(cell).collect();
        text += &(cells.join(",") + "\n");
    }
    Ok(text)
}
