//! What the machine has: nodes, hugepages, memory.

use std::fs;
use std::path::Path;

use crate::page::PageSize;

const NODES: &str = "/sys/devices/system/node";
const WHOLE_MACHINE: &str = "/sys/kernel/mm/hugepages";

/// The hugepages of one size on one NUMA node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeStatus {
    /// The node; 0 on a machine whose kernel has no NUMA.
    pub node: u32,
    /// Bytes in a page of this size.
    pub page_bytes: u64,
    /// Pages in the node's pool.
    pub total_pages: u64,
    /// Pages of the pool that hold nothing. Some of them may be reserved for mappings that have not touched them yet.
    pub free_pages: u64,
}

/// The hugepage pools of every NUMA node, ordered by node and then page size. Empty where the kernel has no hugepages.
#[must_use]
pub fn status() -> Vec<NodeStatus> {
    status_in(Path::new(NODES), Path::new(WHOLE_MACHINE))
}

fn status_in(nodes: &Path, whole_machine: &Path) -> Vec<NodeStatus> {
    let mut pools = Vec::new();
    for (node, path) in numbered(nodes, "node", "") {
        pools_in(node, &path.join("hugepages"), &mut pools);
    }
    if pools.is_empty() {
        pools_in(0, whole_machine, &mut pools);
    }
    pools.sort_by_key(|pool| (pool.node, pool.page_bytes));
    pools
}

fn pools_in(node: u64, folder: &Path, pools: &mut Vec<NodeStatus>) {
    let Ok(node) = u32::try_from(node) else { return };
    for (page_kib, path) in numbered(folder, "hugepages-", "kB") {
        let pages = |file: &str| fs::read_to_string(path.join(file)).ok()?.trim().parse().ok();
        if let (Some(total_pages), Some(free_pages)) = (pages("nr_hugepages"), pages("free_hugepages")) {
            pools.push(NodeStatus {
                node,
                page_bytes: page_kib.saturating_mul(1024),
                total_pages,
                free_pages,
            });
        }
    }
}

/// The entries of `folder` named `prefix`, a number, `suffix`.
fn numbered(folder: &Path, prefix: &str, suffix: &str) -> Vec<(u64, std::path::PathBuf)> {
    let number = |name: &str| name.strip_prefix(prefix)?.strip_suffix(suffix)?.parse().ok();
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some((number(entry.file_name().to_str()?)?, entry.path()))).collect()
}

/// Whether the machine has the node, with memory. Node 0 exists where the kernel has no NUMA.
pub(crate) fn has_node(node: u32) -> bool {
    match fs::read_to_string(Path::new(NODES).join("has_memory")) {
        Ok(list) => in_list(&list, node),
        Err(_) => node == 0,
    }
}

/// Whether `number` is in a kernel list such as `0-3,8`.
fn in_list(list: &str, number: u32) -> bool {
    list.trim().split(',').any(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        matches!((first.parse::<u32>(), last.parse::<u32>()), (Ok(first), Ok(last)) if (first..=last).contains(&number))
    })
}

/// Says how far the machine is from having `pages` of `page`.
pub(crate) fn shortage(page: PageSize, pages: usize, node: Option<u32>) -> String {
    if page == PageSize::Base {
        return "out of memory".to_owned();
    }
    let (mut total, mut free) = (0, 0);
    for pool in status() {
        if u64::try_from(page.bytes()) == Ok(pool.page_bytes) && node.is_none_or(|node| node == pool.node) {
            total += pool.total_pages;
            free += pool.free_pages;
        }
    }
    let place = node.map_or(String::new(), |node| format!(" on NUMA node {node}"));
    format!("{pages} needed, {free} of {total}{place} free (hugepages/setup.sh reserves more)")
}

/// Refuses a size of ordinary memory that the machine cannot have at the moment.
pub(crate) fn check_available(bytes: usize) -> Result<(), String> {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    match available_bytes(&meminfo) {
        Some(available) if u64::try_from(bytes).is_ok_and(|bytes| bytes > available) => {
            Err(format!("{} MiB needed, {} MiB available", bytes.div_ceil(1 << 20), available >> 20))
        }
        _ => Ok(()),
    }
}

fn available_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_lists() {
        for (list, number, expected) in [
            ("0\n", 0, true),
            ("0-3,8\n", 2, true),
            ("0-3,8\n", 8, true),
            ("0-3,8", 5, false),
            ("\n", 0, false),
        ] {
            assert_eq!(in_list(list, number), expected, "{list:?} {number}");
        }
    }

    #[test]
    fn available_memory() {
        assert_eq!(available_bytes("MemFree: 1 kB\nMemAvailable:   12 kB\n"), Some(12 * 1024));
        assert_eq!(available_bytes("MemFree: 1 kB\n"), None);
        assert_eq!(available_bytes("MemAvailable: 99999999999999999999 kB\n"), None);
    }

    #[test]
    fn pools_come_by_node_or_else_from_the_whole_machine() {
        let root = std::env::temp_dir().join(format!("hugepages-status-{}", std::process::id()));
        let pool = |path: &str, total: &str, free: &str| {
            let folder = root.join(path);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("nr_hugepages"), total).unwrap();
            fs::write(folder.join("free_hugepages"), free).unwrap();
        };
        pool("nodes/node1/hugepages/hugepages-2048kB", "8\n", "7\n");
        pool("nodes/node0/hugepages/hugepages-1048576kB", "1\n", "x\n");
        pool("nodes/node0/hugepages/hugepages-2048kB", "4\n", "4\n");
        pool("whole/hugepages-2048kB", "12\n", "11\n");
        let row =
            |node, total_pages, free_pages| NodeStatus { node, page_bytes: 2 << 20, total_pages, free_pages };
        assert_eq!(status_in(&root.join("nodes"), &root.join("whole")), [row(0, 4, 4), row(1, 8, 7)]);
        assert_eq!(status_in(&root.join("none"), &root.join("whole")), [row(0, 12, 11)]);
        assert_eq!(status_in(&root.join("none"), &root.join("none")), []);
        fs::remove_dir_all(&root).unwrap();
    }
}
