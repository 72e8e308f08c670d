//! The loop that a lcore runs: its stages in turn, for ever, until told to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use crate::clock::Clock;
use crate::counter::Counter;

/// A piece of the data path that a lcore polls.
pub trait Stage: Send {
    /// Does what can be done at `now_ns` without waiting and returns how much that was, 0 when there was nothing.
    fn poll(&mut self, now_ns: u64) -> usize;
}

/// How a lcore spent its loops.
#[derive(Debug, Default)]
pub struct LcoreCounters {
    /// Loops in which at least one stage found work.
    pub busy_loops: Counter,
    /// Loops in which none did.
    pub idle_loops: Counter,
    /// Nanoseconds spent in busy loops.
    pub busy_ns: Counter,
}

/// What every lcore of a process shares.
#[derive(Debug, Clone)]
pub struct LcoreControl {
    /// Set once, to end every loop.
    pub stop: Arc<AtomicBool>,
    /// The clock that stages are given.
    pub clock: Clock,
    /// How long a lcore that has been idle for a while naps; zero polls without pause.
    pub idle_sleep: Duration,
}

/// Tells the lcores of a process to end when it is dropped: whoever waits for them while a panic or an error unwinds would wait for ever.
#[derive(Debug)]
pub struct StopOnDrop(pub Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Idle loops in a row before the lcore naps, when it may.
const IDLE_LOOPS_BEFORE_NAP: u32 = 2_000;

/// Polls `stages` in turn until told to stop.
pub fn run(stages: &mut [Box<dyn Stage>], control: &LcoreControl, counters: &LcoreCounters) {
    let mut idle_in_a_row = 0_u32;
    let mut now_ns = control.clock.now_ns();
    while !control.stop.load(Relaxed) {
        let work: usize = stages.iter_mut().map(|stage| stage.poll(now_ns)).sum();
        if work > 0 {
            idle_in_a_row = 0;
            let end_ns = control.clock.now_ns();
            counters.busy_loops.add(1);
            counters.busy_ns.add(end_ns.saturating_sub(now_ns));
            now_ns = end_ns;
            continue;
        }
        counters.idle_loops.add(1);
        idle_in_a_row = idle_in_a_row.saturating_add(1);
        if idle_in_a_row >= IDLE_LOOPS_BEFORE_NAP && !control.idle_sleep.is_zero() {
            std::thread::sleep(control.idle_sleep);
        } else {
            std::hint::spin_loop();
        }
        now_ns = control.clock.now_ns();
    }
}
