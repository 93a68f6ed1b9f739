//! The edge between C and Rust: no panic crosses it, and an [`Errno`] leaves by it as C expects.
//!
//! A thread that is cancelled (pthread_cancel(3)) unwinds, and what catches that without throwing it on ends the program.
//! So cancellation is put off here; where a thread waits for others it can be cancelled outside ([`crate::hooks`]).

use std::ffi::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

pub(crate) use rustix::io::Errno;

/// The errno of a caught panic. The default panic hook has already said on stderr what happened.
const PANICKED: Errno = Errno::NOTRECOVERABLE;

/// Sets the calling thread's errno.
pub(crate) fn set_errno(errno: Errno) {
    // SAFETY: `__errno_location` always returns the valid address of this thread's errno.
    unsafe { *libc::__errno_location() = errno.raw_os_error() }
}

unsafe extern "C" {
    fn pthread_setcancelstate(state: c_int, before: *mut c_int) -> c_int;
}

/// `PTHREAD_CANCEL_DISABLE` of glibc's pthread.h.
const CANCEL_DISABLE: c_int = 1;

/// Runs `body`, which does not unwind, with the thread's cancellation put off.
fn uncancelled<R>(body: impl FnOnce() -> R) -> R {
    let (mut before, mut ours) = (0, 0);
    // SAFETY: it changes the calling thread's own state and stores what that was.
    unsafe { pthread_setcancelstate(CANCEL_DISABLE, &raw mut before) };
    let result = body();
    // SAFETY: as above.
    unsafe { pthread_setcancelstate(before, &raw mut ours) };
    result
}

/// Runs `body` and leaves errno as it was, for work that C must not notice.
pub(crate) fn keeping_errno<R>(body: impl FnOnce() -> R) -> R {
    // SAFETY: `__errno_location` always returns the valid address of this thread's errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above; it stays valid while the thread lives.
    let before = unsafe { *errno };
    let result = body();
    // SAFETY: as above.
    unsafe { *errno = before }
    result
}

/// For verbs that return 0 or an errno value.
pub(crate) fn status(body: impl FnOnce() -> Result<(), Errno>) -> c_int {
    uncancelled(|| quick_status(body))
}

/// The same for posting, which makes no call at which a thread is cancelled.
#[inline]
pub(crate) fn quick_status(body: impl FnOnce() -> Result<(), Errno>) -> c_int {
    match caught(body) {
        Ok(()) => 0,
        Err(errno) => errno.raw_os_error(),
    }
}

/// For verbs that return an object, or null with errno set.
pub(crate) fn pointer<T>(body: impl FnOnce() -> Result<*mut T, Errno>) -> *mut T {
    uncancelled(|| caught(body)).unwrap_or_else(|errno| {
        set_errno(errno);
        ptr::null_mut()
    })
}

/// For functions shaped like system calls: a value, or -1 with errno set.
pub(crate) fn syscall<T: From<i8>>(body: impl FnOnce() -> Result<T, Errno>) -> T {
    uncancelled(|| caught(body)).unwrap_or_else(|errno| {
        set_errno(errno);
        T::from(-1)
    })
}

/// For functions that cannot fail: `fallback` is the answer after a panic.
pub(crate) fn value<T>(fallback: T, body: impl FnOnce() -> T) -> T {
    caught(|| Ok(body())).unwrap_or(fallback)
}

fn caught<T>(body: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    // What a panic leaves half done is the object that C named; it is no less safe for it, as nothing here is
    // `unsafe` because of a broken invariant that only unwinding could expose.
    catch_unwind(AssertUnwindSafe(body)).unwrap_or(Err(PANICKED))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errno() -> i32 {
        std::io::Error::last_os_error().raw_os_error().unwrap()
    }

    #[test]
    fn an_error_leaves_as_each_kind_of_function_shows_it() {
        assert_eq!(status(|| Err(Errno::INVAL)), libc::EINVAL);
        set_errno(Errno::PERM);
        assert!(pointer::<u8>(|| Err(Errno::NOMEM)).is_null());
        assert_eq!(errno(), libc::ENOMEM);
        assert_eq!(syscall::<isize>(|| Err(Errno::AGAIN)), -1);
        assert_eq!(errno(), libc::EAGAIN);
    }

    #[test]
    fn a_panic_stops_at_the_edge() {
        assert_eq!(status(|| panic!("on purpose")), libc::ENOTRECOVERABLE);
        assert_eq!(value(7, || panic!("on purpose")), 7);
    }

    #[test]
    fn unnoticed_work_keeps_errno() {
        set_errno(Errno::NOENT);
        keeping_errno(|| set_errno(Errno::BADF));
        assert_eq!(errno(), libc::ENOENT);
    }
}
