//! Memory that comes from, or goes to, a process that is not trusted.
//!
//! Three things that a peer can do to a memfd would raise SIGBUS in a process that has it mapped: shrink it; punch a
//! hole in it, and leave no free hugepage for the next touch; hand over one whose pages were never allocated, with the
//! same outcome. The first is prevented by `F_SEAL_SHRINK`. The second by `F_SEAL_FUTURE_WRITE`, which the kernel also
//! takes as "no more holes"; it leaves standing the writable mappings that exist. The third by `fallocate` after that.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::SealFlags;
use rustix::io::Errno;

use crate::arena::Arena;
use crate::page::PageSize;

const HUGETLBFS_MAGIC: rustix::fs::FsWord = 0x9584_58f6;

/// Why [`Arena::from_fd`] did not take a peer's memory.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// The descriptor is not a memfd (or not one that takes seals).
    #[error("the descriptor is not a memfd that takes seals: {0}; make it with MFD_ALLOW_SEALING")]
    NotMemfd(io::Error),
    /// The memfd could be shrunk under us.
    #[error("the memfd is not sealed against shrinking: add F_SEAL_SHRINK before passing it")]
    Shrinkable,
    /// The memfd has another size than its owner said, or none.
    #[error("the memfd has {actual} bytes where {expected} were announced")]
    WrongSize {
        /// What the caller expected.
        expected: usize,
        /// What the memfd has.
        actual: u64,
    },
    /// Pages of a size that arenas do not have.
    #[error("the memfd has hugepages of {0} bytes: only 2 MiB and 1 GiB are supported")]
    PageSize(u64),
    /// The memfd takes no new writable mapping, so it was lent to another process before, or is open for reading only.
    #[error(
        "the memfd cannot be mapped for writing: {0}; it is read-only, or was lent once already (an arena is mapped by its \
         maker and one other process: make a new one for each)"
    )]
    Map(io::Error),
    /// There are not enough free pages for what the memfd's owner did not allocate.
    #[error(
        "{bytes} bytes of the memfd are not all allocated, and there is no memory for the rest: {source}"
    )]
    NoMemory {
        /// Bytes in the memfd.
        bytes: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// Holes in the memory cannot be ruled out.
    #[error(transparent)]
    Seal(#[from] SealError),
}

/// Why an arena could not be closed to others.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// `F_SEAL_SEAL` was set before: pages could be taken back at any time.
    #[error(
        "the memfd takes no more seals (F_SEAL_SEAL), so its pages could be taken back: pass it without that seal"
    )]
    Sealed,
    /// The kernel does not have the seal.
    #[error("the kernel refused F_SEAL_FUTURE_WRITE, which Linux has since 5.1: {0}")]
    Kernel(io::Error),
    /// Pages were missing, and there are none left to take their place.
    #[error("pages of the memfd were never allocated or were taken back, and no others are free: {0}")]
    MissingPages(io::Error),
}

impl Arena {
    /// Maps a memfd that came from another process, which need not be trusted with anything but the contents.
    ///
    /// The memfd must have exactly `expected_bytes` (the caller's budget: missing pages are allocated and count against
    /// this process) and carry `F_SEAL_SHRINK`. It is closed to others, as by [`close_to_others`](Arena::close_to_others),
    /// so that it can be lent once only.
    pub fn from_fd(fd: OwnedFd, expected_bytes: usize) -> Result<Arena, AdoptError> {
        let seals = rustix::fs::fcntl_get_seals(&fd).map_err(|errno| AdoptError::NotMemfd(errno.into()))?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(AdoptError::Shrinkable);
        }
        let not_memfd = |errno: Errno| AdoptError::NotMemfd(errno.into());
        // The size is read after the seal is seen: from here on it can grow but not shrink.
        let actual = rustix::fs::fstat(&fd).map_err(not_memfd)?.st_size;
        let actual = u64::try_from(actual).unwrap_or(0);
        if actual == 0 || usize::try_from(actual) != Ok(expected_bytes) {
            return Err(AdoptError::WrongSize { expected: expected_bytes, actual });
        }
        let page = page_size_of(&fd)?;
        if !expected_bytes.is_multiple_of(page.bytes()) {
            return Err(AdoptError::WrongSize {
                expected: expected_bytes.next_multiple_of(page.bytes()),
                actual,
            });
        }
        let arena = Self::map(fd, expected_bytes, page).map_err(|errno| match errno {
            Errno::NOMEM => AdoptError::NoMemory { bytes: expected_bytes, source: errno.into() },
            _ => AdoptError::Map(errno.into()),
        })?;
        arena.close_to_others()?;
        Ok(arena)
    }

    /// Rules out, from here on, new writable mappings of the memory and holes in it, and puts a page wherever one is
    /// missing. The mappings that exist stay writable.
    ///
    /// For the maker of an arena that lent it: call this after the borrower has mapped it (its `from_fd` has done the
    /// same), and before reading or writing anything in it.
    pub fn close_to_others(&self) -> Result<(), SealError> {
        rustix::fs::fcntl_add_seals(&self.fd, SealFlags::FUTURE_WRITE).or_else(|errno| match errno {
            Errno::PERM if self.is_closed_to_others() => Ok(()),
            Errno::PERM => Err(SealError::Sealed),
            errno => Err(SealError::Kernel(errno.into())),
        })?;
        self.allocate().map_err(|errno| SealError::MissingPages(errno.into()))?;
        self.populate();
        Ok(())
    }

    pub(crate) fn is_closed_to_others(&self) -> bool {
        rustix::fs::fcntl_get_seals(&self.fd).is_ok_and(|seals| seals.contains(SealFlags::FUTURE_WRITE))
    }
}

fn page_size_of(fd: &OwnedFd) -> Result<PageSize, AdoptError> {
    let fs = rustix::fs::fstatfs(fd).map_err(|errno| AdoptError::NotMemfd(errno.into()))?;
    if fs.f_type != HUGETLBFS_MAGIC {
        return Ok(PageSize::Base);
    }
    let bytes = u64::try_from(fs.f_bsize).unwrap_or(0);
    [PageSize::Huge2M, PageSize::Huge1G]
        .into_iter()
        .find(|page| u64::try_from(page.bytes()) == Ok(bytes))
        .ok_or(AdoptError::PageSize(bytes))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::path::Path;
    use std::process::Command;

    use rustix::fs::FallocateFlags;

    use super::*;

    const PAGE: usize = 2 << 20;

    /// A file of one page, mapped, which promises it the page.
    fn mapped(folder: &Path, name: &str) -> Result<Arena, Errno> {
        let file =
            File::options().read(true).write(true).create(true).truncate(false).open(folder.join(name));
        let file = file.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        rustix::fs::ftruncate(&file, 2 << 20)?;
        Arena::map(file.into(), PAGE, PageSize::Huge2M)
    }

    /// What a peer would do: free a page by a hole, and let somebody else have it. A mount that may hold two pages stands
    /// for a machine that has no more.
    #[test]
    fn a_page_that_was_taken_away_is_an_error_and_not_a_fault() {
        let folder = tempfile::tempdir().unwrap();
        let mount = ["-t", "hugetlbfs", "-o", "pagesize=2M,size=4M", "hugetlbfs"];
        let mounted = Command::new("mount").args(mount).arg(folder.path()).output();
        if !mounted.is_ok_and(|mount| mount.status.success()) {
            eprintln!("not tested: hugetlbfs cannot be mounted here");
            return;
        }
        let outcome = (|| {
            let pages = (mapped(folder.path(), "ours"), mapped(folder.path(), "others"));
            let (Ok(ours), Ok(_others)) = pages else { return Ok(None) };
            ours.allocate()?;
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&ours.fd, hole, 0, 2 << 20)?;
            let _taker = mapped(folder.path(), "taker")?;
            Ok::<_, Errno>(Some((ours.allocate(), mapped(folder.path(), "too many").err())))
        })();
        let unmounted = Command::new("umount").arg(folder.path()).status().unwrap();
        assert!(unmounted.success());
        match outcome.expect("the page in the hole is free for another file") {
            Some(refused) => assert_eq!(refused, (Err(Errno::NOSPC), Some(Errno::NOMEM))),
            None => eprintln!("not tested: no 2 free hugepages"),
        }
    }
}
