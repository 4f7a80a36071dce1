//! Rule by rule.

use std::sync::Arc;
use std::time::Duration;

use smallvec::{SmallVec, smallvec};

use super::{any, gpus, request};
use crate::machine::{DeviceId, Event, HOST, Kind, Stream};
use crate::schedule::gang::{
    Alternative, Capacity, Coming, Gang, Grant, Limits, Member, Reason, Request, Step, Transfer,
    WHOLE, check,
};

const LIMITS: Limits = Limits {
    overtaking: 32,
    runahead: 64,
};

fn named(devices: &[u16]) -> Alternative {
    Alternative {
        members: devices
            .iter()
            .map(|&index| Member::Device(DeviceId::gpu(index)))
            .collect(),
        ..any(0)
    }
}

fn one(alternative: Alternative) -> Request {
    request(&[alternative].into())
}

fn part(share: u32, memory: u64) -> Request {
    one(Alternative {
        share,
        memory,
        ..any(1)
    })
}

fn event(device: u16, number: u32, position: u64) -> Event {
    Event {
        stream: Stream {
            device: DeviceId::gpu(device),
            number,
        },
        position,
    }
}

fn start(gang: &mut Gang<&'static str>) -> (&'static str, Grant) {
    match gang.next(|_| true) {
        Some(Step::Start(token, grant)) => (token, grant),
        step => panic!("a task starts, not {step:?}"),
    }
}

fn resume(gang: &mut Gang<&'static str>) -> Grant {
    match gang.next(|_| true) {
        Some(Step::Resume(grant)) => grant,
        step => panic!("a body goes on, not {step:?}"),
    }
}

fn nothing(gang: &mut Gang<&'static str>) {
    let step = gang.next(|_| true);
    assert!(step.is_none(), "nothing is to be done, not {step:?}");
}

fn devices(grant: &Grant) -> Vec<u16> {
    grant.lent.iter().map(|lent| lent.device.index()).collect()
}

/// Starts and launches the next task, which leaves an event on each device.
fn launch(gang: &mut Gang<&'static str>, events: &[Event]) -> (&'static str, Grant) {
    let (token, grant) = start(gang);
    gang.launched(
        grant.id,
        &events.iter().copied().map(Some).collect::<Vec<_>>(),
    );
    (token, grant)
}

#[test]
fn what_no_machine_can_serve_is_told_by_alternative() {
    let machine = gpus(2, 100);
    let refused =
        |alternative: Alternative| check(&machine, &[alternative]).unwrap_err()[0].clone();
    assert_eq!(refused(any(0)), Reason::Empty);
    assert_eq!(refused(any(3)), Reason::TooMany(Kind::Gpu, 3, 2));
    assert_eq!(refused(named(&[1, 1])), Reason::Twice(DeviceId::gpu(1)));
    assert_eq!(refused(named(&[2])), Reason::NoDevice(DeviceId::gpu(2)));
    let share = WHOLE + 1;
    assert_eq!(
        refused(Alternative { share, ..any(1) }),
        Reason::Share(share)
    );
    let memory = 101;
    let member = Member::Any(Kind::Gpu);
    assert_eq!(
        refused(Alternative { memory, ..any(1) }),
        Reason::Memory(member, 101, 100)
    );
    // A named device is no other member, and the one that is left is too small.
    let mixed = Alternative {
        members: [Member::Device(DeviceId::gpu(0)), member, member].into(),
        ..any(0)
    };
    assert_eq!(refused(mixed), Reason::TooMany(Kind::Gpu, 2, 1));
    // Cores are others' business.
    let cores = |members: &[Member]| Alternative {
        members: members.into(),
        ..any(0)
    };
    let core = Member::Any(Kind::Cpu);
    assert_eq!(refused(cores(&[core, core])), Reason::Empty);
    let with_cores = cores(&[core, member, core, member]);
    assert_eq!(
        (with_cores.cores(), check(&machine, &[with_cores])),
        (2, Ok(()))
    );
    let uneven = [
        Capacity {
            id: HOST,
            memory: 500,
            fails_whole: false,
        },
        machine[0].clone(),
    ];
    let memory = 200;
    let both = [
        Alternative { memory, ..any(1) },
        Alternative {
            members: [Member::Device(HOST)].into(),
            memory,
            ..any(0)
        },
    ];
    assert_eq!(check(&uneven, &both), Ok(()), "one alternative is enough");
    let reasons = check(&uneven, &[any(2), named(&[1])]).unwrap_err();
    assert_eq!(
        *reasons,
        [
            Reason::TooMany(Kind::Gpu, 2, 1),
            Reason::NoDevice(DeviceId::gpu(1))
        ]
    );
}

#[test]
fn a_chain_uses_one_stream_and_waits_for_nothing() {
    let mut gang = Gang::new(&gpus(2, 0), LIMITS);
    let shape: Arc<[Alternative]> = [any(1)].into();
    gang.submit("first", request(&shape)).unwrap();
    let (_, grant) = launch(&mut gang, &[event(0, 7, 1)]);
    assert_eq!(grant.lent[0].stream, None, "there was none yet");
    for position in 1..50 {
        let prefer = smallvec![event(0, 7, position)];
        gang.submit(
            "next",
            Request {
                prefer,
                ..request(&shape)
            },
        )
        .unwrap();
        let (_, grant) = launch(&mut gang, &[event(0, 7, position + 1)]);
        assert_eq!(grant.lent[0].stream, Some(event(0, 7, 0).stream));
        assert!(grant.lent[0].waits.is_empty());
    }
}

#[test]
fn a_stream_that_another_successor_took_is_not_taken_over() {
    let mut gang = Gang::new(&gpus(1, 0), LIMITS);
    gang.submit("root", part(WHOLE / 4, 0)).unwrap();
    launch(&mut gang, &[event(0, 0, 1)]);
    let prefer: SmallVec<_> = smallvec![event(0, 0, 1)];
    for name in ["one", "two", "three"] {
        let prefer = prefer.clone();
        gang.submit(
            name,
            Request {
                prefer,
                ..part(WHOLE / 4, 0)
            },
        )
        .unwrap();
    }
    let (_, one) = start(&mut gang);
    let (_, two) = start(&mut gang);
    assert_eq!(one.lent[0].stream, Some(event(0, 0, 0).stream));
    assert_eq!(two.lent[0].stream, None, "the stream is lent");
    gang.launched(one.id, &[Some(event(0, 0, 2))]);
    let (_, three) = start(&mut gang);
    assert_eq!(
        three.lent[0].stream, None,
        "other work came behind the root"
    );
}

#[test]
fn what_is_in_flight_is_taken_behind_its_event_unless_stream_order_does() {
    for (prefer, stream, waits) in [
        (smallvec![], None, vec![event(0, 0, 1), event(0, 1, 1)]),
        (
            smallvec![event(0, 1, 1)],
            Some(event(0, 1, 0).stream),
            vec![event(0, 0, 1)],
        ),
    ] {
        let mut gang = Gang::new(&gpus(1, 0), LIMITS);
        for (name, number) in [("a", 0), ("b", 1)] {
            gang.submit(name, part(WHOLE / 2, 0)).unwrap();
            launch(&mut gang, &[event(0, number, 1)]);
        }
        let whole = part(WHOLE, 0);
        gang.submit("c", Request { prefer, ..whole }).unwrap();
        let (_, c) = start(&mut gang);
        assert_eq!(c.lent[0].stream, stream);
        assert_eq!(c.lent[0].waits[..], waits);
    }
}

#[test]
fn what_is_at_rest_comes_before_what_is_in_flight_and_the_oldest_flight_first() {
    let mut gang = Gang::new(&gpus(1, 12), LIMITS);
    for (name, number) in [("a", 0), ("b", 1)] {
        gang.submit(name, part(0, 4)).unwrap();
        launch(&mut gang, &[event(0, number, 1)]);
    }
    gang.submit("c", part(0, 4)).unwrap();
    let (_, c) = launch(&mut gang, &[event(0, 2, 1)]);
    assert_eq!((c.lent[0].stream, c.lent[0].waits.len()), (None, 0));
    gang.submit("d", part(0, 4)).unwrap();
    let (_, d) = start(&mut gang);
    assert_eq!(d.lent[0].stream, None, "not that of a stranger");
    assert_eq!(d.lent[0].waits[..], [event(0, 0, 1)], "the oldest");
    gang.completed(event(0, 2, 1));
    gang.submit("e", part(0, 4)).unwrap();
    let (_, e) = start(&mut gang);
    assert_eq!(
        e.lent[0].stream,
        Some(event(0, 2, 0).stream),
        "that is at rest now"
    );
    assert!(e.lent[0].waits.is_empty());
}

#[test]
fn where_a_failure_is_the_whole_devices_one_stream_does() {
    let mut device = gpus(1, 0);
    device[0].fails_whole = true;
    let mut gang = Gang::new(&device, LIMITS);
    let launch = |gang: &mut Gang<_>, position| {
        gang.submit("whole", part(WHOLE, 0)).unwrap();
        let (_, grant) = start(gang);
        gang.launched(grant.id, &[Some(event(0, 1, position))]);
        grant
    };
    assert_eq!(launch(&mut gang, 1).lent[0].stream, None);
    for position in 2..4 {
        let lent = &launch(&mut gang, position).lent[0];
        assert_eq!(lent.stream, Some(event(0, 1, 0).stream));
        assert!(lent.waits.is_empty(), "the order is the stream's");
    }
    // Who waits for one stream of two follows that one.
    gang.completed(event(0, 1, 3));
    for stream in [1, 2] {
        gang.submit("half", part(WHOLE / 2, 0)).unwrap();
        let (_, grant) = start(&mut gang);
        gang.launched(grant.id, &[Some(event(0, stream, 10))]);
    }
    gang.submit("half", part(WHOLE / 2, 0)).unwrap();
    let (_, grant) = start(&mut gang);
    let lent = &grant.lent[0];
    assert_eq!(
        (lent.stream, lent.waits.len()),
        (Some(event(0, 1, 0).stream), 0)
    );
    gang.submit("half", part(WHOLE / 2, 0)).unwrap();
    let (_, grant) = start(&mut gang);
    assert_eq!(grant.lent[0].stream, Some(event(0, 2, 0).stream));
}

#[test]
fn at_most_so_many_run_ahead() {
    for (runahead, most) in [(0, 1), (1, 1), (3, 3)] {
        let mut gang = Gang::new(&gpus(1, 0), Limits { runahead, ..LIMITS });
        let mut launched = 0;
        for _ in 0..5 {
            gang.submit("task", part(WHOLE, 0)).unwrap();
        }
        while let Some(Step::Start(_, grant)) = gang.next(|_| true) {
            launched += 1;
            gang.launched(grant.id, &[Some(event(0, launched, 1))]);
        }
        assert_eq!(launched, most, "run-ahead {runahead}");
        gang.completed(event(0, 1, 1));
        start(&mut gang);
    }
}

#[test]
fn what_takes_nothing_waits_for_nothing() {
    let mut gang = Gang::new(
        &gpus(1, 0),
        Limits {
            runahead: 0,
            ..LIMITS
        },
    );
    gang.submit("whole", part(WHOLE, 0)).unwrap();
    gang.submit("blocked", part(WHOLE, 0)).unwrap();
    start(&mut gang);
    gang.submit("light", part(0, 0)).unwrap();
    let (token, grant) = start(&mut gang);
    assert_eq!((token, grant.lent[0].waits.len()), ("light", 0));
    nothing(&mut gang);
}

#[test]
fn a_set_has_all_or_nothing_in_its_own_order() {
    let mut gang = Gang::new(&gpus(3, 0), LIMITS);
    gang.submit("busy", one(named(&[1]))).unwrap();
    let (_, busy) = start(&mut gang);
    gang.submit("set", one(named(&[2, 1]))).unwrap();
    nothing(&mut gang);
    gang.submit("other", one(named(&[0]))).unwrap();
    assert_eq!(
        devices(&start(&mut gang).1),
        [0],
        "devices that it does not need are free"
    );
    gang.launched(busy.id, &[Some(event(1, 0, 1))]);
    nothing(&mut gang);
    gang.completed(event(1, 0, 1));
    assert_eq!(devices(&start(&mut gang).1), [2, 1]);
}

#[test]
fn a_set_runs_ahead_behind_one_common_task_or_its_predecessors() {
    let mut gang = Gang::new(&gpus(2, 0), LIMITS);
    let pair = || one(any(2));
    gang.submit("one", pair()).unwrap();
    launch(&mut gang, &[event(0, 0, 1), event(1, 0, 1)]);
    gang.submit("two", pair()).unwrap();
    launch(&mut gang, &[event(0, 1, 1), event(1, 1, 1)]);
    for (name, device) in [("left", 0), ("right", 1)] {
        gang.submit(name, one(named(&[device]))).unwrap();
        launch(&mut gang, &[event(device, 2, 1)]);
    }
    let prefer = smallvec![event(0, 2, 1), event(1, 2, 1)];
    gang.submit("successor", Request { prefer, ..pair() })
        .unwrap();
    let (_, grant) = launch(&mut gang, &[event(0, 2, 2), event(1, 2, 2)]);
    assert!(grant.lent.iter().all(|lent| lent.waits.is_empty()));
    gang.submit("left", one(named(&[0]))).unwrap();
    launch(&mut gang, &[event(0, 3, 1)]);
    gang.submit("stranger", pair()).unwrap();
    nothing(&mut gang);
    gang.completed(event(0, 3, 1));
    gang.completed(event(1, 2, 2));
    start(&mut gang);
}

#[test]
fn larger_priorities_come_first_then_age() {
    let mut gang = Gang::new(&gpus(1, 0), LIMITS);
    // Two shapes, so that order is not that of one queue.
    for (name, priority, share) in [
        ("c", 0, WHOLE),
        ("d", 0, WHOLE - 1),
        ("a", 2, WHOLE),
        ("b", 1, WHOLE - 1),
        ("e", -1, WHOLE),
    ] {
        gang.submit(
            name,
            Request {
                priority,
                ..part(share, 0)
            },
        )
        .unwrap();
    }
    let mut names = Vec::new();
    for number in 1..6 {
        names.push(launch(&mut gang, &[event(0, number, 1)]).0);
    }
    names[2..4].sort_unstable();
    assert_eq!(names, ["a", "b", "c", "d", "e"]);
}

#[test]
fn narrow_tasks_fill_the_gap_before_a_wide_one_up_to_the_bound() {
    for priority in [0, -1] {
        let mut gang = Gang::new(
            &gpus(2, 0),
            Limits {
                overtaking: 5,
                runahead: 0,
            },
        );
        gang.submit("long", one(named(&[0]))).unwrap();
        let (_, long) = start(&mut gang);
        gang.submit("wide", one(any(2))).unwrap();
        for _ in 0..20 {
            gang.submit(
                "narrow",
                Request {
                    priority,
                    ..one(any(1))
                },
            )
            .unwrap();
        }
        for position in 1..=5 {
            let (token, _) = launch(&mut gang, &[event(1, 0, position)]);
            assert_eq!(token, "narrow");
            gang.completed(event(1, 0, position));
        }
        nothing(&mut gang);
        gang.launched(long.id, &[Some(event(0, 0, 1))]);
        gang.completed(event(0, 0, 1));
        assert_eq!(start(&mut gang).0, "wide");
    }
}

#[test]
fn a_sweep_holds_no_more_than_its_task_needs() {
    let mut gang = Gang::new(
        &gpus(4, 0),
        Limits {
            overtaking: 0,
            runahead: 0,
        },
    );
    gang.submit("long", one(named(&[0]))).unwrap();
    start(&mut gang);
    gang.submit("wide", one(named(&[0, 1]))).unwrap();
    gang.submit("narrow", one(named(&[1]))).unwrap();
    gang.submit("apart", one(named(&[3]))).unwrap();
    assert_eq!(start(&mut gang).0, "apart");
    nothing(&mut gang);
}

#[test]
fn the_alternative_that_finishes_first_is_taken() {
    let mut gang = Gang::new(&gpus(2, 0), LIMITS);
    let shape: Arc<[Alternative]> = [any(1), any(2)].into();
    let estimates = |one, two| {
        [one, two]
            .map(|time: Option<u64>| time.map(Duration::from_millis))
            .into_iter()
            .collect()
    };
    let asked = |one, two| Request {
        estimates: estimates(one, two),
        ..request(&shape)
    };
    for (asked, width, why) in [
        (asked(Some(5), Some(3)), 2, "the estimate decides"),
        (asked(Some(3), Some(5)), 1, "the estimate decides"),
        (asked(Some(3), None), 2, "what is unknown is tried"),
        (request(&shape), 1, "order breaks ties"),
    ] {
        gang.submit("task", asked).unwrap();
        let (_, grant) = start(&mut gang);
        assert_eq!(grant.lent.len(), width, "{why}");
        assert_eq!(grant.alternative, width - 1);
        gang.launched(grant.id, &vec![None; width]);
    }
    // The other device has 3 ms before it, this one 5.
    gang.submit(
        "five",
        Request {
            estimates: estimates(Some(5), None),
            ..one(named(&[0]))
        },
    )
    .unwrap();
    launch(&mut gang, &[event(0, 9, 1)]);
    gang.submit(
        "three",
        Request {
            estimates: estimates(Some(3), None),
            ..one(named(&[1]))
        },
    )
    .unwrap();
    launch(&mut gang, &[event(1, 9, 1)]);
    gang.submit("next", asked(Some(1), Some(1))).unwrap();
    assert_eq!(devices(&start(&mut gang).1), [1]);
}

/// A request for any device or any two, of which the run times are known, in milliseconds.
fn one_or_two(one: u64, two: u64) -> Request {
    Request {
        estimates: [one, two]
            .map(|it| Some(Duration::from_millis(it)))
            .into_iter()
            .collect(),
        ..request(&[any(1), any(2)].into())
    }
}

#[test]
fn a_faster_set_that_is_busy_is_waited_for_if_that_finishes_first() {
    let mut gang = Gang::new(&gpus(2, 0), LIMITS);
    let busy = |time| Request {
        estimates: smallvec![Some(Duration::from_millis(time))],
        ..one(named(&[0]))
    };
    gang.submit("busy", busy(5)).unwrap();
    let (_, first) = start(&mut gang);
    // On two it finishes at 5 + 10 ms, on the one that is free at 100.
    gang.submit("waits", one_or_two(100, 10)).unwrap();
    nothing(&mut gang);
    // Both are held for it.
    gang.submit("younger", one(any(1))).unwrap();
    nothing(&mut gang);
    gang.launched(first.id, &[None]);
    let (token, grant) = start(&mut gang);
    assert_eq!((token, devices(&grant)), ("waits", vec![0, 1]));
    gang.launched(grant.id, &[None, None]);
    assert_eq!(start(&mut gang).0, "younger");

    // It does not wait for longer than that takes.
    let mut gang = Gang::new(&gpus(2, 0), LIMITS);
    gang.submit("busy", busy(95)).unwrap();
    start(&mut gang);
    gang.submit("waits not", one_or_two(100, 10)).unwrap();
    assert_eq!(devices(&start(&mut gang).1), [1]);
}

#[test]
fn a_task_that_waits_for_a_faster_set_waits_for_so_many_grants_alone() {
    let limits = Limits {
        overtaking: 4,
        ..LIMITS
    };
    let mut gang = Gang::new(&gpus(3, 0), limits);
    let urgent = || Request {
        priority: 1,
        estimates: smallvec![Some(Duration::from_millis(5))],
        ..one(named(&[0]))
    };
    let fast_or_slow = Request {
        estimates: [1, 100]
            .map(|it| Some(Duration::from_millis(it)))
            .into_iter()
            .collect(),
        ..request(&[named(&[0]), named(&[1])].into())
    };
    gang.submit("urgent", urgent()).unwrap();
    let (_, mut running) = start(&mut gang);
    gang.submit("waits", fast_or_slow).unwrap();
    nothing(&mut gang);
    // Those that are more urgent keep the fast one from it.
    let mut grants = 0;
    loop {
        gang.submit("urgent", urgent()).unwrap();
        gang.launched(running.id, &[None]);
        let (token, grant) = start(&mut gang);
        assert_eq!(token, "urgent");
        running = grant;
        grants += 1;
        if let Some(Step::Start(token, grant)) = gang.next(|_| true) {
            assert_eq!((token, devices(&grant)), ("waits", vec![1]));
            break;
        }
        assert!(grants < 10, "it waits for ever");
    }
    assert_eq!(grants, 4);
}

#[test]
fn a_set_whose_memory_paused_bodies_keep_is_not_waited_for() {
    let mut gang = Gang::new(&gpus(2, 10), LIMITS);
    gang.submit("keeps", part(WHOLE, 8)).unwrap();
    let (_, body) = start(&mut gang);
    gang.paused(body.id, &[None]);
    let asked = Request {
        estimates: [100, 1]
            .map(|it| Some(Duration::from_millis(it)))
            .into_iter()
            .collect(),
        ..request(
            &[any(1), any(2)]
                .map(|set| Alternative { memory: 5, ..set })
                .into(),
        )
    };
    gang.submit("starts", asked).unwrap();
    assert_eq!(devices(&start(&mut gang).1), [1]);
}

/// A sweep up comes to "either" first, for its narrow set, whose memory is kept; for its wide one it may not
/// overtake "oldest".
#[test]
fn a_set_whose_memory_paused_bodies_keep_has_nothing_held_for_it() {
    let limits = Limits {
        overtaking: 1,
        ..LIMITS
    };
    let mut gang = Gang::new(&gpus(3, 10), limits);
    let narrow = Alternative {
        share: WHOLE / 2,
        memory: 8,
        ..named(&[0])
    };
    gang.submit("keeps", one(narrow.clone())).unwrap();
    let (_, body) = start(&mut gang);
    gang.paused(body.id, &[None]);
    gang.submit("oldest", one(named(&[0]))).unwrap();
    gang.submit("either", request(&[narrow, named(&[0, 1])].into()))
        .unwrap();
    assert_eq!(start(&mut gang).0, "oldest");
}

#[test]
fn a_paused_body_keeps_its_memory_and_its_stream_and_returns_first() {
    let mut gang = Gang::new(&gpus(1, 10), LIMITS);
    gang.submit("waits", part(WHOLE, 6)).unwrap();
    let (_, body) = start(&mut gang);
    gang.paused(body.id, &[Some(event(0, 0, 1))]);
    gang.submit("large", part(WHOLE, 5)).unwrap();
    nothing(&mut gang);
    gang.submit("small", part(WHOLE, 4)).unwrap();
    let (token, small) = start(&mut gang);
    assert_eq!(token, "small");
    assert_eq!(small.lent[0].stream, None, "the other stream is lent still");
    assert_eq!(small.lent[0].waits[..], [event(0, 0, 1)]);
    gang.submit("later", part(WHOLE, 1)).unwrap();
    gang.resumed(body.id);
    nothing(&mut gang);
    gang.launched(small.id, &[Some(event(0, 1, 1))]);
    let again = resume(&mut gang);
    assert_eq!(again.id, body.id);
    assert_eq!(again.lent[0].stream, Some(event(0, 0, 0).stream));
    assert_eq!(again.lent[0].waits[..], [event(0, 1, 1)]);
    nothing(&mut gang);
    gang.launched(body.id, &[Some(event(0, 0, 2))]);
    assert_eq!(start(&mut gang).0, "large");
}

#[test]
fn who_is_not_wanted_is_handed_out_and_holds_nothing() {
    let mut gang = Gang::new(
        &gpus(2, 0),
        Limits {
            overtaking: 0,
            ..LIMITS
        },
    );
    gang.submit("long", one(named(&[0]))).unwrap();
    start(&mut gang);
    gang.submit("wide", one(any(2))).unwrap();
    gang.submit("narrow", one(any(1))).unwrap();
    nothing(&mut gang);
    // Nobody is asked again before something happens.
    gang.withdrawn();
    let step = gang.next(|&token| token != "wide");
    assert!(matches!(step, Some(Step::Unwanted("wide"))));
    assert_eq!(start(&mut gang).0, "narrow");
}

#[test]
fn a_lost_device_fails_those_who_need_it_alone() {
    let mut gang = Gang::new(&gpus(2, 0), LIMITS);
    gang.submit("runs", one(any(2))).unwrap();
    let (_, runs) = start(&mut gang);
    gang.submit("needs", one(named(&[1]))).unwrap();
    gang.submit("both", one(any(2))).unwrap();
    gang.submit("free", request(&[any(2), any(1)].into()))
        .unwrap();
    let mut failed = gang.fail_device(DeviceId::gpu(1));
    failed.sort_unstable();
    assert_eq!(failed, ["both", "needs"]);
    assert_eq!(gang.submit("late", one(any(2))), Err("late"));
    gang.launched(runs.id, &[Some(event(0, 0, 1)), None]);
    let (token, grant) = start(&mut gang);
    assert_eq!(
        (token, grant.alternative, devices(&grant)),
        ("free", 1, vec![0])
    );
}

/// A body of a lost device returns to nobody's books, and is not waited for.
#[test]
fn who_keeps_memory_is_found_out_beside_a_lost_device() {
    let mut gang = Gang::new(&gpus(2, 4), LIMITS);
    gang.submit("lost", one(named(&[1]))).unwrap();
    let (_, lost) = start(&mut gang);
    gang.submit("keeps", part(WHOLE, 3)).unwrap();
    let (_, keeps) = start(&mut gang);
    assert_eq!(devices(&keeps), [0]);
    gang.fail_device(DeviceId::gpu(1));
    gang.launched(lost.id, &[None]);
    gang.paused(keeps.id, &[Some(event(0, 0, 1))]);
    gang.completed(event(0, 0, 1));
    gang.submit("starves", part(WHOLE, 2)).unwrap();
    nothing(&mut gang);
    assert!(gang.is_stuck());
    assert_eq!(gang.give_up(|_| true), Some("starves"));
}

/// A task whose data come to each device from another one in so many microseconds.
fn with_data(transfers: &[u64]) -> Request {
    let transfer = |&time: &u64| Transfer {
        whole: Coming {
            time: time * 1_000,
            from_host: 0,
            links: time * 1_000,
        },
        ..Transfer::default()
    };
    Request {
        transfers: transfers.iter().map(transfer).collect(),
        ..one(any(1))
    }
}

fn that_takes(microseconds: u64, request: Request) -> Request {
    Request {
        estimates: smallvec![Some(Duration::from_micros(microseconds))],
        ..request
    }
}

#[test]
fn a_chain_stays_where_its_data_are_however_much_it_has_before_it() {
    for known in [false, true] {
        let mut gang = Gang::new(&gpus(2, 0), LIMITS);
        gang.submit("first", with_data(&[5, 5])).unwrap();
        let (_, grant) = launch(&mut gang, &[event(0, 0, 1)]);
        assert_eq!(devices(&grant), [0]);
        for position in 1..40 {
            let next = Request {
                prefer: smallvec![event(0, 0, position)],
                ..with_data(&[0, 1])
            };
            let next = if known { that_takes(10, next) } else { next };
            gang.submit("next", next).unwrap();
            let (_, grant) = launch(&mut gang, &[event(0, 0, position + 1)]);
            assert_eq!(devices(&grant), [0], "link {position}");
        }
    }
}

#[test]
fn tasks_that_have_nothing_to_do_with_each_other_spread_from_one_place() {
    // What is the transfer worth? That is known only if the run time is. Each one also counts for a quarter
    // of its time on the timeline of the device that it goes to, which has one task less for that.
    for (run, transfer, most) in [(None, 5, 6), (Some(10), 5, 6), (Some(1), 100, 10)] {
        let mut gang = Gang::new(&gpus(2, 0), LIMITS);
        let mut on_first = 0;
        for number in 1..=10 {
            let task = with_data(&[0, transfer]);
            let task = match run {
                Some(run) => that_takes(run, task),
                None => task,
            };
            gang.submit("task", task).unwrap();
            let (_, grant) = start(&mut gang);
            let device = devices(&grant)[0];
            on_first += u64::from(device == 0);
            gang.launched(grant.id, &[Some(event(device, number, 1))]);
        }
        assert_eq!(on_first, most, "run {run:?}, transfer {transfer}");
    }
}

#[test]
fn long_tasks_run_ahead_by_few_and_short_ones_by_their_time() {
    let ahead = |task: &dyn Fn() -> Request| {
        let mut gang = Gang::new(&gpus(1, 0), LIMITS);
        let mut granted = 0;
        loop {
            gang.submit("task", task()).unwrap();
            let Some(step) = gang.next(|_| true) else {
                return granted;
            };
            let Step::Start(_, grant) = step else {
                panic!("a task starts, not {step:?}");
            };
            granted += 1;
            gang.launched(grant.id, &[Some(event(0, granted, 1))]);
        }
    };
    assert_eq!(ahead(&|| one(any(1))), LIMITS.runahead);
    assert_eq!(ahead(&|| that_takes(10_000, one(any(1)))), 4);
    assert_eq!(ahead(&|| that_takes(500, one(any(1)))), 4);
    assert_eq!(ahead(&|| that_takes(100, one(any(1)))), 20);
    assert_eq!(ahead(&|| that_takes(10, one(any(1)))), LIMITS.runahead);
    // A quarter of them run at the same time.
    assert_eq!(ahead(&|| that_takes(1_000, part(WHOLE / 4, 0))), 16);
}

#[test]
fn who_has_its_data_goes_first_where_the_device_would_idle() {
    let from_host = |microseconds: u64| Request {
        transfers: [Transfer {
            whole: Coming {
                time: microseconds * 1_000,
                from_host: microseconds * 1_000,
                links: microseconds * 1_000,
            },
            ..Transfer::default()
        }]
        .into(),
        ..one(any(1))
    };
    for (apart, order) in [
        (250, ["near", "first", "second"]),
        (50, ["first", "second", "near"]),
    ] {
        let mut gang = Gang::new(&gpus(1, 0), LIMITS);
        gang.submit("busy", that_takes(200, one(any(1)))).unwrap();
        for token in ["first", "second"] {
            gang.submit(token, that_takes(100, from_host(apart)))
                .unwrap();
        }
        let near = Request {
            transfers: [Transfer::default()].into(),
            ..one(named(&[0]))
        };
        gang.submit("near", that_takes(50, near)).unwrap();
        let mut tokens = Vec::new();
        for number in 0..4 {
            let (token, grant) = start(&mut gang);
            gang.launched(grant.id, &[Some(event(0, number, 1))]);
            tokens.push(token);
        }
        assert_eq!(tokens[0], "busy");
        assert_eq!(tokens[1..], order, "{apart} us apart");
    }
}

#[test]
fn a_task_waits_for_the_body_that_has_the_device_of_its_data() {
    for known in [false, true] {
        let task = |transfers: &[u64]| {
            let task = with_data(transfers);
            if known { that_takes(2, task) } else { task }
        };
        let mut gang = Gang::new(&gpus(2, 0), LIMITS);
        gang.submit("busy", task(&[0, 9])).unwrap();
        let (_, busy) = start(&mut gang);
        assert_eq!(devices(&busy), [0]);
        gang.submit("near", task(&[0, 9])).unwrap();
        nothing(&mut gang);
        // Whose data are elsewhere is not kept waiting.
        gang.submit("far", task(&[9, 0])).unwrap();
        let (token, grant) = start(&mut gang);
        assert_eq!((token, devices(&grant)), ("far", vec![1]));
        gang.launched(grant.id, &[Some(event(1, 0, 1))]);
        nothing(&mut gang);
        gang.launched(busy.id, &[Some(event(0, 0, 1))]);
        let (token, grant) = start(&mut gang);
        assert_eq!((token, devices(&grant)), ("near", vec![0]));
    }
}

#[test]
fn who_wait_for_one_device_go_elsewhere_when_they_are_many() {
    let mut gang = Gang::new(&gpus(2, 0), LIMITS);
    gang.submit("busy", with_data(&[0, 9])).unwrap();
    let (_, busy) = start(&mut gang);
    for _ in 0..2 {
        gang.submit("waits", with_data(&[0, 9])).unwrap();
        nothing(&mut gang);
    }
    gang.submit("too many", with_data(&[0, 9])).unwrap();
    let (_, first) = start(&mut gang);
    assert_eq!(devices(&first), [1], "the first of them has its data moved");
    nothing(&mut gang);
    gang.launched(busy.id, &[Some(event(0, 0, 1))]);
    assert_eq!(devices(&start(&mut gang).1), [0]);
}
