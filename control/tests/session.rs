//! Sessions over real sockets: the file and who may connect, the handshake, regions, limits, hostile clients.

use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use control::doorbell::line_pair;
use control::handshake::{FromClient, FromDataPlane, HandshakeError, datagram, parse};
use control::message::MAX_STATS_BYTES;
use control::session::{Endpoint, Side, open};
use control::socket::{Stream, connect};
use control::{
    AttachError, BindError, ChunkPlace, ClientSession, ClientSessionError, Command, Completion, DeviceUuid,
    Dtype, ElementType, GpuAllocation, GpuMemory, IpcHandle, LayerBase, Layout, Limits, Listener, Outcome,
    PageStrides, PagedKv, PlaneBase, RingConsumer, RingKv, Sent, ServerSession, SessionError, Shape,
    SocketError, SocketEvent, Target, ring_words_bytes,
};
use hugepages::{Arena, ArenaConfig, PageChoice};

const SHAPE: Shape = Shape { layers: 1, kv_heads: 1, head_dim: 2, dtype: Dtype::Bf16 };
const WAIT: Duration = Duration::from_secs(10);

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("data plane.sock")
    }
}

fn memory(bytes: usize) -> Arena {
    Arena::new(ArenaConfig { name: "test-region", bytes, page: PageChoice::Base, numa_node: None }).unwrap()
}

/// Polls until the session has an event that `wanted` takes.
fn event<T>(session: &mut ServerSession, mut wanted: impl FnMut(SocketEvent) -> Option<T>) -> T {
    let limit = std::time::Instant::now() + WAIT;
    while std::time::Instant::now() < limit {
        for event in session.handle_socket().expect("a sound client") {
            if let Some(found) = wanted(event) {
                return found;
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("no such event within {WAIT:?}");
}

fn accept(listener: &Listener) -> ServerSession {
    let limit = std::time::Instant::now() + WAIT;
    while std::time::Instant::now() < limit {
        if let Some(session) = listener.accept().unwrap() {
            return session;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("no client within {WAIT:?}");
}

fn attached(listener: &Listener) -> (ClientSession, ServerSession) {
    let path = listener.path().to_owned();
    let client = std::thread::spawn(move || ClientSession::connect(&path, "tester", WAIT).unwrap());
    let mut server = accept(listener);
    let name = event(&mut server, |event| match event {
        SocketEvent::Attached { name } => Some(name),
        _ => None,
    });
    assert_eq!(name, "tester");
    (client.join().unwrap(), server)
}

fn register(client: &mut ClientSession, server: &mut ServerSession, arena: &Arena) -> Result<u32, String> {
    client.register(77, arena).unwrap();
    server.handle_socket().unwrap();
    let reply = client.handle_socket().unwrap().expect("an answer");
    assert_eq!(reply.token, 77);
    reply.result
}

fn fetch(id: u64, region: u32) -> Command {
    Command::Fetch {
        id,
        timeout_ms: 100,
        region,
        to: Target::Host { layout: Layout::chunked(&SHAPE, 256), out_dtype: Dtype::Bf16 },
        shape: SHAPE,
        chunks: vec![ChunkPlace { key: [1; 32], tokens: 256, offset: 0 }],
        progress: true,
    }
}

fn ended(id: u64) -> Completion {
    Completion::Ended {
        id,
        outcome: Outcome::Done,
        planes: 2,
        encoded_bytes: 10,
        delivered_bytes: 20,
        missing: vec![],
        message: String::new(),
    }
}

fn refusal(client: &mut ClientSession) -> (u64, String) {
    match client.next_completion().unwrap() {
        Some(Completion::Refused { id, reason }) => (id, reason),
        other => panic!("expected a refusal: {other:?}"),
    }
}

#[test]
fn the_socket_file_has_its_mode_and_goes_with_the_listener() {
    let place = Place::new();
    let own_group = std::fs::metadata(place.0.path()).unwrap().gid().to_string();
    let listener = Listener::bind(place.path(), 0o660, Some(&own_group)).unwrap();
    let file = std::fs::metadata(place.path()).unwrap();
    assert_eq!(file.permissions().mode() & 0o777, 0o660);
    assert_eq!(file.gid().to_string(), own_group);
    drop(listener);
    assert!(!place.path().exists());
}

#[test]
fn what_cannot_be_listened_on() {
    let place = Place::new();
    let bind = |path: &Path, group| Listener::bind(path, 0o660, group).unwrap_err();
    let file = place.0.path().join("precious");
    std::fs::write(&file, "data").unwrap();
    assert!(matches!(bind(&file, None), BindError::NotASocket { .. }));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "data");
    let nowhere = place.0.path().join("no/such/directory.sock");
    assert!(matches!(bind(&nowhere, None), BindError::Directory { .. }));
    let long = place.0.path().join("x".repeat(120));
    assert!(matches!(bind(&long, None), BindError::PathTooLong { .. }));
    let error = bind(&place.path(), Some("no such group"));
    assert!(matches!(error, BindError::UnknownGroup { .. }), "{error}");
    assert!(!place.path().exists(), "nothing is left behind");
}

#[test]
fn a_socket_in_use_is_left_alone_and_a_stale_one_replaced() {
    let place = Place::new();
    let first = Listener::bind(place.path(), 0o660, None).unwrap();
    let error = Listener::bind(place.path(), 0o660, None).unwrap_err();
    assert!(matches!(error, BindError::InUse { .. }), "{error}");
    drop(first);
    // What a killed process leaves: the file, and nobody behind it.
    drop(std::os::unix::net::UnixListener::bind(place.path()).unwrap());
    assert!(place.path().exists());
    let listener = Listener::bind(place.path(), 0o660, None).unwrap();
    let (_client, _server) = attached(&listener);
}

#[test]
fn of_many_who_bind_at_once_one_listens() {
    for _ in 0..20 {
        let place = Place::new();
        drop(std::os::unix::net::UnixListener::bind(place.path()).unwrap());
        let threads: Vec<_> = (0..8)
            .map(|_| {
                let path = place.path();
                std::thread::spawn(move || Listener::bind(path, 0o660, None))
            })
            .collect();
        let results: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1, "{results:?}");
        assert!(connect(&place.path()).is_ok(), "the file names the one that listens");
    }
}

#[test]
fn a_listener_removes_only_its_own_file() {
    let place = Place::new();
    let listener = Listener::bind(place.path(), 0o660, None).unwrap();
    std::fs::remove_file(place.path()).unwrap();
    std::fs::write(place.path(), "somebody else's").unwrap();
    drop(listener);
    assert!(place.path().exists());
}

#[test]
fn nobody_listens_or_nobody_may() {
    let place = Place::new();
    let connect =
        |path: &Path| ClientSession::connect(path, "tester", Duration::from_millis(50)).unwrap_err();
    let error = connect(&place.path());
    assert!(error.to_string().contains("shadowserve dataplane --socket"), "{error}");
    drop(std::os::unix::net::UnixListener::bind(place.path()).unwrap());
    assert!(matches!(connect(&place.path()), AttachError::NoDataPlane { .. }));
    let error = connect(&place.0.path().join("x".repeat(120)));
    assert!(matches!(error, AttachError::BadPath { .. }), "{error}");
    std::fs::remove_file(place.path()).unwrap();
    let _listener = Listener::bind(place.path(), 0o660, None).unwrap();
    let error = connect(&place.path());
    assert!(matches!(error, AttachError::Timeout { .. }), "nobody accepts: {error}");
}

#[test]
fn who_may_not_connect_is_told_about_the_group() {
    if rustix::process::geteuid().is_root() {
        eprintln!("skipped: root may connect to any socket");
        return;
    }
    let place = Place::new();
    let _listener = Listener::bind(place.path(), 0o000, None).unwrap();
    let error = ClientSession::connect(&place.path(), "tester", WAIT).unwrap_err();
    assert!(matches!(error, AttachError::Permission { .. }), "{error}");
    assert!(error.to_string().contains("group"), "{error}");
}

#[test]
fn commands_and_completions_cross() {
    let place = Place::new();
    let listener = Listener::bind(place.path(), 0o660, None).unwrap();
    let (mut client, mut server) = attached(&listener);
    assert_eq!(server.pid(), i32::try_from(std::process::id()).unwrap());
    assert!(client.data_plane().starts_with("shadowserve "));
    let arena = memory(4096);
    let region = register(&mut client, &mut server, &arena).unwrap();

    // The very same memory on both sides.
    server.region(region).unwrap().copy_in(100, b"planes").unwrap();
    let mut bytes = [0; 6];
    arena.copy_out(100, &mut bytes).unwrap();
    assert_eq!(&bytes, b"planes");

    assert!(server.set_sleeping(true));
    assert_eq!(client.send(&fetch(5, region)), Ok(Sent::Sent));
    assert!(!server.set_sleeping(true), "a command waits");
    assert_eq!(server.next_command().unwrap(), Some(fetch(5, region)));
    assert_eq!(server.next_command().unwrap(), None);
    assert_eq!(server.under_way(), 1);
    let progress = Completion::Progress { id: 5, planes: 1, encoded_bytes: 5, delivered_bytes: 10 };
    assert_eq!(server.complete(&progress).unwrap(), Sent::Sent);
    assert_eq!(server.complete(&ended(5)).unwrap(), Sent::Sent);
    assert_eq!(client.next_completion().unwrap(), Some(progress));
    assert_eq!(client.next_completion().unwrap(), Some(ended(5)));
    assert_eq!(client.next_completion().unwrap(), None);
    let again = server.complete(&ended(5));
    assert!(matches!(again, Err(SessionError::NotUnderWay { id: 5 })), "a fetch ends once: {again:?}");

    drop(client);
    event(&mut server, |event| matches!(event, SocketEvent::Closed { .. }).then_some(()));
    assert!(!server.is_attached());
    assert_eq!(server.next_command().unwrap(), None);
}

#[test]
fn after_the_client_has_gone_everything_counts_as_sent() {
    let place = Place::new();
    let listener = Listener::bind(place.path(), 0o660, None).unwrap();
    let (mut client, mut server) = attached(&listener);
    assert_eq!(client.send(&Command::Stats { id: 1 }), Ok(Sent::Sent));
    assert!(server.next_command().unwrap().is_some());
    drop(client);
    event(&mut server, |event| matches!(event, SocketEvent::Closed { .. }).then_some(()));
    let stats = Completion::Stats { id: 1, json: "{}".to_owned() };
    assert_eq!(server.complete(&stats).unwrap(), Sent::Sent);
    assert_eq!(server.under_way(), 0);
    assert!(server.set_sleeping(true));
}

#[test]
fn commands_that_may_not_be_are_refused_with_a_reason() {
    let place = Place::new();
    let limits = Limits { commands: 3, ..Limits::default() };
    let listener = Listener::bind(place.path(), 0o660, None).unwrap().with_limits(limits);
    let (mut client, mut server) = attached(&listener);
    let region = register(&mut client, &mut server, &memory(4096)).unwrap();
    let mut refused = |command: Command, server: &mut ServerSession| {
        assert_eq!(client.send(&command), Ok(Sent::Sent));
        assert_eq!(server.next_command().unwrap(), None);
        refusal(&mut client)
    };
    assert!(refused(fetch(1, region + 1), &mut server).1.contains("not registered"));
    assert!(refused(Command::Unregister { id: 2, region: 99 }, &mut server).1.contains("99"));

    let (mut client, mut server) = attached(&listener);
    let region = register(&mut client, &mut server, &memory(4096)).unwrap();
    assert_eq!(client.send(&fetch(7, region)), Ok(Sent::Sent));
    assert!(server.next_command().unwrap().is_some());
    for (command, reason) in [
        (fetch(7, region), "already names a command"),
        (Command::Unregister { id: 8, region }, "still in use by 1 fetches"),
    ] {
        assert_eq!(client.send(&command), Ok(Sent::Sent));
        assert_eq!(server.next_command().unwrap(), None);
        let text = refusal(&mut client).1;
        assert!(text.contains(reason), "{text}");
    }
    // Cancels are passed on only for what is under way.
    assert_eq!(client.send(&Command::Cancel { id: 12345 }), Ok(Sent::Sent));
    assert_eq!(client.send(&Command::Cancel { id: 7 }), Ok(Sent::Sent));
    assert_eq!(server.next_command().unwrap(), Some(Command::Cancel { id: 7 }));
    for id in 8..11 {
        assert_eq!(client.send(&Command::Stats { id }), Ok(Sent::Sent));
    }
    while server.next_command().unwrap().is_some() {}
    assert_eq!(
        refusal(&mut client),
        (10, "3 commands are under way, which is the limit: wait for some to end".into())
    );
    assert_eq!(server.complete(&ended(7)).unwrap(), Sent::Sent);
    assert_eq!(client.send(&Command::Unregister { id: 11, region }), Ok(Sent::Sent));
    assert_eq!(server.next_command().unwrap(), Some(Command::Unregister { id: 11, region }));
    assert!(server.region(region).is_none());
}

#[test]
fn regions_have_limits() {
    let place = Place::new();
    let limits = Limits { regions: 2, region_bytes: 12288, ..Limits::default() };
    let listener = Listener::bind(place.path(), 0o660, None).unwrap().with_limits(limits);
    let (mut client, mut server) = attached(&listener);
    let error = register(&mut client, &mut server, &memory(16384)).unwrap_err();
    assert!(error.contains("would exceed the 12288 bytes"), "{error}");
    register(&mut client, &mut server, &memory(8192)).unwrap();
    let error = register(&mut client, &mut server, &memory(8192)).unwrap_err();
    assert!(error.contains("would exceed the 4096 bytes"), "{error}");
    register(&mut client, &mut server, &memory(4096)).unwrap();
    let error = register(&mut client, &mut server, &memory(4096)).unwrap_err();
    assert!(error.contains("2 regions are registered"), "{error}");
}

#[test]
fn too_many_clients_are_told_so() {
    let place = Place::new();
    let limits = Limits { sessions: 1, ..Limits::default() };
    let listener = Listener::bind(place.path(), 0o660, None).unwrap().with_limits(limits);
    let (client, server) = attached(&listener);
    let path = listener.path().to_owned();
    let second = std::thread::spawn(move || ClientSession::connect(&path, "second", WAIT).unwrap_err());
    while !second.is_finished() {
        assert!(listener.accept().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(1));
    }
    let error = second.join().unwrap();
    assert!(error.to_string().contains("has 1 clients, which is its limit"), "{error}");
    drop((client, server));
    attached(&listener);
}

#[test]
fn another_version_is_told_apart() {
    let place = Place::new();
    let listener = Listener::bind(place.path(), 0o660, None).unwrap();
    let stream = connect(&place.path()).unwrap();
    let mut hello = datagram(&FromClient::Hello { name: "from the future".to_owned() });
    hello[4] = 200;
    stream.send(&hello, &[]).unwrap();
    let error = accept(&listener).handle_socket().unwrap_err();
    assert!(matches!(error, SessionError::Handshake(HandshakeError::Version { theirs: 200 })), "{error}");
    // And the client, if it were of that version, would read ours from the refusal.
    let mut answer = Vec::new();
    assert!(stream.receive(&mut answer).unwrap().is_some());
    let [low, high] = control::VERSION.to_le_bytes();
    assert_eq!(answer[4..8], [low, high, 1, 0]);
    answer[4] = 9;
    let parsed = parse::<FromDataPlane>(&answer);
    assert_eq!(parsed, Err(HandshakeError::Version { theirs: 9 }));
}

#[test]
fn clients_that_break_the_handshake_are_let_go() {
    let place = Place::new();
    let listener = Listener::bind(place.path(), 0o660, None).unwrap();
    let hello = datagram(&FromClient::Hello { name: String::new() });
    let register = datagram(&FromClient::Register { token: 1, bytes: 4096 });
    let attach = datagram(&FromClient::Attached);
    let twice = [hello.clone(), hello.clone()];
    let cases: [(&[Vec<u8>], &str); 6] = [
        (&[b"GET / HTTP/1.1".to_vec()], "does not speak"),
        (&[vec![0; 3]], "does not speak"),
        (&[hello[..9].to_vec()], "malformed"),
        (&[register], "before the session is attached"),
        (&[attach], "not offered"),
        (&twice, "second hello"),
    ];
    for (messages, reason) in cases {
        let stream = connect(&place.path()).unwrap();
        for message in messages {
            stream.send(message, &[]).unwrap();
        }
        let mut session = accept(&listener);
        let error = session.handle_socket().unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
        assert!(!session.peer_alive(0, WAIT));
        drop(session);
        assert_eq!(listener.sessions(), 0);
    }
    // Descriptors that nobody asked for are closed, and too many of them end the session.
    let stream = connect(&place.path()).unwrap();
    let (one, _other) = line_pair().unwrap();
    stream.send(&hello, &[one.as_fd(); 4]).unwrap();
    let mut session = accept(&listener);
    assert!(session.handle_socket().unwrap().is_empty());
    let too_many = stream.send(&hello, &[one.as_fd(); 5]);
    assert!(matches!(too_many, Err(SocketError::TooLong)));
}

/// Attaches by hand, to send what [`ClientSession`] never would.
fn attach_by_hand(listener: &Listener) -> (Stream, Endpoint, ServerSession) {
    let stream = connect(listener.path()).unwrap();
    stream.send(&datagram(&FromClient::Hello { name: "hostile".to_owned() }), &[]).unwrap();
    let mut server = accept(listener);
    assert!(server.handle_socket().unwrap().is_empty());
    let mut bytes = Vec::new();
    let mut fds = stream.receive(&mut bytes).unwrap().unwrap().into_iter();
    let memory = open(fds.next().unwrap()).unwrap();
    let endpoint = Endpoint::new(memory, Side::Client, Arc::new(fds.next().unwrap())).unwrap();
    stream.send(&datagram(&FromClient::Attached), &[]).unwrap();
    assert_eq!(server.handle_socket().unwrap().len(), 1);
    (stream, endpoint, server)
}

fn told(stream: &Stream) -> String {
    let mut bytes = Vec::new();
    stream.receive(&mut bytes).unwrap().expect("a refusal");
    parse::<FromDataPlane>(&bytes).unwrap_err().to_string()
}

#[test]
fn a_client_that_sends_nonsense_is_told_and_let_go() {
    let place = Place::new();
    let listener = Listener::bind(place.path(), 0o660, None).unwrap();
    for bytes in [&[][..], &[250, 1, 2, 3], &[5, 1, 9]] {
        let (stream, mut endpoint, mut server) = attach_by_hand(&listener);
        assert_eq!(endpoint.send(bytes), Ok(Sent::Sent));
        assert!(matches!(server.next_command(), Err(SessionError::Decode(_))));
        assert!(told(&stream).contains("message"));
        assert_eq!(server.next_command().unwrap(), None, "it is over");
    }
    // Cursors and lengths that cannot be, anywhere in the words of either side.
    for offset in (1024..4096 + 64).step_by(8) {
        let (stream, mut endpoint, mut server) = attach_by_hand(&listener);
        assert_eq!(endpoint.send(&[5, 1]), Ok(Sent::Sent));
        endpoint.memory().copy_in(offset, &0xdead_beef_dead_beef_u64.to_le_bytes()).unwrap();
        match server.next_command() {
            Ok(Some(command)) => assert_eq!(command, Command::Stats { id: 1 }),
            Ok(None) => panic!("the command is lost"),
            Err(error) => {
                assert!(matches!(error, SessionError::Ring(_) | SessionError::Decode(_)), "{error}");
                assert!(!told(&stream).is_empty());
            }
        }
        let stats = Completion::Stats { id: 1, json: String::new() };
        let _ = server.complete(&stats);
    }
}

#[test]
fn bad_registrations_are_refused_and_the_session_goes_on() {
    let place = Place::new();
    let listener = Listener::bind(place.path(), 0o660, None).unwrap();
    let (stream, _endpoint, mut server) = attach_by_hand(&listener);
    let file = std::fs::File::open("/dev/zero").unwrap();
    let arena = memory(8192);
    let fd = arena.fd();
    let cases: [(u64, &[_], &str); 5] = [
        (4096, &[], "takes one descriptor"),
        (4096, &[fd, fd], "takes one descriptor"),
        (4096, &[file.as_fd()], "memfd"),
        (4096, &[fd], "8192"),
        (u64::MAX, &[fd], "would exceed"),
    ];
    let mut bytes = Vec::new();
    for (size, fds, expected) in cases {
        stream.send(&datagram(&FromClient::Register { token: 3, bytes: size }), fds).unwrap();
        assert!(server.handle_socket().unwrap().is_empty());
        stream.receive(&mut bytes).unwrap().expect("an answer");
        match parse(&bytes) {
            Ok(FromDataPlane::RegionRefused { token: 3, reason }) => {
                assert!(reason.contains(expected), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    }
    stream.send(&datagram(&FromClient::Register { token: 4, bytes: 8192 }), &[fd]).unwrap();
    assert_eq!(server.handle_socket().unwrap().len(), 1);
}

#[test]
fn a_full_ring_rings_when_there_is_room() {
    let place = Place::new();
    let listener = Listener::bind(place.path(), 0o660, None).unwrap();
    let (mut client, mut server) = attached(&listener);
    let big = Completion::Stats { id: 1, json: "x".repeat(MAX_STATS_BYTES) };
    let mut sent = 0;
    loop {
        assert_eq!(client.send(&Command::Stats { id: 1 }), Ok(Sent::Sent));
        assert!(server.next_command().unwrap().is_some());
        match server.complete(&big).unwrap() {
            Sent::Sent => sent += 1,
            Sent::Full => break,
        }
    }
    assert!(sent >= 4, "{sent}");
    assert_eq!(server.under_way(), 1, "what was not sent is not completed");
    let rung = |server: &ServerSession| {
        let mut fds =
            [rustix::event::PollFd::from_borrowed_fd(server.doorbell_fd(), rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    };
    assert!(server.set_sleeping(true));
    assert!(!rung(&server));
    for _ in 0..sent {
        assert_eq!(client.next_completion().unwrap().as_ref(), Some(&big));
    }
    assert!(rung(&server), "there is room again");
    server.set_sleeping(false);
    assert_eq!(server.complete(&big).unwrap(), Sent::Sent);
    let long = Completion::Stats { id: 1, json: "x".repeat(MAX_STATS_BYTES + 1) };
    assert!(matches!(server.complete(&long), Err(SessionError::TooLong { .. })));
}

/// A client that asks for what is refused, and never reads, costs the data plane neither memory nor its sleep.
#[test]
fn refusals_that_nobody_reads_hold_up_only_their_client() {
    let place = Place::new();
    let listener = Listener::bind(place.path(), 0o660, None).unwrap();
    let (mut client, mut server) = attached(&listener);
    let mut stuck = 0;
    while stuck < 100 {
        match client.send(&Command::Unregister { id: 1, region: 5 }).unwrap() {
            Sent::Sent => {}
            Sent::Full => stuck += 1,
        }
        assert_eq!(server.next_command().unwrap(), None);
    }
    assert!(server.set_sleeping(true), "there are commands, but nothing can be done about them");
    let mut refusals = 0;
    while client.next_completion().unwrap().is_some() {
        refusals += 1;
        server.next_command().unwrap();
    }
    assert!(refusals > 1000, "{refusals}");
}

#[test]
fn a_data_plane_that_closes_is_noticed() {
    let place = Place::new();
    let listener = Listener::bind(place.path(), 0o660, None).unwrap();
    let (mut client, server) = attached(&listener);
    assert!(client.handle_socket().unwrap().is_none());
    drop(server);
    let error = client.handle_socket().unwrap_err();
    assert!(matches!(error, ClientSessionError::Socket(SocketError::HungUp)), "{error}");
}

#[test]
fn descriptors_are_closed_on_exec() {
    let place = Place::new();
    let listener = Listener::bind(place.path(), 0o660, None).unwrap();
    let (mut client, mut server) = attached(&listener);
    let arena = memory(4096);
    let region = register(&mut client, &mut server, &arena).unwrap();
    let region = Arc::clone(server.region(region).unwrap());
    for fd in
        [listener.fd(), server.fd(), server.doorbell_fd(), client.fd(), client.doorbell_fd(), region.fd()]
    {
        assert!(rustix::io::fcntl_getfd(fd).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    }
}

fn pages() -> PagedKv {
    let strides = PageStrides::nhd(16, 1, 2, ElementType::Bf16);
    let handle = IpcHandle::new([7; 64]);
    PagedKv {
        device: DeviceUuid([5; 16]),
        allocations: vec![GpuAllocation { handle, bytes: 8 * strides.page }],
        element: ElementType::Bf16,
        page_tokens: 16,
        pages: 4,
        kv_heads: 1,
        head_dim: 2,
        k: strides,
        v: strides,
        layers: vec![LayerBase { k: PlaneBase::new(0, 0), v: PlaneBase::new(0, 4 * strides.page) }],
    }
}

fn gpu_reply(
    server: &mut ServerSession,
    client: &mut ClientSession,
    opened: Result<(), String>,
) -> Result<u32, String> {
    for event in server.handle_socket().unwrap() {
        let SocketEvent::GpuOffered { token, memory, words } = event else { panic!("{event:?}") };
        assert_eq!(words.is_some(), matches!(memory, GpuMemory::Ring(_)));
        server.answer_gpu(token, opened.clone().map(|()| memory)).unwrap();
    }
    let reply = client.handle_socket().unwrap().expect("an answer");
    assert_eq!(reply.token, 78);
    reply.result
}

#[test]
fn gpu_memory_is_offered_opened_and_used() {
    let place = Place::new();
    let listener = Listener::bind(place.path(), 0o600, None).unwrap().with_limits(Limits::default());
    let (mut client, mut server) = attached(&listener);
    let kv = pages();
    client.register_gpu(78, &GpuMemory::Pages(kv.clone()), None).unwrap();
    let region = gpu_reply(&mut server, &mut client, Ok(())).unwrap();
    assert!(server.region(region).is_none(), "it is not host memory");
    let to_pages = |id, table: Vec<u32>| {
        let Command::Fetch { timeout_ms, shape, progress, .. } = fetch(id, region) else { unreachable!() };
        let chunks = vec![ChunkPlace { key: [1; 32], tokens: 20, offset: 0 }];
        Command::Fetch { id, timeout_ms, region, to: Target::Pages { table }, shape, chunks, progress }
    };
    for command in [to_pages(1, vec![3, 0]), to_pages(2, vec![3, 4]), fetch(3, region)] {
        assert_eq!(client.send(&command).unwrap(), Sent::Sent);
    }
    let Some(Command::Fetch { id: 1, to: Target::Pages { table }, .. }) = server.next_command().unwrap()
    else {
        panic!("the first is sound")
    };
    assert_eq!(table, [3, 0]);
    assert!(server.next_command().unwrap().is_none());
    let (id, reason) = refusal(&mut client);
    assert!(id == 2 && reason.contains("names page 4 of a cache of 4 pages"), "{reason}");
    let _ = server.next_command().unwrap();
    let (id, reason) = refusal(&mut client);
    assert!(id == 3 && reason.contains("is a paged KV cache"), "{reason}");
    assert_eq!(client.send(&Command::Unregister { id: 4, region }).unwrap(), Sent::Sent);
    let _ = server.next_command().unwrap();
    let (id, reason) = refusal(&mut client);
    assert!(id == 4 && reason.contains("still in use by 1 fetches"), "{reason}");

    client.register_gpu(78, &GpuMemory::Pages(kv), None).unwrap();
    let refused = gpu_reply(&mut server, &mut client, Err("no such GPU".into()));
    assert_eq!(refused, Err("no such GPU".into()));
}

#[test]
fn gpu_memory_as_no_correct_client_describes_it() {
    let place = Place::new();
    let listener = Listener::bind(place.path(), 0o600, None)
        .unwrap()
        .with_limits(Limits { regions: 1, ..Limits::default() });
    let (mut client, mut server) = attached(&listener);
    let words = |entries: u32| {
        let bytes = ring_words_bytes(entries);
        Arc::new(
            Arena::new(ArenaConfig { name: "ring", bytes, page: PageChoice::Base, numa_node: None }).unwrap(),
        )
    };
    let ring = RingKv {
        device: DeviceUuid([5; 16]),
        allocation: GpuAllocation { handle: IpcHandle::new([7; 64]), bytes: 1024 },
        element: ElementType::Bf16,
        offset: 0,
        entry_bytes: 256,
        entries: 4,
        generation: 3,
    };
    let good = words(4);
    RingConsumer::create(Arc::clone(&good), 4, 256, 3).unwrap();
    let mut outside = pages();
    outside.layers[0].v.offset += 2;
    let cases: [(GpuMemory, Option<&Arena>, &str); 6] = [
        (GpuMemory::Pages(outside), None, "would end at byte"),
        (GpuMemory::Pages(pages()), Some(&good), "pages with none; this came with 1"),
        (GpuMemory::Ring(ring.clone()), None, "this came with 0"),
        (GpuMemory::Ring(RingKv { entries: 0, ..ring.clone() }), Some(&good), "0 entries"),
        (GpuMemory::Ring(RingKv { entry_bytes: !255, ..ring.clone() }), Some(&good), "does not fit"),
        (
            GpuMemory::Ring(RingKv { entries: 1000, entry_bytes: 0, ..ring.clone() }),
            Some(&good),
            "multiple of 256",
        ),
    ];
    for (memory, arena, expected) in cases {
        client.register_gpu(78, &memory, arena).unwrap();
        let reason = gpu_reply(&mut server, &mut client, Ok(())).unwrap_err();
        assert!(reason.contains(expected), "{reason}");
    }
    client.register_gpu(78, &GpuMemory::Ring(ring), Some(&good)).unwrap();
    gpu_reply(&mut server, &mut client, Ok(())).unwrap();
    client.register_gpu(78, &GpuMemory::Pages(pages()), None).unwrap();
    let reason = gpu_reply(&mut server, &mut client, Ok(())).unwrap_err();
    assert!(reason.contains("1 regions are registered"), "{reason}");
}

#[test]
fn the_largest_description_fits_a_datagram() {
    let mut kv = pages();
    kv.layers = vec![LayerBase { k: PlaneBase::new(511, u64::MAX), v: PlaneBase::new(511, u64::MAX) }; 512];
    kv.allocations = vec![GpuAllocation { handle: IpcHandle::new([255; 64]), bytes: u64::MAX }; 512];
    let bytes = datagram(&FromClient::RegisterGpu { token: u64::MAX, memory: GpuMemory::Pages(kv.clone()) });
    assert!(bytes.len() <= control::handshake::MAX_SOCKET_BYTES, "{}", bytes.len());
    let place = Place::new();
    let listener = Listener::bind(place.path(), 0o600, None).unwrap().with_limits(Limits::default());
    let (client, mut server) = attached(&listener);
    client.register_gpu(78, &GpuMemory::Pages(kv), None).unwrap();
    assert_eq!(server.handle_socket().unwrap().len(), 0, "read whole, and refused");
}
