//! What the protocol engine of a queue has done, for other threads to read.

use iface::Counter;
use protocol::fetch::FetchCounters;

macro_rules! fetch_counts {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// The engine's counts of requests, losses and replicas.
        #[derive(Debug, Default)]
        pub(crate) struct FetchCounts { $($(#[doc = $doc])+ $name: Counter,)+ }

        impl FetchCounts {
            /// Copies the engine's counts; only the lcore that owns the engine calls it.
            pub(crate) fn mirror(&self, counts: &FetchCounters) {
                $(self.$name.set(counts.$name);)+
            }

            /// Every counter with its name.
            pub(crate) fn named(&self) -> impl Iterator<Item = (&'static str, &Counter)> {
                [$((stringify!($name), &self.$name),)+].into_iter()
            }
        }
    };
}

fetch_counts! {
    /// LOOKUPs sent, repeats included.
    lookups_sent,
    /// PULLs sent.
    pulls_sent,
    /// Segments asked for the first time.
    segments_asked,
    /// Segments asked for again after they were given up.
    segments_asked_again,
    /// Segments given up as lost.
    segments_lost,
    /// Of those, that came after all: they were asked for again in vain.
    segments_late,
    /// Times that the last segment under way of a store was asked for again because nothing came.
    tail_probes,
    /// Times that everything under way of one store was given up as lost.
    timeouts,
    /// ICMP errors by which a store cannot be reached, about something under way at it.
    unreachable,
    /// Such errors that quote nothing that is under way: nothing was done.
    unreachable_unproven,
    /// Answers of stores that they are busy.
    busy,
    /// Chunks that went to another store because theirs was silent, busy, slow, or did not hold them.
    failovers,
    /// Chunks whose store was slow, so that a replica was asked too.
    chunks_hedged,
    /// Segments of planes under way that a replica was asked for too: at most `--hedge-percent` of those asked for.
    segments_hedged,
    /// Planes that came from such a replica.
    planes_hedged,
    /// Chunks looked up again because the store no longer knew their handle.
    lookups_again,
}
