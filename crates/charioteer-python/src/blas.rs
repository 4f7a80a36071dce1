//! LAPACK's routines with what a C pointer alone cannot say.
//!
//! `charioteer.blas` calls SciPy's pointers directly wherever flags can say that a matrix is stored
//! by rows. Two routines need code around the call, which is here, as C functions that take the
//! routine's own pointer; native tasks call them like any other.
//!
//! * The pivots of `getrf` are those of rows, so no flag makes of a matrix that is stored by rows
//!   the one that the routine expects. It is transposed before and after.
//! * `geqrf` needs a workspace whose size it says itself. Of a matrix that is stored by rows,
//!   `gelqf` gives the same factorization: of A = QR the transposed is LQ with L the transposed of
//!   R, and both leave the reflectors where they were. They are applied conjugated there, so that
//!   the scalars of complex ones are conjugated here.

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;

use pyo3::prelude::*;

type Getrf = unsafe extern "C" fn(
    *const c_int,
    *const c_int,
    *mut c_void,
    *const c_int,
    *mut c_int,
    *mut c_int,
);

type Geqrf = unsafe extern "C" fn(
    *const c_int,
    *const c_int,
    *mut c_void,
    *const c_int,
    *mut c_void,
    *mut c_void,
    *const c_int,
    *mut c_int,
);

/// A number as wide as the four types are; only moved.
trait Element: Copy {}
impl Element for u32 {}
impl Element for u64 {}
impl Element for u128 {}

/// Copies the `rows` x `columns` matrix at `from`, whose rows begin `from_row` elements apart, to the
/// place where its columns begin `to_column` elements apart.
///
/// # Safety
/// Both matrices are where they are said to be, and do not overlap; `to` may be uninitialized.
unsafe fn transpose<T: Element>(
    rows: usize,
    columns: usize,
    from: *const T,
    from_row: usize,
    to: *mut T,
    to_column: usize,
) {
    // So that what is read and what is written stay in the cache.
    const SIDE: usize = 32;
    for row in (0..rows).step_by(SIDE) {
        for column in (0..columns).step_by(SIDE) {
            for i in row..rows.min(row + SIDE) {
                for j in column..columns.min(column + SIDE) {
                    // SAFETY: within the matrices. Elements of arrays are aligned to their type,
                    // which may be less than a whole one is: of complex ones, to half of it.
                    unsafe {
                        let element = from.add(i * from_row + j).read_unaligned();
                        to.add(j * to_column + i).write_unaligned(element);
                    }
                }
            }
        }
    }
}

fn size(number: c_int) -> usize {
    usize::try_from(number).unwrap_or(0)
}

/// `getrf` of a matrix by rows, as a matrix by columns.
///
/// # Safety
/// As for the routine; `row` is how many elements its rows are apart.
unsafe fn getrf_by_rows<T: Element>(
    routine: Getrf,
    m: c_int,
    n: c_int,
    a: *mut T,
    row: c_int,
    pivots: *mut c_int,
    info: *mut c_int,
) {
    let (rows, columns) = (size(m), size(n));
    let mut copy: Vec<MaybeUninit<T>> = Vec::with_capacity(rows * columns);
    let copied = copy.as_mut_ptr().cast::<T>();
    // SAFETY: the copy has room for the matrix, column after column; the routine gets it with that
    // leading dimension and leaves it initialized.
    unsafe {
        transpose(rows, columns, a, size(row), copied, rows);
        routine(
            &raw const m,
            &raw const n,
            copied.cast(),
            &raw const m,
            pivots,
            info,
        );
        transpose(columns, rows, copied, rows, a, size(row));
    }
}

/// `getrf`, with pivots that count from zero.
///
/// # Safety
/// As for the routine. `element` is the size of an element; `by_rows` is not zero if the matrix is
/// stored by rows, and `leading` then how many elements they are apart.
unsafe extern "C" fn getrf(
    routine: *const c_void,
    element: c_int,
    by_rows: c_int,
    m: c_int,
    n: c_int,
    a: *mut c_void,
    leading: c_int,
    pivots: *mut c_int,
    info: *mut c_int,
) {
    // SAFETY: as promised.
    unsafe {
        let routine = std::mem::transmute::<*const c_void, Getrf>(routine);
        if by_rows == 0 {
            routine(
                &raw const m,
                &raw const n,
                a,
                &raw const leading,
                pivots,
                info,
            );
        } else {
            match element {
                4 => getrf_by_rows::<u32>(routine, m, n, a.cast(), leading, pivots, info),
                8 => getrf_by_rows::<u64>(routine, m, n, a.cast(), leading, pivots, info),
                _ => getrf_by_rows::<u128>(routine, m, n, a.cast(), leading, pivots, info),
            }
        }
        // An argument that it refuses leaves the pivots as they were.
        if *info >= 0 {
            for at in 0..size(m.min(n)) {
                *pivots.add(at) -= 1;
            }
        }
    }
}

/// `geqrf` with a workspace of its own; of a matrix by rows, with `gelqf` for the routine.
///
/// # Safety
/// As for the routine. `letter` says which type it is for, as in its name; `by_rows` as for [`getrf`].
unsafe extern "C" fn geqrf(
    routine: *const c_void,
    letter: u8,
    by_rows: c_int,
    m: c_int,
    n: c_int,
    a: *mut c_void,
    leading: c_int,
    tau: *mut c_void,
    info: *mut c_int,
) {
    let (m_seen, n_seen) = if by_rows == 0 { (m, n) } else { (n, m) };
    let call = |work: *mut c_void, length: c_int| {
        // SAFETY: as promised; the workspace has the length, or is asked for.
        unsafe {
            let routine = std::mem::transmute::<*const c_void, Geqrf>(routine);
            routine(
                &raw const m_seen,
                &raw const n_seen,
                a,
                &raw const leading,
                tau,
                work,
                &raw const length,
                info,
            );
        }
    };
    // The answer is a number of the routine's own type; of complex ones the real part.
    let mut answer = [0.0_f64; 2];
    call(answer.as_mut_ptr().cast(), -1);
    // SAFETY: asked just above.
    if unsafe { *info } != 0 {
        return;
    }
    let single = matches!(letter, b's' | b'c');
    let length = if single {
        let bytes = answer[0].to_ne_bytes();
        f64::from(f32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    } else {
        answer[0]
    };
    // A workspace fits in memory, so the number is small, and it is whole.
    #[allow(clippy::cast_possible_truncation)]
    let length = (length as c_int).max(1);
    let mut work: Vec<u128> = Vec::with_capacity(size(length));
    call(work.as_mut_ptr().cast(), length);
    if by_rows != 0 && matches!(letter, b'c' | b'z') {
        for at in 0..size(m.min(n)) {
            // SAFETY: `tau` has so many elements, each a real and an imaginary part.
            unsafe {
                if single {
                    *tau.cast::<f32>().add(2 * at + 1) *= -1.0;
                } else {
                    *tau.cast::<f64>().add(2 * at + 1) *= -1.0;
                }
            }
        }
    }
}

/// The addresses of `getrf` and `geqrf`.
#[pyfunction]
pub fn lapack_adapters() -> (usize, usize) {
    (getrf as *const () as usize, geqrf as *const () as usize)
}
