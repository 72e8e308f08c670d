//! Which DPDK this is and what it was linked with.

use std::ffi::CStr;

/// The release of DPDK that is linked: "DPDK 22.11.11".
#[must_use]
pub fn version() -> String {
    // SAFETY: returns a constant string.
    unsafe { CStr::from_ptr(dpdk_sys::rte_version()) }.to_string_lossy().into_owned()
}

/// Names of the linked network and compression drivers, as `net_mlx5` or `compress_zlib`, sorted.
///
/// Works before an EAL is started: drivers register their log types when the program is loaded, and those are what is listed. With the
/// feature `shared`, drivers are loaded when the EAL starts and are listed from then on.
#[must_use]
pub fn drivers() -> Vec<String> {
    let mut text = vec![0_u8; 64 * 1024];
    // SAFETY: writes at most `text.len()` bytes to `text`.
    let length = unsafe { dpdk_sys::shim_log_types(text.as_mut_ptr().cast(), text.len()) };
    text.truncate(length);
    driver_names(&String::from_utf8_lossy(&text))
}

/// Whether the `compress_isal` driver will work: ISA-L's shared library is looked up when it is first needed.
#[must_use]
pub fn isal_available() -> bool {
    // SAFETY: loads a library from the system's own folders; no arguments.
    unsafe { dpdk_sys::shim_isal_available() == 1 }
}

/// Finds lines such as `id 31: pmd.net.i40e.init, level is notice`.
fn driver_names(log_types: &str) -> Vec<String> {
    let name_of = |line: &str| {
        let log_type = line.split_whitespace().find(|word| word.starts_with("pmd."))?;
        let mut parts = log_type.trim_end_matches(',').split('.').skip(1);
        let (class, name) = (parts.next()?, parts.next()?);
        matches!(class, "net" | "compress").then(|| format!("{class}_{name}"))
    };
    let mut names: Vec<String> = log_types.lines().filter_map(name_of).collect();
    names.sort();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn driver_names_are_read_from_log_types() {
        let text = "global log level is notice\nid 0: lib.eal, level is info\nid 31: pmd.net.i40e.init, level is notice\n\
                    id 32: pmd.net.i40e.driver, level is notice\nid 33: pmd.compress.zlib, level is notice\nid 34: pmd.common.mlx5, x";
        assert_eq!(driver_names(text), ["compress_zlib", "net_i40e"]);
    }
}
