//! Memory that is asked for before it is used, so that what is far away comes while something else is done,
//! or all at once.
//!
//! A walk over pointers waits at each of them for what it points to. Who knows several places that it will
//! look at asks for all of them first, and waits as long as for one.

/// Asks for the cache line at an address. Nothing is read, so it may be one where nothing is any more.
#[inline]
pub(crate) fn fetch<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has the instruction; it accesses no memory and cannot fail.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
