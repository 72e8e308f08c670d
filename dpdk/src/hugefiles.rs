//! Hugepage files that a process which died has left behind.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

/// Removes the files that a dead process with the same file prefix left on any hugetlbfs mount, and so frees their pages. A living
/// process holds a lock on each of its files; those are left alone. Returns how many were removed; a mount that this user cannot write
/// is skipped, as the EAL will not use it either.
pub(crate) fn remove_stale(prefix: &str) -> usize {
    mounts().iter().map(|mount| remove_stale_in(mount, prefix)).sum()
}

fn remove_stale_in(mount: &Path, prefix: &str) -> usize {
    let Ok(entries) = fs::read_dir(mount) else { return 0 };
    let stale = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| is_map_file(name, prefix)) && remove_unlocked(path).unwrap_or(false)
    };
    entries.flatten().map(|entry| entry.path()).filter(stale).count()
}

/// Whether this is `<prefix>map_<number>`, as the EAL names its pages.
fn is_map_file(name: &str, prefix: &str) -> bool {
    let number = name.strip_prefix(prefix).and_then(|rest| rest.strip_prefix("map_"));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

fn remove_unlocked(path: &Path) -> io::Result<bool> {
    let file = File::open(path)?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(false);
    }
    fs::remove_file(path)?;
    Ok(true)
}

fn mounts() -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let hugetlbfs = |line: &str| {
        let mut fields = line.split(' ').skip(1);
        let (path, kind) = (fields.next()?, fields.next()?);
        (kind == "hugetlbfs").then(|| PathBuf::from(path.replace("\\040", " ")))
    };
    table.lines().filter_map(hugetlbfs).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_unlocked_files_of_the_prefix_go() {
        let folder = tempfile::tempdir().expect("temporary folder");
        for name in ["ownmap_0", "ownmap_12", "othermap_0", "ownmap_x", "ownmap_", "own"] {
            fs::write(folder.path().join(name), b"").expect("write");
        }
        let held = File::open(folder.path().join("ownmap_12")).expect("open");
        flock(&held, FlockOperation::LockShared).expect("lock");
        assert_eq!(remove_stale_in(folder.path(), "own"), 1);
        assert!(!folder.path().join("ownmap_0").exists());
        drop(held);
        assert_eq!(remove_stale_in(folder.path(), "own"), 1);
        let left = fs::read_dir(folder.path()).expect("read").count();
        assert_eq!(left, 4);
    }
}
