//! Copying planes to the host ring.
fn main() {}
