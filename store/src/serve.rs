//! The serving stage: one queue's requests, answered from the chunks in memory.

use std::ops::Range;
use std::sync::Arc;

use dpdk::Attacher;
use iface::{Counter, Link, Outgoing, Stage};
use protocol::Instant;
use protocol::put::AcceptEngine;
use protocol::serve::ServeEngine;

use crate::chunks::{Chunk, Chunks};
use crate::intakes::Intakes;

/// Exact counts of one queue, copied from its engine now and then for other threads to read.
#[derive(Debug, Default)]
pub struct ServeCounts {
    /// Datagrams given to the engine.
    pub datagrams: Counter,
    /// DATA messages sent.
    pub segments: Counter,
    /// Bytes of chunks in them.
    pub payload_bytes: Counter,
    /// Of the DATA messages, those whose segment was not copied.
    pub attached: Counter,
}

/// Serves one queue.
pub(crate) struct ServeStage {
    pub(crate) chunks: Arc<Chunks>,
    pub(crate) link: Link,
    pub(crate) engine: ServeEngine,
    pub(crate) intakes: Intakes,
    /// Sends segments from where they lie; `None` copies them.
    pub(crate) attacher: Option<Attacher<Chunk>>,
    pub(crate) counts: Arc<ServeCounts>,
    /// The port that answers come from: the one that data planes know, whatever the queue.
    pub(crate) udp_port: u16,
}

impl Stage for ServeStage {
    fn poll(&mut self, now_ns: u64) -> usize {
        let received = self.receive(now_ns);
        // What does not reach a data plane was asked for by it: nothing more is sent than that.
        while self.link.take_path_error().is_some() {}
        self.link.poll_neighbours(now_ns);
        let taken_in = self.intakes.poll(Instant::from_nanos(now_ns));
        received + taken_in + self.transmit(now_ns)
    }
}

impl ServeStage {
    fn receive(&mut self, now_ns: u64) -> usize {
        let Self { chunks, link, engine, intakes, counts, .. } = self;
        let now = Instant::from_nanos(now_ns);
        link.receive(now_ns, |datagram| {
            counts.datagrams.add(1);
            let payload = datagram.mbuf.data();
            if AcceptEngine::takes(payload) {
                intakes.take(now, (datagram.from, datagram.marked), payload, chunks)
            } else {
                engine.handle_datagram(now, datagram.from, payload, chunks.as_ref())
            }
        })
    }

    /// Sends until the burst is full or nothing waits; what the device does not take stays in the burst, and what did
    /// not fit the burst stays in the engine's queue.
    fn transmit(&mut self, now_ns: u64) -> usize {
        let now = Instant::from_nanos(now_ns);
        let Self { chunks, link, engine, intakes, attacher, counts, udp_port } = self;
        if engine.idle() && !intakes.wants_to_send() {
            link.flush();
            if let Some(attacher) = attacher {
                attacher.let_go();
            }
            return 0;
        }
        // Consecutive segments are mostly of one chunk. It is let go below, so that an evicted one is soon free.
        let mut held: Option<Arc<Chunk>> = None;
        let mut intakes_wait = intakes.wants_to_send();
        let mut write = |buffer: &mut [u8]| {
            // What is asked for on behalf of others' saves is small, and goes first.
            if intakes_wait && let Some((to, payload_bytes)) = intakes.poll_transmit(now, buffer) {
                return Some(Outgoing {
                    from_port: *udp_port,
                    to,
                    payload_bytes,
                    tail: None,
                    marks_answered: false,
                    covered: false,
                });
            }
            intakes_wait = false;
            loop {
                let transmit = engine.poll_transmit(now, buffer)?;
                let (mut payload_bytes, mut tail) = (transmit.header_bytes, None);
                // Chunk headers and planes have checksums of their own, which their receiver checks.
                let covered = transmit.payload.is_some();
                if let Some((handle, range)) = transmit.payload {
                    if held.as_ref().is_none_or(|chunk| chunk.info.handle != handle) {
                        held = chunks.load(handle);
                    }
                    let Some(chunk) = &held else { continue };
                    let bytes = range.len();
                    tail = attacher.as_mut().and_then(|attacher| attacher.attach(chunk, range.clone()));
                    if tail.is_none() {
                        let Some(copied) = copy(chunk, range, &mut buffer[payload_bytes..]) else { continue };
                        payload_bytes += copied;
                    }
                    counts.segments.add(1);
                    counts.payload_bytes.add(bytes as u64);
                    counts.attached.add(u64::from(tail.is_some()));
                }
                return Some(Outgoing {
                    from_port: *udp_port,
                    to: transmit.to,
                    payload_bytes,
                    tail,
                    // A data plane asks for less when DATA arrives marked.
                    marks_answered: covered,
                    covered,
                });
            }
        };
        let mut sent = 0;
        while link.send(&mut write) {
            sent += 1;
        }
        link.flush();
        if let Some(attacher) = attacher {
            attacher.let_go();
        }
        sent
    }
}

/// Copies a piece of a chunk to the beginning of `room`; `None` if it is not there, or has no room.
fn copy(chunk: &Chunk, range: Range<usize>, room: &mut [u8]) -> Option<usize> {
    let bytes = chunk.bytes().get(range)?;
    room.get_mut(..bytes.len())?.copy_from_slice(bytes);
    Some(bytes.len())
}
