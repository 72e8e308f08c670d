//! Printing where somebody may have stopped reading: `println!` and `eprintln!` panic then.

/// A line on standard error, which is lost if nobody reads it.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($text)*);
    }};
}

/// A line on standard output; an `anyhow::Result` of its fate.
macro_rules! print_line {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        anyhow::Context::context(writeln!(std::io::stdout(), $($text)*), "standard output")
    }};
}

pub(crate) use {print_line, say};
