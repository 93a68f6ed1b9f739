//! Threads that are cancelled while they wait, as pthread_cancel(3) does it: they unwind from where they are.

use std::{
    ffi::{c_int, c_void},
    mem::MaybeUninit,
    ptr, thread,
    time::Duration,
};

use anyhow::{Result, ensure};

/// A call that waits: a function and what it gets.
#[derive(Debug)]
pub(crate) struct Wait {
    /// A function of C; a third argument is not looked at by one that has two.
    pub(crate) function: unsafe extern "C-unwind" fn(*mut c_void, *mut c_void, *mut c_void) -> c_int,
    /// What the event comes from.
    pub(crate) channel: *mut c_void,
}

type Start = extern "C-unwind" fn(*mut c_void) -> *mut c_void;

unsafe extern "C" {
    fn pthread_create(
        thread: *mut libc::pthread_t,
        attr: *const libc::pthread_attr_t,
        start: Start,
        argument: *mut c_void,
    ) -> c_int;
    fn pthread_timedjoin_np(
        thread: libc::pthread_t,
        result: *mut *mut c_void,
        until: *const libc::timespec,
    ) -> c_int;
}

/// Long enough for a thread to be asleep.
const ASLEEP: Duration = Duration::from_millis(100);
const SECONDS: i64 = 10;

/// Has a thread wait, cancels it, and sees that it ended by that.
pub(crate) fn while_it_waits(wait: &Wait) -> Result<()> {
    let mut made = MaybeUninit::<libc::pthread_t>::uninit();
    let argument = ptr::from_ref(wait).cast_mut().cast();
    // SAFETY: a live place, and an argument that outlives the thread, which is waited for below.
    let code = unsafe { pthread_create(made.as_mut_ptr(), ptr::null(), start, argument) };
    ensure!(code == 0, "pthread_create: {code}");
    // SAFETY: it was stored.
    let made = unsafe { made.assume_init() };
    thread::sleep(ASLEEP);
    // SAFETY: the thread was made above and not joined.
    let code = unsafe { libc::pthread_cancel(made) };
    ensure!(code == 0, "pthread_cancel: {code}");
    // SAFETY: the clock has a place to be stored.
    let now = unsafe { libc::time(ptr::null_mut()) };
    let until = libc::timespec { tv_sec: now + SECONDS, tv_nsec: 0 };
    let mut result = ptr::null_mut();
    // SAFETY: as above; live places.
    let code = unsafe { pthread_timedjoin_np(made, &raw mut result, &raw const until) };
    ensure!(code == 0, "it waits on: {code}");
    // PTHREAD_CANCELED
    ensure!(result.addr() == usize::MAX, "it was not cancelled, but came back");
    Ok(())
}

#[allow(
    ffi_unwind_calls,
    reason = "a cancelled thread unwinds from there, through this frame, which drops nothing"
)]
extern "C-unwind" fn start(argument: *mut c_void) -> *mut c_void {
    let wait = argument.cast::<Wait>();
    let mut places = [ptr::null_mut::<c_void>(); 2];
    let [first, second] = &mut places;
    // SAFETY: the argument outlives this thread; the places are for what the function stores.
    unsafe {
        ((*wait).function)((*wait).channel, ptr::from_mut(first).cast(), ptr::from_mut(second).cast());
    }
    ptr::null_mut()
}
