//! Runs the shell test of `setup.sh`.

use std::path::Path;
use std::process::Command;

#[test]
fn setup_script() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/setup.sh");
    let output = Command::new("bash").arg(script).output().expect("bash is there");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    match output.status.code() {
        Some(0) => {}
        // The part that needs root was skipped; the reason is in the output.
        Some(125) => eprintln!("{out}"),
        _ => panic!("{out}{err}"),
    }
}
