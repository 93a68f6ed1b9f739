//! The device's clock: the kernel's raw monotonic one, which no adjustment bends, in nanoseconds.

use std::ffi::c_int;

use rustix::time::{ClockId, clock_gettime};
use verbs_abi::ffi::{IBV_VALUES_MASK_RAW_CLOCK, ibv_context, ibv_values_ex};

use crate::abi::edge::{self, Errno};

/// `hca_core_clock`, kHz: a tick is a nanosecond.
pub(crate) const FREQUENCY: u64 = 1_000_000;

/// Clocks that completions are to be stamped by.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Clocks {
    /// The device's own.
    pub(crate) raw: bool,
    /// The time of day.
    pub(crate) wall: bool,
}

/// Their times, in nanoseconds.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Times {
    pub(crate) raw: u64,
    pub(crate) wall: u64,
}

impl Clocks {
    /// What the clocks say that were asked for, and nothing of the others.
    #[inline]
    pub(crate) fn now(self) -> Times {
        let read = |wanted: bool, clock| if wanted { nanoseconds(clock) } else { 0 };
        Times { raw: read(self.raw, ClockId::MonotonicRaw), wall: read(self.wall, ClockId::Realtime) }
    }
}

fn nanoseconds(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

pub(crate) unsafe extern "C" fn query(_context: *mut ibv_context, values: *mut ibv_values_ex) -> c_int {
    edge::status(|| {
        // SAFETY: the application passes a structure that is its own.
        let values = unsafe { &mut *values };
        if values.comp_mask & !IBV_VALUES_MASK_RAW_CLOCK != 0 {
            return Err(Errno::INVAL);
        }
        if values.comp_mask != 0 {
            // In ticks, as on other devices: the seconds stay zero.
            values.raw_clock.tv_sec = 0;
            values.raw_clock.tv_nsec = nanoseconds(ClockId::MonotonicRaw) as i64;
        }
        Ok(())
    })
}
