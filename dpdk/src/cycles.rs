//! The CPU's own clock.

/// What the CPU has counted since some time: the time stamp counter (x86), the generic timer (Arm).
#[inline]
#[must_use]
pub fn cycles() -> u64 {
    // SAFETY: reads a register.
    unsafe { dpdk_sys::shim_tsc() }
}

/// How often [`cycles`] grows a second; `None` before the EAL has started, and where the count depends on a CPU's state or may differ
/// between CPUs, so that it is no clock.
#[must_use]
pub fn cycles_hz() -> Option<u64> {
    // SAFETY: reads a variable that the EAL sets once.
    let hz = unsafe { dpdk_sys::rte_get_tsc_hz() };
    (hz > 0 && is_constant()).then_some(hz)
}

/// On x86 the kernel says whether the counter runs at one speed and never stops; Arm's does by definition.
fn is_constant() -> bool {
    if !cfg!(target_arch = "x86_64") {
        return true;
    }
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = info.lines().find(|line| line.starts_with("flags")).unwrap_or("");
    ["constant_tsc", "nonstop_tsc"].iter().all(|flag| flags.split_whitespace().any(|word| word == *flag))
}
