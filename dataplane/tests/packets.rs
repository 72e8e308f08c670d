//! Hostile traffic between a store and the data plane: every packet is counted under its reason, nothing wrong is ever
//! delivered, and what a fetch needs arrives all the same.

#[allow(dead_code, reason = "each test binary uses its part")]
mod lab;

use std::time::{Duration, Instant};

use client::MissingReason::{
    self, Corrupt, Deadline, NotStored, ShapeMismatch, StoreUnreachable, Undecodable,
};
use compress::{ChunkHeader, Codec, Compression, ENTRY_BYTES, FIXED_HEADER_BYTES, PlaneCodec};
use protocol::ChunkInfo;
use protocol::reason::DropReason;

use lab::chunks::Library;
use lab::ledger::{Fates, Ledger};
use lab::random::Random;
use lab::{Lab, Rates, Round, forgery};

/// Rounds of random mischief.
const ROUNDS: u64 = 500;

/// The chunk that lies are told of.
const VICTIM: u32 = 1;

fn round<'a>(name: &'a str, seed: u64, library: &'a Library) -> Round<'a> {
    Round {
        name,
        seed,
        library,
        rates: Rates::default(),
        twist: None,
        missing: &[],
        cut: 0,
        timeout: lab::PATIENCE,
        cancel_after: None,
        restart_after: None,
        unreachable_after: None,
    }
}

/// One test, because a process starts one EAL, and the rounds share one data plane: what a round leaves behind would
/// be found by the next.
#[test]
fn hostile_packets_are_counted_and_change_nothing() {
    let start = Instant::now();
    let deflated = PlaneCodec { compression: Compression::Deflate, ..Codec::Int4.into() };
    let zstd = PlaneCodec { compression: Compression::Zstd, ..Codec::Int8.into() };
    let libraries: Vec<Library> = (7..)
        .zip([Codec::Raw.into(), Codec::Lossless.into(), Codec::Int8.into(), deflated, zstd])
        .map(|(seed, codec)| Library::new(codec, seed))
        .collect();
    let mut lab = Lab::start();
    type Part = fn(&mut Lab, &[Library]);
    let parts: [(&str, Part); 10] = [
        ("undisturbed", undisturbed),
        ("cut", cut_at_every_length),
        ("lies of the lookup", lies_of_the_lookup),
        ("lies of the header", lies_of_the_header),
        ("damage", persistent_damage),
        ("errors", persistent_errors),
        ("ends", silence_and_cancelling),
        ("restarts", restarts),
        ("unreachable", unreachable),
        ("random", random_mischief),
    ];
    for (name, part) in parts {
        part(&mut lab, &libraries);
        eprintln!("{name}: until {:?}", start.elapsed());
    }
    check_coverage(&lab);
    lab.stop();
}

fn undisturbed(lab: &mut Lab, libraries: &[Library]) {
    for library in libraries {
        lab.round(round("undisturbed", 1, library));
    }
}

fn cut_at_every_length(lab: &mut Lab, libraries: &[Library]) {
    // The reply, the headers of three chunks, planes.
    lab.round(Round { cut: 6, ..round("cut at every length", 2, &libraries[3]) });
}

fn lies_of_the_lookup(lab: &mut Lab, libraries: &[Library]) {
    type Lie = fn(&mut ChunkInfo);
    let lies: [(&str, &[MissingReason], Lie); 15] = [
        ("layers", &[ShapeMismatch], |info| info.layers += 1),
        ("no layers", &[ShapeMismatch], |info| info.layers = 0),
        ("heads", &[ShapeMismatch], |info| info.kv_heads = u16::MAX),
        ("head size", &[ShapeMismatch], |info| info.head_dim = 0),
        ("element type", &[ShapeMismatch], |info| info.dtype ^= 0xff),
        ("tokens", &[Undecodable], |info| info.tokens -= 1),
        ("no header", &[Undecodable], |info| info.header_bytes = 0),
        ("header larger than the chunk", &[Undecodable], |info| info.chunk_bytes = 10),
        ("huge header", &[Undecodable], |info| {
            info.header_bytes = u32::MAX;
            info.chunk_bytes = u64::MAX;
        }),
        ("short header", &[Undecodable], |info| info.header_bytes -= 1),
        ("header only", &[Undecodable], |info| info.chunk_bytes = u64::from(info.header_bytes)),
        ("unknown handle", &[Undecodable], |info| info.handle = 99),
        ("handle of another chunk", &[Undecodable], |info| info.handle = 0),
        ("long header", &[], |info| info.header_bytes += 1),
        ("huge chunk", &[], |info| info.chunk_bytes = u64::MAX),
    ];
    for (seed, (name, reasons, lie)) in (100..).zip(lies) {
        let mut library = libraries[3].clone();
        let key = library.keys[VICTIM as usize];
        lie(library.index.get_mut(&key).unwrap());
        let missing = [(VICTIM, reasons)];
        let missing = if reasons.is_empty() { &[][..] } else { &missing };
        lab.round(Round { missing, ..round(name, seed, &library) });
    }
    let mut library = libraries[3].clone();
    library.index.remove(&library.keys[VICTIM as usize]);
    lab.round(Round { missing: &[(VICTIM, &[NotStored])], ..round("not stored", 99, &library) });
}

/// Changes a chunk, and makes the checksums of its planes and its header right.
fn with_header(library: &Library, change: impl FnOnce(&mut [u8])) -> Library {
    let mut library = library.clone();
    let chunk = &mut library.chunks[VICTIM as usize];
    change(chunk);
    let end = FIXED_HEADER_BYTES + library.planes[VICTIM as usize].len() * ENTRY_BYTES;
    chunk[92..96].fill(0);
    let crc = compress::crc32c(&chunk[..end]);
    chunk[92..96].copy_from_slice(&crc.to_le_bytes());
    library
}

fn lies_of_the_header(lab: &mut Lab, libraries: &[Library]) {
    type Lie = fn(&mut [u8]);
    const ENTRY: usize = FIXED_HEADER_BYTES + 2 * ENTRY_BYTES;
    let lies: [(&str, &[MissingReason], Lie); 9] = [
        ("magic", &[Undecodable], |chunk| chunk[0] ^= 1),
        ("format version", &[Undecodable], |chunk| chunk[8] ^= 1),
        ("key", &[Undecodable], |chunk| chunk[20] ^= 1),
        ("layers", &[Undecodable], |chunk| chunk[48] += 1),
        ("tokens", &[Undecodable], |chunk| chunk[54..56].copy_from_slice(&17_u16.to_le_bytes())),
        ("plane far away", &[Undecodable], |chunk| chunk[ENTRY + 7] = 0xff),
        ("empty plane", &[Undecodable], |chunk| chunk[ENTRY + 8..ENTRY + 12].fill(0)),
        ("codec", &[Undecodable], |chunk| chunk[ENTRY + 16] = 77),
        ("plane checksum", &[Corrupt], |chunk| chunk[ENTRY + 12] ^= 1),
    ];
    for (seed, (name, reasons, lie)) in (200..).zip(lies) {
        let library = with_header(&libraries[1], lie);
        lab.round(Round { missing: &[(VICTIM, reasons)], ..round(name, seed, &library) });
    }
    // Whatever is wrong with a plane's place or checksum, the chunk fails, for one reason or the other.
    let mut random = Random::new(3);
    for seed in 300..312 {
        let at = FIXED_HEADER_BYTES + random.below(4) * ENTRY_BYTES + random.below(16);
        let bit = random.below(8);
        let library = with_header(&libraries[1 + random.below(3)], |chunk| chunk[at] ^= 1 << bit);
        let missing: [(u32, &[MissingReason]); 1] = [(VICTIM, &[Corrupt, Undecodable])];
        lab.round(Round { missing: &missing, ..round("a bit of the table", seed, &library) });
    }
    // A plane of noise, every checksum right.
    for seed in 320..324 {
        let header = ChunkHeader::parse(&libraries[1].chunks[VICTIM as usize]).unwrap();
        let entry = header.planes[2];
        let begin = usize::try_from(entry.offset).unwrap();
        let end = begin + usize::try_from(entry.bytes).unwrap();
        let library = with_header(&libraries[1], |chunk| {
            chunk[begin..end].iter_mut().for_each(|byte| *byte = random.byte());
            let crc = compress::crc32c(&chunk[begin..end]);
            chunk[ENTRY + 12..ENTRY + 16].copy_from_slice(&crc.to_le_bytes());
        });
        lab.round(Round { missing: &[(VICTIM, &[Undecodable])], ..round("noise", seed, &library) });
    }
}

/// The range of a DATA message, as chunk and whether it is the header.
fn range_of(payload: &[u8], ledger: &Ledger) -> Option<(u32, bool)> {
    let number = payload.get(8..12).filter(|_| payload[5] == 4)?;
    let range = ledger.receiving(u32::from_le_bytes(number.try_into().unwrap()))?;
    Some((range.handle, range.offset == 0))
}

fn persistent_damage(lab: &mut Lab, libraries: &[Library]) {
    for (name, of_header, reason) in
        [("planes damaged for ever", false, Corrupt), ("header damaged for ever", true, Undecodable)]
    {
        for (seed, library) in (400..).zip(libraries) {
            let mut damage = |payload: &mut Vec<u8>, ledger: &Ledger| {
                if range_of(payload, ledger) == Some((VICTIM, of_header)) {
                    *payload.last_mut().unwrap() ^= 1;
                }
            };
            let missing: [(u32, &[MissingReason]); 1] = [(VICTIM, &[reason])];
            let twist: Option<lab::Twist<'_>> = Some(&mut damage);
            lab.round(Round { twist, missing: &missing, ..round(name, seed, library) });
        }
    }
}

fn persistent_errors(lab: &mut Lab, libraries: &[Library]) {
    for (seed, (code, of_header)) in (500..).zip([
        (1, false),
        (2, false),
        (3, false),
        (4, false),
        (1, true),
        (2, true),
        (3, true),
        (4, true),
    ]) {
        let mut refuse = |payload: &mut Vec<u8>, ledger: &Ledger| {
            if range_of(payload, ledger) == Some((VICTIM, of_header)) {
                *payload = forgery::error_message(&payload[8..12], code);
            }
        };
        let twist: Option<lab::Twist<'_>> = Some(&mut refuse);
        let missing: [(u32, &[MissingReason]); 1] = [(VICTIM, &[Undecodable])];
        lab.round(Round { twist, missing: &missing, ..round("refused for ever", seed, &libraries[3]) });
    }
}

fn silence_and_cancelling(lab: &mut Lab, libraries: &[Library]) {
    let reasons: &[MissingReason] = &[Deadline, StoreUnreachable];
    let missing = [(0, reasons), (1, reasons), (2, reasons)];
    let rates = Rates { lose_request: 1000, ..Rates::default() };
    let timeout = Duration::from_millis(100);
    lab.round(Round { rates, timeout, missing: &missing, ..round("a silent store", 600, &libraries[3]) });
    let mut random = Random::new(601);
    for seed in 601..613 {
        let cancel_after = Some(random.below(120) as u64);
        let rates = Rates { reorder: 300, late: 100, duplicate: 50, ..Rates::default() };
        lab.round(Round { cancel_after, rates, ..round("cancelled", seed, random.pick(libraries)) });
    }
}

fn restarts(lab: &mut Lab, libraries: &[Library]) {
    let mut random = Random::new(700);
    for seed in 700..706 {
        let restart_after = Some(random.below(60) as u64);
        lab.round(Round { restart_after, ..round("the store restarts", seed, random.pick(libraries)) });
    }
}

/// ICMP errors say that there is no store, or no way to it: the fetch fails for that reason, and does not wait for its deadline. The next finds
/// the store again.
fn unreachable(lab: &mut Lab, libraries: &[Library]) {
    let reasons: &[MissingReason] = &[StoreUnreachable];
    let missing = [(0, reasons), (1, reasons), (2, reasons)];
    // Host, port, and forbidden by a router; from the first LOOKUP on, and when headers are pulled.
    for (seed, (code, after)) in (800..).zip([(1, 0), (3, 0), (13, 0), (1, 1), (3, 1), (3, 4)]) {
        let unreachable_after = Some((after, code));
        let round =
            Round { unreachable_after, missing: &missing, ..round("unreachable", seed, &libraries[3]) };
        lab.round(round);
        // Longer than the store counts as gone.
        std::thread::sleep(Duration::from_millis(1100));
    }
    lab.round(round("reachable again", 810, &libraries[3]));
}

fn random_mischief(lab: &mut Lab, libraries: &[Library]) {
    for seed in 1000..1000 + ROUNDS {
        let mut random = Random::new(seed);
        // Half of the rounds have little of some kinds, so that not everything is always at once.
        let mut up_to = |most: usize| if random.chance(500) { random.below(most + 1) } else { 0 };
        let rates = Rates {
            lose: up_to(40),
            lose_request: up_to(60),
            duplicate: up_to(150),
            late: up_to(100),
            reorder: up_to(600),
            forge: 100 + up_to(600),
            poison: up_to(60),
            flip: up_to(40),
            split: up_to(20),
            vlan: up_to(100),
            pad: up_to(100),
            no_checksum: up_to(100),
            error: up_to(30),
        };
        let restart_after = random.chance(100).then(|| random.below(100) as u64);
        let library = random.pick(libraries);
        lab.round(Round { rates, restart_after, ..round("random", seed, library) });
    }
}

/// Everything that can happen to a packet at this end did, and most of it was predicted exactly.
fn check_coverage(lab: &Lab) {
    // One store, one queue, buffers enough: nothing comes from the wrong store, to a full queue, or finds no room.
    let cannot = [DropReason::WrongStore, DropReason::QueueFull, DropReason::NoBuffer];
    for &reason in DropReason::ALL.iter().filter(|reason| !cannot.contains(reason)) {
        let times = lab.totals.get(&Fates::dropped(reason)).copied().unwrap_or(0);
        assert!(times > 10, "{} happened {times} times", reason.name());
    }
    // Requests of strangers that come in one burst may exceed the answers that are kept.
    let (asked, answered) = (lab.arp_requests, lab.arp_replies);
    assert!(answered > asked / 2 && answered <= asked, "{asked} ARP requests, {answered} replies");
    let all: u64 = lab.totals.values().sum();
    let open: u64 = lab.totals.iter().filter(|(fates, _)| !fates.is_exact()).map(|(_, count)| count).sum();
    eprintln!("{all} packets, {open} of them with more than one fate");
    assert!(open * 10 < all, "{open} of {all} packets are not predicted exactly");
}
