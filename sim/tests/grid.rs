//! A grid of losses and buffers, its whole result table compared with the one in `grid.txt`: exact, since a run is a
//! function of its seed. A change that is meant to change it writes the table anew with `SIM_BLESS=1`.

use std::fmt::Write as _;
use std::{env, fs};

use sim::catalogue::{GRID, grid};
use sim::scenario::Design;

fn table() -> String {
    let mut text = String::from(
        "design       loss/million buffer/BDP  of ideal  lost %  resent %  queue us  packets not done\n",
    );
    for design in Design::ALL {
        for loss in GRID.0 {
            for buffer in GRID.1 {
                let figures = grid(design, 1, loss, buffer);
                writeln!(
                    text,
                    "{:<12} {:>12} {:>10.2} {:>9.4} {:>7.3} {:>9.3} {:>9.1} {:>8} {:>8}",
                    design.name(),
                    loss,
                    buffer,
                    figures.of_ideal,
                    figures.lost_percent,
                    figures.resent_percent,
                    figures.queue_peak_us,
                    figures.packets,
                    figures.not_done
                )
                .expect("a string takes all");
            }
        }
    }
    text
}

#[test]
fn the_grid_is_what_it_was() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/grid.txt");
    let now = table();
    if env::var_os("SIM_BLESS").is_some() {
        fs::write(path, &now).expect("the table can be written");
    }
    let before = fs::read_to_string(path).unwrap_or_default();
    assert!(
        now == before,
        "the table has changed. If that is meant: SIM_BLESS=1 cargo test -p sim --test grid, and look at the \
         difference.\n--- before\n{before}\n--- now\n{now}"
    );
}
