//! What estimates come to.

use proptest::prelude::*;

use super::{ModelError, Models, RECENT, SAMPLE, TRIES, VERSION, step};

/// Runs calls of a function with these choices one after the other, each taking what `time` says of its
/// choice and number; gives the choices that ran. The best estimate decides, the first of equals.
fn run(
    models: &Models,
    size: u64,
    choices: &[&str],
    count: u64,
    mut time: impl FnMut(usize, u64) -> u64,
) -> Vec<usize> {
    let function = models.function("f");
    let series: Vec<usize> = choices.iter().map(|it| function.series(it)).collect();
    (0..count)
        .map(|call| {
            let all = series.iter().map(|&index| (index, None));
            let advice = function.advise(size, all, true);
            let best = (0..choices.len())
                .filter(|&place| advice.estimates[place].is_some())
                .min_by_key(|&place| advice.estimates[place]);
            let place = advice.explore.or(best).unwrap_or(0);
            if function.begin(series[place], size) {
                function.record(series[place], size, time(place, call));
            }
            place
        })
        .collect()
}

fn estimate(models: &Models, choice: &str, size: u64) -> Option<u64> {
    let function = models.function("f");
    let series = function.series(choice);
    let advice = function.advise(size, std::iter::once((series, None)), false);
    advice.estimates[0]
}

#[test]
fn the_fastest_choice_is_used_after_a_bounded_number_of_tries() {
    let models = Models::new();
    let ran = run(&models, 100, &["a", "b", "c"], 100, |place, _| {
        [50, 40, 45][place]
    });
    let tries = usize::try_from(TRIES).unwrap();
    assert!(ran[3 * tries..].iter().all(|place| *place == 1), "{ran:?}");
    for known in models.known() {
        let tries = known.explored;
        assert!((1..=TRIES).contains(&tries), "{known:?}");
    }
}

#[test]
fn what_is_hopeless_is_tried_twice_and_not_three_times() {
    let models = Models::new();
    let ran = run(&models, 100, &["a", "b"], 50, |place, _| [10, 1000][place]);
    assert_eq!(ran.iter().filter(|place| **place == 1).count(), 2);
}

#[test]
fn a_warm_up_does_not_decide() {
    let models = Models::new();
    let mut seen = [0; 2];
    let ran = run(&models, 100, &["a", "b"], 50, |place, _| {
        seen[place] += 1;
        match (place, seen[place]) {
            (1, 1) => 1_000_000,
            _ => [30, 20][place],
        }
    });
    assert!(ran[6..].iter().all(|place| *place == 1), "{ran:?}");
    assert_eq!(estimate(&models, "b", 100), Some(20));
}

#[test]
fn single_outliers_do_not_move_an_estimate() {
    let models = Models::new();
    run(&models, 8, &["a"], 7, |_, call| {
        if call % 3 == 1 { 9_000 } else { 100 + call }
    });
    let estimate = estimate(&models, "a", 8).unwrap();
    assert!((100..110).contains(&estimate), "{estimate}");
}

#[test]
fn a_lasting_change_of_speed_is_noticed() {
    let models = Models::new();
    let ran = run(&models, 8, &["a", "b"], 400, |place, call| match place {
        0 if call >= 50 => 90,
        0 => 10,
        _ => 15,
    });
    assert!(ran[10..50].iter().all(|place| *place == 0));
    // A majority of the times that are kept, one of so many calls each.
    let noticed = 50 + usize::try_from(SAMPLE).unwrap() * (RECENT / 2 + 2);
    assert!(ran[noticed..].iter().all(|place| *place == 1), "{ran:?}");
}

#[test]
fn later_calls_are_sampled() {
    let models = Models::new();
    run(&models, 8, &["a"], 807, |_, _| 5);
    let known = &models.known()[0];
    assert_eq!(known.calls, 807);
    assert_eq!(known.timed, RECENT as u64 + 100);
}

#[test]
fn sizes_between_those_that_are_known_follow_a_power_law() {
    let models = Models::new();
    let square = |size: u64| size * size / 100;
    for size in [1_000, 8_000] {
        run(&models, size, &["a"], 5, |_, _| square(size));
    }
    for size in [100, 2_000, 3_000, 50_000] {
        let guess = estimate(&models, "a", size).unwrap() as f64;
        let right = square(size) as f64;
        assert!(
            (guess / right - 1.0).abs() < 0.02,
            "{size}: {guess}, not {right}"
        );
    }
    assert_eq!(estimate(&models, "a", 0), None);
    // It is provisional: what is measured counts.
    run(&models, 2_000, &["a"], 1, |_, _| 7);
    assert_eq!(estimate(&models, "a", 2_000), Some(7));
    // One size says nothing of others.
    run(&models, 10, &["b"], 5, |_, _| 7);
    assert_eq!(estimate(&models, "b", 20), None);
}

#[test]
fn what_a_power_law_finds_hopeless_is_not_tried() {
    let models = Models::new();
    let time = |size: u64, place: usize| [size, 10 * size][place];
    for size in [1_000, 100_000] {
        run(&models, size, &["a", "b"], 20, |place, _| time(size, place));
    }
    let ran = run(&models, 10_000, &["a", "b"], 20, |place, _| {
        time(10_000, place)
    });
    assert!(ran.iter().all(|place| *place == 0), "{ran:?}");
}

#[test]
fn a_declared_cost_serves_until_a_time_is_known() {
    let models = Models::new();
    let function = models.function("f");
    let (a, b) = (function.series("a"), function.series("b"));
    let advise = || function.advise(1, [(a, Some(50)), (b, Some(60))].into_iter(), true);
    assert_eq!(advise().explore, None);
    assert_eq!(advise().estimates[..], [Some(50), Some(60)]);
    function.begin(a, 1);
    function.record(a, 1, 70);
    assert_eq!(advise().estimates[..], [Some(70), Some(60)]);
}

#[test]
fn a_try_that_is_given_back_is_made_again() {
    let models = Models::new();
    let function = models.function("f");
    let series = [function.series("a"), function.series("b")];
    let advise = || function.advise(1, series.map(|it| (it, None)).into_iter(), true);
    let tries = usize::try_from(TRIES).unwrap();
    let mut explored = Vec::new();
    for _ in 0..2 * tries {
        explored.push(advise().explore.unwrap());
    }
    assert_eq!(advise().explore, None, "all tries are on their way");
    function.give_back(series[1], 1);
    assert_eq!(advise().explore, Some(1));
    assert_eq!(advise().explore, None);
}

#[test]
fn a_document_survives_a_restart() {
    let models = Models::new();
    run(&models, 100, &["gpu", "gpu*2"], 30, |place, call| {
        [50, 40][place] + call % 3
    });
    run(&models, 7, &["gpu", "cpu"], 10, |place, _| [5, 4][place]);
    let document = models.export();
    let again = Models::new();
    again.import(&document).unwrap();
    assert_eq!(again.known(), models.known());
    assert_eq!(again.export(), document);
    // What was measured here stays.
    let here = Models::new();
    run(&here, 100, &["gpu"], 9, |_, _| 1);
    here.import(&document).unwrap();
    assert_eq!(estimate(&here, "gpu", 100), Some(1));
    assert_eq!(
        estimate(&here, "gpu*2", 100),
        estimate(&models, "gpu*2", 100)
    );
    // Nothing is explored anew.
    let ran = run(&again, 100, &["gpu", "gpu*2"], 20, |place, _| {
        [50, 40][place]
    });
    assert!(ran.iter().all(|place| *place == 1), "{ran:?}");
}

#[test]
fn what_is_no_document_is_refused_and_changes_nothing() {
    let models = Models::new();
    run(&models, 100, &["gpu"], 7, |_, _| 5);
    let document = models.export();
    let other = Models::new();
    let damaged = |text: &str| {
        let error = other.import(text).unwrap_err();
        assert!(matches!(error, ModelError::Damaged(_)), "{error}");
    };
    damaged("");
    damaged("[1, 2]");
    damaged("{\"format\": \"somebody's\", \"version\": 1}");
    damaged(&document[..document.len() / 2]);
    damaged(&document.replace("\"timed\"", "\"untimed\""));
    damaged(&document.replace("\"timed\": 7", "\"timed\": 2"));
    damaged(&document.replace("\"calls\": 7", "\"calls\": -7"));
    let newer = document.replace(
        &format!("\"version\": {VERSION}"),
        &format!("\"version\": {}, \"more\": []", VERSION + 1),
    );
    assert_eq!(other.import(&newer), Err(ModelError::Version(VERSION + 1)));
    assert!(other.known().is_empty(), "nothing was taken over");
}

#[test]
fn sizes_that_differ_by_an_eighth_are_told_apart_and_grow() {
    let mut last = step(0);
    let mut size = 1_u64;
    for _ in 0..400 {
        let now = step(size);
        assert!(now > last, "{size}");
        last = now;
        let Some(next) = size.checked_add((size / 7).max(1)) else {
            break;
        };
        size = next;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn steps_grow_with_sizes(one: u64, other: u64) {
        prop_assert_eq!(step(one) < step(other), one < other && step(one) != step(other));
        prop_assert!(step(one) < 512);
    }

    #[test]
    fn random_documents_survive(
        times in proptest::collection::vec((0..3_usize, any::<u64>(), any::<u64>()), 1..60),
    ) {
        let models = Models::new();
        let function = models.function("a name: \"quoted\"\n");
        for (choice, size, time) in times {
            let series = function.series(["cpu", "gpu", "b@gpu*2"][choice]);
            function.begin(series, size);
            function.record(series, size, time);
        }
        let again = Models::new();
        again.import(&models.export()).unwrap();
        prop_assert_eq!(again.known(), models.known());
    }
}
