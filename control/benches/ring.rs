//! What a message costs: through the ring alone, and to a peer that sleeps and back.

use std::hint::black_box;
use std::sync::Arc;

use control::codec::{decode_command, encode};
use control::doorbell::line_pair;
use control::session::{Endpoint, Sent, Side, create, open};
use control::{ChunkPlace, Command, Dtype, Layout, Shape, Target};
use criterion::{Criterion, criterion_group, criterion_main};
use rustix::event::{PollFd, PollFlags};

fn endpoints() -> (Endpoint, Endpoint) {
    let ours = create().expect("memory");
    let theirs = open(ours.fd().try_clone_to_owned().expect("descriptor")).expect("memory");
    let (line, other) = line_pair().expect("descriptors");
    let server = Endpoint::new(ours, Side::DataPlane, Arc::new(line)).expect("layout");
    (server, Endpoint::new(theirs, Side::Client, Arc::new(other)).expect("layout"))
}

fn fetch(chunks: usize) -> Command {
    let shape = Shape { layers: 32, kv_heads: 8, head_dim: 128, dtype: Dtype::Bf16 };
    let place = ChunkPlace { key: [0xa5; 32], tokens: 256, offset: 1 << 30 };
    Command::Fetch {
        id: 1,
        timeout_ms: 1000,
        region: 1,
        to: Target::Host { layout: Layout::chunked(&shape, 256), out_dtype: Dtype::Bf16 },
        shape,
        chunks: vec![place; chunks],
        progress: false,
    }
}

/// Receives one message, sleeping until it comes.
fn receive(endpoint: &mut Endpoint, bytes: &mut Vec<u8>) {
    while !endpoint.receive(bytes).expect("a sound ring") {
        if endpoint.set_sleeping(true) {
            let _ = rustix::event::poll(&mut [PollFd::new(&endpoint.doorbell_fd(), PollFlags::IN)], None);
        }
        endpoint.set_sleeping(false);
    }
}

fn through_the_ring(criterion: &mut Criterion, server: &mut Endpoint, client: &mut Endpoint) {
    let mut bytes = Vec::new();
    for size in [64, 4096] {
        let message = vec![1; size];
        criterion.bench_function(&format!("ring/{size}_bytes"), |bencher| {
            bencher.iter(|| {
                assert_eq!(client.send(black_box(&message)), Ok(Sent::Sent));
                assert_eq!(server.receive(&mut bytes), Ok(true));
            });
        });
    }
    for chunks in [1, 64] {
        let command = fetch(chunks);
        criterion.bench_function(&format!("fetch_command/{chunks}_chunks"), |bencher| {
            bencher.iter(|| {
                encode(black_box(&command), &mut bytes);
                assert_eq!(client.send(&bytes), Ok(Sent::Sent));
                assert_eq!(server.receive(&mut bytes), Ok(true));
                decode_command(&bytes).expect("a command")
            });
        });
    }
}

fn benches(criterion: &mut Criterion) {
    let (mut server, mut client) = endpoints();
    through_the_ring(criterion, &mut server, &mut client);
    let echo = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        loop {
            receive(&mut server, &mut bytes);
            if bytes.is_empty() {
                return;
            }
            assert_eq!(server.send(&bytes), Ok(Sent::Sent));
        }
    });
    let mut bytes = Vec::new();
    criterion.bench_function("wake_and_back", |bencher| {
        bencher.iter(|| {
            assert_eq!(client.send(&[1; 64]), Ok(Sent::Sent));
            receive(&mut client, &mut bytes);
        });
    });
    assert_eq!(client.send(&[]), Ok(Sent::Sent));
    echo.join().expect("the echo ends");
}

criterion_group!(ring, benches);
criterion_main!(ring);
