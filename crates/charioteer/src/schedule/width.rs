//! How wide the [`gate`](super::gate) should be: a controller for domains whose sessions exclude
//! each other in part, as threads that are attached to a Python with a GIL do.
//!
//! # What is measured
//!
//! The *rate*: how many seconds of processor time the threads in sessions use up in a second, all
//! together. It is known without a look into bodies, also in the middle of long ones, and it is
//! progress: a thread that waits for the GIL uses no processor time. (Hand-overs use some, a few per
//! cent; the thresholds leave room for that.)
//!
//! # How it decides
//!
//! A measurement counts if the gate was full all the time: as many threads inside as may be. With
//! width `w` and rate `r`:
//!
//! * `r` well below `w`: the threads wait for something. If that is the GIL, `r` threads' worth of
//!   bodies is all that it lets through, and a width a little above `r` lets just as much through,
//!   with fewer hand-overs and shorter queues. So the width shrinks to [`SLACK`] times `r`, and not
//!   below a quarter at once; where it is as narrow as that and they still wait ([`FINE`], [`SPARE`]), by
//!   one. If the rate falls by that, it was not the GIL that they waited for (they sleep, or wait for a
//!   socket): the width goes back, the next try has to wait, and meanwhile it may grow.
//! * `r` below one half: nobody holds the GIL for long, and the gate is opened.
//! * `r` close to `w`: every thread makes progress, and more might as well. The width grows, and
//!   faster as long as that pays off. If the rate does not grow with it, the width goes back, and
//!   the next try has to wait.
//!
//! # What it compares with
//!
//! One measurement is of two milliseconds, and is off by a tenth where the system or another machine on
//! the same host takes a processor away for some of that time. So what is known of a width is the *level*:
//! the mean of the last [`MEAN`] measurements at it. A trial is begun for the level, and judged against
//! it. If it were begun for one measurement and judged against that, chance would begin it and then make
//! it look like a success: the low ones are those that make the gate narrower, and what follows a low one
//! is as a rule better, whatever the width; so the gate would drift to where it is too narrow, and the high
//! ones, after which it should be wider, would make that fail. And it does not shrink after the first
//! measurement at a width, or unless the last one says so too: after a change all begin at once, and get
//! in each other's way until they are out of step.
//!
//! # What it remembers
//!
//! Threads may be held up for some milliseconds by what their bodies have no part in: the system, another
//! machine on the same host, or each other, since who finds the GIL taken sleeps, and where all do every
//! hand-over has to wake somebody. The rate falls to a third or less then, just as it does when other
//! work begins that holds the GIL for longer, and the width shrinks for it, to a quarter. To grow back
//! step by step takes several times as long as the fall did, or never ends: what nearly all make progress
//! with is a reason for neither more nor fewer. So the width from which the rate fell is remembered, and tried
//! in one step as soon as those inside do not wait any more ([`FINE`]). That is a trial as any other, made
//! once for each fall. One thread alone never waits, so it says nothing.
//!
//! # Why it does not oscillate
//!
//! Every change is a trial against the level before it, and one that does not pay off is taken back
//! after one measurement: the first for which all who were let in are inside, since before that their
//! time is not in the rate, or not all of it. If that takes longer than [`ENTERING`] measurements,
//! there are too few tasks for a judgement, and the wider of the two widths stays. After a trial that
//! failed the width rests for a number of measurements that doubles with each failure, and is halved
//! by a success. It has rested enough when a measurement is far from the level: that is other work
//! ([`OTHER`]), and the level begins anew. So while the work is the same, what wrong trials cost is
//! bounded: a trial lasts one measurement, or [`ENTERING`] more, in each [`PATIENCE`], and costs only as
//! much as its width is worse. A narrower gate has to give as much as the one before, a wider one more;
//! what gives the same stays narrow.
//!
//! That a limit on the threads in a critical section raises its throughput is from Dice and Kogan,
//! *Malthusian Locks* (EuroSys 2017); climbing by trials of the measured throughput is what thread
//! pools do, as in Hellerstein et al., *Optimizing concurrency levels in the .NET ThreadPool* (2008).

/// Threads to a unit of rate that keep the GIL busy although they are not in step.
const SLACK: f64 = 1.45;
/// Below this part of the width so many of the threads inside wait for something that one fewer may do
/// as well. Where fewer wait, one fewer costs more than hand-overs do.
const FINE: f64 = 0.8;
/// How many threads have to wait at a time for that: what one fewer leaves undone, another has to do.
const SPARE: f64 = 1.0;
/// Above this part of the width, every thread inside makes progress.
const BUSY: f64 = 0.9;
/// How many measurements the mean is of at most.
const MEAN: u32 = 8;
/// From how many measurements on at one width it may shrink.
const SURE: u32 = 2;
/// Below this rate it is not the GIL that threads wait for: who holds it uses a processor up. What
/// little there is to measure then would be noise.
const IDLE: f64 = 0.5;
/// What has to be left of the rate when the width shrinks.
const KEPT: f64 = 0.93;
/// The gain in rate, relative to the growth of the width, that is worth a wider gate.
const WORTH: f64 = 0.15;
/// The gain at which the next growth is larger.
const WELL_WORTH: f64 = 0.7;
/// How many measurements rest after trials that failed, at most.
const PATIENCE: u32 = 32;
/// The change of the rate at the same width that makes it other work, of which nothing is known.
const OTHER: f64 = 1.4;

/// How many measurements a trial waits for threads that are coming in: where all wait for the GIL,
/// they do so one at a time.
const ENTERING: u32 = 3;

#[derive(Clone, Copy, Debug, PartialEq)]
struct Trial {
    from: usize,
    level: Level,
    /// The rate that is worth a narrower gate.
    kept: f64,
    /// Measurements for which threads may still come in.
    patience: u32,
}

/// What is known of the rate at a width.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Level {
    mean: f64,
    /// How many measurements it is the mean of, up to [`MEAN`].
    count: u32,
}

impl Level {
    fn of(rate: f64) -> Self {
        Self {
            mean: rate,
            count: 1,
        }
    }

    fn and(self, rate: f64) -> Self {
        let count = (self.count + 1).min(MEAN);
        Self {
            mean: self.mean + (rate - self.mean) / f64::from(count),
            count,
        }
    }

    /// Whether a rate is that of other work.
    fn is_far_from(self, rate: f64) -> bool {
        rate > OTHER * self.mean || self.mean > OTHER * rate
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Width {
    most: usize,
    width: usize,
    trial: Option<Trial>,
    /// How much the next growth adds.
    step: usize,
    /// Measurements left before the width may shrink or grow, and how many it will be next time.
    shrink_rest: (u32, u32),
    grow_rest: (u32, u32),
    /// What was measured at this width.
    level: Option<Level>,
    /// The width from which the rate fell, until it is tried again.
    before: Option<usize>,
}

impl Width {
    /// Starts with `most` threads, and lets never more in.
    #[must_use]
    pub fn new(most: usize) -> Self {
        let most = most.max(1);
        Self {
            most,
            width: most,
            trial: None,
            step: 1,
            shrink_rest: (0, 1),
            grow_rest: (0, 1),
            level: None,
            before: None,
        }
    }

    /// The width now.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// What was measured now says nothing, and nothing of the trial that is under way: others take part
    /// that are not in sessions. Gives the width from now on, which is the one before the trial.
    pub fn disturbed(&mut self) -> usize {
        if let Some(trial) = self.trial.take() {
            self.width = trial.from;
        }
        self.level = None;
        self.width
    }

    /// Takes a measurement, and gives the width from now on. `rate`: seconds of processor time in a
    /// second; `inside`: the least and the most threads that were seen inside meanwhile.
    pub fn measured(&mut self, rate: f64, inside: (usize, usize)) -> usize {
        if rate < IDLE && inside.1 >= self.width {
            // Also where some have still to leave: they may wait for somebody who has no room.
            self.trial = None;
            self.level = None;
            self.before = None;
            self.width = self.most;
            return self.width;
        }
        if inside.1 > self.width {
            // Some have still to leave.
            return self.width;
        }
        if inside.0 < self.width {
            // Too few tasks for this width, or threads that are still coming in: nothing can be said
            // of it, and a trial is neither good nor bad.
            match &mut self.trial {
                Some(trial) if trial.patience != 0 => trial.patience -= 1,
                Some(trial) => {
                    if self.width < trial.from {
                        self.width = trial.from;
                        self.level = Some(trial.level);
                    } else {
                        self.forget();
                    }
                    self.trial = None;
                }
                None => {}
            }
            return self.width;
        }
        self.shrink_rest.0 = self.shrink_rest.0.saturating_sub(1);
        self.grow_rest.0 = self.grow_rest.0.saturating_sub(1);
        let level = match self.trial.take() {
            Some(trial) => {
                if !self.judge(&trial, rate) {
                    self.level = Some(trial.level);
                    return self.width;
                }
                Level::of(rate)
            }
            None => match self.level {
                Some(level) if level.is_far_from(rate) => {
                    (self.shrink_rest, self.grow_rest) = ((0, 1), (0, 1));
                    if rate < level.mean {
                        self.before = self.before.max(Some(self.width));
                    } else {
                        // It is over, and the width did not shrink for it.
                        self.forget();
                    }
                    Level::of(rate)
                }
                Some(level) => level.and(rate),
                None => Level::of(rate),
            },
        };
        self.level = Some(level);
        self.try_another(level, rate);
        self.width
    }

    /// Whether a trial paid off; takes it back if not.
    fn judge(&mut self, trial: &Trial, rate: f64) -> bool {
        let rest = |(_, next): (u32, u32)| (next, (2 * next).min(PATIENCE));
        let eased = |(_, next): (u32, u32)| (0, (next / 2).max(1));
        if self.width < trial.from {
            let paid = rate >= trial.kept;
            if paid {
                self.shrink_rest = eased(self.shrink_rest);
            } else {
                self.width = trial.from;
                self.shrink_rest = rest(self.shrink_rest);
            }
            return paid;
        }
        self.forget();
        let growth = self.width as f64 / trial.from as f64 - 1.0;
        let gain = rate / trial.level.mean - 1.0;
        let paid = gain >= WORTH * growth;
        if !paid {
            self.width = trial.from;
            self.grow_rest = rest(self.grow_rest);
            self.step = 1;
        } else {
            self.grow_rest = eased(self.grow_rest);
            self.step = if gain < WELL_WORTH * growth {
                1
            } else {
                2 * self.step
            };
        }
        paid
    }

    /// The width before a fall need not be tried any more, if it is as wide as that.
    fn forget(&mut self) {
        self.before = self.before.filter(|&before| before > self.width);
    }

    /// Begins a trial, if one may pay off. `last`: what was measured last.
    fn try_another(&mut self, level: Level, last: f64) {
        let from = self.width;
        let (narrower, kept) = Self::narrower(from, level.mean, last);
        let waiting = narrower < from;
        if waiting && self.shrink_rest.0 == 0 {
            if level.count < SURE {
                return;
            }
            self.width = narrower;
        } else if let Some(before) = self
            .before
            .filter(|&before| !waiting && 1 < from && from < before)
        {
            self.width = before;
        } else if (waiting || from == 1 || level.mean > BUSY * from as f64) && self.grow_rest.0 == 0
        {
            // Also what waits, where narrower is worse or cannot be: if it is not the GIL that it waits
            // for, there can never be too many.
            self.width = (from + self.step).min(self.most);
        }
        if self.width != from {
            self.level = None;
            self.trial = Some(Trial {
                from,
                level,
                kept,
                patience: ENTERING,
            });
        }
    }

    /// The width that should be as good, `from` if there is none, and the rate that it has to keep.
    fn narrower(from: usize, mean: f64, last: f64) -> (usize, f64) {
        let rate = mean.max(last);
        // Widths are small numbers, so the casts are exact enough.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let enough = (SLACK * rate).round() as usize;
        let narrower = enough.max(from / 4).max(1);
        if narrower < from {
            (narrower, KEPT * mean)
        } else if rate < FINE * from as f64 && from as f64 - rate > SPARE {
            // Fewer than should be needed: not for less.
            ((from - 1).max(1), mean)
        } else {
            (from, mean)
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    /// Rates by width, of bodies of 1 ms of which a share holds the GIL, in slices: measured on 16
    /// cores with CPython 3.12.3, as the efficiency of 1,000 tasks times the ideal.
    const WIDTHS: [f64; 10] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0];
    const FREE: Rates = [1.00, 1.98, 2.96, 3.92, 4.90, 5.88, 7.76, 9.76, 11.60, 14.88];
    const FREE_SLICES_10: Rates = [0.98, 1.96, 2.93, 3.89, 4.84, 5.80, 7.70, 9.50, 11.20, 14.30];
    const SHARE_5_SLICES_1: Rates = [0.99, 1.97, 2.93, 3.89, 4.83, 5.78, 7.68, 9.44, 11.36, 13.76];
    const SHARE_5_SLICES_10: Rates = [0.98, 1.92, 2.88, 3.84, 4.64, 5.60, 6.88, 6.40, 6.56, 6.40];
    const SHARE_20_SLICES_1: Rates = [1.00, 1.95, 2.90, 3.85, 4.54, 4.20, 4.05, 4.05, 4.05, 3.95];
    const SHARE_20_SLICES_10: Rates = [0.98, 1.90, 2.85, 3.25, 3.15, 3.15, 3.10, 2.70, 2.65, 2.60];
    const SHARE_20_SLICES_100: Rates = [0.90, 1.50, 1.05, 0.95, 0.90, 1.00, 0.95, 0.85, 1.00, 0.90];
    const SHARE_50_SLICES_1: Rates = [1.00, 1.92, 1.80, 1.80, 1.80, 1.80, 1.78, 1.76, 1.76, 1.78];
    const SHARE_50_SLICES_10: Rates = [0.98, 1.60, 1.62, 1.60, 1.42, 1.40, 1.30, 1.28, 1.24, 1.18];
    const HELD: Rates = [0.99, 1.01, 1.01, 1.01, 1.01, 1.01, 1.01, 1.01, 1.01, 1.01];
    const ASLEEP: Rates = [
        0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.08,
    ];
    type Rates = [f64; 10];

    fn at(rates: &Rates, width: usize) -> f64 {
        let width = width as f64;
        let next = WIDTHS.iter().position(|other| *other >= width).unwrap();
        if next == 0 {
            return rates[0];
        }
        let (low, high) = (WIDTHS[next - 1], WIDTHS[next]);
        let part = (width - low) / (high - low);
        rates[next - 1] + part * (rates[next] - rates[next - 1])
    }

    fn best(rates: &Rates) -> f64 {
        rates.iter().copied().fold(0.0, f64::max)
    }

    /// The mean rate of `measurements`, each with up to `noise` of error.
    fn run(width: &mut Width, rates: &Rates, measurements: u32, noise: f64) -> f64 {
        run_from(1, width, rates, measurements, noise)
    }

    /// The same, with an error of its own for each `seed`.
    fn run_from(seed: u64, width: &mut Width, rates: &Rates, measurements: u32, noise: f64) -> f64 {
        let mut random = seed;
        let mut sum = 0.0;
        for _ in 0..measurements {
            let now = width.width();
            let rate = at(rates, now);
            sum += rate;
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let error = noise * ((random >> 33) as f64 / f64::from(1_u32 << 30) - 1.0);
            width.measured(rate * (1.0 + error), (now, now));
        }
        sum / f64::from(measurements)
    }

    const ALL: [(&str, &Rates); 11] = [
        ("free", &FREE),
        ("free, 10 slices", &FREE_SLICES_10),
        ("5 %, 1 slice", &SHARE_5_SLICES_1),
        ("5 %, 10 slices", &SHARE_5_SLICES_10),
        ("20 %, 1 slice", &SHARE_20_SLICES_1),
        ("20 %, 10 slices", &SHARE_20_SLICES_10),
        ("20 %, 100 slices", &SHARE_20_SLICES_100),
        ("50 %, 1 slice", &SHARE_50_SLICES_1),
        ("50 %, 10 slices", &SHARE_50_SLICES_10),
        ("held", &HELD),
        ("asleep", &ASLEEP),
    ];

    /// Measures that rate at a full gate until it is known.
    fn settle(width: &mut Width, rate: f64) -> usize {
        let inside = width.width();
        for _ in 0..SURE {
            width.measured(rate, (inside, inside));
        }
        width.width()
    }

    #[test]
    fn it_comes_close_to_the_best_width() {
        for (name, rates) in ALL {
            for noise in if name == "asleep" {
                [0.0, 1.0, 4.0, 4.0]
            } else {
                [0.0, 0.02, 0.05, 0.1]
            } {
                let mut width = Width::new(16);
                run(&mut width, rates, 20, noise);
                let mean = run(&mut width, rates, 1000, noise);
                let part = mean / best(rates);
                assert!(part > 0.95, "{name}, noise {noise}: {part:.3} of the best");
            }
        }
    }

    #[test]
    fn chance_makes_it_no_narrower() {
        // As long as a run of the study, from its first measurement on.
        for (name, rates) in [
            ("free", &FREE),
            ("free, 10 slices", &FREE_SLICES_10),
            ("5 %, 1 slice", &SHARE_5_SLICES_1),
        ] {
            for noise in [0.05, 0.1, 0.15] {
                let seeds = 1..=100;
                let mean = seeds.clone().map(|seed| {
                    let mut width = Width::new(16);
                    run_from(seed, &mut width, rates, 31, noise)
                });
                let part = mean.sum::<f64>() / seeds.count() as f64 / best(rates);
                assert!(part > 0.985, "{name}, noise {noise}: {part:.3} of the best");
            }
        }
    }

    #[test]
    fn one_measurement_makes_it_no_narrower() {
        let mut width = Width::new(16);
        assert_eq!(width.measured(8.0, (16, 16)), 16, "all begin at once");
        for rate in [13.0, 15.0, 15.0, 15.0, 9.0, 15.0, 15.0, 7.0, 15.0, 15.0] {
            assert_eq!(width.measured(rate, (16, 16)), 16);
        }
        // Two say that it is other work.
        assert_eq!(width.measured(4.0, (16, 16)), 16);
        assert_eq!(width.measured(4.0, (16, 16)), 6);
    }

    /// A width of 11 that was found, after a fall of the rate that made it shrink to 4.
    fn fallen() -> Width {
        let mut width = Width::new(16);
        assert_eq!(settle(&mut width, 7.6), 11);
        assert_eq!(width.measured(9.3, (11, 11)), 11);
        assert_eq!(width.measured(9.3, (11, 11)), 11);
        assert_eq!(width.measured(2.9, (11, 11)), 11);
        assert_eq!(width.measured(2.1, (11, 11)), 4);
        width
    }

    #[test]
    fn after_a_fall_the_width_before_it_is_tried_in_one_step() {
        let mut width = fallen();
        assert_eq!(width.measured(2.6, (4, 4)), 4, "those inside still wait");
        assert_eq!(width.measured(3.9, (4, 4)), 11);
        assert_eq!(width.disturbed(), 4);
        assert_eq!(width.measured(3.9, (4, 4)), 11, "again");
        assert_eq!(width.measured(3.9, (4, 11)), 11, "they are coming in");
        for _ in 0..20 {
            assert_eq!(width.measured(9.3, (11, 11)), 11);
        }
    }

    #[test]
    fn a_fall_within_a_fall_leaves_the_first_width_to_be_tried() {
        let mut width = fallen();
        assert_eq!(width.measured(2.6, (4, 4)), 4);
        assert_eq!(width.measured(1.2, (4, 4)), 4);
        assert_eq!(width.measured(1.2, (4, 4)), 2);
        assert_eq!(width.measured(1.9, (2, 2)), 11);
    }

    #[test]
    fn what_fell_for_good_is_tried_once_at_the_width_before() {
        let mut width = fallen();
        assert_eq!(width.measured(3.4, (4, 4)), 11);
        assert_eq!(width.measured(3.0, (11, 11)), 4, "it did not pay off");
        for _ in 0..100 {
            let now = width.width();
            assert!(now <= 5, "{now}");
            width.measured(if now == 4 { 3.4 } else { 3.2 }, (now, now));
        }
    }

    #[test]
    fn a_fall_that_is_over_at_once_leaves_nothing_to_be_tried() {
        let mut width = Width::new(16);
        assert_eq!(settle(&mut width, 15.0), 16);
        assert_eq!(width.measured(4.0, (16, 16)), 16);
        assert_eq!(width.measured(15.0, (16, 16)), 16);
        assert_eq!(width.before, None);
    }

    #[test]
    fn one_alone_says_nothing_of_the_width_before_a_fall() {
        let mut width = Width::new(16);
        assert_eq!(settle(&mut width, 15.0), 16);
        // Bytecode begins: one at a time, whatever the width.
        for _ in 0..1000 {
            let now = width.width();
            width.measured(1.0, (now, now));
        }
        let mut widths = Vec::new();
        for _ in 0..1000 {
            let now = width.width();
            widths.push(now);
            width.measured(1.0, (now, now));
        }
        assert!(widths.iter().all(|&now| now <= 2), "{widths:?}");
    }

    #[test]
    fn what_holds_threads_up_costs_little_more_than_it_lasts() {
        for (name, rates) in [
            ("free", &FREE),
            ("free, 10 slices", &FREE_SLICES_10),
            ("5 %, 10 slices", &SHARE_5_SLICES_10),
            ("20 %, 10 slices", &SHARE_20_SLICES_10),
        ] {
            let mut width = Width::new(16);
            run(&mut width, rates, 100, 0.0);
            let low = at(rates, width.width()) / 4.0;
            let mut lost = 0;
            for measurement in 0..100 {
                let now = width.width();
                let held_up = measurement % 50 < 3;
                let rate = at(rates, now).min(if held_up { low } else { f64::MAX });
                lost += u32::from(!held_up && rate < 0.9 * best(rates));
                width.measured(rate, (now, now));
            }
            assert!(lost <= 2 * 3, "{name}: {lost} measurements after two falls");
        }
    }

    #[test]
    fn what_was_known_of_a_width_stays_known_after_a_trial() {
        let mut width = Width::new(16);
        assert_eq!(settle(&mut width, 4.0), 6);
        assert_eq!(width.measured(3.0, (6, 6)), 16, "it did not pay off");
        // It rests for a measurement, and the width is tried again by what was known.
        assert_eq!(width.measured(4.0, (16, 16)), 6);
        // Too few came for a judgement.
        for _ in 0..ENTERING {
            assert_eq!(width.measured(1.0, (3, 3)), 6);
        }
        assert_eq!(width.measured(1.0, (3, 3)), 16);
        assert_eq!(width.measured(4.0, (16, 16)), 6);
    }

    #[test]
    fn it_gets_there_fast_from_anywhere() {
        for (_, before) in ALL {
            for (name, rates) in ALL {
                let mut width = Width::new(16);
                run(&mut width, before, 200, 0.0);
                run(&mut width, rates, 25, 0.0);
                let mean = run(&mut width, rates, 50, 0.0);
                let part = mean / best(rates);
                assert!(part > 0.9, "{name} after {before:?}: {part:.3}");
            }
        }
    }

    #[test]
    fn threads_that_are_coming_in_settle_no_trial() {
        for (name, rates) in ALL {
            let mut width = Width::new(16);
            let (mut before, mut sum, mut changes) = (16, 0.0, 0);
            for measurement in 0..1000 {
                let now = width.width();
                let (rate, inside) = if now > before {
                    // The clocks of those who came in count from the next time on.
                    (0.8 * at(rates, before), (before, now))
                } else {
                    (at(rates, now), (now, now))
                };
                if measurement >= 40 {
                    sum += at(rates, now);
                    changes += u32::from(now != before);
                }
                before = now;
                width.measured(rate, inside);
            }
            let part = sum / 960.0 / best(rates);
            assert!(part > 0.95, "{name}: {part:.3} of the best");
            assert!(changes < 240, "{name}: {changes} changes");
        }
    }

    #[test]
    fn a_trial_that_is_disturbed_is_taken_back_and_may_be_made_again() {
        let mut width = Width::new(16);
        for _ in 0..3 {
            assert!(settle(&mut width, 8.0) < 16, "a trial");
            assert_eq!(width.disturbed(), 16);
            assert_eq!(width.disturbed(), 16);
        }
        // What was found before stays.
        let found = settle(&mut width, 8.0);
        assert!(width.measured(8.0, (found, found)) <= found);
        assert!(width.disturbed() <= found);
    }

    #[test]
    fn too_few_tasks_say_nothing() {
        let mut width = Width::new(8);
        for _ in 0..100 {
            assert_eq!(width.measured(0.5, (3, 5)), 8);
        }
    }

    #[test]
    fn threads_that_have_still_to_leave_say_nothing() {
        let mut width = Width::new(8);
        assert_eq!(settle(&mut width, 1.0), 2);
        for _ in 0..100 {
            assert_eq!(width.measured(1.0, (2, 8)), 2);
        }
        assert_eq!(settle(&mut width, 1.0), 1);
    }

    #[test]
    fn bodies_that_wait_for_one_that_has_no_room_get_it() {
        let mut width = Width::new(8);
        assert_eq!(settle(&mut width, 1.0), 2);
        assert_eq!(width.measured(0.01, (3, 3)), 8);
    }

    #[test]
    fn one_worker_is_let_in_whatever_is_measured() {
        let mut width = Width::new(1);
        for rate in [0.0, 0.5, 1.0, 2.0, f64::NAN] {
            assert_eq!(width.measured(rate, (1, 1)), 1);
        }
    }
}
