//! Stamps the version into the binary. Its libraries name what they link in their own build scripts (see `dpdk-sys/build/`); nothing is left
//! to be passed to the linker from here.

use std::path::Path;
use std::process::Command;

fn main() {
    let package = env!("CARGO_PKG_VERSION");
    let version = match commit() {
        Some(commit) => format!("{package} ({commit})"),
        None => package.to_owned(),
    };
    println!("cargo:rustc-env=SHADOWSERVE_VERSION={version}");
    println!("cargo:rerun-if-changed=build.rs");
    // A commit or a checkout appends to the log of HEAD, which a linked worktree has elsewhere. A missing path would make every
    // build run this again.
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"]).filter(|log| Path::new(log).exists()) {
        println!("cargo:rerun-if-changed={log}");
    }
}

/// The commit that is checked out, shortened; none outside a git checkout.
fn commit() -> Option<String> {
    git(&["rev-parse", "--short=12", "HEAD"])
}

/// What git answers, if there is git and it has an answer.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !text.trim().is_empty()).then(|| text.trim().to_owned())
}
