//! One shared mapping: how it is made.

use std::fmt::{self, Write as _};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::numa::BoundThread;
use crate::page::{PageChoice, PageSize};
use crate::status;

/// What to make an [`Arena`] from.
#[derive(Clone, Copy, Debug)]
pub struct ArenaConfig<'a> {
    /// A name for `/proc/PID/maps`: at most 200 bytes, none of them zero.
    pub name: &'a str,
    /// At least so many bytes; rounded up to whole pages.
    pub bytes: usize,
    /// The pages to try for.
    pub page: PageChoice,
    /// The NUMA node whose memory to take, and no other's; `None` leaves it to the kernel.
    pub numa_node: Option<u32>,
}

/// Why [`Arena::new`] made no arena.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// An arena of no bytes was asked for.
    #[error("an arena of 0 bytes was asked for: ask for at least 1")]
    Empty,
    /// The size does not fit this machine's addresses.
    #[error("an arena of {0} bytes is larger than this machine can address")]
    TooLarge(usize),
    /// The name is too long or holds a zero byte.
    #[error("arena name {0:?} must have at most {MAX_NAME_BYTES} bytes, none of them zero")]
    Name(String),
    /// The machine has no such NUMA node, or none of that number has memory.
    #[error("NUMA node {0} does not exist or has no memory: `shadowserve doctor` lists the nodes")]
    NoSuchNode(u32),
    /// The kernel refused to bind to the node.
    #[error(
        "cannot bind memory to NUMA node {node}: {source} (in a container this needs CAP_SYS_NICE or a seccomp profile \
         that allows set_mempolicy; or name no node)"
    )]
    Bind {
        /// The node asked for.
        node: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// Neither hugepages nor ordinary pages were to be had.
    #[error("no memory for an arena of {} MiB: {reasons}", bytes.div_ceil(1 << 20))]
    NoMemory {
        /// Bytes asked for.
        bytes: usize,
        /// What stood in the way, for each page size tried.
        reasons: String,
    },
}

const MAX_NAME_BYTES: usize = 200;

/// One mapping of a memfd that processes can share.
///
/// All pages exist from the start: the machine was asked for every one of them when the arena was made, so that
/// touching it later can neither fail nor wait. It cannot shrink or grow, and no page of it can be taken back once
/// [`from_fd`](Arena::from_fd) or [`close_to_others`](Arena::close_to_others) has closed it: no peer can make an access
/// fault. A new arena is all zeros.
pub struct Arena {
    first: NonNull<u8>,
    bytes: usize,
    page: PageSize,
    fallback_reason: Option<String>,
    /// Dropped before the memory is unmapped.
    guards: Vec<Box<dyn Send + Sync>>,
    pub(crate) fd: OwnedFd,
}

// SAFETY: the mapping belongs to the process and not to a thread; `first` and `bytes` never change, and all access goes
// through raw copies and atomics (see `access`).
unsafe impl Send for Arena {}
// SAFETY: as above; no method hands out a reference to plain bytes of the mapping.
unsafe impl Sync for Arena {}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { first, bytes, page, fd, .. } = self;
        f.debug_struct("Arena")
            .field("first", first)
            .field("bytes", bytes)
            .field("page", page)
            .field("fd", fd)
            .finish_non_exhaustive()
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.guards.clear();
        // SAFETY: this is the range that `map` mapped, and nothing that borrows from the arena is left.
        let unmapped = unsafe { rustix::mm::munmap(self.first.as_ptr().cast(), self.bytes) };
        debug_assert!(unmapped.is_ok(), "munmap of an arena: {unmapped:?}");
    }
}

impl Arena {
    /// Makes an arena: pages of the first size of `config.page` that the machine has enough of, all of them allocated,
    /// zeroed and mapped. Sealed against shrinking and growing.
    ///
    /// # Errors
    ///
    /// A shortage of hugepages is not an error as long as ordinary pages do: see [`page_size`](Arena::page_size) and
    /// [`fallback_reason`](Arena::fallback_reason).
    pub fn new(config: ArenaConfig<'_>) -> Result<Arena, ArenaError> {
        let ArenaConfig { name, bytes, page, numa_node } = config;
        if bytes == 0 {
            return Err(ArenaError::Empty);
        }
        if isize::try_from(bytes).is_err() {
            return Err(ArenaError::TooLarge(bytes));
        }
        if name.len() > MAX_NAME_BYTES || name.contains('\0') {
            return Err(ArenaError::Name(name.to_owned()));
        }
        if let Some(node) = numa_node.filter(|&node| !status::has_node(node)) {
            return Err(ArenaError::NoSuchNode(node));
        }
        let _bound = numa_node
            .map(|node| BoundThread::bind(node).map_err(|source| ArenaError::Bind { node, source }))
            .transpose()?;
        let mut reasons = String::new();
        for &page in page.candidates(bytes) {
            match Self::try_pages(name, bytes, page, numa_node) {
                Ok(mut arena) => {
                    arena.fallback_reason = (!reasons.is_empty()).then_some(reasons);
                    return Ok(arena);
                }
                Err(reason) => {
                    let joint = if reasons.is_empty() { "" } else { "; " };
                    let _ = write!(reasons, "{joint}{page}: {reason}");
                }
            }
        }
        Err(ArenaError::NoMemory { bytes, reasons })
    }

    fn try_pages(name: &str, bytes: usize, page: PageSize, node: Option<u32>) -> Result<Arena, String> {
        let page_bytes = page.bytes();
        let bytes = bytes.checked_next_multiple_of(page_bytes).filter(|&b| isize::try_from(b).is_ok());
        let bytes = bytes.ok_or("rounded up to whole pages, larger than this machine can address")?;
        let shortage = |step: &'static str| {
            move |errno: Errno| match errno {
                Errno::NOMEM | Errno::NOSPC => status::shortage(page, bytes / page_bytes, node),
                _ => format!("{step}: {}", io::Error::from(errno)),
            }
        };
        if page == PageSize::Base {
            // Past this point the kernel would rather end a process than refuse.
            status::check_available(bytes)?;
        }
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | page.memfd_flags();
        let fd = rustix::fs::memfd_create(name, flags).map_err(|errno| match errno {
            Errno::NODEV | Errno::INVAL | Errno::NOENT | Errno::OPNOTSUPP => {
                "not supported by this machine or kernel".to_owned()
            }
            _ => format!("memfd_create: {}", io::Error::from(errno)),
        })?;
        let length = u64::try_from(bytes).map_err(|e| e.to_string())?;
        rustix::fs::ftruncate(&fd, length).map_err(shortage("ftruncate"))?;
        // On hugetlb this reserves: all pages or ENOMEM, without taking any from others in between.
        let arena = Self::map(fd, bytes, page).map_err(shortage("mmap"))?;
        arena.allocate().map_err(shortage("fallocate"))?;
        rustix::fs::fcntl_add_seals(&arena.fd, SealFlags::SHRINK | SealFlags::GROW)
            .map_err(shortage("sealing"))?;
        arena.populate();
        Ok(arena)
    }

    /// Maps `bytes` of `fd`, which is that large.
    pub(crate) fn map(fd: OwnedFd, bytes: usize, page: PageSize) -> Result<Arena, Errno> {
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping at a place of the kernel's choice touches no memory of ours.
        let first = unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, flags, &fd, 0) }?;
        let first = NonNull::new(first.cast::<u8>()).ok_or(Errno::NOMEM)?;
        Ok(Arena { first, bytes, page, fallback_reason: None, guards: Vec::new(), fd })
    }

    /// Gives every page of the file memory, by this thread's NUMA policy; says so when there is not enough, where
    /// touching the mapping would raise SIGBUS.
    pub(crate) fn allocate(&self) -> Result<(), Errno> {
        let length = u64::try_from(self.bytes).map_err(|_| Errno::FBIG)?;
        rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), 0, length))
    }

    /// Fills the page tables, so that the data path takes no page fault. All pages exist, hence a kernel that cannot
    /// (before 5.14) costs a minor fault for each page on its first use, and no more.
    pub(crate) fn populate(&self) {
        // SAFETY: this advice changes no contents, and the range is exactly the mapping.
        let _ = unsafe {
            rustix::mm::madvise(self.first.as_ptr().cast(), self.bytes, Advice::LinuxPopulateWrite)
        };
    }

    /// Keeps `guard` until just before the memory is unmapped: a device's registration of it, whose drop ends it. Guards
    /// are dropped in the order in which they were given.
    pub fn guard(&mut self, guard: impl Send + Sync + 'static) {
        self.guards.push(Box::new(guard));
    }

    /// The pages that the arena stands on.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.page
    }

    /// Why the arena does not stand on larger pages, if larger ones were tried.
    #[must_use]
    pub fn fallback_reason(&self) -> Option<&str> {
        self.fallback_reason.as_deref()
    }

    /// Bytes mapped: what was asked for, rounded up to whole pages. All of them can be used, and the peer that maps the
    /// descriptor is to expect this number.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The memfd, for passing to another process, which maps it with [`Arena::from_fd`].
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Where the mapping starts, as a number: for registering the memory with a device.
    #[must_use]
    pub fn addr(&self) -> usize {
        self.first.as_ptr().addr()
    }

    /// Where the mapping starts. Making a reference to shared memory from it is undefined behaviour (see the rules in
    /// the source of `copy_in`); devices and raw copies are what it is for.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.first.as_ptr()
    }

    pub(crate) fn first_byte(&self) -> NonNull<u8> {
        self.first
    }
}
