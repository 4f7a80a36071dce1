//! BLAS and LAPACK: what `charioteer.blas` is made of.
//!
//! # Routines
//!
//! A [`Routine`] stands for the four functions that differ in their type alone. Its signature is
//! that of the Python function which declares it. A call looks at its arrays, chooses the function,
//! and writes the words of its Fortran parameters: nothing of a call passes through Python objects
//! but what the caller gave.
//!
//! Everything is said of the matrices as NumPy shows them. Fortran sees the transposed of one that
//! is stored by rows, so triangles, sides and products are exchanged for it. Where operands differ
//! in order, one that is to be conjugated and not transposed is refused, which BLAS cannot do.
//!
//! Arguments that do not fit the signature are given to the declaring function, whose error is
//! Python's own.
//!
//! # Adapters
//!
//! SciPy's pointers are called directly wherever flags can say that a matrix is stored
//! by rows. Two routines need code around the call, which is here, as C functions that take the
//! routine's own pointer; native tasks call them like any other.
//!
//! * The pivots of `getrf` are those of rows, so no flag makes of a matrix that is stored by rows
//!   the one that the routine expects. It is transposed before and after.
//! * `geqrf` needs a workspace whose size it says itself. Of a matrix that is stored by rows,
//!   `gelqf` gives the same factorization: of A = QR the transposed is LQ with L the transposed of
//!   R, and both leave the reflectors where they were. They are applied conjugated there, so that
//!   the scalars of complex ones are conjugated here.

#![allow(non_snake_case, reason = "matrices have capitals")]

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::sync::Arc;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyString, PyTuple};
use smallvec::SmallVec;

use crate::access::Signature;
use crate::callable::intern;
use crate::gateway::PyRef;
use crate::native::{
    ArrayHead, C_CONTIGUOUS, Callee, F_CONTIGUOUS, Function, NativeFunction, Order, Packed, Scalar,
    WRITEABLE, checked, convert, range, word,
};

/// What a routine computes.
#[derive(Clone, Copy)]
enum Kind {
    Gemm,
    Syrk,
    Trsm,
    Potrf,
    Axpy,
    Getrf,
    Geqrf,
}

impl Kind {
    fn of(name: &str) -> Option<Self> {
        Some(match name {
            "gemm" => Self::Gemm,
            "syrk" => Self::Syrk,
            "trsm" => Self::Trsm,
            "potrf" => Self::Potrf,
            "axpy" => Self::Axpy,
            "getrf" => Self::Getrf,
            "geqrf" => Self::Geqrf,
            _ => return None,
        })
    }
}

/// The letters of the types, in the names of the routines.
const LETTERS: [(u8, Scalar); 4] = [
    (b's', Scalar::Float(4)),
    (b'd', Scalar::Float(8)),
    (b'c', Scalar::Complex(8)),
    (b'z', Scalar::Complex(16)),
];

/// A function of one type.
struct Typed {
    function: Arc<Function>,
    /// What an adapter calls, for a matrix by columns and for one by rows.
    called: [usize; 2],
}

/// The functions that differ in their type alone, as one with a signature of Python's.
pub struct Routine {
    kind: Kind,
    name: &'static str,
    /// A function of Python with this signature, which does nothing.
    declared: PyRef,
    /// Finds the function of one type.
    load: PyRef,
    parameters: Vec<Parameter>,
    /// How many of them may be given by position.
    positional: usize,
    typed: [PyOnceLock<Typed>; LETTERS.len()],
    /// What it does with its arrays.
    modes: Option<Arc<Signature>>,
}

struct Parameter {
    name: Py<PyString>,
    default: Option<PyRef>,
}

type Given<'py> = SmallVec<[Bound<'py, PyAny>; 8]>;

impl Routine {
    pub fn name(&self) -> &'static str {
        self.name
    }

    pub fn positional(&self) -> usize {
        self.positional
    }

    pub fn modes(&self) -> Option<&Arc<Signature>> {
        self.modes.as_ref()
    }

    /// Chooses the function and translates the arguments.
    pub fn pack<'py>(
        &self,
        py: Python<'py>,
        given: &[Bound<'py, PyAny>],
        keywords: Option<&Bound<'py, PyDict>>,
        keep: impl FnOnce() -> PyRef,
    ) -> PyResult<Packed> {
        let Some(arguments) = self.bind(py, given, keywords)? else {
            let positional = PyTuple::new(py, given)?;
            self.declared.bind(py).call(positional, keywords)?;
            return Err(PyTypeError::new_err(format!(
                "{}: the arguments do not fit",
                self.name
            )));
        };
        let (function, words) = self.translate(py, &arguments)?;
        // What is given by position alone are the arrays, unless one has its name.
        let kept = if given.len() == self.positional {
            keep()
        } else {
            PyTuple::new(py, &arguments[..self.positional])?.into()
        };
        Ok(function.packed(words.into_vec().into(), Some(kept)))
    }

    /// An argument for each parameter; `None` if they do not fit.
    fn bind<'py>(
        &self,
        py: Python<'py>,
        given: &[Bound<'py, PyAny>],
        keywords: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Option<Given<'py>>> {
        if given.len() > self.positional {
            return Ok(None);
        }
        let mut left = keywords.map_or(0, PyDictMethods::len);
        let mut arguments = Given::new();
        for (number, parameter) in self.parameters.iter().enumerate() {
            if let Some(argument) = given.get(number) {
                arguments.push(argument.clone());
                continue;
            }
            let named = match keywords {
                Some(keywords) if left > 0 => keywords.get_item(parameter.name.bind(py))?,
                _ => None,
            };
            if let Some(argument) = named {
                left -= 1;
                arguments.push(argument);
            } else if let Some(default) = &parameter.default {
                arguments.push(default.bind(py).clone());
            } else {
                return Ok(None);
            }
        }
        // A name that there is not, or that has its argument by position.
        Ok((left == 0).then_some(arguments))
    }

    fn translate<'py>(
        &self,
        py: Python<'py>,
        arguments: &[Bound<'py, PyAny>],
    ) -> PyResult<(&Arc<Function>, Words)> {
        match (self.kind, arguments) {
            (Kind::Gemm, [a, b, c, alpha, beta, trans_a, trans_b]) => {
                self.gemm(py, [a, b, c], [alpha, beta], [trans_a, trans_b])
            }
            (Kind::Syrk, [a, c, alpha, beta, lower, trans]) => {
                self.syrk(py, [a, c], [alpha, beta], lower, trans)
            }
            (Kind::Trsm, [a, b, alpha, left, lower, trans, unit]) => {
                self.trsm(py, [a, b], alpha, [left, lower, unit], trans)
            }
            (Kind::Potrf, [a, lower]) => self.potrf(py, a, lower),
            (Kind::Axpy, [x, y, alpha]) => self.axpy(py, x, y, alpha),
            (Kind::Getrf, [a, pivots]) => self.getrf(py, a, pivots),
            (Kind::Geqrf, [a, tau]) => self.geqrf(py, a, tau),
            _ => unreachable!("counted where the routine is made"),
        }
    }

    fn gemm<'py>(
        &self,
        py: Python<'py>,
        [a, b, c]: [&Bound<'py, PyAny>; 3],
        [alpha, beta]: [&Bound<'py, PyAny>; 2],
        [trans_a, trans_b]: [&Bound<'py, PyAny>; 2],
    ) -> PyResult<(&Arc<Function>, Words)> {
        let (of, [a, b, c]) = self.arrays([("a", a), ("b", b), ("c", c)])?;
        let trans_a = self.trans("trans_a", trans_a, b"NTC")?;
        let trans_b = self.trans("trans_b", trans_b, b"NTC")?;
        let A = self.matrix(&a, false)?;
        let B = self.matrix(&b, false)?;
        let C = self.matrix(&c, true)?;
        let (m, k) = A.after(trans_a);
        let (inner, n) = B.after(trans_b);
        if inner != k {
            return Err(PyValueError::new_err(format!(
                "gemm: op(a) has {k} columns, op(b) {inner} rows"
            )));
        }
        self.check_shape(&c, &[m, n])?;
        let by_rows = C.is_by_rows(true);
        let (a_by_rows, b_by_rows) = (A.is_by_rows(by_rows), B.is_by_rows(by_rows));
        let seen_a = self.seen(of, trans_a, a_by_rows != by_rows)?;
        let seen_b = self.seen(of, trans_b, b_by_rows != by_rows)?;
        let first = (seen_a, m, &a, A.leading(a_by_rows));
        let second = (seen_b, n, &b, B.leading(b_by_rows));
        let (first, second) = if by_rows {
            (second, first)
        } else {
            (first, second)
        };
        let mut out = Writer::new(py, self.typed(py, of)?);
        out.char(first.0);
        out.char(second.0);
        out.int(first.1)?;
        out.int(second.1)?;
        out.int(k)?;
        out.factor(of, alpha)?;
        out.array(of, first.2, false)?;
        out.int(first.3)?;
        out.array(of, second.2, false)?;
        out.int(second.3)?;
        out.factor(of, beta)?;
        out.array(of, &c, true)?;
        out.int(C.leading(by_rows))?;
        Ok(out.done())
    }

    fn syrk<'py>(
        &self,
        py: Python<'py>,
        [a, c]: [&Bound<'py, PyAny>; 2],
        [alpha, beta]: [&Bound<'py, PyAny>; 2],
        lower: &Bound<'py, PyAny>,
        trans: &Bound<'py, PyAny>,
    ) -> PyResult<(&Arc<Function>, Words)> {
        let (of, [a, c]) = self.arrays([("a", a), ("c", c)])?;
        let trans = self.trans("trans", trans, b"NT")?;
        let A = self.matrix(&a, false)?;
        let C = self.matrix(&c, true)?;
        let (n, k) = A.after(trans);
        self.check_shape(&c, &[n, n])?;
        let by_rows = C.is_by_rows(true);
        let a_by_rows = A.is_by_rows(by_rows);
        let seen = self.seen(of, trans, a_by_rows)?;
        let mut out = Writer::new(py, self.typed(py, of)?);
        out.char(triangle(lower.is_truthy()?, by_rows));
        out.char(seen);
        out.int(n)?;
        out.int(k)?;
        out.factor(of, alpha)?;
        out.array(of, &a, false)?;
        out.int(A.leading(a_by_rows))?;
        out.factor(of, beta)?;
        out.array(of, &c, true)?;
        out.int(C.leading(by_rows))?;
        Ok(out.done())
    }

    fn trsm<'py>(
        &self,
        py: Python<'py>,
        [a, b]: [&Bound<'py, PyAny>; 2],
        alpha: &Bound<'py, PyAny>,
        [left, lower, unit]: [&Bound<'py, PyAny>; 3],
        trans: &Bound<'py, PyAny>,
    ) -> PyResult<(&Arc<Function>, Words)> {
        let (of, [a, b]) = self.arrays([("a", a), ("b", b)])?;
        let trans = self.trans("trans", trans, b"NTC")?;
        let A = self.matrix(&a, false)?;
        let B = self.matrix(&b, true)?;
        self.check_square(&a, &A)?;
        let left = left.is_truthy()?;
        let side = if left { B.rows } else { B.columns };
        self.check_shape(&a, &[side, side])?;
        let by_rows = B.is_by_rows(true);
        let a_by_rows = A.is_by_rows(by_rows);
        let (m, n) = if by_rows {
            (B.columns, B.rows)
        } else {
            (B.rows, B.columns)
        };
        let seen = self.seen(of, trans, a_by_rows != by_rows)?;
        let mut out = Writer::new(py, self.typed(py, of)?);
        out.char(if left == by_rows { b'R' } else { b'L' });
        out.char(triangle(lower.is_truthy()?, a_by_rows));
        out.char(seen);
        out.char(if unit.is_truthy()? { b'U' } else { b'N' });
        out.int(m)?;
        out.int(n)?;
        out.factor(of, alpha)?;
        out.array(of, &a, false)?;
        out.int(A.leading(a_by_rows))?;
        out.array(of, &b, true)?;
        out.int(B.leading(by_rows))?;
        Ok(out.done())
    }

    fn potrf<'py>(
        &self,
        py: Python<'py>,
        a: &Bound<'py, PyAny>,
        lower: &Bound<'py, PyAny>,
    ) -> PyResult<(&Arc<Function>, Words)> {
        let (of, [a]) = self.arrays([("a", a)])?;
        let A = self.matrix(&a, true)?;
        self.check_square(&a, &A)?;
        let by_rows = A.is_by_rows(true);
        let mut out = Writer::new(py, self.typed(py, of)?);
        out.char(triangle(lower.is_truthy()?, by_rows));
        out.int(A.rows)?;
        out.array(of, &a, true)?;
        out.int(A.leading(by_rows))?;
        out.info();
        Ok(out.done())
    }

    fn axpy<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        y: &Bound<'py, PyAny>,
        alpha: &Bound<'py, PyAny>,
    ) -> PyResult<(&Arc<Function>, Words)> {
        let (of, [x, y]) = self.arrays([("x", x), ("y", y)])?;
        self.check_writable(&y)?;
        self.check_shape(&x, y.head.shape())?;
        let length = x.head.shape().iter().product();
        let both = |flag| x.head.has(flag) && y.head.has(flag);
        let (step_x, step_y) = if x.head.shape().len() == 1 {
            (self.increment(of, &x)?, self.increment(of, &y)?)
        } else if both(C_CONTIGUOUS) || both(F_CONTIGUOUS) {
            (1, 1)
        } else {
            return Err(PyValueError::new_err(
                "axpy: x and y are no vectors, and not contiguous in the same order",
            ));
        };
        let mut out = Writer::new(py, self.typed(py, of)?);
        out.int(length)?;
        out.factor(of, alpha)?;
        for (array, step, writes) in [(&x, step_x, false), (&y, step_y, true)] {
            // Of a negative increment BLAS wants the lowest address, whence it goes backwards.
            let before = (step.min(0) * (length - 1)).unsigned_abs() * size_of_element(of);
            out.array_from(of, array, writes, before)?;
            out.int(step)?;
        }
        Ok(out.done())
    }

    /// How many elements of a vector are apart.
    fn increment(&self, of: usize, vector: &Array<'_, '_>) -> PyResult<isize> {
        let ([length], [stride]) = (vector.head.shape(), vector.head.strides()) else {
            unreachable!("callers give vectors")
        };
        if *length < 2 {
            return Ok(1);
        }
        let size = size_of_element(of).cast_signed();
        let step = stride / size;
        if stride % size != 0 || (vector.name == "y" && step == 0) {
            return Err(PyValueError::new_err(format!(
                "{}: {} has elements {stride} bytes apart",
                self.name, vector.name
            )));
        }
        Ok(step)
    }

    fn getrf<'py>(
        &self,
        py: Python<'py>,
        a: &Bound<'py, PyAny>,
        pivots: &Bound<'py, PyAny>,
    ) -> PyResult<(&Arc<Function>, Words)> {
        let (of, [a]) = self.arrays([("a", a)])?;
        let A = self.matrix(&a, true)?;
        let integer = Scalar::Signed(4);
        let pivots = self.vector("pivots", pivots, integer, "int32", A.rows.min(A.columns))?;
        let by_rows = A.is_by_rows(false);
        let typed = self.typed(py, of)?;
        let mut out = Writer::new(py, typed);
        out.pointer(typed.called[usize::from(by_rows)]);
        out.int(size_of_element(of).cast_signed())?;
        out.int(by_rows.into())?;
        out.int(A.rows)?;
        out.int(A.columns)?;
        out.array(of, &a, true)?;
        out.int(A.leading(by_rows))?;
        out.pointer_to(integer, &pivots)?;
        out.info();
        Ok(out.done())
    }

    fn geqrf<'py>(
        &self,
        py: Python<'py>,
        a: &Bound<'py, PyAny>,
        tau: &Bound<'py, PyAny>,
    ) -> PyResult<(&Arc<Function>, Words)> {
        let (of, [a]) = self.arrays([("a", a)])?;
        let A = self.matrix(&a, true)?;
        let (letter, scalar) = LETTERS[of];
        let dtype = a.get("dtype")?;
        let tau = self.vector("tau", tau, scalar, &dtype, A.rows.min(A.columns))?;
        let by_rows = A.is_by_rows(false);
        let typed = self.typed(py, of)?;
        let mut out = Writer::new(py, typed);
        out.pointer(typed.called[usize::from(by_rows)]);
        out.char(letter);
        out.int(by_rows.into())?;
        out.int(A.rows)?;
        out.int(A.columns)?;
        out.array(of, &a, true)?;
        out.int(A.leading(by_rows))?;
        out.array(of, &tau, true)?;
        out.info();
        Ok(out.done())
    }

    /// The function of one type; the first call of all imports SciPy.
    fn typed(&self, py: Python<'_>, of: usize) -> PyResult<&Typed> {
        self.typed[of].get_or_try_init(py, || {
            let name = format!("{}{}", char::from(LETTERS[of].0), self.name);
            let (function, by_columns, by_rows): (Bound<'_, NativeFunction>, usize, usize) =
                self.load.bind(py).call1((name,))?.extract()?;
            Ok(Typed {
                function: Arc::clone(function.get().function()),
                called: [by_columns, by_rows],
            })
        })
    }

    /// The arrays of a call and the type that they share.
    fn arrays<'a, 'py, const N: usize>(
        &self,
        given: [(&'static str, &'a Bound<'py, PyAny>); N],
    ) -> PyResult<(usize, [Array<'a, 'py>; N])> {
        let mut found: Option<usize> = None;
        let mut arrays: [Option<Array<'a, 'py>>; N] = [None; N];
        for (slot, (name, object)) in arrays.iter_mut().zip(given) {
            let Some(head) = ArrayHead::of(object)? else {
                return Err(PyTypeError::new_err(format!(
                    "{}: {name} is to be a NumPy array, not {}",
                    self.name,
                    object.get_type().name()?
                )));
            };
            let array = Array { name, object, head };
            let scalar = head.scalar();
            let of = LETTERS.iter().position(|(_, of)| Some(*of) == scalar);
            let wrong = match (of, found) {
                (None, _) => "; there is float32, float64, complex64 and complex128".to_owned(),
                (Some(of), Some(found)) if of != found => format!(", {} is not", given[0].0),
                _ => {
                    found = of;
                    *slot = Some(array);
                    continue;
                }
            };
            return Err(PyTypeError::new_err(format!(
                "{}: {name} is of {}{wrong}",
                self.name,
                array.get("dtype")?
            )));
        }
        let of = found.expect("every routine has arrays");
        Ok((of, arrays.map(|array| array.expect("each was looked at"))))
    }

    fn matrix(&self, array: &Array<'_, '_>, writes: bool) -> PyResult<Matrix> {
        let (&[rows, columns], &[down, right]) = (array.head.shape(), array.head.strides()) else {
            return Err(PyValueError::new_err(format!(
                "{}: {} is to be a matrix, not of shape {}",
                self.name,
                array.name,
                array.get("shape")?
            )));
        };
        if writes {
            self.check_writable(array)?;
        }
        let mut matrix = Matrix {
            rows,
            columns,
            by_rows: 0,
            by_columns: 0,
        };
        if rows == 0 || columns == 0 {
            matrix.by_rows = columns.max(1);
            matrix.by_columns = rows.max(1);
            return Ok(matrix);
        }
        let size = array.element_size();
        let leading = |stride: isize, least: isize| {
            if stride >= least * size && stride % size == 0 {
                stride / size
            } else {
                0
            }
        };
        if columns == 1 || right == size {
            matrix.by_rows = if rows == 1 {
                columns
            } else {
                leading(down, columns)
            };
        }
        if rows == 1 || down == size {
            matrix.by_columns = if columns == 1 {
                rows
            } else {
                leading(right, rows)
            };
        }
        if matrix.by_rows == 0 && matrix.by_columns == 0 {
            return Err(PyValueError::new_err(format!(
                "{}: the elements of {} are adjacent neither along rows nor along columns: shape \
                 {}, strides {}",
                self.name,
                array.name,
                array.get("shape")?,
                array.get("strides")?
            )));
        }
        Ok(matrix)
    }

    /// An array beside the matrix, which is written.
    fn vector<'a, 'py>(
        &self,
        name: &'static str,
        object: &'a Bound<'py, PyAny>,
        scalar: Scalar,
        dtype: &str,
        length: isize,
    ) -> PyResult<Array<'a, 'py>> {
        let array = match ArrayHead::of(object)? {
            Some(head) if head.scalar() == Some(scalar) => Array { name, object, head },
            _ => {
                return Err(PyTypeError::new_err(format!(
                    "{}: {name} is to be an array of {dtype}",
                    self.name
                )));
            }
        };
        self.check_writable(&array)?;
        self.check_shape(&array, &[length])?;
        if !array.head.has(C_CONTIGUOUS) {
            return Err(PyValueError::new_err(format!(
                "{}: {name} is to be contiguous",
                self.name
            )));
        }
        Ok(array)
    }

    fn check_writable(&self, array: &Array<'_, '_>) -> PyResult<()> {
        if array.head.has(WRITEABLE) {
            return Ok(());
        }
        Err(PyValueError::new_err(format!(
            "{}: {} is read-only",
            self.name, array.name
        )))
    }

    fn check_shape(&self, array: &Array<'_, '_>, wanted: &[isize]) -> PyResult<()> {
        if array.head.shape() == wanted {
            return Ok(());
        }
        Err(PyValueError::new_err(format!(
            "{}: {} is of shape {}, the others need {}",
            self.name,
            array.name,
            array.get("shape")?,
            PyTuple::new(array.object.py(), wanted)?
        )))
    }

    fn check_square(&self, array: &Array<'_, '_>, matrix: &Matrix) -> PyResult<()> {
        if matrix.rows == matrix.columns {
            return Ok(());
        }
        Err(PyValueError::new_err(format!(
            "{}: {} is to be square, not of shape {}",
            self.name,
            array.name,
            array.get("shape")?
        )))
    }

    /// A letter for what is to be done with an operand.
    fn trans(&self, name: &str, given: &Bound<'_, PyAny>, allowed: &[u8]) -> PyResult<u8> {
        if let Ok(text) = given.cast::<PyString>()
            && let [letter] = text.to_string_lossy().as_bytes()
            && allowed.contains(letter)
        {
            return Ok(*letter);
        }
        let shown: Vec<String> = allowed
            .iter()
            .map(|letter| format!("'{}'", char::from(*letter)))
            .collect();
        Err(PyValueError::new_err(format!(
            "{}: {name} is one of {}, not {}",
            self.name,
            shown.join(", "),
            given.repr()?
        )))
    }

    /// What Fortran is to do with an operand that it sees transposed, or not.
    fn seen(&self, of: usize, trans: u8, turned: bool) -> PyResult<u8> {
        let is_complex = matches!(LETTERS[of].1, Scalar::Complex(_));
        match trans {
            _ if !turned => Ok(trans),
            b'N' => Ok(b'T'),
            b'C' if is_complex => Err(PyValueError::new_err(format!(
                "{}: one operand is stored by rows and one by columns, so this one would have to \
                 be conjugated and not transposed, which BLAS cannot",
                self.name
            ))),
            _ => Ok(b'N'),
        }
    }
}

fn size_of_element(of: usize) -> usize {
    match LETTERS[of].1 {
        Scalar::Float(size) | Scalar::Complex(size) => size.into(),
        _ => unreachable!("the types of BLAS"),
    }
}

fn triangle(lower: bool, by_rows: bool) -> u8 {
    if lower == by_rows { b'U' } else { b'L' }
}

/// An argument that is an array.
#[derive(Clone, Copy)]
struct Array<'a, 'py> {
    name: &'static str,
    object: &'a Bound<'py, PyAny>,
    head: &'a ArrayHead,
}

impl Array<'_, '_> {
    /// An attribute as text.
    fn get(&self, attribute: &str) -> PyResult<String> {
        Ok(self.object.getattr(attribute)?.str()?.to_string())
    }

    fn element_size(&self) -> isize {
        match self.head.scalar() {
            Some(Scalar::Float(size) | Scalar::Complex(size)) => size.into(),
            _ => unreachable!("looked at before"),
        }
    }
}

/// How a matrix lies in memory.
struct Matrix {
    rows: isize,
    columns: isize,
    /// The leading dimension if it is stored by rows, else 0.
    by_rows: isize,
    /// The same by columns; a vector may be stored both ways.
    by_columns: isize,
}

impl Matrix {
    /// Which way it is taken; `rather` where both are right.
    fn is_by_rows(&self, rather: bool) -> bool {
        if self.by_rows != 0 && self.by_columns != 0 {
            rather
        } else {
            self.by_rows != 0
        }
    }

    fn leading(&self, by_rows: bool) -> isize {
        if by_rows {
            self.by_rows
        } else {
            self.by_columns
        }
    }

    /// Its shape after what is to be done with it.
    fn after(&self, trans: u8) -> (isize, isize) {
        if trans == b'N' {
            (self.rows, self.columns)
        } else {
            (self.columns, self.rows)
        }
    }
}

type Words = SmallVec<[u64; 16]>;

/// Writes the words of a call, parameter after parameter.
struct Writer<'f, 'py> {
    py: Python<'py>,
    function: &'f Arc<Function>,
    words: Words,
    /// Arguments so far.
    number: usize,
}

impl<'f, 'py> Writer<'f, 'py> {
    fn new(py: Python<'py>, typed: &'f Typed) -> Self {
        Self {
            py,
            function: &typed.function,
            words: Words::new(),
            number: 0,
        }
    }

    fn push(&mut self, word: u64) {
        self.words.push(word);
        self.number += 1;
    }

    fn char(&mut self, letter: u8) {
        self.push(word([letter]));
    }

    fn int(&mut self, number: isize) -> PyResult<()> {
        let Ok(int) = i32::try_from(number) else {
            let given = number.into_pyobject(self.py)?;
            let error = range("i4", &given);
            return Err(self.function.wrong(self.py, self.number, &error));
        };
        self.push(word(int.to_ne_bytes()));
        Ok(())
    }

    fn pointer(&mut self, address: usize) {
        self.push(word(address.to_ne_bytes()));
    }

    /// A number of the type of the arrays.
    fn factor(&mut self, of: usize, given: &Bound<'_, PyAny>) -> PyResult<()> {
        let scalar = LETTERS[of].1;
        let mut words = [0; 2];
        convert(scalar, given, &mut words)
            .map_err(|error| self.function.wrong(self.py, self.number, &error))?;
        self.words.extend_from_slice(&words[..scalar.words()]);
        self.number += 1;
        Ok(())
    }

    fn array(&mut self, of: usize, array: &Array<'_, '_>, writes: bool) -> PyResult<()> {
        self.array_from(of, array, writes, 0)
    }

    /// An array, from so many bytes before its first element.
    fn array_from(
        &mut self,
        of: usize,
        array: &Array<'_, '_>,
        writes: bool,
        before: usize,
    ) -> PyResult<()> {
        let address = self.address(LETTERS[of].1, array, writes)?;
        self.pointer(address - before);
        Ok(())
    }

    /// An array of another type, which is written.
    fn pointer_to(&mut self, scalar: Scalar, array: &Array<'_, '_>) -> PyResult<()> {
        let address = self.address(scalar, array, true)?;
        self.pointer(address);
        Ok(())
    }

    fn address(&self, scalar: Scalar, array: &Array<'_, '_>, writes: bool) -> PyResult<usize> {
        checked(array.head, array.object, writes, Some(scalar), Order::Any)
            .map_err(|error| self.function.wrong(self.py, self.number, &error))
    }

    /// Where LAPACK reports; no argument stands for it.
    fn info(&mut self) {
        self.words.push(0);
    }

    fn done(self) -> (&'f Arc<Function>, Words) {
        (self.function, self.words)
    }
}

/// A routine as a Python callable: what a task function of `charioteer.blas` has for `.fn`. Calling
/// it computes at once, detached.
#[pyclass(module = "charioteer._core", frozen)]
pub struct BlasRoutine(Arc<Routine>);

impl BlasRoutine {
    pub fn routine(&self) -> &Arc<Routine> {
        &self.0
    }
}

#[pymethods]
impl BlasRoutine {
    /// `declared` has the name of the routine and its signature, with a default for what may be
    /// given by name alone. `load` gives, for the name of a function of one type, that function and
    /// what an adapter is to call: for matrices by columns, and by rows.
    #[new]
    fn new(declared: &Bound<'_, PyAny>, load: Bound<'_, PyAny>) -> PyResult<Self> {
        let name: String = declared.getattr("__name__")?.extract()?;
        let kind =
            Kind::of(&name).ok_or_else(|| PyValueError::new_err(format!("no routine {name:?}")))?;
        let code = declared.getattr("__code__")?;
        let positional: usize = code.getattr("co_argcount")?.extract()?;
        let by_name: usize = code.getattr("co_kwonlyargcount")?.extract()?;
        let names: Vec<Py<PyString>> = code.getattr("co_varnames")?.extract()?;
        let defaults = declared.getattr("__kwdefaults__")?;
        let parameters = names
            .into_iter()
            .take(positional + by_name)
            .enumerate()
            .map(|(number, name)| {
                let default = if number < positional {
                    None
                } else {
                    Some(defaults.get_item(&name)?.into())
                };
                Ok(Parameter { name, default })
            })
            .collect::<PyResult<_>>()?;
        let name = intern(&name);
        let modes = Signature::read(declared, name)?.map(|modes| {
            let overwritten = matches!(kind, Kind::Gemm).then_some(("c", "beta"));
            Arc::new(modes.of_native(overwritten))
        });
        Ok(Self(Arc::new(Routine {
            kind,
            modes,
            name,
            declared: declared.clone().into(),
            load: load.into(),
            parameters,
            positional,
            typed: [const { PyOnceLock::new() }; LETTERS.len()],
        })))
    }

    #[pyo3(signature = (*arguments, **keywords))]
    fn __call__(
        &self,
        py: Python<'_>,
        arguments: &Bound<'_, PyTuple>,
        keywords: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Py<PyAny>> {
        Callee::Routine(Arc::clone(&self.0)).call(py, arguments, keywords)
    }

    #[getter]
    fn __name__(&self) -> &'static str {
        self.0.name
    }

    #[getter]
    fn __qualname__(&self) -> &'static str {
        self.0.name
    }

    #[getter]
    fn __wrapped__(&self, py: Python<'_>) -> Py<PyAny> {
        self.0.declared.clone_ref(py)
    }

    fn __repr__(&self) -> String {
        format!("<routine {}>", self.0.name)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // As for native functions.
        if Arc::strong_count(&self.0) == 1 {
            visit.call(self.0.declared.get())?;
            visit.call(self.0.load.get())?;
        }
        Ok(())
    }

    #[allow(clippy::unused_self)]
    fn __clear__(&self) {
        // The routine never changes; the containers in a cycle with it are cleared instead.
    }
}

// The adapters.

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
