//! The daemon on the caller's thread: for a driver that wants neither threads nor waiting, such as a fuzz target.

use rustix::{
    event::{Timespec, epoll},
    io::Errno,
};

use super::{DIRECTORY, DOORS, Daemon, FAULTS, FIRST_SESSION};
use crate::error::DaemonError;

impl Daemon {
    /// Does what there is to do now: takes connections, answers requests, gives the data path a look. Says how many
    /// connections there are.
    ///
    /// # Errors
    /// [`DaemonError::Wait`].
    pub fn step(&mut self) -> Result<usize, DaemonError> {
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 64];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let count = match epoll::wait(&self.epoll, &mut events, Some(&at_once)) {
            Ok(count) => count,
            Err(Errno::INTR) => 0,
            Err(error) => return Err(DaemonError::Wait(error.into())),
        };
        for event in &events[..count] {
            match event.data.u64() {
                FAULTS => self.drop_spoilt(),
                DIRECTORY => self.hear_directory(),
                door @ DOORS.. => self.accept((door - DOORS) as usize),
                token if token >= u64::from(FIRST_SESSION) * 2 => self.attend(token, event.flags),
                _ => {}
            }
        }
        self.resume();
        self.recover();
        self.tick_manager();
        self.terms.lane.turn();
        Ok(self.sessions.len())
    }
}
