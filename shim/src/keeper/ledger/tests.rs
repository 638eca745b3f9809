use std::cell::Cell;

use super::*;

/// Small, seeded and good enough to choose where a worker crashes.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

const OPERATIONS: Step = 3;

/// A keeper around a ledger: it counts what was done, in the place of the world.
#[derive(Default)]
struct World {
    ledger: Ledger,
    performed: BTreeMap<(Cause, Step), u32>,
    answered: BTreeMap<Cause, u32>,
    /// Operations that were asked for and whose outcome has not come.
    under_way: Vec<(Cause, Step)>,
}

impl World {
    fn operation(&mut self, cause: Cause, step: Step) -> Option<Outcome> {
        match self.ledger.ask(cause, step, false) {
            Asked::Known(outcome) => Some(outcome),
            Asked::Pending => None,
            Asked::Over => panic!("operation of a cause that is over"),
            Asked::New => {
                *self.performed.entry((cause, step)).or_default() += 1;
                self.under_way.push((cause, step));
                None
            }
        }
    }

    fn finish_one(&mut self) {
        if let Some((cause, step)) = self.under_way.pop() {
            self.ledger.settle(cause, step, &Outcome::Done);
        }
    }

    fn commit(&mut self, cause: Cause) {
        let mut commit = Commit {
            state: vec![(format!("c{cause}"), Some(vec![1]))],
            answers: vec![(cause, cause.to_le_bytes().to_vec())],
            ..Commit::default()
        };
        for due in self.ledger.commit(&mut commit, Instant::now()) {
            assert_eq!(due.response, cause.to_le_bytes());
            *self.answered.entry(cause).or_default() += 1;
        }
    }
}

/// Runs a dummy worker that crashes after `budget` messages. Returns whether it completed everything.
fn live(world: &mut World, mut budget: u64) -> bool {
    let causes: Vec<Cause> = world.ledger.causes().keys().copied().collect();
    for cause in causes {
        for step in 0..OPERATIONS {
            while world.operation(cause, step).is_none() {
                if budget == 0 {
                    return false;
                }
                budget -= 1;
                world.finish_one();
            }
        }
        if budget == 0 {
            return false;
        }
        budget -= 1;
        world.commit(cause);
    }
    true
}

/// Where no ready-made answer has a signal.
fn none(_: &str, _: i32) -> io::Result<()> {
    unreachable!("nothing is to be signalled")
}

fn caller(stream: u32) -> Asker {
    Asker::Client(Caller { client: 1, stream })
}

#[test]
fn random_worker_kills_do_nothing_twice_and_lose_no_answer() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (mut crashes, mut rounds) = (0, 0);
    while crashes < 10_000 {
        rounds += 1;
        let mut world = World::default();
        let requests = 1 + random.below(8);
        for stream in 0..requests {
            world.ledger.open_request(caller(stream as u32), vec![], Instant::now());
        }
        while !live(&mut world, random.below(6)) {
            crashes += 1;
        }
        assert!(world.performed.values().all(|count| *count == 1), "round {rounds}: {:?}", world.performed);
        assert_eq!(world.performed.len() as u64, requests * u64::from(OPERATIONS), "round {rounds}");
        assert_eq!(world.answered.len() as u64, requests, "round {rounds}");
        assert!(world.answered.values().all(|count| *count == 1), "round {rounds}: {:?}", world.answered);
        assert_eq!(world.ledger.state().len() as u64, requests, "round {rounds}");
    }
}

#[test]
fn an_outcome_is_repeated_and_a_closed_cause_refuses() {
    let mut ledger = Ledger::default();
    let cause = ledger.open_request(caller(1), vec![], Instant::now());
    assert_eq!(ledger.ask(cause, 0, false), Asked::New);
    assert_eq!(ledger.ask(cause, 0, false), Asked::Pending);
    assert!(ledger.settle(cause, 0, &Outcome::Done));
    assert_eq!(ledger.ask(cause, 0, false), Asked::Known(Outcome::Done));
    ledger.commit(&mut Commit { answers: vec![(cause, vec![])], ..Commit::default() }, Instant::now());
    assert_eq!(ledger.ask(cause, 1, false), Asked::Over);
}

#[test]
fn a_ready_answer_is_given_when_the_worker_is_late_and_dropped_when_the_state_changes() {
    let mut ledger = Ledger::default();
    // service "s", method "m", no payload
    let request = vec![0x0a, 1, b's', 0x12, 1, b'm'];
    let ready = Ready {
        key: "c".into(),
        service: "s".into(),
        method: "m".into(),
        payload: vec![],
        answer: vec![42],
        is_fallback: false,
        signal: None,
    };
    ledger.commit(&mut Commit { state: vec![("c".into(), Some(vec![1]))], ready: vec![ready], ..Commit::default() }, Instant::now());
    let now = Instant::now();
    let cause = ledger.open_request(caller(1), request.clone(), now);
    assert_eq!(ledger.overdue(now, false, none), []);
    // Of what the worker has asked for by then, one outcome is still to come.
    ledger.ask(cause, 4, false);
    ledger.settle(cause, 4, &Outcome::Done);
    ledger.ask(cause, 5, false);
    let due = ledger.overdue(now + READY_AFTER, false, none);
    assert_eq!(due.iter().map(|(due, _)| due.response.clone()).collect::<Vec<_>>(), [vec![42]]);
    assert_eq!(due[0].1, [(cause, 5)]);
    ledger.commit(&mut Commit { state: vec![("c".into(), Some(vec![2]))], ..Commit::default() }, Instant::now());
    assert_eq!(ledger.ready_answer(&request), None);
}

#[test]
fn what_is_asked_about_a_pod_is_answered_from_its_entry_while_a_worker_serves() {
    let mut ledger = Ledger::default();
    let request = [0x0a, 1, b's', 0x12, 1, b'm'];
    let offer = |ledger: &mut Ledger, key: &str, answer, is_fallback| {
        let (key, service, method) = (key.to_owned(), "s".to_owned(), "m".to_owned());
        let ready = Ready { key: key.clone(), service, method, payload: vec![], answer: vec![answer], is_fallback, signal: None };
        drop(ledger.commit(&mut Commit { state: vec![(key, Some(vec![1]))], ready: vec![ready], ..Commit::default() }, Instant::now()));
    };
    let answer = |ledger: &Ledger| ledger.answer_about_pod(caller(1), &request).map(|due| (due.request_bytes, due.response));
    assert_eq!(answer(&ledger), None);
    offer(&mut ledger, POD_KEY, 1, false);
    assert_eq!(answer(&ledger), Some((Some(6), vec![1])));
    offer(&mut ledger, POD_KEY, 2, false);
    assert_eq!(answer(&ledger), Some((Some(6), vec![2])));
    offer(&mut ledger, POD_KEY, 3, true);
    assert_eq!(answer(&ledger), None, "the worker knows a better one");
    offer(&mut ledger, POD_KEY, 4, false);
    ledger.commit(&mut Commit { state: vec![(POD_KEY.into(), None)], ..Commit::default() }, Instant::now());
    assert_eq!(answer(&ledger), None, "the pod is gone");
    // Of a container, the worker knows more.
    offer(&mut ledger, "c", 5, false);
    assert_eq!(answer(&ledger), None);
}

#[test]
fn what_is_moved_stays_the_same() {
    let mut ledger = Ledger::default();
    let ready = |number: u8| Ready {
        key: "c".into(),
        service: "s".into(),
        method: format!("m{number}"),
        payload: vec![number; 20],
        answer: vec![number; 100],
        is_fallback: false,
        signal: None,
    };
    // Holes, as requests leave them.
    let holes: Vec<Vec<u8>> = (0..100).map(|count| vec![0; count * 8]).collect();
    let state = vec![("c".to_owned(), Some(vec![1; 6000])), ("c/e".to_owned(), Some(vec![2; 300]))];
    ledger.commit(&mut Commit { state, ready: (0..12).map(ready).collect(), ..Commit::default() }, Instant::now());
    drop(holes);
    let before = (ledger.state.clone(), ledger.ready.clone());
    let places = |ledger: &Ledger| ledger.state.values().map(|value| value.as_ptr() as usize).collect::<Vec<_>>();
    for _ in 0..3 {
        let places_before = places(&ledger);
        ledger.compact();
        assert!((&ledger.state, &ledger.ready) == (&before.0, &before.1));
        assert!(places(&ledger).iter().zip(&places_before).all(|(now, before)| now <= before), "moved up");
    }
}

#[test]
fn a_fallback_is_given_only_when_no_worker_has_answered_in_time() {
    let mut ledger = Ledger::default();
    let request = vec![0x0a, 1, b's', 0x12, 1, b'm'];
    let ready = |is_fallback| Ready {
        key: "c".into(),
        service: "s".into(),
        method: "m".into(),
        answer: vec![42],
        payload: vec![],
        is_fallback,
        signal: None,
    };
    let offer = |ledger: &mut Ledger, is_fallback| {
        drop(ledger.commit(&mut Commit { ready: vec![ready(is_fallback)], ..Commit::default() }, Instant::now()))
    };
    offer(&mut ledger, true);
    let now = Instant::now();
    ledger.open_request(caller(1), request.clone(), now);
    assert_eq!(ledger.overdue(now, true, none), [], "the next worker is waited for");
    assert_eq!(ledger.overdue(now + READY_AFTER, true, none).len(), 1);
    // the same question, answered anew
    offer(&mut ledger, false);
    ledger.open_request(caller(1), request, now);
    assert_eq!(ledger.overdue(now, true, none).len(), 1);
    ledger.commit(&mut Commit { state: vec![("c".into(), None)], ..Commit::default() }, Instant::now());
    assert!(ledger.ready.is_empty() && ledger.questions.is_empty());
}

#[test]
fn a_signal_is_sent_once_and_only_if_no_worker_serves_in_time_or_has_begun() {
    let request = vec![0x0a, 1, b's', 0x12, 1, b'm'];
    let now = Instant::now();
    let late = now + READY_AFTER;
    let sent = Cell::new(0);
    let send = |key: &str, signal| {
        assert_eq!((key, signal), ("c", 9));
        sent.set(sent.get() + 1);
        Ok(())
    };
    let fail = |_: &str, _| Err(io::ErrorKind::NotFound.into());
    let asked = || {
        let mut ledger = Ledger::default();
        let (service, method) = ("s".into(), "m".into());
        let ready = Ready { key: "c".into(), service, method, payload: vec![], answer: vec![42], is_fallback: true, signal: Some(9) };
        ledger.commit(&mut Commit { ready: vec![ready], ..Commit::default() }, Instant::now());
        let cause = ledger.open_request(caller(1), request.clone(), now);
        (ledger, cause)
    };
    let (mut ledger, _) = asked();
    assert_eq!(ledger.overdue(now, true, send), [], "the next worker is waited for");
    assert_eq!(ledger.deadline(now), Some(late));
    assert_eq!(ledger.overdue(late, false, send), [], "a worker serves");
    assert_eq!((ledger.deadline(late), sent.get()), (None, 0));
    let due = ledger.overdue(late, true, send);
    assert_eq!((due.len(), due[0].0.response.as_slice(), sent.get()), (1, [42].as_slice(), 1));
    assert!(!ledger.is_busy());
    let (mut ledger, cause) = asked();
    ledger.ask(cause, 1, false);
    assert_eq!(ledger.overdue(late, true, send), [], "a worker had begun");
    let (mut ledger, _) = asked();
    // with a timeout of 127 ns
    ledger.open_request(caller(2), [request.as_slice(), &[0x20, 0x7f]].concat(), now);
    assert_eq!(ledger.overdue(late, true, send).len(), 1, "a client has given up");
    assert_eq!(sent.replace(1), 2);
    let (mut ledger, _) = asked();
    assert_eq!(ledger.overdue(late, true, fail), [], "the next worker says why");
    assert_eq!(ledger.overdue(late, true, send), []);
    assert!(sent.get() == 1 && ledger.is_busy());
}

#[test]
fn the_keeper_exits_only_on_shutdown_with_nothing_left() {
    let mut ledger = Ledger::default();
    assert!(!ledger.may_exit(false));
    ledger.commit(&mut Commit { state: vec![("c".into(), Some(vec![1]))], ..Commit::default() }, Instant::now());
    ledger.commit(&mut Commit { leave: true, ..Commit::default() }, Instant::now());
    assert!(!ledger.may_exit(false), "a container is left");
    let now = Instant::now();
    ledger.reserve("c".into(), now);
    assert_eq!(ledger.reservations().count(), 0, "the container exists");
    ledger.reserve("d".into(), now);
    ledger.commit(&mut Commit { state: vec![("c".into(), None)], ..Commit::default() }, Instant::now());
    assert!(!ledger.may_exit(false), "a place is reserved");
    assert!(ledger.expire(now + RESERVATION).is_empty());
    assert!(ledger.may_exit(false));
}

#[test]
fn a_wait_on_a_forgotten_container_is_answered() {
    let mut ledger = Ledger::default();
    let now = Instant::now();
    let mut park = |key: &str, control_client: u32| {
        let cause = ledger.open_request(Asker::ControlClient(control_client), Vec::new(), now);
        ledger.park(vec![(cause, key.to_owned())], |_| true);
    };
    park("c1", 1);
    park("c1/e", 2);
    park("c10", 3);
    let (keys, due) = ledger.forget_container("c1", b"gone");
    let mut answered: Vec<Asker> = due.iter().map(|due| due.asker).collect();
    answered.sort_by_key(|asker| format!("{asker:?}"));
    assert!(keys.is_empty() && due.iter().all(|due| due.response == b"gone"));
    assert_eq!(answered, [Asker::ControlClient(1), Asker::ControlClient(2)]);
    assert_eq!(ledger.parked().collect::<Vec<_>>(), [("c10", 1)]);
}

#[test]
fn an_entry_expires_unless_it_is_set_again() {
    let now = Instant::now();
    let mut ledger = Ledger::default();
    let set = |expiring| Commit { state: vec![("@pod".into(), Some(vec![1]))], expiring, ..Commit::default() };
    ledger.commit(&mut set(vec![("@pod".into(), 7), ("none".into(), 7)]), now);
    let at = now + Duration::from_secs(7);
    assert_eq!(ledger.deadline(now), Some(at));
    assert!(ledger.expire(at - Duration::from_millis(1)).is_empty());
    ledger.commit(&mut set(vec![]), now);
    assert!(ledger.expire(at).is_empty() && ledger.deadline(now).is_none());
    ledger.commit(&mut set(vec![("@pod".into(), 7)]), now);
    assert_eq!(ledger.expire(at), ["@pod"]);
    assert!(ledger.expire(at).is_empty());
}

#[test]
fn an_entry_does_not_expire_while_clients_ask() {
    let now = Instant::now();
    let mut ledger = Ledger::default();
    ledger.postpone_expiry(now);
    let set = Commit { state: vec![("@pod".into(), Some(vec![1]))], expiring: vec![("@pod".into(), 7)], ..Commit::default() };
    ledger.commit(&mut { set }, now);
    let [second, fifth, last] = [1, 5, 12].map(|seconds| now + Duration::from_secs(seconds));
    ledger.postpone_expiry(second);
    ledger.postpone_expiry(fifth);
    assert_eq!(ledger.deadline(fifth), Some(last));
    assert!(ledger.expire(last - Duration::from_millis(1)).is_empty());
    assert_eq!(ledger.expire(last), ["@pod"]);
    ledger.postpone_expiry(last);
    assert!(ledger.deadline(last).is_none(), "it has expired");
}

#[test]
fn a_keeper_that_may_exit_stays_for_its_clients_as_long_as_it_was_told() {
    let mut ledger = Ledger::default();
    assert_eq!(ledger.linger(), Duration::ZERO);
    ledger.commit(&mut Commit { leave: true, linger_millis: 500, ..Commit::default() }, Instant::now());
    assert_eq!(ledger.linger(), Duration::from_millis(500));
    ledger.commit(&mut Commit { leave: true, ..Commit::default() }, Instant::now());
    assert_eq!(ledger.linger(), Duration::ZERO);
}
