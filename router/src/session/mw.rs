//! Memory windows: `ibv_alloc_mw` and `ibv_dealloc_mw`. They are bound by work requests (engine).

use engine::{CHOSEN_BITS, MemoryWindow};
use rustix::io::Errno;
use verbs_abi::proto::{Answer, Reply};

use super::client::{Client, errno};
use crate::account::Resource;

impl Client {
    pub(super) fn alloc_mw(&mut self, pd: u32, is_type_2: bool) -> Reply {
        if !self.pds.contains_key(&pd) {
            return Err(Errno::INVAL.raw_os_error());
        }
        // A window has a key like a region, so it counts as one.
        if !self.account.take(Resource::Mrs, 1) {
            return Err(Errno::NOMEM.raw_os_error());
        }
        let key = self.keys.take(self.limits.max_mr).map_err(|error| errno(&error));
        let key = key.inspect_err(|_| self.account.give(Resource::Mrs, 1))?;
        let window = MemoryWindow { key, pd, is_type_2, bound: None };
        self.lane.with(|fabric| {
            if let Some(memory) = fabric.memory_mut(self.id) {
                memory.add_window(window);
            }
        });
        self.use_pd(pd, true);
        self.mws.insert(key | CHOSEN_BITS, pd);
        Ok(Answer::Mr { key })
    }

    /// The key dies at once. Nobody can be in the middle of using it: only the lane looks into windows.
    pub(super) fn dealloc_mw(&mut self, key: u32) -> Reply {
        let pd = self.mws.remove(&(key | CHOSEN_BITS)).ok_or(Errno::INVAL.raw_os_error())?;
        self.lane.with(|fabric| {
            if let Some(memory) = fabric.memory_mut(self.id) {
                memory.remove_window(key);
            }
        });
        self.use_pd(pd, false);
        self.keys.put(key);
        self.account.give(Resource::Mrs, 1);
        Ok(Answer::Done)
    }
}
