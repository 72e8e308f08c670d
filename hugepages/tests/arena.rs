//! Arenas on whatever pages this machine has.

use std::sync::atomic::Ordering::{Acquire, Release};

use hugepages::{Arena, ArenaConfig, ArenaError, PageChoice, PageSize};
use proptest::prelude::*;

fn arena(bytes: usize, page: PageChoice) -> Arena {
    Arena::new(ArenaConfig { name: "test", bytes, page, numa_node: None }).unwrap()
}

#[test]
fn rounds_up_to_pages_and_starts_as_zeros() {
    for page in [PageChoice::Base, PageChoice::Huge2M, PageChoice::Auto] {
        let arena = arena(10_000, page);
        assert_eq!(arena.bytes(), 10_000usize.next_multiple_of(arena.page_size().bytes()), "{page}");
        assert_eq!(arena.addr() % arena.page_size().bytes(), 0);
        let mut read = vec![1; arena.bytes()];
        arena.copy_out(0, &mut read).unwrap();
        assert!(read.iter().all(|&byte| byte == 0));
    }
}

#[test]
fn says_which_pages_it_got_and_why() {
    let base = arena(1, PageChoice::Base);
    assert_eq!((base.page_size(), base.fallback_reason()), (PageSize::Base, None));
    for page in [PageChoice::Huge2M, PageChoice::Huge1G] {
        let arena = arena(1, page);
        let wanted = if page == PageChoice::Huge1G { PageSize::Huge1G } else { PageSize::Huge2M };
        assert_eq!(arena.fallback_reason().is_none(), arena.page_size() == wanted, "{arena:?}");
        if let Some(reason) = arena.fallback_reason() {
            assert!(reason.starts_with(&wanted.to_string()), "{reason}");
        }
    }
}

#[test]
fn more_hugepages_than_there_are_falls_back_without_touching_the_pool() {
    let pool_bytes: u64 = (hugepages::status().iter())
        .filter(|pool| pool.page_bytes == 2 << 20)
        .map(|pool| pool.total_pages * pool.page_bytes)
        .sum();
    let bytes = usize::try_from(pool_bytes).unwrap() + (2 << 20);
    let arena = arena(bytes, PageChoice::Huge2M);
    if arena.page_size() == PageSize::Huge2M {
        eprintln!("not tested: the kernel allows surplus hugepages here");
        return;
    }
    assert_eq!(arena.page_size(), PageSize::Base);
    let reason = arena.fallback_reason().unwrap();
    assert!(reason.contains("2 MiB pages") && reason.contains("needed"), "{reason}");
    arena.copy_in(bytes - 3, b"end").unwrap();
}

#[test]
fn more_memory_than_the_machine_has_is_refused() {
    let config = |bytes| ArenaConfig { name: "test", bytes, page: PageChoice::Auto, numa_node: None };
    let error = Arena::new(config(1 << 50)).unwrap_err();
    assert!(matches!(error, ArenaError::NoMemory { .. }), "{error}");
    assert!(error.to_string().contains("ordinary 4 KiB pages: 1073741824 MiB needed"), "{error}");
    assert!(matches!(Arena::new(config(0)), Err(ArenaError::Empty)));
    assert!(matches!(Arena::new(config(usize::MAX)), Err(ArenaError::TooLarge(usize::MAX))));
    assert!(matches!(Arena::new(config(isize::MAX.unsigned_abs())), Err(ArenaError::NoMemory { .. })));
}

#[test]
fn names_the_kernel_cannot_take_are_refused() {
    for name in ["a\0b", &"n".repeat(201)] {
        let config = ArenaConfig { name, bytes: 1, page: PageChoice::Base, numa_node: None };
        assert!(matches!(Arena::new(config), Err(ArenaError::Name(_))));
    }
}

#[test]
fn memory_comes_from_the_node_asked_for() {
    let config = |node| ArenaConfig {
        name: "numa-test",
        bytes: 8 << 20,
        page: PageChoice::Auto,
        numa_node: Some(node),
    };
    assert!(matches!(Arena::new(config(4000)), Err(ArenaError::NoSuchNode(4000))));
    let arena = match Arena::new(config(0)) {
        Ok(arena) => arena,
        Err(ArenaError::Bind { source, .. }) => {
            eprintln!("not tested: this container forbids memory policies ({source})");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let maps = std::fs::read_to_string("/proc/thread-self/numa_maps").unwrap_or_default();
    let Some(line) = maps.lines().find(|line| line.starts_with(&format!("{:x}", arena.addr()))) else {
        eprintln!("not tested: no numa_maps here");
        return;
    };
    // All of it is there already, on node 0 and on no other; the thread's own policy is back to what it was.
    let pages = arena.bytes() / arena.page_size().bytes();
    let nodes: Vec<_> = line.split(' ').filter(|field| field.starts_with('N')).collect();
    assert_eq!(nodes, [format!("N0={pages}")], "{line}");
    assert!(line.contains(" default "), "{line}");
}

#[test]
fn every_page_is_there_from_the_start() {
    let arena = arena(4 << 20, PageChoice::Base);
    let stat = rustix::fs::fstat(arena.fd()).unwrap();
    assert_eq!(usize::try_from(stat.st_blocks).unwrap() * 512, arena.bytes());
    let faults_before = minor_faults();
    for offset in (0..arena.bytes()).step_by(4096) {
        arena.copy_in(offset, &[1]).unwrap();
    }
    let faults = minor_faults() - faults_before;
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut version = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    if (version.next(), version.next()) < (Some(5), Some(14)) {
        eprintln!("not tested: Linux {} cannot fill page tables", release.trim());
        return;
    }
    // This thread may take a few for other reasons, but not one for each of 1024 pages.
    assert!(faults < 64, "{faults} page faults");
}

fn minor_faults() -> i64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the kernel fills the struct, of which all-zeros is a valid value.
    unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init().ru_minflt
    }
}

#[test]
fn words_are_checked_for_bounds_and_alignment() {
    let arena = arena(1, PageChoice::Base);
    let end = arena.bytes();
    for (offset, is_u64, is_u32) in [
        (0, true, true),
        (4, false, true),
        (2, false, false),
        (end - 8, true, true),
        (end - 4, false, true),
        (end, false, false),
        (usize::MAX - 7, false, false),
        (usize::MAX - 3, false, false),
    ] {
        assert_eq!(arena.atomic_u64(offset).is_some(), is_u64, "{offset}");
        assert_eq!(arena.atomic_u32(offset).is_some(), is_u32, "{offset}");
    }
    arena.atomic_u64(8).unwrap().store(0x0102_0304_0506_0708, Release);
    let low_half = if cfg!(target_endian = "little") { 8 } else { 12 };
    assert_eq!(arena.atomic_u32(low_half).unwrap().load(Acquire), 0x0506_0708);
}

#[test]
fn a_release_store_publishes_what_was_copied_before_it() {
    let arena = arena(4096, PageChoice::Base);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            for round in 1..=20_000u64 {
                while arena.atomic_u64(0).unwrap().load(Acquire) != round * 2 - 2 {
                    std::thread::yield_now();
                }
                arena.copy_in(64, &round.to_le_bytes().repeat(16)).unwrap();
                arena.atomic_u64(0).unwrap().store(round * 2 - 1, Release);
            }
        });
        for round in 1..=20_000u64 {
            while arena.atomic_u64(0).unwrap().load(Acquire) != round * 2 - 1 {
                std::thread::yield_now();
            }
            let mut read = [0; 128];
            arena.copy_out(64, &mut read).unwrap();
            assert_eq!(read, *round.to_le_bytes().repeat(16));
            arena.atomic_u64(0).unwrap().store(round * 2, Release);
        }
    });
}

#[test]
fn streaming_writes_exactly_its_range() {
    let arena = arena(1 << 16, PageChoice::Base);
    for offset in [0, 1, 63, 64, 65, 1000] {
        for bytes in [0, 1, 8191, 8192, 8193, 8255, 10_007] {
            arena.copy_in(0, &[0xee; 1 << 14]).unwrap();
            let written: Vec<u8> = (0..bytes).map(|i: usize| (i % 251).to_le_bytes()[0]).collect();
            arena.copy_in_streaming(offset, &written).unwrap();
            let mut read = vec![0; 1 << 14];
            arena.copy_out(0, &mut read).unwrap();
            assert_eq!(&read[offset..offset + bytes], &written, "{offset} {bytes}");
            read[offset..offset + bytes].fill(0xee);
            assert!(read.iter().all(|&byte| byte == 0xee), "{offset} {bytes}");
        }
    }
    let end = arena.bytes();
    for offset in [end - 8192 + 1, end, usize::MAX, usize::MAX - 8191] {
        assert!(arena.copy_in_streaming(offset, &[1; 8192]).is_err());
    }
    let mut read = vec![1; 8191];
    arena.copy_out(end - 8191, &mut read).unwrap();
    assert!(read.iter().all(|&byte| byte == 0));
}

#[derive(Clone, Debug)]
enum Access {
    In(usize, Vec<u8>),
    Out(usize, usize),
    Zero(usize, usize),
}

const ARENA_BYTES: usize = 4096;

fn accesses() -> impl Strategy<Value = Vec<Access>> {
    let offset = prop_oneof![8 => 0..ARENA_BYTES + 8, 1 => Just(usize::MAX), 1 => Just(usize::MAX / 2)];
    let bytes = prop_oneof![8 => 0..64usize, 2 => 0..ARENA_BYTES + 8];
    let access = (offset, bytes, 0..3u8, any::<u8>()).prop_map(|(offset, bytes, kind, seed)| match kind {
        0 => Access::In(offset, (0..bytes).map(|i| seed.wrapping_add(i.to_le_bytes()[0])).collect()),
        1 => Access::Out(offset, bytes),
        _ => Access::Zero(offset, if bytes == 5 { usize::MAX } else { bytes }),
    });
    prop::collection::vec(access, 1..40)
}

proptest! {
    /// The twin: a vector, whose bounds the standard library checks.
    #[test]
    fn behaves_as_a_vector(accesses in accesses()) {
        let arena = arena(ARENA_BYTES, PageChoice::Base);
        prop_assume!(arena.bytes() == ARENA_BYTES);
        let mut twin = vec![0u8; ARENA_BYTES];
        for access in accesses {
            match access {
                Access::In(offset, bytes) => {
                    let range = twin.get_mut(offset..offset.saturating_add(bytes.len()));
                    let expected = range.map(|range| range.copy_from_slice(&bytes));
                    prop_assert_eq!(arena.copy_in(offset, &bytes).ok(), expected);
                }
                Access::Out(offset, bytes) => {
                    let mut read = vec![0xee; bytes];
                    let copied = arena.copy_out(offset, &mut read);
                    match twin.get(offset..offset.saturating_add(bytes)) {
                        Some(range) => prop_assert_eq!(range, &read),
                        None => prop_assert!(copied.is_err() && read.iter().all(|&byte| byte == 0xee)),
                    }
                }
                Access::Zero(offset, bytes) => {
                    let range = twin.get_mut(offset..offset.saturating_add(bytes));
                    prop_assert_eq!(arena.zero(offset, bytes).ok(), range.map(|range| range.fill(0)));
                }
            }
            let mut all = vec![0; ARENA_BYTES];
            arena.copy_out(0, &mut all).unwrap();
            prop_assert_eq!(&all, &twin);
        }
    }
}
