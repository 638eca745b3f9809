//! A manager that is played by the test, on a socket of its own.
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use tokio::net::UnixListener;
use tokio::task::LocalSet;
use x_engine::plan::{Property, Unit, Value};
use zbus::export::futures_core::Stream;
use zbus::message::Type;
use zbus::zvariant::{ObjectPath, Structure};
use zbus::{Connection, Guid, Message, MessageStream, connection};

use super::*;

/// What the manager does, and what it was asked.
#[derive(Debug, Default)]
struct Fake {
    version: &'static str,
    /// Units that exist, with whether they have failed: then a reset removes them.
    units: RefCell<BTreeMap<String, bool>>,
    control_group: &'static str,
    /// Of jobs; none: they never end.
    result: Option<&'static str>,
    calls: RefCell<Vec<String>>,
    /// The method at which the connection ends, without an answer; or `after` and the method.
    closes_at: &'static str,
}

const MANAGER: &str = "/org/freedesktop/systemd1";

impl Fake {
    fn new() -> Self {
        Self { version: "252.38", control_group: "/a.slice/p-c1.scope", result: Some("done"), ..Self::default() }
    }

    /// Serves, and runs a test with a connection.
    fn serve<T>(self, test: impl AsyncFnOnce(Manager) -> T) -> (T, Vec<String>) {
        let folder = scratch::Folder::new("systemd");
        let socket = folder.join("bus");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build().expect("a runtime");
        let fake = Rc::new(self);
        let tested = LocalSet::new().block_on(&runtime, async {
            let listener = UnixListener::bind(&socket).expect("a socket");
            let served = Rc::clone(&fake);
            tokio::task::spawn_local(async move { served.live(&listener).await });
            let manager = Manager::connect_to(&[(format!("unix:path={}", socket.display()), false)]).await.expect("a connection");
            test(manager).await
        });
        (tested, fake.calls.take())
    }

    async fn live(&self, listener: &UnixListener) {
        let (stream, _) = listener.accept().await.expect("a client");
        let connection = connection::Builder::unix_stream(stream).server(Guid::generate()).expect("a server").p2p().build().await;
        let connection = connection.expect("a client that speaks D-Bus");
        let mut messages = std::pin::pin!(MessageStream::from(&connection));
        while let Some(Ok(message)) = std::future::poll_fn(|context| messages.as_mut().poll_next(context)).await {
            if message.message_type() == Type::MethodCall {
                let member = message.header().member().map(ToString::to_string).unwrap_or_default();
                if member == self.closes_at {
                    return;
                }
                self.answer(&connection, &message).await.expect("an answer");
                if self.closes_at.strip_prefix("after ") == Some(&member) {
                    return;
                }
            }
        }
    }

    async fn answer(&self, connection: &Connection, message: &Message) -> zbus::Result<()> {
        let header = message.header();
        let member = header.member().expect("a method").to_string();
        let body = message.body();
        let words = body.deserialize::<Structure<'_>>().map(|words| words.to_string()).unwrap_or_default();
        // A single argument, or none.
        let words =
            words.strip_prefix('(').and_then(|words| words.strip_suffix(",)")).map_or(words.as_str(), |word| word.trim_matches('"'));
        let words = if words == "()" { String::new() } else { words.to_owned() };
        self.calls.borrow_mut().push(format!("{member} {words}").trim_end().to_owned());
        let unit = words.trim_start_matches(['(', '"']).split('"').next().unwrap_or_default().to_owned();
        let exists = self.units.borrow().get(&unit).copied();
        let error = |name: &'static str| format!("org.freedesktop.systemd1.{name}");
        match member.as_str() {
            "Get" if words.contains("Version") => connection.reply(&header, &zbus::zvariant::Value::from(self.version)).await,
            "Get" if words.contains("ControlGroup") => connection.reply(&header, &zbus::zvariant::Value::from(self.control_group)).await,
            "Get" if words.contains("Description") => connection.reply(&header, &zbus::zvariant::Value::from("container c1")).await,
            "Get" => connection.reply(&header, &zbus::zvariant::Value::from(7_u64)).await,
            "GetUnit" => connection.reply(&header, &ObjectPath::try_from(format!("{MANAGER}/unit/u"))?).await,
            "StartTransientUnit" if exists.is_some() => connection.reply_error(&header, error("UnitExists"), &"it exists").await,
            "StopUnit" | "ResetFailedUnit" if exists.is_none() => connection.reply_error(&header, error("NoSuchUnit"), &"not loaded").await,
            "StartTransientUnit" | "StopUnit" => {
                let is_stop = member == "StopUnit";
                // A unit that failed to start, or to stop, stays.
                let stays = self.result != Some("done");
                if is_stop && !stays {
                    self.units.borrow_mut().remove(&unit);
                } else {
                    self.units.borrow_mut().insert(unit.clone(), stays);
                }
                let job = |number: u32| ObjectPath::try_from(format!("{MANAGER}/job/{number}"));
                // Another's, then this one, before its answer: as systemd may send them.
                for (number, of, result) in
                    [(1, "other.scope", Some("failed")), (2, unit.as_str(), Some("canceled")), (3, unit.as_str(), self.result)]
                {
                    if let Some(result) = result {
                        let body = (number, job(number)?, of, result);
                        connection.emit_signal(None::<&str>, MANAGER, "org.freedesktop.systemd1.Manager", "JobRemoved", &body).await?;
                    }
                }
                connection.reply(&header, &job(3)?).await
            }
            "ResetFailedUnit" => {
                if exists == Some(true) {
                    self.units.borrow_mut().remove(&unit);
                }
                connection.reply(&header, &()).await
            }
            "SetUnitProperties" if words.contains("Unfit") => {
                connection
                    .reply_error(&header, "org.freedesktop.DBus.Error.PropertyReadOnly", &"Cannot set property Unfit, or unknown property.")
                    .await
            }
            "Subscribe" => connection.reply_error(&header, error("AlreadySubscribed"), &"twice").await,
            _ => connection.reply(&header, &()).await,
        }
    }
}

fn unit() -> Unit {
    let property = |name: &str, value, since| Property { name: name.to_owned(), value, since };
    let properties = vec![
        property("Description", Value::Text("container c1".to_owned()), 0),
        property("Delegate", Value::Bool(true), 0),
        property("After", Value::Array("s".to_owned(), vec![Value::Text("a.service".to_owned())]), 0),
        property("DeviceAllow", Value::Array("(ss)".to_owned(), vec![]), 0),
        property("New", Value::U64(1), 253),
    ];
    Unit { name: "p-c1.scope".to_owned(), control_group: "/a.slice/p-c1.scope".to_owned(), properties, limits: Vec::new() }
}

fn with_unit(has_failed: bool) -> RefCell<BTreeMap<String, bool>> {
    RefCell::new(BTreeMap::from([(unit().name, has_failed)]))
}

#[test]
fn a_unit_is_started_with_its_process_and_properties() {
    let (started, calls) = Fake::new().serve(async |manager| manager.start(&unit(), &[7]).await);
    started.expect("started");
    let expected = [
        r#"Get ("org.freedesktop.systemd1.Manager", "Version")"#,
        "Subscribe",
        // Without the property that this version does not have.
        r#"StartTransientUnit ("p-c1.scope", "replace", [("Description", <"container c1">), ("Delegate", <true>), ("After", <["a.service"]>), ("DeviceAllow", <@a(ss) []>), ("PIDs", <[uint32 7]>)], @a(sa(sv)) [])"#,
        "GetUnit p-c1.scope",
        r#"Get ("org.freedesktop.systemd1.Scope", "ControlGroup")"#,
    ];
    assert_eq!(calls, expected);
}

#[test]
fn a_unit_of_the_name_that_has_failed_is_replaced_once() {
    let (started, calls) = Fake { units: with_unit(true), ..Fake::new() }.serve(async |manager| manager.start(&unit(), &[7]).await);
    started.expect("started");
    let methods: Vec<&str> = calls.iter().filter_map(|call| call.split(' ').next()).collect();
    assert_eq!(methods, ["Get", "Subscribe", "StartTransientUnit", "ResetFailedUnit", "Subscribe", "StartTransientUnit", "GetUnit", "Get"]);
}

#[test]
fn a_unit_of_the_name_that_is_active_is_left_alone() {
    let (started, calls) = Fake { units: with_unit(false), ..Fake::new() }.serve(async |manager| manager.start(&unit(), &[7]).await);
    assert!(matches!(&started, Err(Error::Exists { unit }) if unit == "p-c1.scope"), "{started:?}");
    assert!(!calls.iter().any(|call| call.starts_with("StopUnit")), "{calls:?}");
    assert_eq!(calls.iter().filter(|call| call.starts_with("StartTransientUnit")).count(), 2);
}

#[test]
fn a_unit_is_known_by_its_description() {
    let (found, _) = Fake::new().serve(async |manager| {
        (manager.has_description(&unit()).await, manager.has_description(&unit().described("container c1, request 7 of shim 8")).await)
    });
    assert_eq!(found, (true, false));
}

#[test]
fn a_unit_is_ours_once_systemd_has_taken_the_order_to_start_it() {
    for (fake, is_ours) in [
        (Fake { result: Some("failed"), ..Fake::new() }, true),
        (Fake { result: None, ..Fake::new() }, true),
        (Fake { control_group: "/b.slice/p-c1.scope", ..Fake::new() }, true),
        (Fake { units: with_unit(false), ..Fake::new() }, false),
        (Fake { closes_at: "StartTransientUnit", ..Fake::new() }, false),
    ] {
        let (started, _) = fake.serve(async |manager| manager.start(&unit(), &[7]).await);
        let error = started.expect_err("not started");
        assert_eq!(error.has_a_job(), is_ours, "{error:?}");
    }
}

#[test]
fn a_bus_that_vanishes_during_a_call_is_an_error_at_once() {
    let before = std::time::Instant::now();
    for method in ["Subscribe", "StartTransientUnit", "GetUnit"] {
        let (started, _) = Fake { closes_at: method, ..Fake::new() }.serve(async |manager| manager.start(&unit(), &[7]).await);
        assert!(matches!(&started, Err(Error::Call { .. })), "{started:?}");
    }
    // A signal that does not come: the answer was the last message.
    let (started, _) = Fake { closes_at: "after StartTransientUnit", result: None, ..Fake::new() }
        .serve(async |manager| manager.start(&unit(), &[7]).await);
    assert!(matches!(&started, Err(Error::Closed { .. } | Error::Call { .. })), "{started:?}");
    assert!(before.elapsed() < ANSWER_WITHIN, "{:?}", before.elapsed());
}

#[test]
fn a_connection_leaves_nothing_behind_whether_it_is_closed_or_dropped() {
    let folder = scratch::Folder::new("connections");
    let socket = folder.join("bus");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build().expect("a runtime");
    LocalSet::new().block_on(&runtime, async {
        let listener = UnixListener::bind(&socket).expect("a socket");
        tokio::task::spawn_local(async move {
            let fake = Fake::new();
            loop {
                fake.live(&listener).await;
            }
        });
        let address = [(format!("unix:path={}", socket.display()), false)];
        let alive = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
        let before = alive();
        for number in 0..100 {
            let manager = Manager::connect_to(&address).await.expect("a connection");
            manager.start(&unit(), &[7]).await.expect("started");
            manager.stop(&unit().name).await.expect("stopped");
            if number % 2 == 0 { manager.close().await } else { drop(manager) }
        }
        let ended = async {
            while alive() > before {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(ANSWER_WITHIN, ended).await.unwrap_or_else(|_| panic!("{} tasks, {before} before", alive()));
    });
}

#[test]
fn a_job_that_fails_is_an_error_with_its_unit_and_result() {
    let (started, calls) = Fake { result: Some("dependency"), ..Fake::new() }.serve(async |manager| manager.start(&unit(), &[7]).await);
    let text = started.expect_err("the job has failed").to_string();
    assert!(text.contains("start unit p-c1.scope") && text.contains("\"dependency\""), "{text}");
    assert_eq!(calls.last().map(String::as_str), Some("ResetFailedUnit p-c1.scope"));
}

#[test]
fn a_job_that_does_not_end_is_given_up() {
    let (started, _) = Fake { result: None, ..Fake::new() }.serve(async |manager| manager.start(&unit(), &[7]).await);
    assert!(matches!(&started, Err(Error::Late { unit, .. }) if unit == "p-c1.scope"), "{started:?}");
}

#[test]
fn a_unit_at_another_place_is_an_error_with_both() {
    let (started, _) =
        Fake { control_group: "/b.slice/p-c1.scope", ..Fake::new() }.serve(async |manager| manager.start(&unit(), &[7]).await);
    let text = started.expect_err("elsewhere").to_string();
    assert!(text.contains("/b.slice/p-c1.scope") && text.contains("/a.slice/p-c1.scope"), "{text}");
}

#[test]
fn a_unit_is_stopped_and_forgotten_and_one_that_is_not_there_is_stopped() {
    let (stopped, calls) = Fake { units: with_unit(false), ..Fake::new() }.serve(async |manager| manager.stop("p-c1.scope").await);
    stopped.expect("stopped");
    assert_eq!(calls[1..], ["Subscribe", r#"StopUnit ("p-c1.scope", "replace")"#, "ResetFailedUnit p-c1.scope"]);
    let (stopped, calls) = Fake::new().serve(async |manager| manager.stop("p-c1.scope").await);
    stopped.expect("stopped");
    assert_eq!(calls.len(), 3, "{calls:?}");
    let (stopped, calls) =
        Fake { units: with_unit(true), result: Some("timeout"), ..Fake::new() }.serve(async |manager| manager.stop("p-c1.scope").await);
    assert!(matches!(&stopped, Err(Error::Job { what: "stop", .. })), "{stopped:?}");
    assert_eq!(calls.last().map(String::as_str), Some("ResetFailedUnit p-c1.scope"), "it is forgotten all the same");
}

#[test]
fn properties_are_set_until_the_next_boot_and_can_be_set_back() {
    let limit = |name: &str, number, since| Property { name: name.to_owned(), value: Value::U64(number), since };
    let limits = [limit("MemoryMax", 4096, 0), limit("CPUQuotaPeriodUSec", 100_000, 242), limit("New", 1, 253)];
    let (set, calls) = Fake::new().serve(async |manager| {
        let before = manager.values("p-c1.scope", &limits).await;
        manager.set("p-c1.scope", &limits).await?;
        manager.set_back("p-c1.scope", &before).await
    });
    set.expect("set");
    let sets: Vec<&String> = calls.iter().filter(|call| call.starts_with("SetUnitProperties")).collect();
    // Each is followed by a question: systemd writes the files after its answer.
    let after: Vec<&String> = calls.windows(2).filter(|pair| pair[0].starts_with("SetUnitProperties")).map(|pair| &pair[1]).collect();
    assert!(after.len() == 2 && after.iter().all(|call| call.starts_with("Get ")), "{calls:?}");
    let expected = [
        r#"SetUnitProperties ("p-c1.scope", true, [("MemoryMax", <uint64 4096>), ("CPUQuotaPeriodUSec", <uint64 100000>)])"#,
        r#"SetUnitProperties ("p-c1.scope", true, [("MemoryMax", <uint64 7>), ("CPUQuotaPeriodUSec", <uint64 7>)])"#,
    ];
    assert_eq!(sets, expected);
}

#[test]
fn what_systemd_refuses_is_reported_in_its_words() {
    let unfit = [Property { name: "Unfit".to_owned(), value: Value::U64(1), since: 0 }];
    let (set, _) = Fake::new().serve(async |manager| manager.set("p-c1.scope", &unfit).await);
    let text = crate::chain::chain(&set.expect_err("refused"));
    assert!(text.contains("SetUnitProperties of unit p-c1.scope") && text.contains("Cannot set property Unfit"), "{text}");
}

#[test]
fn a_host_without_a_bus_is_an_error_with_every_address_that_was_tried() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build().expect("a runtime");
    let addresses = [("unix:path=/no/such/bus".to_owned(), true), ("unix:path=/no/such/private".to_owned(), false)];
    let text = runtime.block_on(Manager::connect_to(&addresses)).expect_err("nothing is there").to_string();
    for words in
        ["cannot reach systemd", "SystemdCgroup", "unix:path=/no/such/bus", "unix:path=/no/such/private", "No such file or directory"]
    {
        assert!(text.contains(words), "{text}");
    }
}
