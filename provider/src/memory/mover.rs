//! Registration and deregistration as the rest of the provider sees them.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use thiserror::Error;

use super::fork;
use super::holding::{self, Holding};
use super::region::Region;
use super::world::{self, World};

/// Why memory could not be registered.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// The range wraps around or leaves the address space.
    #[error("memory region {address:#x} + {len:#x} bytes leaves the address space; check the length")]
    OutOfBounds {
        /// Start of the range.
        address: usize,
        /// Its length.
        len: usize,
    },
    /// Nothing is mapped at some address of the range.
    #[error("nothing is mapped at {address:#x}; register only memory that is allocated")]
    Unmapped {
        /// The first such address.
        address: usize,
    },
    /// Some address of the range may not be accessed as the registration asks.
    #[error("memory at {address:#x} may not be {}; ask for fewer access flags or change its protection",
            if *.writable { "written" } else { "read" })]
    Protected {
        /// The first such address.
        address: usize,
        /// Whether writing was asked for.
        writable: bool,
    },
    /// The process was forked after this mover was made.
    #[error("this device was opened before fork; open it again in the child")]
    Forked,
    /// The kernel does not tell what is mapped.
    #[error("cannot read /proc/self/maps ({0}); mount /proc in this container")]
    Maps(Errno),
}

impl RegisterError {
    /// The errno that `ibv_reg_mr` reports for it.
    pub fn errno(&self) -> i32 {
        match self {
            RegisterError::OutOfBounds { .. } => libc::EINVAL,
            RegisterError::Unmapped { .. } | RegisterError::Protected { .. } => libc::EFAULT,
            RegisterError::Forked => libc::EIO,
            RegisterError::Maps(error) => error.raw_os_error(),
        }
    }
}

/// A registered range. Give it back with [`Mover::deregister`]; dropped, it leaves its pages moved until the mover
/// goes.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "pages stay moved until the registration is given back"]
pub struct Registration {
    /// All pages that the range touches.
    pub(super) pages: Range<usize>,
    pub(super) shared: Range<usize>,
}

impl Registration {
    /// The pages, possibly none, that lie in the region file now, at file offset equal to address. The first and the
    /// last may be owned in part, when another registration moved them.
    pub fn shared(&self) -> Range<usize> {
        self.shared.clone()
    }
}

/// Moves the registered memory of one client into its region file and back.
///
/// Dropping it makes everything private again.
#[derive(Debug)]
pub struct Mover {
    id: u64,
    generation: u64,
}

impl Mover {
    /// A mover for `region`, the client's memfd of sealed size `1 << 47` that the router made.
    pub fn new(region: OwnedFd) -> io::Result<Mover> {
        let region = Region::new(region)?;
        fork::install()?;
        let generation = fork::generation();
        let mut world = world::lock();
        let id = world.next_id;
        world.next_id += 1;
        let holding = Holding::new(region, generation);
        world.holdings.insert(id, holding);
        Ok(Mover { id, generation })
    }

    /// Whether this process is a fork of the one that made the mover. Nothing is moved then, and whatever else
    /// belongs to that device, such as its connection, is the parent's alone.
    pub fn is_child(&self) -> bool {
        self.generation != fork::generation()
    }

    /// Moves the largest run of pages of the range that can be moved. Memory that cannot is no error: the
    /// registration's shared part is then smaller, or empty. `writable` asks for memory that may be written.
    pub fn register(
        &self,
        address: usize,
        len: usize,
        writable: bool,
    ) -> Result<Registration, RegisterError> {
        if self.is_child() {
            return Err(RegisterError::Forked);
        }
        let end = address.checked_add(len).filter(|&end| end <= isize::MAX as usize);
        let end = end.ok_or(RegisterError::OutOfBounds { address, len })?;
        let mut world = world::lock();
        let World { holdings, books, .. } = &mut *world;
        let holding = holdings.get_mut(&self.id).ok_or(RegisterError::Forked)?;
        holding.register(&(address..end), writable, books)
    }

    /// Registers a range as it is: its pages neither move nor go back before this registration is given back. Nothing
    /// need be mapped there yet.
    pub fn keep(&self, address: usize, len: usize) -> Registration {
        let pages = holding::touched_pages(&(address..address.saturating_add(len)));
        let registration = Registration { pages, shared: 0..0 };
        if !self.is_child() {
            world::lock().books.staying.hold(&registration.pages);
        }
        registration
    }

    /// Gives a registration back. Pages that no other registration holds become private again. Nobody else may
    /// work on the memory any more.
    pub fn deregister(&self, registration: Registration) {
        if self.is_child() {
            return;
        }
        let mut world = world::lock();
        let World { holdings, books, .. } = &mut *world;
        if let Some(holding) = holdings.get_mut(&self.id) {
            holding.release(&registration, books);
        }
        // Pages of any mover may have waited for this one, or for threads that could not be stopped.
        holdings.values_mut().for_each(|holding| holding.send_home(books));
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        let mut world = world::lock();
        let World { holdings, books, .. } = &mut *world;
        let Some(mut holding) = holdings.remove(&self.id) else { return };
        if !self.is_child() {
            holding.release_all(books);
        }
    }
}
