//! The command line of ShadowServe: one file per subcommand.

mod bench;
mod bench_codec;
mod bench_codec_device;
mod bench_gpu;
mod bench_pages;
mod bench_tx;
mod config_file;
mod dataplane;
mod decode;
mod demo;
mod doctor;
mod encode;
mod fault_proxy;
mod fetch;
mod flags;
mod gpu_flags;
mod gpudirect;
mod make_profile;
mod out;
mod report;
mod save;
mod store;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Fetches the KV cache of LLM prompt prefixes from remote storage into the serving process, over DPDK.
#[derive(Debug, Parser)]
#[command(version = env!("SHADOWSERVE_VERSION"), args_override_self = true, max_term_width = 110)]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Encode KV caches, keep them in hugepage memory and serve them
    Store(store::Flags),
    /// Fetch, decode and deliver KV for the serving processes of this host
    Dataplane(dataplane::Flags),
    /// Fetch the KV of a token sequence through a running data plane and write it to a file
    Fetch(fetch::Flags),
    /// Put the KV of a file into the store through a running data plane
    Save(save::Flags),
    /// Run a store and a data plane here, fetch a file's whole KV and check every plane
    Demo(demo::Flags),
    /// Encode a KV cache into a file of chunks, and make profiles: which layer's K and V get how many bits
    Encode(encode::Flags),
    /// Decode a file of chunks that `encode` wrote
    Decode(decode::Flags),
    /// Say what this machine has, what it lacks, and what to do about it
    Doctor(doctor::Flags),
    /// Measure one part alone, beside other programs; `make bench` runs all of it
    #[command(subcommand)]
    Bench(bench::Command),
    /// Stand between two ports and lose, repeat, damage, reorder and delay packets: for tests
    #[command(hide = true)]
    FaultProxy(fault_proxy::Flags),
}

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            out::say!("error: {}", with_causes(&error));
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<ExitCode> {
    let arguments = config_file::expand(std::env::args_os().collect())?;
    let command_line = CommandLine::parse_from(arguments);
    start_log();
    match command_line.command {
        Command::Store(flags) => store::run(&flags),
        Command::Dataplane(flags) => dataplane::run(&flags),
        Command::Fetch(flags) => fetch::run(&flags),
        Command::Save(flags) => save::run(&flags),
        Command::Demo(flags) => demo::run(&flags),
        Command::Encode(flags) => encode::run(&flags),
        Command::Decode(flags) => decode::run(&flags),
        Command::Doctor(flags) => doctor::run(&flags),
        Command::Bench(command) => bench::run(&command),
        Command::FaultProxy(flags) => fault_proxy::run(&flags),
    }
}

/// An error and its causes, without those that its text names already.
fn with_causes(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Log lines go to standard error; `SHADOWSERVE_LOG` says which, as in `debug` or `dataplane=debug`.
fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("SHADOWSERVE_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    // Whoever reads the log may go away: that must not end what is logged.
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .log_internal_errors(false)
        .init();
}
