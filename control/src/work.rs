//! What one client has under way and registered: the part of a session that decides, without any I/O.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use hugepages::{AdoptError, Arena};

use crate::check::CommandError;
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
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Lookup,
    Fetch { region: u32 },
    Unregister,
    Stats,
}

#[derive(Debug)]
pub(crate) struct Region {
    pub(crate) arena: Arc<Arena>,
    /// Fetches under way into it.
    fetches: u32,
}

impl Region {
    fn bytes(&self) -> u64 {
        self.arena.bytes() as u64
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
        if self.regions.len() >= self.limits.regions || self.next_region == u32::MAX {
            return Err(RegionError::TooMany { limit: self.limits.regions });
        }
        let used: u64 = self.regions.values().map(Region::bytes).sum();
        let left = self.limits.region_bytes.saturating_sub(used);
        let size = usize::try_from(bytes).ok().filter(|_| bytes <= left);
        let arena = Arena::from_fd(fd, size.ok_or(RegionError::TooMuch { bytes, left })?)?;
        let (id, arena) = (self.next_region, Arc::new(arena));
        self.next_region += 1;
        self.regions.insert(id, Region { arena: Arc::clone(&arena), fetches: 0 });
        Ok((id, arena))
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
        command.check(|region| self.regions.get(&region).map(Region::bytes))?;
        let kind = match *command {
            Command::Fetch { region, .. } => {
                if let Some(region) = self.regions.get_mut(&region) {
                    region.fetches += 1;
                }
                Kind::Fetch { region }
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
            Completion::Unregistered { .. } => *kind == Kind::Unregister,
            Completion::Stats { .. } => *kind == Kind::Stats,
            Completion::Refused { .. } => true,
        }
    }

    /// Strikes a command from the books.
    pub(crate) fn finish(&mut self, id: u64) {
        if let Some(CommandKind(Kind::Fetch { region })) = self.commands.remove(&id)
            && let Some(region) = self.regions.get_mut(&region)
        {
            region.fetches = region.fetches.saturating_sub(1);
        }
    }
}
