//! Where the running thread's stack lies: the one piece of memory that must not be moved by its own frames.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::overlap;

/// The part of `mapping` that must stay because the running thread's frames may lie in it.
///
/// The whole mapping counts when it holds the stack pointer and the thread library does not know that stack, as
/// with coroutines.
pub(super) fn live_part(mapping: &Range<usize>) -> Range<usize> {
    let marker = 0u8;
    let pointer = &raw const marker as usize;
    if !mapping.contains(&pointer) {
        return mapping.start..mapping.start;
    }
    // Buffers may have been joined with a thread's stack into one mapping: keep those movable.
    match thread_stack() {
        Some(stack) if stack.contains(&pointer) => overlap(mapping, &stack),
        _ => mapping.clone(),
    }
}

/// The running thread's stack, as the thread library knows it.
fn thread_stack() -> Option<Range<usize>> {
    let mut attributes = MaybeUninit::<libc::pthread_attr_t>::uninit();
    // SAFETY: the attributes object is ours to be initialised; pthread_self is always valid.
    if unsafe { libc::pthread_getattr_np(libc::pthread_self(), attributes.as_mut_ptr()) } != 0 {
        return None;
    }
    let mut start = std::ptr::null_mut();
    let mut len = 0;
    // SAFETY: pthread_getattr_np succeeded, so the attributes are initialised; they are destroyed once.
    let found = unsafe {
        let found = libc::pthread_attr_getstack(attributes.as_ptr(), &mut start, &mut len) == 0;
        libc::pthread_attr_destroy(attributes.as_mut_ptr());
        found
    };
    found.then(|| start as usize..(start as usize).saturating_add(len))
}
