//! What is known of run times: by function, choice and size, from history.
//!
//! A [`Models`] has a book for each function, by name, a *series* for each choice of a function that was
//! ever offered, and in it an *entry* for each size. Sizes that differ by less than an eighth share an
//! entry, so that there are few however many are asked for.
//!
//! * **An estimate** is the lower median of the last times of the entry, seven at most: a first
//!   call that warms something up, or a run that was preempted, does not move it, and a lasting
//!   change of speed does once it is the majority. Where nothing was measured it is what was
//!   declared (`cost=`); else a power law through the two measured sizes of the series that are
//!   nearest, which is provisional.
//! * **Exploration.** A choice without a declared cost is tried three times for each size before
//!   times decide, and less often if it is hopeless: more than twice as slow as the best one, by two
//!   measured times, or by the power law. Tries are counted when they are decided, so that a thousand
//!   calls at once try no more than one after the other would; a try that measured nothing, since the
//!   task was cancelled, say, is given back.
//! * **Sampling.** The first seven calls of an entry are timed, and later every eighth, so that the one
//!   in use is known to have changed. One that is not used is not timed: it is noticed only when the
//!   one in use has become slower than it was.
//!
//! The document that [`Models::export`] writes is JSON, with a format and a version, keyed by names, so
//! that it survives a restart and can be read by people.
//!
//! Each function has one lock, a leaf: nothing is called and nothing of a user's is dropped under it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use crate::sync::Mutex;

/// How many times an entry keeps.
const RECENT: usize = 7;

/// How often a choice is tried before times decide.
const TRIES: u32 = 3;

/// How many times slower than the best a choice is not tried any more.
const HOPELESS: u64 = 2;

/// Of how many calls of an entry that is known one is timed.
const SAMPLE: u64 = 8;

/// What the document calls itself.
const FORMAT: &str = "charioteer performance models";
const VERSION: u32 = 1;

/// The run times of all functions. Shared by the runtimes that are opened with it.
pub struct Models {
    functions: Mutex<BTreeMap<Arc<str>, Arc<Function>>>,
}

/// The run times of one function.
#[derive(Debug)]
pub(crate) struct Function {
    name: Arc<str>,
    book: Mutex<Book>,
}

#[derive(Debug, Default)]
struct Book {
    /// In the order in which they were first offered; never removed, so that an index stays good.
    series: Vec<Series>,
}

/// The run times of one choice.
#[derive(Debug)]
struct Series {
    choice: Arc<str>,
    /// By the eighth of an octave that the size is in.
    entries: BTreeMap<u32, Entry>,
}

#[derive(Clone, Debug, Default)]
struct Entry {
    /// The size that was seen first.
    size: u64,
    /// The last times, in nanoseconds, oldest first.
    recent: SmallVec<[u64; RECENT]>,
    /// How many were measured.
    timed: u64,
    /// Calls that are timed and measured nothing, yet or for good.
    outstanding: usize,
    /// How many calls ran, timed or not.
    calls: u64,
    /// How many calls were made to try it.
    tried: u32,
}

/// What is known of one function, choice and size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// The function's name.
    pub function: Arc<str>,
    /// The choice: the variant's label, if it has one, and the set's kinds and numbers.
    pub choice: Arc<str>,
    /// A size; others that differ by less than an eighth are counted with it.
    pub size: u64,
    /// Calls that ran, timed or not.
    pub calls: u64,
    /// Calls that were timed.
    pub timed: u64,
    /// Calls that were made to try the choice.
    pub explored: u32,
    /// The estimated run time; none before the first time is measured.
    pub estimate: Option<Duration>,
}

/// Why a document is refused. Nothing of it was taken over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelError {
    /// It is no such document, or a damaged one: what is wrong, and where.
    Damaged(String),
    /// It is of a version that this one does not know.
    Version(u32),
}

impl fmt::Display for ModelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Damaged(why) => write!(f, "these are no performance models: {why}"),
            Self::Version(version) => write!(
                f,
                "these are performance models of version {version}, and this is version {VERSION}"
            ),
        }
    }
}

impl std::error::Error for ModelError {}

/// What is looked at before the rest, which another version may write in another way.
#[derive(Deserialize)]
struct Head {
    format: String,
    version: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    format: String,
    version: u32,
    functions: BTreeMap<String, BTreeMap<String, Vec<Record>>>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    size: u64,
    calls: u64,
    timed: u64,
    explored: u32,
    /// The last times, oldest first.
    nanoseconds: Vec<u64>,
}

/// The eighth of an octave that a size is in; sizes up to 16 have one each.
fn step(size: u64) -> u32 {
    if size < 16 {
        return size as u32; // it is small
    }
    let octave = size.ilog2();
    // The three bits behind the first.
    let eighth = (size >> (octave - 3)) as u32 & 7;
    octave * 8 + eighth - 16
}

impl Entry {
    /// The lower median.
    fn median(&self) -> Option<u64> {
        let mut times = self.recent.clone();
        times.sort_unstable();
        times.get(times.len().checked_sub(1)? / 2).copied()
    }
}

impl Series {
    fn entry(&mut self, size: u64) -> &mut Entry {
        self.entries.entry(step(size)).or_insert_with(|| Entry {
            size,
            ..Entry::default()
        })
    }

    fn measured(&self, size: u64) -> Option<u64> {
        self.entries.get(&step(size))?.median()
    }

    /// By a power law through the nearest two sizes that were measured.
    fn provisional(&self, size: u64) -> Option<u64> {
        let known = |(_, entry): (&u32, &Entry)| {
            let time = entry.median()?;
            (entry.size > 0 && time > 0).then_some((entry.size, time))
        };
        if size == 0 {
            return None;
        }
        let at = step(size);
        let mut below = self.entries.range(..at).rev().filter_map(known);
        let mut above = self.entries.range(at + 1..).filter_map(known);
        let (one, other) = match (below.next(), above.next()) {
            (Some(one), Some(other)) => (one, other),
            (Some(one), None) => (below.next()?, one),
            (None, Some(one)) => (one, above.next()?),
            (None, None) => return None,
        };
        #[allow(clippy::cast_precision_loss, reason = "an estimate")]
        let log = |number: u64| (number as f64).ln();
        // Noise between sizes that lie close together makes no steeper law than any algorithm has.
        let slope = (log(other.1) - log(one.1)) / (log(other.0) - log(one.0));
        let slope = slope.clamp(0.0, 4.0);
        let nearest = if size.abs_diff(one.0) < size.abs_diff(other.0) {
            one
        } else {
            other
        };
        let time = (log(nearest.1) + slope * (log(size) - log(nearest.0))).exp();
        // The cast saturates.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        Some(time as u64)
    }
}

/// What times say of the choices of one call.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Advice {
    /// The choice that is to be tried, by its place.
    pub(crate) explore: Option<usize>,
    /// In nanoseconds, in order; none where nothing is known.
    pub(crate) estimates: SmallVec<[Option<u64>; 4]>,
}

impl Function {
    fn new(name: Arc<str>) -> Self {
        Self {
            name,
            book: Mutex::new(Book::default()),
        }
    }

    pub(crate) fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// The index of a choice, which is offered from now on.
    pub(crate) fn series(&self, choice: &str) -> usize {
        self.book.lock().series(choice)
    }

    /// What is known of these choices, each by its index and what was declared of it. Where one is to be
    /// tried, the try is counted.
    pub(crate) fn advise(
        &self,
        size: u64,
        choices: impl Iterator<Item = (usize, Option<u64>)> + Clone,
        explores: bool,
    ) -> Advice {
        let mut book = self.book.lock();
        let estimates: SmallVec<[Option<u64>; 4]> = choices
            .clone()
            .map(|(index, cost)| {
                let series = &book.series[index];
                series
                    .measured(size)
                    .or(cost)
                    .or_else(|| series.provisional(size))
            })
            .collect();
        let mut explore = None;
        if explores && estimates.len() > 1 {
            let best = estimates.iter().flatten().min().copied();
            // Of those that were tried equally often the one that was offered first.
            let mut least = (TRIES, 0);
            for (place, (index, cost)) in choices.clone().enumerate() {
                let entry = book.series[index].entries.get(&step(size));
                let tried = entry.map_or(0, |entry| entry.tried);
                // One time alone may be that of a warm-up.
                let once = entry.is_some_and(|entry| entry.recent.len() == 1);
                let hopeless = !once
                    && best
                        .zip(estimates[place])
                        .is_some_and(|(best, own)| own > best.saturating_mul(HOPELESS));
                if cost.is_none() && (tried, index) < least && !hopeless {
                    least = (tried, index);
                    explore = Some(place);
                }
            }
            if let Some((index, _)) = explore.and_then(|place| choices.clone().nth(place)) {
                book.series[index].entry(size).tried += 1;
            }
        }
        Advice { explore, estimates }
    }

    /// A try measured nothing.
    pub(crate) fn give_back(&self, series: usize, size: u64) {
        let mut book = self.book.lock();
        let entry = book.series[series].entry(size);
        entry.tried = entry.tried.saturating_sub(1);
    }

    /// A call of the choice is about to run: whether it is to be timed.
    pub(crate) fn begin(&self, series: usize, size: u64) -> bool {
        let mut book = self.book.lock();
        let entry = book.series[series].entry(size);
        entry.calls += 1;
        let timed =
            entry.recent.len() + entry.outstanding < RECENT || entry.calls.is_multiple_of(SAMPLE);
        entry.outstanding += usize::from(timed);
        timed
    }

    /// A call took so long.
    pub(crate) fn record(&self, series: usize, size: u64, nanoseconds: u64) {
        let mut book = self.book.lock();
        let entry = book.series[series].entry(size);
        if entry.recent.len() == RECENT {
            entry.recent.remove(0);
        }
        entry.recent.push(nanoseconds);
        entry.timed += 1;
        entry.outstanding = entry.outstanding.saturating_sub(1);
    }
}

impl Book {
    fn series(&mut self, choice: &str) -> usize {
        if let Some(index) = self.series.iter().position(|it| &*it.choice == choice) {
            return index;
        }
        self.series.push(Series {
            choice: choice.into(),
            entries: BTreeMap::new(),
        });
        self.series.len() - 1
    }
}

impl Default for Models {
    fn default() -> Self {
        Self::new()
    }
}

impl Models {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            functions: Mutex::new(BTreeMap::new()),
        }
    }

    pub(crate) fn function(&self, name: &str) -> Arc<Function> {
        let mut functions = self.functions.lock();
        if let Some(function) = functions.get(name) {
            return Arc::clone(function);
        }
        let name: Arc<str> = name.into();
        let function = Arc::new(Function::new(Arc::clone(&name)));
        functions.insert(name, Arc::clone(&function));
        function
    }

    fn all(&self) -> Vec<Arc<Function>> {
        self.functions.lock().values().cloned().collect()
    }

    /// What is known, by function, choice and size.
    #[must_use]
    pub fn known(&self) -> Vec<Known> {
        let mut known = Vec::new();
        for function in self.all() {
            let book = function.book.lock();
            let mut series: Vec<_> = book.series.iter().collect();
            series.sort_by_key(|series| &series.choice);
            for series in series {
                known.extend(series.entries.values().map(|entry| Known {
                    function: Arc::clone(&function.name),
                    choice: Arc::clone(&series.choice),
                    size: entry.size,
                    calls: entry.calls,
                    timed: entry.timed,
                    explored: entry.tried,
                    estimate: entry.median().map(Duration::from_nanos),
                }));
            }
        }
        known
    }

    /// All of it as a document of its own format, JSON for people too. What was never timed is left out.
    ///
    /// # Panics
    /// Never: there is nothing in it that JSON could not say.
    #[must_use]
    pub fn export(&self) -> String {
        let mut functions = BTreeMap::new();
        for function in self.all() {
            let book = function.book.lock();
            let mut choices = BTreeMap::new();
            for series in &book.series {
                let records: Vec<Record> = series
                    .entries
                    .values()
                    .filter(|entry| !entry.recent.is_empty())
                    .map(|entry| Record {
                        size: entry.size,
                        calls: entry.calls,
                        timed: entry.timed,
                        explored: entry.tried,
                        nanoseconds: entry.recent.to_vec(),
                    })
                    .collect();
                if !records.is_empty() {
                    choices.insert(series.choice.to_string(), records);
                }
            }
            if !choices.is_empty() {
                functions.insert(function.name.to_string(), choices);
            }
        }
        let document = Document {
            format: FORMAT.to_owned(),
            version: VERSION,
            functions,
        };
        serde_json::to_string_pretty(&document).expect("names and numbers are JSON")
    }

    /// Takes over what [`export`](Self::export) wrote. Where both know a function, a choice and a size,
    /// what was measured here stays.
    ///
    /// # Errors
    /// [`ModelError`].
    pub fn import(&self, document: &str) -> Result<(), ModelError> {
        let damaged = |error: serde_json::Error| ModelError::Damaged(error.to_string());
        let head: Head = serde_json::from_str(document).map_err(damaged)?;
        if head.format != FORMAT {
            let why = format!("the format is {:?}, not {FORMAT:?}", head.format);
            return Err(ModelError::Damaged(why));
        }
        if head.version != VERSION {
            return Err(ModelError::Version(head.version));
        }
        let document: Document = serde_json::from_str(document).map_err(damaged)?;
        let records = document.functions.iter().flat_map(|(function, choices)| {
            let choices = choices.iter();
            choices.flat_map(move |(choice, records)| {
                records.iter().map(move |record| (function, choice, record))
            })
        });
        for (function, choice, record) in records.clone() {
            let times = record.nanoseconds.len();
            if times == 0 || times > RECENT || record.timed < times as u64 {
                return Err(ModelError::Damaged(format!(
                    "{function:?}, {choice:?}, size {}: {times} times of {} that were timed",
                    record.size, record.timed
                )));
            }
        }
        for (function, choice, record) in records {
            let function = self.function(function);
            let mut book = function.book.lock();
            let index = book.series(choice);
            let entry = book.series[index].entry(record.size);
            if entry.recent.is_empty() {
                entry.size = record.size;
                entry.recent = record.nanoseconds.iter().copied().collect();
                entry.timed += record.timed;
                entry.calls += record.calls;
                entry.tried = entry.tried.saturating_add(record.explored);
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Models {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.known()).finish()
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
