//! The algebra against plain sets of indices.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::{Region, Span};

/// How long an axis of a test is.
const EXTENT: u64 = 40;

fn span() -> impl Strategy<Value = Span> {
    (0..EXTENT, 1..14_u64, 0..12_u64).prop_map(|(start, step, count)| {
        let most = (EXTENT - 1 - start) / step + 1;
        Span::new(start, step, count.min(most))
    })
}

fn region(axes: usize) -> impl Strategy<Value = Region> {
    prop::collection::vec(span(), axes).prop_map(Region::new)
}

fn indices(span: &Span) -> BTreeSet<u64> {
    (0..span.count())
        .map(|number| span.start() + number * span.step())
        .collect()
}

fn elements(region: &Region) -> BTreeSet<Vec<u64>> {
    let mut all = BTreeSet::from([Vec::new()]);
    for span in region.spans() {
        all = all
            .iter()
            .flat_map(|head| {
                indices(span)
                    .into_iter()
                    .map(move |index| [head.as_slice(), &[index]].concat())
            })
            .collect();
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 400 } else { 2000 }))]

    #[test]
    fn spans_are_sets(a in span(), b in span()) {
        let (own, other) = (indices(&a), indices(&b));
        prop_assert_eq!(own.len() as u64, a.count());
        prop_assert_eq!(own.last().map_or(0, |last| last + 1), a.end());
        let common: BTreeSet<u64> = own.intersection(&other).copied().collect();
        prop_assert_eq!(indices(&a.intersection(&b)), common.clone());
        prop_assert_eq!(a.intersection(&b), b.intersection(&a));
        prop_assert_eq!(a.overlaps(&b), !common.is_empty());
        prop_assert_eq!(a.contains(&b), other.is_subset(&own));
        for index in 0..EXTENT {
            prop_assert_eq!(a.has(index), own.contains(&index));
        }
    }

    #[test]
    fn what_is_left_is_disjoint_and_exact(
        (a, b) in (0..4_usize).prop_flat_map(|axes| (region(axes), region(axes))),
    ) {
        let (own, other) = (elements(&a), elements(&b));
        prop_assert_eq!(own.len() as u64, a.elements());
        prop_assert_eq!(a.is_empty(), own.is_empty());
        prop_assert_eq!(a.overlaps(&b), !own.is_disjoint(&other));
        prop_assert_eq!(a.contains(&b), other.is_subset(&own));
        let common = own.intersection(&other).cloned().collect::<BTreeSet<_>>();
        prop_assert_eq!(elements(&a.intersection(&b)), common);
        let mut left = BTreeSet::new();
        for piece in a.difference(&b) {
            prop_assert!(!piece.is_empty());
            for element in elements(&piece) {
                prop_assert!(left.insert(element), "two pieces have it");
            }
        }
        let difference: BTreeSet<_> = own.difference(&other).cloned().collect();
        prop_assert_eq!(left, difference);
        let hull = elements(&a.hull(&b));
        prop_assert!(own.is_subset(&hull) && other.is_subset(&hull));
    }

    #[test]
    fn a_selection_of_a_selection_is_one(a in span(), first in span(), second in span()) {
        let clip = |span: Span, count: u64| span.intersection(&Span::range(0, count));
        let first = clip(first, a.count());
        let second = clip(second, first.count());
        let all: Vec<u64> = indices(&a).into_iter().collect();
        let chosen = |from: &[u64], span: &Span| -> Vec<u64> {
            indices(span).iter().map(|&number| from[usize::try_from(number).unwrap()]).collect()
        };
        let expected = chosen(&chosen(&all, &first), &second);
        let region = Region::new([Span::range(0, 1), a]).select(1, first).select(1, second);
        let found: Vec<u64> = indices(&region.spans()[1]).into_iter().collect();
        prop_assert_eq!(found, expected);
    }
}

#[test]
fn one_set_is_written_in_one_way() {
    assert_eq!(Span::new(7, 3, 0), Span::EMPTY);
    assert_eq!(Span::new(7, 3, 1), Span::range(7, 8));
    assert_eq!(Region::whole(&[3, 0, 2]), Region::whole(&[0, 5, 0]));
    assert_eq!(Region::whole(&[]).elements(), 1);
    assert!(!Region::whole(&[]).is_empty());
    assert!(Region::whole(&[]).overlaps(&Region::whole(&[])));
}

#[test]
fn indices_of_large_arrays_do_not_overflow() {
    let most = (1 << 63) - 1;
    let far = Span::new(0, most / 3, 4);
    assert_eq!(far.end(), most / 3 * 3 + 1);
    let near = Span::new(1, most / 2, 2);
    assert!(!far.overlaps(&near));
    assert!(far.overlaps(&Span::range(most / 3, most / 3 + 1)));
    assert_eq!(Region::whole(&[most, most]).elements(), u64::MAX);
}

#[test]
fn few_pieces_are_left_where_few_indices_go() {
    let all = Span::range(0, 1_000_000);
    assert_eq!(all.difference(&Span::new(5, 100_000, 10)).len(), 11);
    assert_eq!(all.difference(&Span::new(0, 2, 500_000)).len(), 2);
    assert_eq!(
        Span::range(0, 999_999)
            .difference(&Span::new(0, 2, 500_000))
            .len(),
        1
    );
}

#[test]
fn they_print_like_slices() {
    let region = Region::new([Span::range(0, 4), Span::new(2, 2, 3)]);
    assert_eq!(region.to_string(), "[0:4, 2:7:2]");
    assert_eq!(Region::whole(&[]).to_string(), "[]");
}
