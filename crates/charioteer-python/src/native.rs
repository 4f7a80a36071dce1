//! Native tasks: C functions as bodies.
//!
//! # Protocol
//!
//! A [`Function`] is a C pointer and what it takes and gives. Its calling convention is prepared
//! once, when it is made. Arguments are converted where the task is spawned, attached, into
//! [`Packed`]: one word of memory for each parameter (two for a complex double), which holds the
//! value, or the address of an array's data. What the addresses point into is kept alive with it.
//! The body is then plain data, and [`Function::invoke`] calls the pointer without the interpreter,
//! on a copy of the words, since a C function may write to what it gets by reference and the next
//! attempt is to see the same arguments.
//!
//! | the thread that runs the body | does |
//! |---|---|
//! | is not attached | calls straight away; no Python API is touched, then or later |
//! | is attached | detaches around the call, at [`Site::Native`] |
//!
//! A body whose arguments hold handles learns its arguments when it runs. It replaces the handles
//! and converts the arguments attached, and detaches for the call; so does a body over several
//! cores, for which the limits of threaded libraries are to be raised. [`Call::needs_session`] tells
//! these from the others.
//!
//! [`Callee`] is what such a body calls: one function, or a routine of [`crate::blas`], which chooses
//! among four by its arguments and fills the words in itself.
//!
//! Results are [`Plain`] and failures [`Failure`]: objects are made of them where somebody receives
//! them. What the body kept alive is dropped by whoever ends the task; [`PyRef`] sees to that.

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use charioteer::engine::Running;
use charioteer::sync::assert_unlocked;
use charioteer::task::{Step, Trouble};
use libffi::middle::{Cif, Type};
use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBool, PyBytes, PyComplex, PyDict, PyString, PyTuple, PyType};
use smallvec::SmallVec;

use crate::access::{Mode, Signature};
use crate::blas::Routine;
use crate::callable::intern;
use crate::gateway::{self, PyRef, Site};
use crate::interp::{Arguments, Interp, Raised, Value, report, substitute, trouble};
use crate::support::{error, support};

/// A type of C.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Scalar {
    Signed(u8),
    Unsigned(u8),
    Float(u8),
    Complex(u8),
    Bool,
    Char,
    Pointer,
}

impl Scalar {
    /// From NumPy's letter and size, where NumPy has them.
    pub fn parse(code: &str) -> Option<Self> {
        Some(match code {
            "i1" => Self::Signed(1),
            "i2" => Self::Signed(2),
            "i4" => Self::Signed(4),
            "i8" => Self::Signed(8),
            "u1" => Self::Unsigned(1),
            "u2" => Self::Unsigned(2),
            "u4" => Self::Unsigned(4),
            "u8" => Self::Unsigned(8),
            "f4" => Self::Float(4),
            "f8" => Self::Float(8),
            "c8" => Self::Complex(8),
            "c16" => Self::Complex(16),
            "bool" => Self::Bool,
            "c1" => Self::Char,
            "p" => Self::Pointer,
            _ => return None,
        })
    }

    /// How it is passed by value; complex numbers are not.
    fn by_value(self) -> Option<Type> {
        Some(match self {
            Self::Signed(1) => Type::i8(),
            Self::Signed(2) => Type::i16(),
            Self::Signed(4) => Type::i32(),
            Self::Signed(_) => Type::i64(),
            Self::Unsigned(1) | Self::Bool => Type::u8(),
            Self::Unsigned(2) => Type::u16(),
            Self::Unsigned(4) => Type::u32(),
            Self::Unsigned(_) => Type::u64(),
            Self::Float(4) => Type::f32(),
            Self::Float(_) => Type::f64(),
            Self::Char => Type::c_schar(),
            Self::Pointer => Type::pointer(),
            Self::Complex(_) => return None,
        })
    }

    /// Its size.
    pub fn bytes(self) -> usize {
        match self {
            Self::Signed(size) | Self::Unsigned(size) | Self::Float(size) | Self::Complex(size) => {
                size.into()
            }
            Self::Bool | Self::Char => 1,
            Self::Pointer => 8,
        }
    }

    /// What it takes of the packed arguments.
    pub fn words(self) -> usize {
        if self == Self::Complex(16) { 2 } else { 1 }
    }
}

/// What an array is to be like in memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// C-contiguous.
    C,
    /// Fortran-contiguous.
    Fortran,
    /// One of these two.
    Contiguous,
    /// Anything; the function learns the strides from other arguments.
    Any,
}

/// What one parameter of the C function is.
#[derive(Clone, Copy)]
enum Kind {
    Value(Scalar),
    /// A pointer to a value of its own.
    Reference(Scalar),
    /// A pointer to the data of an array.
    Array {
        mode: Mode,
        dtype: Option<Scalar>,
    },
    /// A pointer to an `int` through which the function reports failures; no argument stands for it.
    Info,
}

struct Parameter {
    kind: Kind,
    /// Where its words begin.
    at: usize,
}

/// How the function reports a failure.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Check {
    Never,
    /// It returns something other than zero.
    Zero,
    /// It returns all bits set, or a null pointer, and says why in `errno`; one that returns no
    /// integer sets `errno` alone.
    Errno,
}

/// A C function and what is known of it.
pub struct Function {
    name: &'static str,
    pointer: unsafe extern "C" fn(),
    /// Keeps the code that it points to.
    owner: PyRef,
    parameters: Box<[Parameter]>,
    /// How many arguments a call has.
    arguments: usize,
    words: usize,
    order: Order,
    /// `None` for void.
    returns: Option<Scalar>,
    check: Check,
    cif: Cif,
    /// What it does with its arrays; none if it takes none.
    modes: Option<Arc<Signature>>,
}

// SAFETY: the raw pointers within `cif` are to memory of its own, which nothing changes after it was
// prepared; the rest is safe to share by itself, and the pointer is code.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// A value without the interpreter.
#[derive(Clone, Copy)]
pub enum Plain {
    None,
    Bool(bool),
    Signed(i64),
    Unsigned(u64),
    Float(f64),
    Char(u8),
}

impl Plain {
    /// The value as an object.
    pub fn object(self, py: Python<'_>) -> Py<PyAny> {
        match self {
            Self::None => py.None(),
            Self::Bool(value) => PyBool::new(py, value).to_owned().into_any().unbind(),
            Self::Signed(value) => infallible(value.into_pyobject(py)).into_any().unbind(),
            Self::Unsigned(value) => infallible(value.into_pyobject(py)).into_any().unbind(),
            Self::Float(value) => infallible(value.into_pyobject(py)).into_any().unbind(),
            Self::Char(value) => PyBytes::new(py, &[value]).into_any().unbind(),
        }
    }
}

fn infallible<T>(result: Result<T, std::convert::Infallible>) -> T {
    match result {
        Ok(value) => value,
        Err(never) => match never {},
    }
}

/// How a native function said that it failed.
pub struct Failure {
    function: &'static str,
    code: i64,
    /// The word for it that `NativeError` knows.
    how: &'static str,
}

impl Failure {
    /// The exception for it.
    pub fn error(&self, py: Python<'_>) -> PyErr {
        error(py, "NativeError", (self.function, self.code, self.how))
    }
}

/// One call: a function and its arguments.
pub struct Packed {
    function: Arc<Function>,
    words: Box<[u64]>,
    /// Keeps what addresses among them point into.
    _kept: Option<PyRef>,
}

impl Function {
    /// Converts the arguments of a call. `TypeError` and `ValueError` name the argument.
    fn pack<'py>(
        self: &Arc<Self>,
        py: Python<'py>,
        given: &[Bound<'py, PyAny>],
        keep: impl FnOnce() -> PyRef,
    ) -> PyResult<Packed> {
        if given.len() != self.arguments {
            return Err(PyTypeError::new_err(format!(
                "{} takes {} arguments, not {}",
                self.name,
                self.arguments,
                given.len()
            )));
        }
        let mut words = vec![0_u64; self.words].into_boxed_slice();
        let mut arrays = false;
        let mut views: Vec<Bound<'py, PyAny>> = Vec::new();
        let mut given = given.iter().enumerate();
        for parameter in &self.parameters {
            if matches!(parameter.kind, Kind::Info) {
                continue;
            }
            let (number, argument) = given.next().expect("counted above");
            let words = &mut words[parameter.at..];
            match parameter.kind {
                Kind::Value(scalar) | Kind::Reference(scalar) => {
                    convert(scalar, argument, words)
                        .map_err(|error| self.wrong(py, number, &error))?;
                }
                Kind::Array { mode, dtype } => {
                    arrays = true;
                    let address = match array(argument, mode != Mode::In, dtype, self.order) {
                        Ok((address, None)) => address,
                        Ok((address, Some(view))) => {
                            views.push(view);
                            address
                        }
                        Err(error) => return Err(self.wrong(py, number, &error)),
                    };
                    words[0] = address as u64;
                }
                Kind::Info => {}
            }
        }
        let kept = match (arrays, views.is_empty()) {
            (false, _) => None,
            (true, true) => Some(keep()),
            (true, false) => {
                views.push(keep().clone_ref(py).into_bound(py));
                Some(PyTuple::new(py, views)?.into())
            }
        };
        Ok(self.packed(words, kept))
    }

    /// A call with these words, which are right for the parameters.
    pub fn packed(self: &Arc<Self>, words: Box<[u64]>, kept: Option<PyRef>) -> Packed {
        assert_eq!(words.len(), self.words, "the words of {}", self.name);
        Packed {
            function: Arc::clone(self),
            words,
            _kept: kept,
        }
    }

    /// An error that says which argument it is about.
    pub fn wrong(&self, py: Python<'_>, number: usize, error: &PyErr) -> PyErr {
        let text = format!(
            "{}: argument {}: {}",
            self.name,
            number + 1,
            error.value(py)
        );
        if error.is_instance_of::<PyTypeError>(py) {
            PyTypeError::new_err(text)
        } else {
            PyValueError::new_err(text)
        }
    }

    /// Calls the C function. Touches no Python API, and may be called by any thread.
    fn invoke(&self, packed: &Packed) -> Result<Plain, Failure> {
        let mut words: SmallVec<[u64; 24]> = SmallVec::from_slice(&packed.words);
        let base = words.as_mut_ptr();
        let mut references: SmallVec<[*mut u64; 24]> = self
            .parameters
            .iter()
            // Within bounds: that is where the parameter's words are.
            .map(|parameter| base.wrapping_add(parameter.at))
            .collect();
        let mut values: SmallVec<[*mut c_void; 24]> = self
            .parameters
            .iter()
            .zip(references.iter_mut())
            .map(|(parameter, reference)| match parameter.kind {
                Kind::Value(_) | Kind::Array { .. } => reference.cast::<c_void>(),
                Kind::Reference(_) | Kind::Info => std::ptr::from_mut(reference).cast(),
            })
            .collect();
        let mut result = [0_u64; 2];
        // SAFETY: the convention was prepared from the same parameters; there is a pointer for each,
        // to a value of its type, and room for the largest result. That the function is what its
        // maker said it is, is the maker's promise; arrays are kept alive by `packed`. `errno` is
        // this thread's.
        let errno = unsafe {
            let errno = libc::__errno_location();
            if self.check == Check::Errno {
                *errno = 0;
            }
            libffi::raw::ffi_call(
                self.cif.as_raw_ptr(),
                Some(self.pointer),
                result.as_mut_ptr().cast(),
                values.as_mut_ptr(),
            );
            *errno
        };
        let bits = result[0];
        let bytes = bits.to_ne_bytes();
        // Integers come widened to a word; the casts cut them to what they are.
        #[allow(clippy::cast_possible_truncation)]
        let value = match self.returns {
            None => Plain::None,
            Some(Scalar::Signed(1)) => Plain::Signed(i64::from(bits as i8)),
            Some(Scalar::Signed(2)) => Plain::Signed(i64::from(bits as i16)),
            Some(Scalar::Signed(4)) => Plain::Signed(i64::from(bits as i32)),
            Some(Scalar::Signed(_)) => Plain::Signed(bits.cast_signed()),
            Some(Scalar::Unsigned(1)) => Plain::Unsigned(u64::from(bits as u8)),
            Some(Scalar::Unsigned(2)) => Plain::Unsigned(u64::from(bits as u16)),
            Some(Scalar::Unsigned(4)) => Plain::Unsigned(u64::from(bits as u32)),
            Some(Scalar::Unsigned(_) | Scalar::Pointer) => Plain::Unsigned(bits),
            Some(Scalar::Bool) => Plain::Bool(bits as u8 != 0),
            Some(Scalar::Char) => Plain::Char(bits as u8),
            Some(Scalar::Float(4)) => {
                let [a, b, c, d, ..] = bytes;
                Plain::Float(f64::from(f32::from_ne_bytes([a, b, c, d])))
            }
            Some(Scalar::Float(_)) => Plain::Float(f64::from_ne_bytes(bytes)),
            Some(Scalar::Complex(_)) => unreachable!("refused where the function is made"),
        };
        let failed = |code, how| {
            Err(Failure {
                function: self.name,
                code,
                how,
            })
        };
        match (self.check, value) {
            (Check::Zero, Plain::Signed(code)) if code != 0 => return failed(code, "returned"),
            (Check::Zero, Plain::Unsigned(code)) if code != 0 => {
                return failed(code.cast_signed(), "returned");
            }
            (Check::Errno, _) => {
                let said = match self.returns {
                    Some(Scalar::Signed(_)) => matches!(value, Plain::Signed(-1)),
                    Some(Scalar::Unsigned(size)) => {
                        matches!(value, Plain::Unsigned(all) if all == u64::MAX >> (64 - 8 * u32::from(size)))
                    }
                    // `mmap` and its like return all bits set instead of null.
                    Some(Scalar::Pointer) => bits == 0 || bits == u64::MAX,
                    _ => errno != 0,
                };
                if said {
                    return failed(errno.into(), "errno");
                }
            }
            _ => {}
        }
        for parameter in &self.parameters {
            if matches!(parameter.kind, Kind::Info) {
                let bytes = words[parameter.at].to_ne_bytes();
                let info = c_int::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                if info != 0 {
                    return failed(info.into(), "info");
                }
            }
        }
        Ok(value)
    }
}

/// What the body of a native task calls.
#[derive(Clone)]
pub enum Callee {
    Function(Arc<Function>),
    Routine(Arc<Routine>),
}

impl Callee {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Function(function) => function.name,
            Self::Routine(routine) => routine.name(),
        }
    }

    /// What it does with its arrays.
    pub fn modes(&self) -> Option<Arc<Signature>> {
        match self {
            Self::Function(function) => function.modes.clone(),
            Self::Routine(routine) => routine.modes().cloned(),
        }
    }

    /// An inline task has no arguments but defaults, and C has none: `TypeError` if it needs any.
    pub fn check_inline(&self) -> PyResult<()> {
        let arguments = match self {
            Self::Function(function) => function.arguments,
            Self::Routine(routine) => routine.positional(),
        };
        if arguments == 0 {
            return Ok(());
        }
        Err(PyTypeError::new_err(format!(
            "{name} takes {arguments} arguments, and a native function has no defaults to stand for \
             them: call {name}.options(...)(...) instead of spawning it inline",
            name = self.name()
        )))
    }

    fn pack<'py>(
        &self,
        py: Python<'py>,
        given: &[Bound<'py, PyAny>],
        keywords: Option<&Bound<'py, PyDict>>,
        keep: impl FnOnce() -> PyRef,
    ) -> PyResult<Packed> {
        match self {
            Self::Function(function) => {
                if keywords.is_some_and(|some| !some.is_empty()) {
                    return Err(PyTypeError::new_err(format!(
                        "{} takes no keyword arguments: C functions do not name their parameters",
                        function.name
                    )));
                }
                function.pack(py, given, keep)
            }
            Self::Routine(routine) => routine.pack(py, given, keywords, keep),
        }
    }

    /// Calls it on the spot, detached.
    pub fn call(
        &self,
        py: Python<'_>,
        arguments: &Bound<'_, PyTuple>,
        keywords: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Py<PyAny>> {
        let keep = || arguments.clone().into();
        let packed = self.pack(py, arguments.as_slice(), keywords, keep)?;
        match gateway::detach(py, Site::Native, || packed.function.invoke(&packed)) {
            Ok(value) => Ok(value.object(py)),
            Err(failure) => Err(failure.error(py)),
        }
    }
}

/// Puts `bytes` at the beginning of a word.
pub fn word<const N: usize>(bytes: [u8; N]) -> u64 {
    let mut all = [0; 8];
    all[..N].copy_from_slice(&bytes);
    u64::from_ne_bytes(all)
}

/// Converts one value.
pub fn convert(scalar: Scalar, given: &Bound<'_, PyAny>, words: &mut [u64]) -> PyResult<()> {
    words[0] = match scalar {
        Scalar::Signed(size) => signed(given, size)?,
        Scalar::Unsigned(size) => unsigned(given, size)?,
        Scalar::Float(size) => {
            let value = real(given)?;
            if size == 4 {
                // Rounding is what a narrower type is about; to lose all of it is not.
                #[allow(clippy::cast_possible_truncation)]
                let narrow = value as f32;
                if narrow.is_infinite() && value.is_finite() {
                    return Err(range("f4", given));
                }
                word(narrow.to_ne_bytes())
            } else {
                word(value.to_ne_bytes())
            }
        }
        Scalar::Complex(size) => {
            let value = complex(given)?;
            if size == 8 {
                #[allow(clippy::cast_possible_truncation)]
                let (real, imaginary) = (value.real() as f32, value.imag() as f32);
                let mut both = [0; 8];
                both[..4].copy_from_slice(&real.to_ne_bytes());
                both[4..].copy_from_slice(&imaginary.to_ne_bytes());
                word(both)
            } else {
                words[1] = word(value.imag().to_ne_bytes());
                word(value.real().to_ne_bytes())
            }
        }
        Scalar::Bool => {
            let value: bool = given.extract().map_err(|_| not_a("a bool", given))?;
            word([u8::from(value)])
        }
        Scalar::Char => word([character(given)?]),
        Scalar::Pointer => {
            if given.is_none() {
                0
            } else {
                let address: usize = integer(given)?
                    .extract()
                    .map_err(|_| range("an address", given))?;
                word(address.to_ne_bytes())
            }
        }
    };
    Ok(())
}

/// An object's integer, by `__index__`.
fn integer<'py>(given: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    // SAFETY: attached; a new reference, or null with an exception.
    unsafe { Bound::from_owned_ptr_or_err(given.py(), ffi::PyNumber_Index(given.as_ptr())) }
        .map_err(|_| not_a("an integer", given))
}

fn signed(given: &Bound<'_, PyAny>, size: u8) -> PyResult<u64> {
    let value: Option<i64> = integer(given)?.extract().ok();
    match (value, size) {
        (Some(value), 1) => i8::try_from(value)
            .map(|value| word(value.to_ne_bytes()))
            .ok(),
        (Some(value), 2) => i16::try_from(value)
            .map(|value| word(value.to_ne_bytes()))
            .ok(),
        (Some(value), 4) => i32::try_from(value)
            .map(|value| word(value.to_ne_bytes()))
            .ok(),
        (Some(value), _) => Some(word(value.to_ne_bytes())),
        (None, _) => None,
    }
    .ok_or_else(|| range(&format!("i{size}"), given))
}

fn unsigned(given: &Bound<'_, PyAny>, size: u8) -> PyResult<u64> {
    let value: Option<u64> = integer(given)?.extract().ok();
    match (value, size) {
        (Some(value), 1) => u8::try_from(value)
            .map(|value| word(value.to_ne_bytes()))
            .ok(),
        (Some(value), 2) => u16::try_from(value)
            .map(|value| word(value.to_ne_bytes()))
            .ok(),
        (Some(value), 4) => u32::try_from(value)
            .map(|value| word(value.to_ne_bytes()))
            .ok(),
        (Some(value), _) => Some(word(value.to_ne_bytes())),
        (None, _) => None,
    }
    .ok_or_else(|| range(&format!("u{size}"), given))
}

fn real(given: &Bound<'_, PyAny>) -> PyResult<f64> {
    given.extract().map_err(|error: PyErr| {
        if error.is_instance_of::<PyOverflowError>(given.py()) {
            range("f8", given)
        } else {
            not_a("a number", given)
        }
    })
}

fn complex<'py>(given: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyComplex>> {
    if let Ok(complex) = given.cast::<PyComplex>() {
        return Ok(complex.clone());
    }
    if given.is_instance_of::<PyString>() {
        return Err(not_a("a number", given));
    }
    given
        .py()
        .get_type::<PyComplex>()
        .call1((given,))
        .map_err(|_| not_a("a number", given))?
        .cast_into::<PyComplex>()
        .map_err(|_| not_a("a number", given))
}

fn character(given: &Bound<'_, PyAny>) -> PyResult<u8> {
    if let Ok(bytes) = given.cast::<PyBytes>() {
        if let [one] = bytes.as_bytes() {
            return Ok(*one);
        }
    } else if let Ok(text) = given.cast::<PyString>() {
        if let Ok([one]) = text.to_str().map(str::as_bytes) {
            return Ok(*one);
        }
    } else {
        return Err(not_a("a character", given));
    }
    Err(PyValueError::new_err(format!(
        "expects one ASCII character, not {}",
        given.repr()?.to_string_lossy()
    )))
}

pub fn not_a(wanted: &str, given: &Bound<'_, PyAny>) -> PyErr {
    let name = given.get_type().name().map_or_else(
        |_| "an object".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    );
    PyTypeError::new_err(format!("expects {wanted}, not {name}"))
}

pub fn range(what: &str, given: &Bound<'_, PyAny>) -> PyErr {
    let shown = given.repr().map_or_else(
        |_| "the number".to_owned(),
        |repr| repr.to_string_lossy().into_owned(),
    );
    PyValueError::new_err(format!("{shown} is out of range for {what}"))
}

/// The head of NumPy's `ndarray`, which is part of its binary interface: the macros of its C
/// interface compile to loads from it.
#[repr(C)]
pub struct ArrayHead {
    object: ffi::PyObject,
    data: *mut c_void,
    dimensions: c_int,
    shape: *mut ffi::Py_ssize_t,
    strides: *mut ffi::Py_ssize_t,
    base: *mut ffi::PyObject,
    dtype: *mut DtypeHead,
    flags: c_int,
}

impl ArrayHead {
    /// The head of a NumPy array; `None` of anything else.
    pub fn of<'a>(given: &'a Bound<'_, PyAny>) -> PyResult<Option<&'a Self>> {
        let (class, _) = numpy(given.py())?;
        // SAFETY: attached; an object and a class, both alive.
        let is_array =
            unsafe { ffi::PyObject_TypeCheck(given.as_ptr(), class.as_ptr().cast()) != 0 };
        // SAFETY: a NumPy array, alive as long as the borrow. Nobody changes what an array's head
        // says of its memory while others use the array, says NumPy.
        Ok(is_array.then(|| unsafe { &*given.as_ptr().cast::<Self>() }))
    }

    /// The type of the elements, if it is one of C in the machine's order of bytes.
    pub fn scalar(&self) -> Option<Scalar> {
        let described = self.described();
        (described.order != FOREIGN)
            .then(|| numbered(described.number))
            .flatten()
    }

    pub fn shape(&self) -> &[isize] {
        self.extents(self.shape)
    }

    /// Where its first element is.
    pub fn address(&self) -> usize {
        self.data as usize
    }

    /// In bytes.
    pub fn strides(&self) -> &[isize] {
        self.extents(self.strides)
    }

    fn extents(&self, first: *mut ffi::Py_ssize_t) -> &[isize] {
        match usize::try_from(self.dimensions) {
            // Of no dimension there may be no memory either.
            Ok(0) | Err(_) => &[],
            // SAFETY: a number for each dimension, which the array owns.
            Ok(dimensions) => unsafe { std::slice::from_raw_parts(first, dimensions) },
        }
    }

    pub fn has(&self, flag: c_int) -> bool {
        self.flags & flag != 0
    }

    /// Whether its elements are references to Python objects, or hold some.
    pub fn has_objects(&self) -> bool {
        const HAS_OBJECTS: u8 = 0x01;
        // NumPy 2 keeps the flags elsewhere; what is an object itself is one in all versions.
        self.described().kind == b'O' || self.described().flags & HAS_OBJECTS != 0
    }

    fn described(&self) -> &DtypeHead {
        // SAFETY: the array owns its dtype.
        unsafe { &*self.dtype }
    }
}

/// The head of NumPy's `dtype`, of which the same is true.
#[repr(C)]
pub struct DtypeHead {
    object: ffi::PyObject,
    class: *mut ffi::PyTypeObject,
    kind: u8,
    letter: u8,
    order: u8,
    flags: u8,
    number: c_int,
}

impl DtypeHead {
    /// The type of C that a dtype is, if it is one in the machine's order of bytes.
    ///
    /// # Safety
    /// It is a dtype of NumPy's.
    pub unsafe fn scalar_of(dtype: &Bound<'_, PyAny>) -> Option<Scalar> {
        // SAFETY: alive as long as the borrow; nobody changes what a dtype's head says.
        let head = unsafe { &*dtype.as_ptr().cast::<Self>() };
        (head.order != FOREIGN)
            .then(|| numbered(head.number))
            .flatten()
    }
}

pub const C_CONTIGUOUS: c_int = 0x1;
pub const F_CONTIGUOUS: c_int = 0x2;
const ALIGNED: c_int = 0x100;
pub const WRITEABLE: c_int = 0x400;

/// The order of bytes that is not the machine's.
const FOREIGN: u8 = if cfg!(target_endian = "little") {
    b'>'
} else {
    b'<'
};

/// The C types behind NumPy's type numbers, in their order; what has none here has no code either.
fn numbered(number: c_int) -> Option<Scalar> {
    #[allow(clippy::cast_possible_truncation)]
    const LONG: u8 = size_of::<std::ffi::c_long>() as u8;
    Some(match number {
        0 => Scalar::Bool,
        1 => Scalar::Signed(1),
        2 => Scalar::Unsigned(1),
        3 => Scalar::Signed(2),
        4 => Scalar::Unsigned(2),
        5 => Scalar::Signed(4),
        6 => Scalar::Unsigned(4),
        7 => Scalar::Signed(LONG),
        8 => Scalar::Unsigned(LONG),
        9 => Scalar::Signed(8),
        10 => Scalar::Unsigned(8),
        11 => Scalar::Float(4),
        12 => Scalar::Float(8),
        14 => Scalar::Complex(8),
        15 => Scalar::Complex(16),
        _ => return None,
    })
}

/// The class of NumPy's arrays, and the function that makes one of a buffer.
fn numpy(py: Python<'_>) -> PyResult<&(Py<PyType>, Py<PyAny>)> {
    static NUMPY: PyOnceLock<(Py<PyType>, Py<PyAny>)> = PyOnceLock::new();
    NUMPY.get_or_try_init(py, || {
        let numpy = py.import("numpy")?;
        let class = numpy.getattr("ndarray")?.cast_into::<PyType>()?;
        Ok((class.unbind(), numpy.getattr("asarray")?.unbind()))
    })
}

/// The address of an array's data, and a view to keep if the object is no NumPy array.
fn array<'py>(
    given: &Bound<'py, PyAny>,
    writes: bool,
    dtype: Option<Scalar>,
    order: Order,
) -> PyResult<(usize, Option<Bound<'py, PyAny>>)> {
    let py = given.py();
    if let Some(head) = ArrayHead::of(given)? {
        return Ok((checked(head, given, writes, dtype, order)?, None));
    }
    // SAFETY: attached; the object is alive.
    let source = if unsafe { ffi::PyObject_CheckBuffer(given.as_ptr()) != 0 } {
        // SAFETY: attached; a new reference, or null with an exception.
        unsafe { Bound::from_owned_ptr_or_err(py, ffi::PyMemoryView_FromObject(given.as_ptr()))? }
    } else if given.hasattr("__array_interface__")? {
        given.clone()
    } else {
        return Err(not_a("an array", given));
    };
    let view = numpy(py)?.1.bind(py).call1((source,))?;
    let head = ArrayHead::of(&view)?.expect("asarray gives an array");
    Ok((checked(head, &view, writes, dtype, order)?, Some(view)))
}

/// The address of a NumPy array's data, if the array is what it is to be.
pub fn checked(
    head: &ArrayHead,
    given: &Bound<'_, PyAny>,
    writes: bool,
    dtype: Option<Scalar>,
    order: Order,
) -> PyResult<usize> {
    let described = head.described();
    if dtype.is_some_and(|wanted| numbered(described.number) != Some(wanted))
        || described.order == FOREIGN
        || described.kind == b'O'
    {
        let wanted = match dtype {
            Some(wanted) => name_of_scalar(wanted),
            None if described.kind == b'O' => "numbers and no Python objects".to_owned(),
            None => "the machine's order of bytes".to_owned(),
        };
        return Err(PyTypeError::new_err(format!(
            "expects an array of {wanted}, not of {}",
            given.getattr("dtype")?.str()?.to_string_lossy()
        )));
    }
    let contiguous = match order {
        Order::C => head.has(C_CONTIGUOUS),
        Order::Fortran => head.has(F_CONTIGUOUS),
        Order::Contiguous => head.has(C_CONTIGUOUS | F_CONTIGUOUS),
        Order::Any => true,
    };
    if !contiguous {
        let wanted = match order {
            Order::C => "C-contiguous",
            Order::Fortran => "Fortran-contiguous",
            Order::Contiguous | Order::Any => "contiguous",
        };
        return Err(PyValueError::new_err(format!(
            "the array is not {wanted}: shape {}, strides {}",
            given.getattr("shape")?.str()?.to_string_lossy(),
            given.getattr("strides")?.str()?.to_string_lossy()
        )));
    }
    if writes && !head.has(WRITEABLE) {
        return Err(PyValueError::new_err("the array is read-only"));
    }
    if !head.has(ALIGNED) {
        return Err(PyValueError::new_err("the array's data is not aligned"));
    }
    Ok(head.data as usize)
}

/// A number that depends on every byte of a NumPy array's elements.
pub fn checksum(array: &Bound<'_, PyAny>) -> PyResult<u64> {
    let head = ArrayHead::of(array)?.expect("views are arrays of NumPy's");
    let size: usize = array.getattr("itemsize")?.extract()?;
    let mut sum = 0xCBF2_9CE4_8422_2325;
    if !head.shape().contains(&0) {
        // SAFETY: attached; the array is alive, and its head says where its elements are.
        unsafe {
            add_up(
                head.data.cast(),
                head.shape(),
                head.strides(),
                size,
                &mut sum,
            )
        };
    }
    Ok(sum)
}

/// Adds the elements of an array to a checksum.
///
/// # Safety
/// `data`, the extents, which are not zero, and the strides are those of memory that can be read.
unsafe fn add_up(data: *const u8, shape: &[isize], strides: &[isize], size: usize, sum: &mut u64) {
    let ((extent, shape), (stride, strides)) = match (shape.split_first(), strides.split_first()) {
        (Some(shape), Some(strides)) => (shape, strides),
        _ => {
            // SAFETY: an element has so many bytes.
            for byte in unsafe { std::slice::from_raw_parts(data, size) } {
                *sum = (*sum ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01B3);
            }
            return;
        }
    };
    for at in 0..*extent {
        // SAFETY: within the array, as promised.
        unsafe { add_up(data.offset(at * stride), shape, strides, size, sum) };
    }
}

/// What users call a type.
pub fn name_of_scalar(scalar: Scalar) -> String {
    match scalar {
        Scalar::Signed(size) => format!("i{size}"),
        Scalar::Unsigned(size) => format!("u{size}"),
        Scalar::Float(size) => format!("f{size}"),
        Scalar::Complex(size) => format!("c{size}"),
        Scalar::Bool => "bool".to_owned(),
        Scalar::Char => "c1".to_owned(),
        Scalar::Pointer => "p".to_owned(),
    }
}

/// A call as the body of a task.
pub struct Call {
    state: State,
    /// It may get several cores, and threaded libraries are to use them.
    wide: bool,
}

enum State {
    Packed(Packed),
    /// There are handles among the arguments.
    Held(Callee, Arguments),
}

impl Call {
    /// Converts the arguments, unless they hold handles.
    pub fn new(
        py: Python<'_>,
        callee: Callee,
        arguments: Arguments,
        substitute: bool,
        wide: bool,
    ) -> PyResult<Self> {
        let state = if substitute {
            State::Held(callee, arguments)
        } else {
            State::Packed(match &arguments {
                Arguments::None => {
                    callee.pack(py, &[], None, || unreachable!("nothing to keep"))?
                }
                Arguments::One(one) => {
                    let given = std::slice::from_ref(one.bind(py));
                    callee.pack(py, given, None, || PyRef::new(one.clone_ref(py)))?
                }
                Arguments::Many(given) => {
                    let tuple = given.bind(py).cast::<PyTuple>()?;
                    let keep = || PyRef::new(given.clone_ref(py));
                    callee.pack(py, tuple.as_slice(), None, keep)?
                }
                Arguments::Named(both) => {
                    let tuple = both.0.bind(py).cast::<PyTuple>()?;
                    let keywords = Some(both.1.bind(py).cast::<PyDict>()?);
                    let keep = || PyRef::new(both.0.clone_ref(py));
                    callee.pack(py, tuple.as_slice(), keywords, keep)?
                }
            })
        };
        Ok(Self { state, wide })
    }

    /// What it calls, as far as that is known.
    pub fn name(&self) -> &'static str {
        match &self.state {
            State::Packed(packed) => packed.function.name,
            State::Held(callee, _) => callee.name(),
        }
    }

    /// Whether it has to run attached.
    pub fn needs_session(&self) -> bool {
        self.wide || matches!(self.state, State::Held(..))
    }

    /// Runs the body, whether the thread is attached or not.
    pub fn run(&self, running: &Running<'_, Interp>) -> Step<Interp> {
        let result = if gateway::is_attached() {
            // SAFETY: just asked.
            let py = unsafe { Python::assume_attached() };
            self.run_attached(py, running)
        } else {
            let State::Packed(packed) = &self.state else {
                unreachable!("it needs a session")
            };
            assert_unlocked();
            packed.function.invoke(packed).map_err(raised)
        };
        Step::Done(result.map(Value::Plain))
    }

    fn run_attached(
        &self,
        py: Python<'_>,
        running: &Running<'_, Interp>,
    ) -> Result<Plain, Trouble<Interp>> {
        let converted;
        let packed = match &self.state {
            State::Packed(packed) => packed,
            State::Held(callee, arguments) => {
                converted = convert_held(py, callee, arguments)
                    .map_err(|error| trouble(py, running.engine, running.task, error))?;
                &converted
            }
        };
        Interp::follow_limits(py);
        let cores = if self.wide {
            running.grant().cores.len()
        } else {
            1
        };
        if cores > 1 {
            report(py, support(py).limit_enter.bind(py).call1((cores,)));
        }
        let result = gateway::detach(py, Site::Native, || packed.function.invoke(packed));
        if cores > 1 {
            report(py, support(py).limit_exit.bind(py).call1((cores,)));
        }
        result.map_err(raised)
    }
}

fn convert_held(py: Python<'_>, callee: &Callee, arguments: &Arguments) -> PyResult<Packed> {
    let (given, keywords) = substitute(py, arguments, &mut |_| {
        unreachable!("native functions do not reduce")
    })?;
    callee.pack(py, given.as_slice(), keywords.as_ref(), || {
        given.clone().into()
    })
}

fn raised(failure: Failure) -> Trouble<Interp> {
    Trouble::Raised(Raised::Native(failure))
}

/// A C function as a Python callable: what a native task function has for `.fn`. Calling it calls
/// the C function at once, detached. See `charioteer.native`, which makes them.
#[pyclass(module = "charioteer._core", frozen, weakref)]
pub struct NativeFunction {
    function: Arc<Function>,
    signature: String,
}

impl NativeFunction {
    pub fn function(&self) -> &Arc<Function> {
        &self.function
    }
}

#[pymethods]
impl NativeFunction {
    /// `parameters` are pairs of a kind (`value`, `reference`, `in`, `out`, `inout`, `commute`, `info`) and a code, which
    /// is empty where there is none to say; `_native.py` writes them.
    #[new]
    #[pyo3(signature = (name, address, owner, parameters, order, returns, check, signature))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        name: &str,
        address: usize,
        owner: Bound<'_, PyAny>,
        parameters: Vec<(String, String)>,
        order: &str,
        returns: &str,
        check: Option<&str>,
        signature: String,
    ) -> PyResult<Self> {
        let wrong = |what: &str, code: &str| PyValueError::new_err(format!("{what}: {code:?}"));
        let mut types = Vec::with_capacity(parameters.len());
        let mut all = Vec::with_capacity(parameters.len());
        let mut words = 0;
        for (kind, code) in &parameters {
            let scalar = Scalar::parse(code);
            let no_type = || wrong("no type of C has this code", code);
            let (kind, by, size) = match kind.as_str() {
                "value" => {
                    let scalar = scalar.ok_or_else(no_type)?;
                    let by = scalar
                        .by_value()
                        .ok_or_else(|| wrong("complex numbers are passed by reference", code))?;
                    (Kind::Value(scalar), by, scalar.words())
                }
                "reference" => {
                    let scalar = scalar.ok_or_else(no_type)?;
                    (Kind::Reference(scalar), Type::pointer(), scalar.words())
                }
                "info" => (Kind::Info, Type::pointer(), 1),
                "in" | "out" | "inout" | "commute" => {
                    let dtype = if code.is_empty() {
                        None
                    } else {
                        let dtype = scalar.ok_or_else(no_type)?;
                        if matches!(dtype, Scalar::Pointer | Scalar::Char) {
                            return Err(wrong("no dtype of arrays", code));
                        }
                        Some(dtype)
                    };
                    let mode = match kind.as_str() {
                        "in" => Mode::In,
                        "out" => Mode::Out,
                        "inout" => Mode::InOut,
                        _ => Mode::Commute,
                    };
                    (Kind::Array { mode, dtype }, Type::pointer(), 1)
                }
                _ => return Err(wrong("no kind of parameters", kind)),
            };
            types.push(by);
            all.push(Parameter { kind, at: words });
            words += size;
        }
        let order = match order {
            "C" => Order::C,
            "F" => Order::Fortran,
            "A" => Order::Contiguous,
            "any" => Order::Any,
            _ => return Err(wrong("order is \"C\", \"F\", \"A\" or \"any\", not", order)),
        };
        let (returns, gives) = if returns == "void" {
            (None, Type::void())
        } else {
            let scalar =
                Scalar::parse(returns).ok_or_else(|| wrong("returns has no such code", returns))?;
            let gives = scalar
                .by_value()
                .ok_or_else(|| wrong("complex numbers cannot be returned", returns))?;
            (Some(scalar), gives)
        };
        let check = match check {
            None => Check::Never,
            Some("zero") => {
                if !matches!(returns, Some(Scalar::Signed(_) | Scalar::Unsigned(_))) {
                    return Err(PyValueError::new_err(
                        "check=\"zero\" looks at the integer that the function returns: say which, \
                         returns=\"i4\" for int",
                    ));
                }
                Check::Zero
            }
            Some("errno") => {
                if matches!(returns, Some(Scalar::Bool | Scalar::Char)) {
                    return Err(PyValueError::new_err(
                        "check=\"errno\" knows no value of bool or char that stands for a failure",
                    ));
                }
                Check::Errno
            }
            Some(other) => {
                return Err(wrong("check is None, \"zero\" or \"errno\", not", other));
            }
        };
        if address == 0 {
            return Err(PyValueError::new_err(format!("{name} is a null pointer")));
        }
        let arguments = all
            .iter()
            .filter(|parameter| !matches!(parameter.kind, Kind::Info))
            .count();
        // SAFETY: an address and a pointer to a function are the same to the machines that we run
        // on, and this one is not null. What it points to is the maker's promise.
        let pointer = unsafe { std::mem::transmute::<usize, unsafe extern "C" fn()>(address) };
        let name = intern(name);
        let modes = all.iter().filter_map(|parameter| match parameter.kind {
            Kind::Info => None,
            Kind::Array { mode, .. } => Some(Some(mode)),
            Kind::Value(_) | Kind::Reference(_) => Some(None),
        });
        let function = Function {
            modes: Signature::native(name, modes),
            name,
            pointer,
            owner: owner.into(),
            parameters: all.into(),
            arguments,
            words,
            order,
            returns,
            check,
            cif: Cif::new(types, gives),
        };
        Ok(Self {
            function: Arc::new(function),
            signature,
        })
    }

    #[pyo3(signature = (*arguments, **keywords))]
    fn __call__(
        &self,
        py: Python<'_>,
        arguments: &Bound<'_, PyTuple>,
        keywords: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Py<PyAny>> {
        Callee::Function(Arc::clone(&self.function)).call(py, arguments, keywords)
    }

    #[getter]
    fn __name__(&self) -> &'static str {
        self.function.name
    }

    #[getter]
    fn __qualname__(&self) -> &'static str {
        self.function.name
    }

    fn __repr__(&self) -> String {
        format!("<native function {}>", self.signature)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // Where a pending task shares the function, the collector would take the reference for
        // this object's own and might clear what the task still needs.
        if Arc::strong_count(&self.function) == 1 {
            visit.call(self.function.owner.get())?;
        }
        Ok(())
    }

    #[allow(clippy::unused_self)]
    fn __clear__(&self) {
        // The function never changes; the containers in a cycle with it are cleared instead.
    }
}
