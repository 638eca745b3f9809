//! Floods of requests, frames and connections: memory is bounded, and no other client is delayed.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api;
use shim_tests::eventually::{SOON, a_second, eventually, within};
use shim_tests::proc;
use shim_tests::proc::private_kib;
use shim_tests::refusals::frames::{answers, state_of};
use shim_tests::stand::Stand;
use shim_tests::task::{Task, V2, wait};
use shim_tests::ttrpc::{Code, Frame, REQUEST, RESPONSE, Wire, header, refusal};
use shim_tests::witness::Witness;
use tokio::io::AsyncWriteExt as _;

/// Clients that announce 4 GiB and send it as fast as they can do not delay others.
pub(crate) async fn a_four_gibibyte_frame_delays_no_other_client(stand: Stand) -> Result<()> {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;
    let witness = Witness::start(&stand).await?;
    let mut floods = Vec::new();
    for _ in 0..2 {
        let mut socket = UnixStream::connect(witness.socket())?;
        socket.set_write_timeout(Some(SOON))?;
        socket.set_read_timeout(Some(SOON))?;
        socket.write_all(&header(u32::MAX, 1, REQUEST))?;
        // a separate thread, to be faster than the shim
        floods.push(std::thread::spawn(move || {
            let block = vec![0x5a; 1 << 20];
            let begin = Instant::now();
            let mut sent = 0;
            // as much as the shim accepts in a few seconds
            while begin.elapsed() < Duration::from_secs(3) && sent < u32::MAX as usize - block.len() {
                socket.write_all(&block)?;
                sent += block.len();
            }
            // the shim refuses as soon as it has the length
            let mut head = [0; 10];
            socket.read_exact(&mut head)?;
            anyhow::Ok((sent, head))
        }));
    }
    let mut rounds = 0;
    while floods.iter().any(|flood| !flood.is_finished()) {
        witness.is_untouched().await?;
        rounds += 1;
    }
    for flood in floods {
        let (sent, head) = flood.join().expect("it does not panic")?;
        ensure!(rounds > 3 && sent > 16 << 20, "{rounds} rounds beside {sent} bytes");
        ensure!(head[4..9] == [0, 0, 0, 1, RESPONSE], "{head:?}");
    }
    witness.dismiss().await
}

/// Sends `total` requests as fast as they are taken, reads as many answers, and checks the witness meanwhile.
async fn flood(witness: &Witness, total: u32, frame: impl Fn(u32) -> Vec<u8> + Send + 'static) -> Result<Duration> {
    let begin = Instant::now();
    let (mut incoming, mut writer) = Wire::connect(witness.socket()).await?.split();
    let sender = tokio::spawn(async move {
        let mut block = Vec::new();
        for number in 0..total {
            block.extend_from_slice(&frame(1 + 2 * number));
            if block.len() > 1 << 16 || number + 1 == total {
                within("send requests", Duration::from_secs(60), writer.write_all(&block)).await??;
                block.clear();
            }
        }
        anyhow::Ok(writer)
    });
    let receiver = tokio::spawn(async move {
        let (mut answered, mut count, mut first) = (vec![false; total as usize], 0, Vec::new());
        while count < total {
            let is_connected = incoming.receive_all(|stream, payload| {
                let seen = answered.get_mut(stream as usize / 2).context("an answer to nothing")?;
                ensure!(!*seen, "stream {stream} is answered twice");
                *seen = true;
                if count == 0 {
                    first = payload.to_vec();
                    let answer = Frame { stream, kind: RESPONSE, payload: payload.to_vec() }.answer();
                    ensure!(refusal(answer)?.0 == Code::NotFound);
                }
                ensure!(payload == first, "the answer differs from the first");
                count += 1;
                Ok(())
            });
            ensure!(is_connected.await?, "connection closed after {count} answers");
        }
        anyhow::Ok(())
    });
    while !receiver.is_finished() {
        witness.is_untouched().await?;
    }
    receiver.await??;
    drop(sender.await??);
    Ok(begin.elapsed())
}

pub(crate) async fn a_million_small_requests_are_each_answered_and_cost_no_memory(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let (keeper, worker) = (witness.container.shim_pid()?, witness.container.worker_pid().await?);
    let template = Frame::request(0, V2, "State", &state_of("missing")).encode();
    let state = move |stream: u32| {
        let mut frame = template.clone();
        frame[4..8].copy_from_slice(&stream.to_be_bytes());
        frame
    };
    let before = (private_kib(keeper)?, private_kib(worker)?);
    let total = 1_000_000;
    let cpu =
        |pid| Ok::<f64, anyhow::Error>((proc::stat(pid)?.field(14).parse::<f64>()? + proc::stat(pid)?.field(15).parse::<f64>()?) / 100.0);
    let (keeper_before, worker_before) = (cpu(keeper)?, cpu(worker)?);
    let took = flood(&witness, total, state).await?;
    let after = (private_kib(keeper)?, private_kib(worker)?);
    eprintln!(
        "{total} requests in {:.1} s, CPU seconds of keeper {:.1}, worker {:.1}; KiB of both: {before:?}, then {after:?}",
        took.as_secs_f64(),
        cpu(keeper)? - keeper_before,
        cpu(worker)? - worker_before
    );
    ensure!(witness.container.worker_pid().await? == worker, "another worker");
    ensure!(after.0 < before.0 + 8192 && after.1 < before.1 + 4096, "grown from {before:?} to {after:?} KiB");
    eventually("memory of the flood is freed", SOON, async || {
        let kib = (private_kib(keeper)?, private_kib(worker)?);
        ensure!(kib.0 < before.0 + 1024 && kib.1 < before.1 + 1024, "{kib:?} KiB, {before:?} before");
        Ok(())
    })
    .await?;
    witness.dismiss().await
}

pub(crate) async fn a_hundred_thousand_abandoned_waits_cost_little_memory_and_each_is_answered(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let (keeper, worker) = (witness.container.shim_pid()?, witness.container.worker_pid().await?);
    let sleeper = witness.sibling("sleeper", &["sh", "-c", "read go; exit 3"]);
    let fifo = stand.folder().join("go");
    shim_tests::stdio::fifo(&fifo)?;
    let sleeper = sleeper.stdio(&fifo.display().to_string(), "", "").run_in(&witness.container.task).await?;
    let before = (private_kib(keeper)?, private_kib(worker)?);
    let total = 100_000_u32;
    let waits = |total: u32| {
        let mut bytes = Vec::new();
        for number in 0..total {
            bytes.extend(Frame::request(1 + 2 * number, V2, "Wait", &wait("sleeper", "")).encode());
        }
        bytes
    };
    // when a client disconnects, its Waits are dropped
    let mut gone = Wire::connect(witness.socket()).await?;
    gone.send(&waits(total)).await?;
    answers(&mut gone, V2, 1 + 2 * total).await?;
    let held = (private_kib(keeper)?, private_kib(worker)?);
    eprintln!("{total} Waits: KiB of keeper and worker: {before:?}, then {held:?}");
    ensure!(held.0 < before.0 + 8192 && held.1 < before.1 + 4096, "grown from {before:?} to {held:?} KiB");
    drop(gone);
    eventually("memory of waits is freed", SOON, async || {
        let kib = private_kib(keeper)?;
        ensure!(kib < before.0 + 1024, "{kib} KiB, {} before", before.0);
        Ok(())
    })
    .await?;
    // and one that stays is answered
    let mut stays = Wire::connect(witness.socket()).await?;
    stays.send(&waits(total)).await?;
    answers(&mut stays, V2, 1 + 2 * total).await?;
    witness.is_untouched().await?;
    shim_tests::stdio::Writer::open(&fifo).await?.write_all(b"go\n")?;
    let (mut incoming, _writer) = stays.split();
    let mut count = 0;
    while count < total {
        let is_connected = incoming.receive_all(|stream, payload| {
            let answer = Frame { stream, kind: RESPONSE, payload: payload.to_vec() }.answer()?;
            let answer: api::WaitResponse = protobuf::Message::parse_from_bytes(&answer)?;
            ensure!(answer.exit_status == 3, "{answer:?}");
            count += 1;
            Ok(())
        });
        ensure!(is_connected.await?, "connection closed after {count} answers");
    }
    ensure!(sleeper.finish().await? == 3);
    witness.dismiss().await
}

pub(crate) async fn a_client_that_never_reads_its_answers_costs_a_bounded_amount(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let (keeper, worker) = (witness.container.shim_pid()?, witness.container.worker_pid().await?);
    let before = (private_kib(keeper)?, private_kib(worker)?);
    let mut deaf = Vec::new();
    // Stats has the longest answer of all
    let stats = api::StatsRequest { id: "witness".to_owned(), ..Default::default() };
    for client in 0..2 {
        let mut wire = Wire::connect(witness.socket()).await?;
        let mut stream = 1;
        let mut bytes = Vec::new();
        let begin = Instant::now();
        // until the shim accepts no more, or more than its limits allow
        let mut stuck_since = None;
        let mut total = 0;
        while total < 64 << 20 && begin.elapsed() < SOON {
            if bytes.is_empty() {
                for _ in 0..100 {
                    let frame =
                        if client == 0 { Frame::request(stream, V2, "Stats", &stats) } else { Frame::request(2, V2, "State", &stats) };
                    bytes.extend(frame.encode());
                    stream += 2;
                }
            }
            let count = wire.try_send(&bytes)?;
            bytes.drain(..count);
            total += count;
            if count > 0 {
                stuck_since = None;
            } else if stuck_since.get_or_insert_with(Instant::now).elapsed() > Duration::from_millis(300) {
                break;
            } else {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        witness.is_untouched().await?;
        deaf.push(wire);
    }
    let after = (private_kib(keeper)?, private_kib(worker)?);
    eprintln!("two clients that do not read: KiB of keeper and worker: {before:?}, then {after:?}");
    // 16 MiB of answers each, and their bookkeeping
    ensure!(after.0 < before.0 + (80 << 10) && after.1 < before.1 + (16 << 10), "grown from {before:?} to {after:?} KiB");
    drop(deaf);
    // once the worker has answered what they had asked: some thousands of Stats, which take longer than SOON on a busy machine
    eventually("memory of clients that do not read is freed", Duration::from_secs(60), async || {
        let kib = private_kib(keeper)?;
        ensure!(kib < before.0 + 1024, "{kib} KiB, {} before", before.0);
        Ok(())
    })
    .await?;
    witness.dismiss().await
}

/// Many connections, each with requests that fill its allowance, and a worker that does not accept them.
pub(crate) async fn ready_answers_are_given_during_a_flood_with_a_stopped_worker(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let (keeper, worker) = (witness.container.shim_pid()?, witness.container.worker_pid().await?);
    let before = private_kib(keeper)?;
    shim_tests::proc::signal(worker, nix::sys::signal::Signal::SIGSTOP)?;
    let mut floods = Vec::new();
    for _ in 0..4 {
        let mut wire = Wire::connect(witness.socket()).await?;
        let mut bytes = Vec::new();
        for number in 0..9000 {
            bytes.extend(
                Frame::request(1 + 2 * number, V2, "Kill", &api::KillRequest { id: "x".repeat(1000), ..Default::default() }).encode(),
            );
        }
        let begin = Instant::now();
        while !bytes.is_empty() && begin.elapsed() < Duration::from_millis(500) {
            let count = wire.try_send(&bytes)?;
            bytes.drain(..count);
            tokio::task::yield_now().await;
        }
        floods.push(wire);
    }
    for task in [witness.container.task.clone(), Task::connect(witness.socket()).await?] {
        let state = task.state_within("witness", "", a_second()).await;
        ensure!(state.is_ok(), "{state:?}");
    }
    let after = private_kib(keeper)?;
    ensure!(after < before + (64 << 10), "grown from {before} to {after} KiB");
    drop(floods);
    // on a busy machine the keeper may have taken the stopped worker for hung and replaced it
    let _alive_or_replaced = shim_tests::proc::signal(worker, nix::sys::signal::Signal::SIGCONT);
    eventually("a worker has caught up", SOON, async || {
        let pids = witness.container.task.stats("witness").await;
        ensure!(pids.is_ok(), "{pids:?}");
        Ok(())
    })
    .await?;
    witness.dismiss().await
}

/// Workers crash repeatedly during the flood: each request is answered exactly once.
pub(crate) async fn every_request_of_a_flood_over_crashing_workers_is_answered_once(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let keeper = witness.container.shim_pid()?;
    let killer = tokio::spawn(async move {
        for _ in 0..8 {
            for child in proc::children(keeper).into_iter().filter(|child| child.command.contains(" worker")) {
                proc::kill_hard(child.pid);
            }
            // rare enough for progress in between: the keeper delays the replacement of a worker that has done nothing
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    });
    let template = Frame::request(0, V2, "State", &state_of("missing")).encode();
    let answered = flood(&witness, 10_000, move |stream| {
        let mut frame = template.clone();
        frame[4..8].copy_from_slice(&stream.to_be_bytes());
        frame
    });
    let answered = answered.await;
    killer.abort();
    answered?;
    witness.dismiss().await
}

/// A client that connects while the shim has no free descriptor is served as soon as it has.
pub(crate) async fn a_shim_without_free_descriptors_serves_its_clients_and_later_the_others(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let keeper = witness.container.shim_pid()?;
    let limit = |files: &str| -> Result<()> {
        let status = std::process::Command::new("prlimit").args(["--pid", &keeper.to_string(), &format!("--nofile={files}:")]).status()?;
        ensure!(status.success(), "prlimit: {status}");
        Ok(())
    };
    let before = proc::status_field(keeper, "FDSize")?;
    limit(&proc::fewest_open_files(keeper).await?.to_string())?;
    let mut waiting = Vec::new();
    for _ in 0..3 {
        let mut wire = Wire::connect(witness.socket()).await?;
        wire.send(&Frame::request(1, V2, "State", &state_of("witness")).encode()).await?;
        waiting.push(wire);
    }
    for _ in 0..3 {
        let state = witness.container.task.state_within("witness", "", a_second()).await?;
        ensure!(state.pid == witness.container.pid);
    }
    // calls that need a descriptor are refused, and can be repeated
    let exec = witness.container.exec("e", &["true"]).await;
    ensure!(exec.is_err(), "an exec without a descriptor");
    limit("1024")?;
    for mut wire in waiting {
        ensure!(within("the answer", a_second() * 2, wire.answer(1)).await??.is_ok(), "{before}");
    }
    let task = &witness.container.task;
    task.start("witness", "e").await?;
    ensure!(task.wait("witness", "e").await? == 0);
    task.delete("witness", "e").await?;
    witness.dismiss().await
}

/// The state of a group's containers does not fit one message: the commands work nevertheless.
pub(crate) async fn commands_work_on_a_shim_that_knows_a_lot(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let task = &witness.container.task;
    let mut members = Vec::new();
    let path = format!("/{}", "x".repeat(4000));
    for number in 0..2 {
        let member = witness.sibling(&format!("c{number}"), &["sleep", "1000"]).run_in(task).await?;
        for exec in 0..500 {
            let request = member.bundle.exec_request(&format!("e{exec}"), &["true"]);
            task.exec(&api::ExecProcessRequest { stdout: path.clone(), stderr: path.clone(), ..request }).await?;
        }
        members.push(member);
    }
    let output = within("ps", SOON, stand.command(&["ps", "--json"]).output()).await??;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for member in &members {
        ensure!(text.contains(&format!("\"{}\"", member.id)), "{} is not in {text}", member.id);
    }
    let late = witness.sibling("late", &["sh", "-c", "exit 3"]);
    ensure!(late.start_shim().await? == witness.socket());
    ensure!(late.run_in(task).await?.finish().await? == 3);
    let first = members.remove(0);
    ensure!(first.bundle.delete_command().await?.exit_status == 137);
    ensure!(!proc::is_alive(first.pid.cast_signed()));
    for member in members {
        member.destroy().await?;
    }
    witness.dismiss().await
}
