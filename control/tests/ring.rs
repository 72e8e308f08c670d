//! The ring against a `VecDeque`, against a peer that scribbles over the shared memory, and between threads.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use control::RingError;
use control::doorbell::line_pair;
use control::ring::{Receiver, RingSpan, Sender};
use control::session::{Endpoint, Sent, Side, create, open};
use hugepages::{Arena, ArenaConfig, PageChoice};
use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec};

const DATA_AT: usize = 512;

fn arena() -> Arc<Arena> {
    let config = ArenaConfig { name: "ring-test", bytes: 4096, page: PageChoice::Base, numa_node: None };
    Arc::new(Arena::new(config).expect("a page"))
}

fn span(data_bytes: usize) -> RingSpan {
    RingSpan { cursors: 0, data: DATA_AT, data_bytes }
}

fn pair(arena: &Arc<Arena>, data_bytes: usize) -> (Sender, Receiver) {
    let sender = Sender::new(Arc::clone(arena), span(data_bytes)).expect("sender");
    (sender, Receiver::new(Arc::clone(arena), span(data_bytes)).expect("receiver"))
}

#[test]
fn spans_that_are_no_rings_are_refused() {
    let arena = arena();
    let good = span(1024);
    for bad in [
        RingSpan { data_bytes: 1000, ..good },
        RingSpan { data_bytes: 32, ..good },
        RingSpan { data_bytes: 4096, ..good },
        RingSpan { data: usize::MAX - 7, ..good },
        RingSpan { data: 515, ..good },
        RingSpan { cursors: 4, ..good },
        RingSpan { cursors: 4000, ..good },
    ] {
        assert!(matches!(Sender::new(Arc::clone(&arena), bad), Err(RingError::BadSpan { .. })), "{bad:?}");
    }
}

#[test]
fn a_message_that_never_fits_is_named() {
    let (mut sender, _) = pair(&arena(), 128);
    let limit = span(128).max_message_bytes();
    assert_eq!(limit, 56);
    assert_eq!(sender.try_send(&[0; 57]), Err(RingError::TooLong { bytes: 57, limit }));
    assert_eq!(sender.try_send(&[0; 56]), Ok(true));
    assert_eq!(sender.try_send(&[0; 56]), Ok(true), "any two messages fit");
    assert_eq!(sender.try_send(&[]), Ok(false));
}

#[derive(Clone, Debug)]
enum Step {
    Send(Vec<u8>),
    Receive,
}

fn steps(longest: usize) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..=longest).prop_map(Step::Send),
        Just(Step::Receive),
    ];
    prop::collection::vec(step, 0..400)
}

/// Bytes that a queue of messages takes in a ring.
fn used(queue: &VecDeque<Vec<u8>>) -> usize {
    queue.iter().map(|message| 8 + message.len().next_multiple_of(8)).sum()
}

proptest! {
    #[test]
    fn behaves_as_a_queue(power in 6u32..10, steps in steps(64)) {
        let capacity = 1_usize << power;
        let arena = arena();
        let (mut sender, mut receiver) = pair(&arena, capacity);
        let mut model = VecDeque::new();
        let mut out = vec![9; 3];
        for step in steps {
            match step {
                Step::Send(message) => {
                    let sent = sender.try_send(&message);
                    let room = used(&model) + 8 + message.len().next_multiple_of(8) <= capacity;
                    if message.len() > span(capacity).max_message_bytes() {
                        let too_long = matches!(sent, Err(RingError::TooLong { .. }));
                        prop_assert!(too_long);
                    } else {
                        prop_assert_eq!(sent, Ok(room));
                        if room {
                            model.push_back(message);
                        }
                    }
                }
                Step::Receive => {
                    prop_assert_eq!(receiver.is_empty(), Ok(model.is_empty()));
                    prop_assert_eq!(receiver.try_receive(&mut out), Ok(!model.is_empty()));
                    prop_assert_eq!(&out, &model.pop_front().unwrap_or_default());
                }
            }
        }
        // Nothing but the ring has been written to.
        let mut beyond = vec![0; arena.bytes() - DATA_AT - capacity];
        arena.copy_out(DATA_AT + capacity, &mut beyond).unwrap();
        prop_assert!(beyond.iter().all(|&byte| byte == 0));
    }

    /// Whatever the other process writes, wherever it writes it: a message, an error, never a panic; and an
    /// error stays.
    #[test]
    fn a_hostile_peer_gets_errors(
        steps in prop::collection::vec(
            (0usize..3, prop_oneof![Just(0usize), Just(128), DATA_AT..DATA_AT + 256],
             prop_oneof![any::<u64>(), 0u64..300, Just(u64::MAX - 7)]),
            1..300,
        ),
    ) {
        let arena = arena();
        let (mut sender, mut receiver) = pair(&arena, 256);
        let (mut sender_error, mut receiver_error) = (None, None);
        let mut out = Vec::new();
        for (action, offset, value) in steps {
            match action {
                0 => {
                    let length = usize::try_from(value % 121).unwrap();
                    let result = sender.try_send(&vec![7; length]);
                    prop_assert!(sender_error.is_none_or(|error| result == Err(error)));
                    sender_error = result.err().or(sender_error);
                }
                1 => {
                    let result = receiver.try_receive(&mut out);
                    prop_assert!(out.len() <= span(256).max_message_bytes());
                    prop_assert!(receiver_error.is_none_or(|error| result == Err(error)));
                    receiver_error = result.err().or(receiver_error);
                }
                _ => arena.copy_in(offset, &value.to_le_bytes()).unwrap(),
            }
        }
    }
}

#[test]
fn each_impossible_cursor_is_found() {
    // Producer's cursor, as the receiver sees it: beyond a whole ring, not a multiple of 8, gone back.
    for (first, then) in [(0, 1032), (0, 12), (64, 56), (0, u64::MAX - 7)] {
        let arena = arena();
        let mut receiver = Receiver::new(Arc::clone(&arena), span(1024)).unwrap();
        let mut out = Vec::new();
        arena.copy_in(0, &u64::to_le_bytes(first)).unwrap();
        while receiver.try_receive(&mut out).unwrap() {}
        arena.copy_in(0, &u64::to_le_bytes(then)).unwrap();
        let error = receiver.try_receive(&mut out).unwrap_err();
        assert_eq!(error, RingError::PeerCorrupt { what: "cursor", value: then });
        arena.copy_in(0, &u64::to_le_bytes(first)).unwrap();
        assert_eq!(receiver.is_empty(), Err(error), "it stays corrupt");
    }
    // Consumer's cursor, as the sender sees it: ahead of what was ever sent.
    let arena = arena();
    let mut sender = Sender::new(Arc::clone(&arena), span(64)).unwrap();
    assert_eq!(sender.try_send(&[1; 24]), Ok(true));
    assert_eq!(sender.try_send(&[1; 24]), Ok(true));
    arena.copy_in(128, &72_u64.to_le_bytes()).unwrap();
    assert_eq!(sender.try_send(&[1; 24]), Err(RingError::PeerCorrupt { what: "cursor", value: 72 }));
}

#[test]
fn a_length_beyond_what_was_written_is_found() {
    for length in [17_u64, 505, u64::MAX] {
        let arena = arena();
        let (mut sender, mut receiver) = pair(&arena, 1024);
        sender.try_send(&[5; 16]).unwrap();
        arena.copy_in(DATA_AT, &length.to_le_bytes()).unwrap();
        let mut out = Vec::new();
        let error = receiver.try_receive(&mut out).unwrap_err();
        assert_eq!(error, RingError::PeerCorrupt { what: "frame length", value: length });
        assert!(out.is_empty());
    }
}

/// Message `n` of a stream: its number and then bytes that follow from it, mostly short, some long.
fn message(n: u32, out: &mut Vec<u8>) {
    let mixed = n.wrapping_mul(2_654_435_761);
    let length = if n.is_multiple_of(97) { mixed % 50_000 } else { mixed % 300 };
    out.clear();
    out.extend_from_slice(&n.to_le_bytes());
    out.extend((0..length).map(|i| mixed.wrapping_add(i).to_le_bytes()[0]));
}

fn wait(endpoint: &Endpoint) {
    let limit = Timespec { tv_sec: 20, tv_nsec: 0 };
    let ready = rustix::event::poll(&mut [PollFd::new(&endpoint.doorbell_fd(), PollFlags::IN)], Some(&limit));
    assert_eq!(ready, Ok(1), "slept for 20 s: a wake-up was lost");
}

fn send_all(mut endpoint: Endpoint, count: u32) -> Endpoint {
    let mut bytes = Vec::new();
    for n in 0..count {
        message(n, &mut bytes);
        while endpoint.send(&bytes).unwrap() == Sent::Full {
            wait(&endpoint);
            endpoint.set_sleeping(false);
        }
        // Now and then the consumer drains everything and goes to sleep.
        if n % 1000 == 999 {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
    endpoint
}

fn receive_all(mut endpoint: Endpoint, count: u32) -> Endpoint {
    let (mut bytes, mut expected) = (Vec::new(), Vec::new());
    let mut n = 0;
    while n < count {
        if endpoint.receive(&mut bytes).unwrap() {
            message(n, &mut expected);
            assert_eq!(bytes, expected, "message {n}");
            n += 1;
        } else if endpoint.set_sleeping(true) {
            wait(&endpoint);
            endpoint.set_sleeping(false);
        }
    }
    endpoint
}

/// Two threads, both of which sleep whenever they can: everything arrives, in order, and nobody sleeps for ever.
#[test]
fn threads_wake_each_other() {
    let count = 200_000;
    let (server, client) = endpoints();
    let sending = std::thread::spawn(move || send_all(client, count));
    let receiving = std::thread::spawn(move || receive_all(server, count));
    let (client, server) = (sending.join().unwrap(), receiving.join().unwrap());
    // And back, over the other ring.
    let sending = std::thread::spawn(move || send_all(server, count));
    receive_all(client, count);
    drop(sending.join().unwrap());
}

fn endpoints() -> (Endpoint, Endpoint) {
    let ours = create().unwrap();
    let theirs = open(ours.fd().try_clone_to_owned().unwrap()).unwrap();
    let (line, other_line) = line_pair().unwrap();
    let server = Endpoint::new(ours, Side::DataPlane, Arc::new(line)).unwrap();
    (server, Endpoint::new(theirs, Side::Client, Arc::new(other_line)).unwrap())
}

/// Waits for one message and sends it back, `rounds` times. Looks a different number of times before it goes to
/// sleep, so that the other side's message comes at every moment of that.
fn echo(mut endpoint: Endpoint, rounds: u32, first: bool) {
    let mut bytes = Vec::new();
    if first {
        assert_eq!(endpoint.send(&[1]), Ok(Sent::Sent));
    }
    for round in 0..rounds {
        let mut patience = round.wrapping_mul(2_654_435_761) >> 24;
        while !endpoint.receive(&mut bytes).unwrap() {
            if patience > 0 {
                patience -= 1;
            } else if endpoint.set_sleeping(true) {
                wait(&endpoint);
                endpoint.set_sleeping(false);
            }
        }
        assert_eq!(endpoint.send(&bytes), Ok(Sent::Sent));
    }
}

/// One message at a time, there and back: each is the last that is sent, so that a wake-up that is lost is
/// never made up for by the next.
#[test]
fn every_single_message_wakes() {
    let (server, client) = endpoints();
    let other = std::thread::spawn(move || echo(client, 200_000, false));
    echo(server, 200_000, true);
    other.join().unwrap();
}

#[test]
fn a_heartbeat_counts_only_while_watched() {
    let (mut server, client) = endpoints();
    let (limit, ms) = (Duration::from_millis(400), 1_000_000);
    let mut now = 5_000 * ms;
    for _ in 0..50 {
        client.beat(now);
        assert!(server.peer_alive(now, limit));
        now += 100 * ms;
    }
    now += 3_600_000 * ms;
    assert!(server.peer_alive(now, limit), "an hour in which nobody looked is not silence");
    let looks = (0..10).take_while(|_| {
        now += 100 * ms;
        server.peer_alive(now, limit)
    });
    // A quarter of the limit was counted for that hour; two more looks are within the limit.
    assert_eq!(looks.count(), 2);
    client.beat(1);
    assert!(server.peer_alive(now, limit), "any change is life, even a clock that runs otherwise");
}
