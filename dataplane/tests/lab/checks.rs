//! What must hold after a round: the client's report, its memory, and the data plane's counts.

use client::{FetchReport, Outcome, Region};
use protocol::reason::DropReason;
use serde_json::Value;

use super::chunks::Library;
use super::ledger::{Fates, Sums};
use super::{Round, UNTOUCHED};

/// Every plane that arrived has every byte right; every other was not touched.
pub(crate) fn check_region(name: &str, round: &Round<'_>, region: &Region) {
    let mut bytes = vec![0; region.bytes()];
    region.copy_out(0, &mut bytes).unwrap();
    for (chunk, planes) in round.library.planes.iter().enumerate() {
        let is_missing = round.cancel_after.is_some()
            || round.missing.iter().any(|&(index, _)| usize::try_from(index) == Ok(chunk));
        for (plane, expected) in planes.iter().enumerate() {
            let start = Library::plane_offset(chunk, plane);
            let got = &bytes[start..start + expected.len()];
            let untouched = got.iter().all(|&byte| byte == UNTOUCHED);
            assert!(
                got == expected || (is_missing && untouched),
                "{name}: chunk {chunk}, plane {plane} is wrong"
            );
        }
    }
    assert!(bytes[Library::decoded_bytes()..].iter().all(|&byte| byte == UNTOUCHED), "{name}: guard");
}

/// Chunks that the data plane gives up at a moment that cannot be told from outside.
pub(crate) fn shaky(round: &Round<'_>) -> Vec<u32> {
    if round.cancel_after.is_some() {
        return (0..).take(round.library.keys.len()).collect();
    }
    round.missing.iter().map(|&(chunk, _)| chunk).collect()
}

pub(crate) fn check_report(name: &str, round: &Round<'_>, report: &FetchReport) {
    if round.cancel_after.is_some() {
        // The end may have been on its way when the client cancelled.
        assert!(matches!(report.outcome, Outcome::Cancelled | Outcome::Done), "{name}: {report:?}");
        return;
    }
    let expected = if round.missing.is_empty() { Outcome::Done } else { Outcome::Failed };
    assert_eq!(report.outcome, expected, "{name}: {report:?}");
    let mut missing = report.missing.clone();
    missing.sort_by_key(|missing| missing.chunk);
    assert_eq!(missing.len(), round.missing.len(), "{name}: {report:?}");
    for (missing, (chunk, reasons)) in missing.iter().zip(round.missing) {
        assert!(missing.chunk == *chunk && reasons.contains(&missing.reason), "{name}: {report:?}");
    }
}

pub(crate) fn count(counters: &Value, name: &str) -> u64 {
    counters[name].as_u64().unwrap_or_else(|| panic!("no counter {name}"))
}

fn dropped(counters: &Value, reason: DropReason) -> u64 {
    count(&counters["dropped"], reason.name())
}

/// Packets of which it is counted what became of them.
pub(crate) fn accounted(counters: &Value) -> u64 {
    let drops: u64 = DropReason::ALL.iter().map(|&reason| dropped(counters, reason)).sum();
    let taken = ["rx_neighbour", "rx_icmp", "segments_accepted", "control_accepted"]
        .map(|name| count(counters, name));
    drops + taken.iter().sum::<u64>()
}

pub(crate) fn check_counters(name: &str, before: &Value, after: &Value, sums: &Sums, received: u64) {
    let (old, new) = (&before["counters"], &after["counters"]);
    let more = |counter: &str| count(new, counter) - count(old, counter);
    assert_eq!(more("rx_packets"), sums.packets, "{name}");
    assert_eq!(more("rx_bytes"), sums.bytes, "{name}");
    assert_eq!(more("rx_gathered"), sums.split, "{name}");
    assert_eq!(more("rx_datagrams"), sums.datagrams, "{name}");
    assert_eq!(more("tx_packets"), received, "{name}");
    assert_eq!(more("misdirected"), 0, "{name}");
    let check = |what: &str, fate: Fates, got: u64| {
        let (least, most) = sums.bounds(fate);
        assert!((least..=most).contains(&got), "{name}: {got} {what}, expected {least} to {most}: {new:#}");
    };
    check("neighbours", Fates::NEIGHBOUR, more("rx_neighbour"));
    check("errors", Fates::ICMP, more("rx_icmp"));
    check("segments accepted", Fates::SEGMENT, more("segments_accepted"));
    check("control accepted", Fates::CONTROL, more("control_accepted"));
    for &reason in DropReason::ALL {
        check(reason.name(), Fates::dropped(reason), dropped(new, reason) - dropped(old, reason));
    }
    let planes = ["planes_arrived", "planes_delivered", "planes_corrupt", "planes_undecodable"].map(more);
    let [arrived, delivered, corrupt, undecodable] = planes;
    assert_eq!(arrived, delivered + corrupt + undecodable, "{name}: {planes:?}");
    if !sums.is_shaky {
        assert_eq!((arrived, corrupt, undecodable), (sums.planes, sums.poisoned_planes, 0), "{name}");
    }
    check_transport(name, &before["transport"], &after["transport"], (more("segments_accepted"), received));
    let memory = &after["memory"];
    assert_eq!(memory["slots_free"], memory["slots"], "{name}: every slot is free again");
    assert_eq!(memory["decode_backlog_planes"], 0, "{name}");
    let port = &after["port"];
    assert_eq!(count(port, "rx_packets"), count(new, "rx_packets"), "{name}");
}

/// What was asked for accounts for what was taken in and sent.
fn check_transport(name: &str, old: &Value, new: &Value, (segments, sent): (u64, u64)) {
    let more = |counter: &str| count(new, counter) - count(old, counter);
    let asked = more("segments_asked") + more("segments_asked_again");
    assert!(segments <= asked, "{name}: {segments} segments of {asked} asked for");
    let requests = more("lookups_sent") + more("pulls_sent");
    assert!(0 < requests && requests <= sent, "{name}: {requests} requests of {sent} packets");
    assert_eq!(
        (more("chunks_hedged"), more("segments_hedged"), more("planes_hedged")),
        (0, 0, 0),
        "{name}: one store"
    );
}
