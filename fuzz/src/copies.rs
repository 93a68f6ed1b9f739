//! Copies beside the fabric, each performed at once and brought back some time later.

use std::collections::VecDeque;

use engine::{Copy, Fabric};

use crate::memory::Guarded;

/// Copies that were performed and have not come back.
#[derive(Debug, Default)]
pub(crate) struct Copies(VecDeque<Copy>);

impl Copies {
    /// Takes what the last turn has set aside. False: nothing.
    #[expect(unsafe_code, reason = "a copy says what it needs")]
    pub(crate) fn take(&mut self, fabric: &mut Fabric<Guarded>) -> bool {
        let Some(copy) = fabric.next_copy() else { return false };
        // SAFETY: nothing has happened to the fabric since it was told.
        unsafe { copy.perform() };
        self.0.push_back(copy);
        true
    }

    /// Brings one back, of those that wait. False: none does.
    pub(crate) fn end(&mut self, which: usize, fabric: &mut Fabric<Guarded>) -> bool {
        let found = which.checked_rem(self.0.len()).and_then(|at| self.0.remove(at));
        found.map(|copy| fabric.end_copy(copy)).is_some()
    }

    /// Brings all back.
    pub(crate) fn end_all(&mut self, fabric: &mut Fabric<Guarded>) -> bool {
        let any = !self.0.is_empty();
        self.0.drain(..).for_each(|copy| fabric.end_copy(copy));
        any
    }
}
