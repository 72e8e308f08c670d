//! What a peer can do with a shared memfd, and what it cannot.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use hugepages::{AdoptError, Arena, ArenaConfig, PageChoice, PageSize, SealError, Slots, SlotsError};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::io::Errno;

fn arena(page: PageChoice) -> Arena {
    Arena::new(ArenaConfig { name: "peer-test", bytes: 64 << 10, page, numa_node: None }).unwrap()
}

fn duplicate(arena: &Arena) -> OwnedFd {
    arena.fd().try_clone_to_owned().unwrap()
}

fn memfd(flags: MemfdFlags, bytes: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("peer-test", MemfdFlags::CLOEXEC | flags).unwrap();
    rustix::fs::ftruncate(&fd, bytes).unwrap();
    fd
}

fn punch(fd: impl AsFd, bytes: usize) -> Result<(), Errno> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(fd, flags, 0, u64::try_from(bytes).unwrap())
}

#[test]
fn both_ends_see_the_same_bytes() {
    for page in [PageChoice::Base, PageChoice::Huge2M] {
        let ours = arena(page);
        let theirs = Arena::from_fd(duplicate(&ours), ours.bytes()).unwrap();
        assert_ne!(ours.addr(), theirs.addr());
        assert_eq!(ours.page_size(), theirs.page_size());
        ours.copy_in(100, b"to them").unwrap();
        theirs.copy_in(200, b"to us").unwrap();
        let mut read = [0; 7];
        theirs.copy_out(100, &mut read).unwrap();
        assert_eq!(&read, b"to them");
        ours.copy_out(200, &mut read[..5]).unwrap();
        assert_eq!(&read[..5], b"to us");
    }
}

#[test]
fn a_shared_arena_cannot_be_resized_or_holed() {
    for page in [PageChoice::Base, PageChoice::Huge2M] {
        let ours = arena(page);
        let peer = duplicate(&ours);
        for bytes in [0, ours.page_size().bytes(), 2 * ours.bytes()] {
            let resized = rustix::fs::ftruncate(&peer, u64::try_from(bytes).unwrap());
            assert!(resized == Err(Errno::PERM) || bytes == ours.bytes(), "{bytes}: {resized:?}");
        }
        let theirs = Arena::from_fd(peer, ours.bytes()).unwrap();
        assert_eq!(punch(theirs.fd(), ours.bytes()), Err(Errno::PERM));
        assert!(matches!(Arena::from_fd(duplicate(&ours), ours.bytes()), Err(AdoptError::Map(_))));
    }
}

#[test]
fn holes_from_before_are_filled() {
    let ours = arena(PageChoice::Auto);
    ours.copy_in(0, b"gone").unwrap();
    punch(ours.fd(), ours.bytes()).unwrap();
    ours.close_to_others().unwrap();
    let stat = rustix::fs::fstat(ours.fd()).unwrap();
    assert_eq!(usize::try_from(stat.st_blocks).unwrap() * 512, ours.bytes());
    assert_eq!(punch(ours.fd(), ours.bytes()), Err(Errno::PERM));
    ours.close_to_others().unwrap();
    ours.copy_in(0, b"back").unwrap();
}

#[test]
fn memory_that_was_never_there_is_allocated_before_it_is_used() {
    let fd = memfd(MemfdFlags::ALLOW_SEALING, 1 << 20);
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    assert_eq!(rustix::fs::fstat(&fd).unwrap().st_blocks, 0);
    let arena = Arena::from_fd(fd, 1 << 20).unwrap();
    assert_eq!(arena.page_size(), PageSize::Base);
    assert_eq!(rustix::fs::fstat(arena.fd()).unwrap().st_blocks, (1 << 20) / 512);
}

#[test]
fn hugepages_that_do_not_exist_are_refused_and_not_touched() {
    let pool = hugepages::status().into_iter().filter(|pool| pool.page_bytes == 2 << 20);
    let bytes = (pool.map(|pool| pool.total_pages).sum::<u64>() + 1) << 21;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let Ok(fd) = rustix::fs::memfd_create("peer-test", flags) else {
        eprintln!("not tested: this kernel has no 2 MiB pages");
        return;
    };
    rustix::fs::ftruncate(&fd, bytes).unwrap();
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    let error = Arena::from_fd(fd, usize::try_from(bytes).unwrap()).unwrap_err();
    assert!(matches!(error, AdoptError::NoMemory { .. }), "{error}");
}

#[test]
fn descriptors_that_could_fault_are_refused() {
    let refused = |fd: OwnedFd, bytes| Arena::from_fd(fd, bytes).unwrap_err();
    let sealed = |seals, bytes| {
        let fd = memfd(MemfdFlags::ALLOW_SEALING, bytes);
        rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
        fd
    };
    let shrinkable = sealed(SealFlags::GROW, 4096);
    assert!(matches!(refused(shrinkable, 4096), AdoptError::Shrinkable));
    let unsealable = memfd(MemfdFlags::empty(), 4096);
    assert!(matches!(refused(unsealable, 4096), AdoptError::Shrinkable));
    let shut = sealed(SealFlags::SHRINK | SealFlags::SEAL, 4096);
    assert!(matches!(refused(shut, 4096), AdoptError::Seal(SealError::Sealed)));
    let read_only = sealed(SealFlags::SHRINK | SealFlags::WRITE, 4096);
    assert!(matches!(refused(read_only, 4096), AdoptError::Map(_)));
    for (actual, expected) in [(4096, 8192), (8192, 4096), (0, 0), (4095, 4095)] {
        let error = refused(sealed(SealFlags::SHRINK, actual), expected);
        assert!(matches!(error, AdoptError::WrongSize { .. }), "{actual} {expected}: {error}");
    }
    let file = File::open("/proc/self/exe").unwrap();
    assert!(matches!(refused(file.into(), 4096), AdoptError::NotMemfd(_) | AdoptError::Shrinkable));
    let (pipe, _other_end) = rustix::pipe::pipe().unwrap();
    assert!(matches!(refused(pipe, 4096), AdoptError::NotMemfd(_)));
}

#[test]
fn slots_are_aligned_disjoint_and_handed_out_once() {
    let arena = arena(PageChoice::Base);
    let start = arena.addr();
    let mut slots = Slots::new(arena, 5000).unwrap();
    assert_eq!((slots.count(), slots.slot_bytes(), slots.addr()), (8, 8192, start));
    let mut taken = slots.take();
    assert!(slots.take().is_empty());
    assert_eq!(taken.len(), slots.count());
    drop(slots);
    for (index, slot) in taken.iter_mut().enumerate() {
        assert_eq!((slot.index(), slot.offset(), slot.addr()), (index, index * 8192, start + index * 8192));
        slot.as_mut_slice().fill(u8::try_from(index).unwrap() + 1);
    }
    let last = taken.pop().unwrap();
    let filled = std::thread::spawn(move || last.as_slice().iter().all(|&byte| byte == 8)).join().unwrap();
    assert!(filled);
    for (slot, value) in taken.iter().zip(1..) {
        assert!(slot.bytes() == 8192 && slot.as_slice().iter().all(|&byte| byte == value));
    }
}

#[test]
fn slots_need_memory_of_their_own() {
    let error = |bytes| Slots::new(arena(PageChoice::Base), bytes).unwrap_err();
    for bytes in [0, (64 << 10) + 1, usize::MAX] {
        assert!(matches!(error(bytes), SlotsError::NoneFits { .. }), "{bytes}");
    }
    let lent = arena(PageChoice::Base);
    let theirs = Arena::from_fd(duplicate(&lent), lent.bytes()).unwrap();
    assert!(matches!(Slots::new(lent, 4096), Err(SlotsError::Shared)));
    assert!(matches!(Slots::new(theirs, 4096), Err(SlotsError::Shared)));
    let own = arena(PageChoice::Base);
    let fd = duplicate(&own);
    let slots = Slots::new(own, 4096).unwrap();
    assert!(matches!(Arena::from_fd(fd.try_clone().unwrap(), slots.bytes()), Err(AdoptError::Map(_))));
    assert_eq!(rustix::io::write(&fd, b"overwritten"), Err(Errno::PERM));
}
