//! What this module uses from the Python side of the package, imported once.

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyTuple;

/// Names from `charioteer._support`; each is documented there.
pub struct Support {
    pub analyse: Py<PyAny>,
    pub start_thread: Py<PyAny>,
    pub log_callback: Py<PyAny>,
    pub warn: Py<PyAny>,
    pub warn_capture: Py<PyAny>,
    pub normal_placement: Py<PyAny>,
    pub resolve_placement: Py<PyAny>,
    pub read_memory: Py<PyAny>,
    pub read_cost: Py<PyAny>,
    pub read_size: Py<PyAny>,
    pub variants: Py<PyAny>,
    pub variant_decorator: Py<PyAny>,
    pub score: Py<PyAny>,
    pub devices: Py<PyAny>,
    pub each: Py<PyAny>,
    pub limit_thread: Py<PyAny>,
    pub limit_enter: Py<PyAny>,
    pub limit_exit: Py<PyAny>,
    pub refresh_limits: Py<PyAny>,
    pub future: Py<PyAny>,
    pub join_group: Py<PyAny>,
    pub partial: Py<PyAny>,
    pub method: Py<PyAny>,
    pub cancelled_class: Py<PyAny>,
    pub claim_coroutine: Py<PyAny>,
    pub disclaim_coroutine: Py<PyAny>,
    pub loop_: Py<PyAny>,
    pub cuda: Py<PyAny>,
    pub communicator: Py<PyAny>,
    pub kernels: Py<PyAny>,
    pub loaded: Py<PyAny>,
    pub operation_failed: Py<PyAny>,
    pub error: Py<PyAny>,
    pub read_modes: Py<PyAny>,
    pub data: Py<PyAny>,
    pub read_shards: Py<PyAny>,
    pub check_shards: Py<PyAny>,
    pub virtual_array: Py<PyAny>,
}

static SUPPORT: PyOnceLock<Support> = PyOnceLock::new();

pub fn support(py: Python<'_>) -> &'static Support {
    SUPPORT
        .get(py)
        .expect("the package imports its support first")
}

/// Takes the classes and functions of this module out of the counting of references, as the
/// free-threaded 3.13 does with those that are written in Python once there is a second thread: every
/// object counts for its class, so that threads that make handles would meet there. From 3.14 on the
/// interpreter counts references to classes by thread.
#[cfg(all(Py_GIL_DISABLED, not(Py_3_14)))]
fn immortalize(py: Python<'_>) -> PyResult<()> {
    use std::sync::atomic::Ordering;

    for (_, value) in py.import("charioteer._core")?.dict() {
        if value.is_instance_of::<pyo3::types::PyType>()
            || value.is_instance_of::<pyo3::types::PyCFunction>()
        {
            // SAFETY: attached, alive. The module is being imported: no other thread knows its
            // objects. This is what the interpreter itself does, field by field.
            unsafe {
                let object = value.as_ptr();
                (*object).ob_tid = 0;
                (*object).ob_ref_local.store(u32::MAX, Ordering::Relaxed);
                (*object).ob_ref_shared.store(0, Ordering::Relaxed);
            }
        }
    }
    Ok(())
}

/// Called by the package while it is imported.
#[pyfunction]
pub fn connect(py: Python<'_>) -> PyResult<()> {
    #[cfg(all(Py_GIL_DISABLED, not(Py_3_14)))]
    immortalize(py)?;
    let module = py.import("charioteer._support")?;
    let name = |name: &str| module.getattr(name).map(Bound::unbind);
    let support = Support {
        analyse: name("analyse")?,
        start_thread: name("start_thread")?,
        log_callback: name("log_callback")?,
        warn: name("warn")?,
        warn_capture: name("warn_capture")?,
        normal_placement: name("normal_placement")?,
        resolve_placement: name("resolve_placement")?,
        read_memory: name("read_memory")?,
        read_cost: name("read_cost")?,
        read_size: name("read_size")?,
        variants: name("Variants")?,
        variant_decorator: name("variant_decorator")?,
        score: name("score")?,
        devices: name("devices")?,
        each: name("each")?,
        limit_thread: name("limit_thread")?,
        limit_enter: name("limit_enter")?,
        limit_exit: name("limit_exit")?,
        refresh_limits: name("refresh_limits")?,
        future: name("future")?,
        join_group: name("join_group")?,
        partial: name("partial")?,
        method: name("MethodType")?,
        cancelled_class: name("cancelled_class")?,
        claim_coroutine: name("claim_coroutine")?,
        disclaim_coroutine: name("disclaim_coroutine")?,
        loop_: name("loop")?,
        cuda: name("cuda")?,
        communicator: name("communicator")?,
        kernels: name("kernels")?,
        loaded: name("loaded")?,
        operation_failed: name("operation_failed")?,
        error: name("error")?,
        read_modes: name("read_modes")?,
        data: name("data")?,
        read_shards: name("read_shards")?,
        check_shards: name("check_shards")?,
        virtual_array: name("virtual_array")?,
    };
    // Imported a second time by a reload: the first is as good.
    let _ = SUPPORT.set(py, support);
    Ok(())
}

/// The named error `kind` of `charioteer.errors`, made from `arguments`.
pub fn error<'py>(
    py: Python<'py>,
    kind: &str,
    arguments: impl IntoPyObject<'py, Target = PyTuple, Output = Bound<'py, PyTuple>, Error = PyErr>,
) -> PyErr {
    let make = || -> PyResult<PyErr> {
        let arguments = arguments.into_pyobject(py)?;
        let error = support(py).error.bind(py).call1((kind, arguments))?;
        Ok(PyErr::from_value(error))
    };
    make().unwrap_or_else(|error| error)
}
