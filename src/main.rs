//! The command line of ShadowServe.
fn main() {}
