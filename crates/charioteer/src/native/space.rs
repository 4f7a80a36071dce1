//! Task spaces: tasks by index, each made on first touch.

use std::collections::HashMap;
use std::sync::Arc;

use super::Task;
use super::domain::{Label, Native};
use crate::sync::Mutex;
use crate::task::{Task as Cell, TaskRef};

/// An index of `N` dimensions whose elements are tasks that give a `T`. It keeps its tasks, and so
/// their results, while it lives.
pub struct TaskSpace<T, const N: usize> {
    name: Arc<str>,
    tasks: Mutex<HashMap<[i64; N], TaskRef<Native>>>,
    value: std::marker::PhantomData<fn() -> T>,
}

impl<T, const N: usize> TaskSpace<T, N> {
    /// An empty space; the name is for people.
    #[must_use]
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self {
            name: name.into(),
            tasks: Mutex::new(HashMap::new()),
            value: std::marker::PhantomData,
        }
    }

    /// The task at `index`, whether it has been spawned or not.
    #[must_use]
    pub fn at(&self, index: [i64; N]) -> Task<T> {
        let task = Arc::clone(self.tasks.lock().entry(index).or_insert_with(|| {
            let label = Label::Index(Arc::clone(&self.name), Box::new(index));
            Arc::new(Cell::unspawned(label))
        }));
        Task::new(task)
    }

    /// The tasks touched so far, in no particular order.
    #[must_use]
    pub fn touched(&self) -> Vec<Task<T>> {
        let tasks: Vec<_> = self.tasks.lock().values().cloned().collect();
        tasks.into_iter().map(Task::new).collect()
    }
}
