//! Host memory that the GPUs' copy engines read directly.

use std::sync::Arc;

use hugepages::Arena;

use crate::driver::{Driver, DriverError};

/// Registered with the driver for as long as this lives.
struct Registration {
    driver: Arc<dyn Driver>,
    address: usize,
}

impl Drop for Registration {
    fn drop(&mut self) {
        // A driver that refuses has lost its device, and the registration with it.
        let _ = self.driver.unregister_host(self.address);
    }
}

/// Registers all of `arena`. The registration belongs to the arena, which ends it just before it unmaps its memory,
/// however the arena is cut or shared from here on.
///
/// # Errors
/// When the driver refuses; the arena is gone then.
pub fn pin(driver: &Arc<dyn Driver>, mut arena: Arena) -> Result<Arena, DriverError> {
    let (address, bytes) = (arena.addr(), arena.bytes());
    // SAFETY: the arena's mapping, which lasts as long as the arena, and the arena ends the registration before it.
    unsafe { driver.register_host(address, bytes) }?;
    arena.guard(Registration { driver: Arc::clone(driver), address });
    Ok(arena)
}
