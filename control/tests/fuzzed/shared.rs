//! Memory that two processes write: rings of messages, a session's, a GPU ring's words. One side is honest, the other writes what it likes, where it likes.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use control::codec::{decode_command, decode_completion};
use control::doorbell::line_pair;
use control::ring::{CURSORS_BYTES, Receiver, RingSpan, Sender};
use control::session::{Endpoint, Side, create, open};
use control::{RingConsumer, RingDescriptor, RingProducer, Sent, ring_words_bytes};
use hugepages::{Arena, ArenaConfig, PageChoice};

use super::input::Input;

const DATA_BYTES: [usize; 3] = [64, 256, 1024];
const MOST_ENTRIES: u32 = 8;

thread_local! {
    /// Made once; the front is zeroed for each input.
    static ARENA: Arc<Arena> = {
        let config = ArenaConfig { name: "shared", bytes: 8192, page: PageChoice::Base, numa_node: None };
        Arc::new(Arena::new(config).expect("two pages"))
    };
}

/// A script over shared memory, of the kind that the first byte says. As long as nobody has written out of turn, what is sent is what arrives; afterwards
/// nothing is read or written outside of the memory, what is received is no longer than a message, and a ring found corrupt stays so.
pub(crate) fn shared(data: &[u8]) {
    let mut input = Input(data);
    let arena = ARENA.with(Arc::clone);
    arena.zero(0, arena.bytes()).expect("all of it");
    match input.byte() & 3 {
        0 | 1 => ring(&arena, &mut input),
        2 => gpu_ring(&arena, &mut input),
        _ => session(&mut input),
    }
}

/// Writes what no correct peer writes.
fn scribble(arena: &Arena, bytes: usize, input: &mut Input<'_>) {
    let at = usize::from(input.u16()) % (bytes / 8) * 8;
    arena.atomic_u64(at).expect("in the arena").store(input.number(), Ordering::SeqCst);
}

/// A message that follows from its number.
fn bytes_of(number: u64, length: usize) -> Vec<u8> {
    (0..length as u64).map(|at| (number ^ at).to_le_bytes()[0]).collect()
}

fn ring(arena: &Arc<Arena>, input: &mut Input<'_>) {
    let data_bytes = DATA_BYTES[input.below(DATA_BYTES.len())];
    let span = RingSpan { cursors: 0, data: CURSORS_BYTES, data_bytes };
    let mut sender = Sender::new(Arc::clone(arena), span).expect("a ring");
    let mut receiver = Receiver::new(Arc::clone(arena), span).expect("a ring");
    let (mut sent, mut number, mut honest, mut out) = (VecDeque::new(), 0, true, Vec::new());
    let (mut sender_corrupt, mut receiver_corrupt) = (false, false);
    while !input.is_empty() {
        match input.byte() & 3 {
            0 => {
                let message = bytes_of(number, usize::from(input.byte()) * data_bytes / 256);
                let fits = message.len() <= span.max_message_bytes();
                match sender.try_send(&message) {
                    Ok(taken) => {
                        assert!(fits && !sender_corrupt);
                        if taken {
                            sent.push_back(message);
                            number += 1;
                        }
                    }
                    Err(_) => {
                        assert!(!fits || !honest);
                        sender_corrupt |= fits;
                    }
                }
            }
            1 => match receiver.try_receive(&mut out) {
                Ok(true) => {
                    assert!(!receiver_corrupt && out.len() <= span.max_message_bytes());
                    let expected = sent.pop_front();
                    assert!(!honest || expected.as_ref() == Some(&out), "not what was sent");
                }
                Ok(false) => assert!(out.is_empty() && (!honest || sent.is_empty())),
                Err(_) => {
                    assert!(!honest && out.is_empty());
                    receiver_corrupt = true;
                }
            },
            2 => {
                scribble(arena, CURSORS_BYTES + data_bytes, input);
                honest = false;
            }
            _ => assert!(receiver.is_empty().is_ok() != receiver_corrupt || !honest),
        }
    }
}

fn gpu_ring(arena: &Arc<Arena>, input: &mut Input<'_>) {
    let entries = 1 + input.u32() % MOST_ENTRIES;
    let entry_bytes = 4096;
    let mut consumer = RingConsumer::create(Arc::clone(arena), entries, entry_bytes, 7).expect("room");
    let producer = RingProducer::new(Arc::clone(arena), entries, 7).expect("a ring");
    let (mut honest, mut claimed, mut claims, mut taken) = (true, VecDeque::new(), 0, 0);
    while !input.is_empty() {
        match input.byte() & 7 {
            0 | 1 => match producer.claim() {
                Ok(Some(number)) => {
                    assert!(producer.entry(number) < entries);
                    claimed.push_back(number);
                    claims += 1;
                }
                Ok(None) => assert!(!honest || claims == taken + u64::from(entries)),
                Err(_) => assert!(!honest),
            },
            2 | 3 => {
                if let Some(number) = claimed.pop_front() {
                    let (chunk, plane) = (u32::from(input.byte()), u32::from(input.byte()));
                    let descriptor =
                        RingDescriptor { fetch: number, chunk, plane, bytes: chunk, delivered: true };
                    producer.publish(number, &descriptor);
                }
            }
            4 | 5 => match consumer.peek() {
                Ok(Some((entry, found))) => {
                    assert!(entry < entries && u64::from(found.bytes) <= entry_bytes);
                    assert!(!honest || found.fetch == taken, "taken in order");
                    consumer.release();
                    taken += 1;
                }
                Ok(None) => {}
                Err(_) => assert!(!honest),
            },
            6 => {
                scribble(arena, ring_words_bytes(entries), input);
                honest = false;
            }
            _ => {
                if input.byte() == 0 {
                    consumer.revoke();
                    honest = false;
                }
                let generation = input.number();
                let _ = RingProducer::new(Arc::clone(arena), input.u32(), generation);
            }
        }
    }
}

/// The memory of a session, whose both ends are ours and which somebody else writes to.
fn session(input: &mut Input<'_>) {
    let ours = create().expect("memory");
    let theirs = open(ours.fd().try_clone_to_owned().expect("a descriptor")).expect("a session's memory");
    let (line, other_line) = line_pair().expect("a line");
    let mut ends = [
        Endpoint::new(ours, Side::DataPlane, Arc::new(line)).expect("a session's memory"),
        Endpoint::new(theirs, Side::Client, Arc::new(other_line)).expect("a session's memory"),
    ];
    let (mut out, mut now_ns) = (Vec::new(), 0);
    while !input.is_empty() {
        let how = input.byte();
        let end = &mut ends[usize::from(how & 1)];
        match how >> 1 & 7 {
            0 | 1 => {
                let length = usize::from(input.byte());
                let sent = end.send(input.take(length));
                assert!(sent != Ok(Sent::Full), "a megabyte is not full of this");
            }
            2 | 3 => {
                // Both kinds of message are read, whoever reads.
                if let Ok(true) = end.receive(&mut out) {
                    let _ = (decode_command(&out), decode_completion(&out));
                } else {
                    assert!(out.is_empty());
                }
            }
            4 => {
                let _ = end.set_sleeping(input.byte() & 1 == 0);
            }
            5 => {
                now_ns = input.number().max(now_ns);
                end.beat(input.number());
                let _ = end.peer_alive(now_ns, Duration::from_millis(400));
            }
            // The words, the cursors and the first messages.
            _ => scribble(end.memory(), if how & 0x80 == 0 { 8192 } else { 1536 }, input),
        }
    }
}
