//! What one client has under way and registered: the part of a session that decides, without any I/O.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use hugepages::{AdoptError, Arena, PageSize};

use crate::check::{CommandError, RegionView};
use crate::gpu::{GpuMemory, GpuMemoryError};
use crate::gpu_ring::ring_words_bytes;
use crate::listener::Limits;
use crate::message::{Command, Completion};

/// Why a region was not registered. The text goes to the client.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RegionError {
    #[error("{limit} regions are registered, which is the limit: drop one, or use parts of a larger one")]
    TooMany { limit: usize },
    #[error(
        "a region of {bytes} bytes would exceed the {left} bytes that this client may still register: make it \
         smaller, or start the data plane with a larger limit"
    )]
    TooMuch { bytes: u64, left: u64 },
    #[error("registering a region takes one descriptor and this came with {fds}: pass the memory's memfd")]
    Descriptors { fds: usize },
    #[error("the region's memory cannot be used: {0}")]
    Adopt(#[from] AdoptError),
    #[error(transparent)]
    Gpu(#[from] GpuMemoryError),
    #[error(
        "a ring comes with one descriptor, of its host memory, and pages with none; this came with {fds}"
    )]
    GpuDescriptors { fds: usize },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Lookup,
    Fetch { region: u32 },
    Save { region: u32 },
    Unregister,
    Stats,
}

#[derive(Debug)]
pub(crate) struct Region {
    memory: Memory,
    /// Fetches under way into it, and saves out of it.
    fetches: u32,
}

#[derive(Debug)]
enum Memory {
    Host(Arc<Arena>),
    Gpu(Arc<GpuMemory>),
}

impl Region {
    /// Host memory that it takes.
    fn bytes(&self) -> u64 {
        self.arena().map_or(0, |arena| arena.bytes() as u64)
    }

    pub(crate) fn arena(&self) -> Option<&Arc<Arena>> {
        match &self.memory {
            Memory::Host(arena) => Some(arena),
            Memory::Gpu(_) => None,
        }
    }

    fn view(&self) -> RegionView<'_> {
        match &self.memory {
            Memory::Host(arena) => RegionView::Host(arena.bytes() as u64),
            Memory::Gpu(memory) => match &**memory {
                GpuMemory::Pages(kv) => RegionView::Pages(kv),
                GpuMemory::Ring(ring) => RegionView::Ring(ring),
            },
        }
    }
}

#[derive(Debug)]
pub(crate) struct Work {
    limits: Limits,
    pub(crate) commands: HashMap<u64, CommandKind>,
    pub(crate) regions: HashMap<u32, Region>,
    next_region: u32,
}

/// Opaque outside of this module: only the number of commands matters there.
#[derive(Debug)]
pub(crate) struct CommandKind(Kind);

impl Work {
    pub(crate) fn new(limits: Limits) -> Self {
        Self { limits, commands: HashMap::new(), regions: HashMap::new(), next_region: 1 }
    }

    /// Maps the memory and numbers the region.
    pub(crate) fn add_region(
        &mut self,
        bytes: u64,
        fds: Vec<OwnedFd>,
    ) -> Result<(u32, Arc<Arena>), RegionError> {
        let count = fds.len();
        let mut fds = fds.into_iter();
        let (Some(fd), None) = (fds.next(), fds.next()) else {
            return Err(RegionError::Descriptors { fds: count });
        };
        self.check_room()?;
        let used: u64 = self.regions.values().map(Region::bytes).sum();
        let left = self.limits.region_bytes.saturating_sub(used);
        let size = usize::try_from(bytes).ok().filter(|_| bytes <= left);
        let arena = Arena::from_fd(fd, size.ok_or(RegionError::TooMuch { bytes, left })?)?;
        let arena = Arc::new(arena);
        Ok((self.insert(Memory::Host(Arc::clone(&arena))), arena))
    }

    fn check_room(&self) -> Result<(), RegionError> {
        if self.regions.len() >= self.limits.regions || self.next_region == u32::MAX {
            return Err(RegionError::TooMany { limit: self.limits.regions });
        }
        Ok(())
    }

    fn insert(&mut self, memory: Memory) -> u32 {
        let id = self.next_region;
        self.next_region += 1;
        self.regions.insert(id, Region { memory, fetches: 0 });
        id
    }

    /// Judges GPU memory as described, and maps what comes with a ring.
    pub(crate) fn check_gpu(
        &self,
        memory: &GpuMemory,
        fds: Vec<OwnedFd>,
    ) -> Result<Option<Arc<Arena>>, RegionError> {
        self.check_room()?;
        memory.check()?;
        let count = fds.len();
        let mut fds = fds.into_iter();
        match (memory, fds.next(), fds.next()) {
            (GpuMemory::Pages(_), None, None) => Ok(None),
            (GpuMemory::Ring(ring), Some(fd), None) => {
                let bytes = ring_words_bytes(ring.entries).next_multiple_of(PageSize::Base.bytes());
                Ok(Some(Arc::new(Arena::from_fd(fd, bytes)?)))
            }
            _ => Err(RegionError::GpuDescriptors { fds: count }),
        }
    }

    /// Numbers GPU memory that has been opened.
    pub(crate) fn add_gpu(&mut self, memory: GpuMemory) -> Result<u32, RegionError> {
        self.check_room()?;
        Ok(self.insert(Memory::Gpu(Arc::new(memory))))
    }

    /// Takes a command into the books, or says why not. `false`: there is nothing to do, a cancel of what has
    /// ended.
    pub(crate) fn admit(&mut self, command: &Command) -> Result<bool, CommandError> {
        let id = command.id();
        if let Command::Cancel { .. } = command {
            return Ok(self.commands.contains_key(&id));
        }
        if self.commands.contains_key(&id) {
            return Err(CommandError::DuplicateId { id });
        }
        if self.commands.len() >= self.limits.commands {
            return Err(CommandError::TooManyCommands { limit: self.limits.commands });
        }
        command.check(|region| self.regions.get(&region).map(Region::view))?;
        let kind = match *command {
            Command::Fetch { region, .. } => {
                if let Some(region) = self.regions.get_mut(&region) {
                    region.fetches += 1;
                }
                Kind::Fetch { region }
            }
            Command::Save { region, .. } => {
                if let Some(region) = self.regions.get_mut(&region) {
                    region.fetches += 1;
                }
                Kind::Save { region }
            }
            Command::Unregister { region, .. } => {
                let fetches = self.regions.get(&region).map_or(0, |region| region.fetches);
                if fetches > 0 {
                    return Err(CommandError::RegionBusy { region, fetches });
                }
                self.regions.remove(&region);
                Kind::Unregister
            }
            Command::Lookup { .. } => Kind::Lookup,
            Command::Stats { .. } | Command::Cancel { .. } => Kind::Stats,
        };
        self.commands.insert(id, CommandKind(kind));
        Ok(true)
    }

    /// Whether the completion answers a command that is under way, and is an answer to that kind.
    pub(crate) fn is_answer(&self, completion: &Completion) -> bool {
        let Some(CommandKind(kind)) = self.commands.get(&completion.id()) else { return false };
        match completion {
            Completion::LookedUp { .. } | Completion::LookupFailed { .. } => *kind == Kind::Lookup,
            Completion::Progress { .. } | Completion::Ended { .. } => matches!(kind, Kind::Fetch { .. }),
            Completion::Saved { .. } => matches!(kind, Kind::Save { .. }),
            Completion::Unregistered { .. } => *kind == Kind::Unregister,
            Completion::Stats { .. } => *kind == Kind::Stats,
            Completion::Refused { .. } => true,
        }
    }

    /// Strikes a command from the books.
    pub(crate) fn finish(&mut self, id: u64) {
        if let Some(CommandKind(Kind::Fetch { region } | Kind::Save { region })) = self.commands.remove(&id)
            && let Some(region) = self.regions.get_mut(&region)
        {
            region.fetches = region.fetches.saturating_sub(1);
        }
    }
}
