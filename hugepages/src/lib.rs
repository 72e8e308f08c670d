//! Hugepage memory that processes share, and memory that one process keeps to itself.
//!
//! - [`Arena`]: one mapping of a memfd, on hugetlb pages when the machine has them and on ordinary pages when it has
//!   not; it says which it got. Its descriptor can be passed over a Unix socket, and the other end maps it with
//!   [`Arena::from_fd`]. Reading and writing it stays sound, and cannot crash this process, whatever the other end does.
//! - [`Slots`]: an arena cut into fixed pieces of which each belongs to one owner in this process.
//! - [`Heap`]: an arena from which blocks of any size are taken, and to which they return.
//! - [`DeviceWritable`]: memory that is lent to a NIC, of a GPU for example.
//! - [`status`]: what each NUMA node has of each hugepage size.
//!
//! Pages are reserved by the operator: see `hugepages/setup.sh` and `docs/HUGEPAGES.md`.

mod access;
mod arena;
mod foreign;
mod heap;
mod lent;
mod numa;
mod page;
mod slots;
mod status;
mod stream;

pub use access::OutOfBounds;
pub use arena::{Arena, ArenaConfig, ArenaError};
pub use foreign::{AdoptError, SealError};
pub use heap::{BLOCK_ALIGN_BYTES, Block, Heap};
pub use lent::DeviceWritable;
pub use page::{PageChoice, PageSize, ParsePageChoiceError};
pub use slots::{SLOT_ALIGN_BYTES, Slot, Slots, SlotsError};
pub use status::{NodeStatus, status};
