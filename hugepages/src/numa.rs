//! Allocating on one NUMA node.
//!
//! The policy is set on the calling thread and not on the mapping (`mbind`), because pages are allocated by `fallocate`,
//! which reports a shortage where a touch would raise SIGBUS, and `fallocate` on hugetlb files follows the thread's
//! policy: a hugetlb mapping's own policy is never shared with its file.

use std::io;

const MASK_WORDS: usize = 16;
const WORD_BITS: usize = usize::BITS as usize;
const MASK_NODES: usize = MASK_WORDS * WORD_BITS;

/// While this lives, the calling thread allocates on one node only; afterwards as before.
#[derive(Debug)]
pub(crate) struct BoundThread {
    mode: libc::c_int,
    mask: [libc::c_ulong; MASK_WORDS],
}

impl BoundThread {
    pub(crate) fn bind(node: u32) -> io::Result<Self> {
        let node = usize::try_from(node).ok().filter(|&n| n < MASK_NODES);
        let node = node.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let before = current_policy()?;
        let mut mask = [0; MASK_WORDS];
        mask[node / WORD_BITS] = 1 << (node % WORD_BITS);
        set_policy(libc::MPOL_BIND, &mask)?;
        Ok(before)
    }
}

impl Drop for BoundThread {
    fn drop(&mut self) {
        // The same call succeeded a moment ago with the same rights, and a policy is only where to look first for
        // memory: should putting it back fail, then nothing worse follows than remote memory.
        let _ = set_policy(self.mode, &self.mask);
    }
}

fn current_policy() -> io::Result<BoundThread> {
    let mut mode: libc::c_int = 0;
    let mut mask: [libc::c_ulong; MASK_WORDS] = [0; MASK_WORDS];
    let none = std::ptr::null::<libc::c_void>();
    // SAFETY: the kernel writes one int and at most MASK_NODES bits to the places given, which are that large.
    let rc = unsafe {
        libc::syscall(libc::SYS_get_mempolicy, &raw mut mode, mask.as_mut_ptr(), MASK_NODES, none, 0usize)
    };
    if rc == 0 { Ok(BoundThread { mode, mask }) } else { Err(io::Error::last_os_error()) }
}

fn set_policy(mode: libc::c_int, mask: &[libc::c_ulong; MASK_WORDS]) -> io::Result<()> {
    // The kernel drops the last bit of the count that it is given, hence one more than there are; MPOL_DEFAULT wants
    // no mask at all.
    let (mask, bits) =
        if mask.iter().all(|&word| word == 0) { (std::ptr::null(), 0) } else { (mask.as_ptr(), MASK_NODES) };
    // SAFETY: the kernel reads at most `bits` bits from `mask`, which is that large or null with zero bits.
    let rc = unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask, bits) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_bound_while_the_guard_lives() {
        let policy =
            || current_policy().map(std::mem::ManuallyDrop::new).map(|policy| (policy.mode, policy.mask));
        let before = match policy() {
            Ok(before) => before,
            Err(error) => return eprintln!("not tested: memory policies are forbidden here ({error})"),
        };
        let bound = match BoundThread::bind(0) {
            Ok(bound) => bound,
            Err(error) => return eprintln!("not tested: memory policies are forbidden here ({error})"),
        };
        let (mode, mask) = policy().unwrap();
        assert_eq!((mode, mask[0], mask[1..].iter().sum::<u64>()), (libc::MPOL_BIND, 1, 0));
        drop(bound);
        assert_eq!(policy().unwrap(), before);
        assert_eq!(BoundThread::bind(u32::MAX).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
