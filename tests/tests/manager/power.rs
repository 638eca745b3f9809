//! Power cuts at any moment of imports and deletions: what was acknowledged is whole, what was not is absent or whole, and a second import mends it.
//!
//! `X_CUTS` cuts, four without it; `X_SEED` chooses which. With `X_CUTS`, stock containerd is treated likewise, for comparison: its losses are
//! printed, and they show that the check sees some.

use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};
use std::{env, fs};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use shim_tests::client::Client;
use shim_tests::context::Context;
use shim_tests::dice::Dice;
use shim_tests::image::{Image, Layer};
use shim_tests::import::{Fact, Import, delete_image};
use shim_tests::power::{Disk, Program, Recorder, Server};
use shim_tests::stored::Stored;

pub(crate) fn number(name: &str) -> Option<u64> {
    env::var(name).ok().and_then(|text| text.parse().ok())
}

fn cuts() -> u64 {
    number("X_CUTS").unwrap_or(4)
}

/// Some seconds for each cut, and a minute.
pub(crate) fn deadline() -> Duration {
    Duration::from_secs(60 + 5 * cuts())
}

/// Something that was acknowledged after a number of requests to the disk, and holds until a client asks for the opposite.
#[derive(Debug)]
struct Known {
    from: usize,
    until: usize,
    fact: Fact,
}

/// What was acknowledged when.
#[derive(Debug)]
struct Journal<'r> {
    recorder: &'r Recorder,
    known: Mutex<Vec<Known>>,
}

impl Journal<'_> {
    fn acknowledged(&self, fact: Fact) {
        let from = self.recorder.position();
        self.known.lock().expect("no panic under this lock").push(Known { from, until: usize::MAX, fact });
    }

    /// A client is about to ask for the opposite of these.
    fn revoked(&self, is_revoked: impl Fn(&Fact) -> bool) {
        let until = self.recorder.position();
        let mut known = self.known.lock().expect("no panic under this lock");
        known.iter_mut().filter(|known| known.until == usize::MAX && is_revoked(&known.fact)).for_each(|known| known.until = until);
    }

    async fn import(&self, client: &Client, image: &Image, lease: &str) -> Result<()> {
        self.revoked(|fact| *fact == Fact::NoImage(image.name.clone()));
        let import = Import::begin(client, image, lease).await?;
        import.run(&mut |fact| self.acknowledged(fact)).await?;
        Ok(import.end().await?)
    }
}

/// Two images with a layer in common.
fn images(dice: &mut Dice) -> [Image; 2] {
    let layers: Vec<_> = (0..).zip([12, 40, 8, 20, 30]).map(|(number, files)| Arc::new(Layer::random(dice, number, files))).collect();
    let first = Image::new("example.com/power/first:1", &layers[..3]);
    let others: Vec<_> = [0, 3, 4].map(|number| Arc::clone(&layers[number])).into();
    [first, Image::new("example.com/power/second:1", &others)]
}

/// Imports both, deletes one, and imports that again.
async fn work(client: &Client, images: &[Image; 2], journal: &Journal<'_>) -> Result<()> {
    let [first, second] = images;
    journal.import(client, first, "one").await?;
    journal.import(client, second, "two").await?;
    let shared: Vec<_> = second.blobs().map(|(digest, _)| digest).chain(second.chains()).collect();
    let name = first.name.clone();
    journal.revoked(|fact| match fact {
        Fact::Blob(id) | Fact::Snapshot(id) => !shared.contains(id),
        Fact::Image(image) => *image == name,
        Fact::NoImage(_) => false,
    });
    delete_image(client, &name, true).await?;
    journal.acknowledged(Fact::NoImage(name));
    journal.import(client, first, "three").await
}

pub(crate) async fn an_acknowledged_image_survives_a_power_cut_at_any_moment(cx: Context) -> Result<()> {
    let seed = number("X_SEED").unwrap_or(1);
    let tally = campaign(&cx, Program::Manager, seed).await?;
    ensure!(tally.failures.is_empty(), "X_SEED={seed}: {:#?}", tally.failures);
    println!("{tally}");
    if number("X_CUTS").is_some() {
        let stock = campaign(&cx, Program::Containerd, seed).await?;
        println!("{stock}");
        for failure in stock.failures.iter().take(8) {
            println!("  {failure}");
        }
        ensure!(stock.damaged > 0, "the check finds nothing wrong with a daemon that does not write snapshots back: can it find anything?");
    }
    Ok(())
}

/// What a campaign has found.
#[derive(Debug, Default)]
struct Tally {
    program: String,
    cuts: u64,
    written: (usize, usize),
    acknowledged: usize,
    /// Cuts after which something with a row was damaged, or something acknowledged was lost.
    damaged: u64,
    /// Those after which something was damaged or left over also after a second import.
    unmended: u64,
    failures: Vec<String>,
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { program, cuts, written: (bytes, flushes), acknowledged, damaged, unmended, .. } = self;
        write!(
            f,
            "{program}: {cuts} power cuts in {bytes} written bytes with {flushes} flushes and {acknowledged} acknowledgements: {damaged} left damage or a \
             loss; after a second import something was damaged or left over in {unmended}"
        )
    }
}

async fn campaign(cx: &Context, program: Program, seed: u64) -> Result<Tally> {
    let mut dice = Dice::new(seed);
    let images = images(&mut dice);
    let folder = cx.folder().join("power");
    let mut server = Server::new(program, &folder.join("recorded"))?;
    let recorder = Recorder::mount(&folder, 96 << 20, &server.root())?;
    let journal = Journal { recorder: &recorder, known: Mutex::default() };
    let client = server.start().await?;
    let begin = recorder.position();
    let worked = work(&client, &images, &journal).await.with_context(|| server.log());
    let end = recorder.position();
    server.end(Signal::SIGTERM)?;
    worked?;
    let known = journal.known.into_inner().expect("no panic under this lock");
    let mut recorded = recorder.end()?;
    let name = if program == Program::Manager { "x-manager" } else { "containerd" };
    let mut tally =
        Tally { program: name.to_owned(), cuts: cuts(), written: recorded.volume(), acknowledged: known.len(), ..Tally::default() };
    // half of them as soon as something was acknowledged
    let mut positions: Vec<_> = (0..cuts())
        .map(|number| match number % 2 {
            0 => known[usize::try_from(dice.below(known.len() as u64)).expect("it is an index")].from,
            _ => begin + usize::try_from(dice.below((end - begin) as u64)).expect("it is an index"),
        })
        .collect();
    positions.sort_unstable();
    for position in positions {
        let kept = [0, 50, 90][usize::try_from(dice.below(3))?];
        let facts: Vec<_> =
            known.iter().filter(|known| known.from <= position && position < known.until).map(|known| known.fact.clone()).collect();
        let place = format!("{name}, cut after {position} of {} requests, {kept} % of what was not flushed kept", recorded.len());
        let file = folder.join("cut");
        recorded.cut(position, kept, &mut dice, &file)?;
        let verdict = judge(program, &file, "", &folder, &images, facts).await.context(place.clone())?;
        tally.damaged += u64::from(!verdict.damage.is_empty());
        tally.unmended += u64::from(!verdict.unmended.is_empty());
        tally.failures.extend(verdict.damage.into_iter().map(|damage| format!("{place}: {damage}")));
        tally.failures.extend(verdict.unmended.into_iter().map(|damage| format!("{place}: after a second import: {damage}")));
    }
    Ok(tally)
}

/// What was wrong after a cut.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    pub(crate) damage: Vec<String>,
    /// After a second import.
    pub(crate) unmended: Vec<String>,
}

/// Starts a daemon on a disk that a power cut has left, with its root in a folder of it, and looks at what is there.
pub(crate) async fn judge(
    program: Program,
    file: &Path,
    within: &str,
    folder: &Path,
    images: &[Image],
    facts: Vec<Fact>,
) -> Result<Verdict> {
    let (place, point) = (folder.join("after"), folder.join("after/disk"));
    let disk = Disk::mount(file, &point)?;
    let mut server = Server::with_root(program, &place, &point.join(within))?;
    some_time_passes(&server.root())?;
    let client = server.start().await?;
    let stored = Stored::new(&client, &server.root());
    let found = async {
        let mut found = stored.damage(images).await?;
        found.extend(stored.lost(facts).await?);
        anyhow::Ok(found)
    };
    let mut verdict = Verdict { damage: found.await.unwrap_or_else(|error| vec![format!("{error:#}")]), ..Verdict::default() };
    verdict.unmended = match mend(&client, &stored, images).await {
        Ok(damage) => damage,
        Err(error) => vec![format!("{error:#}")],
    };
    server.end(Signal::SIGTERM)?;
    if let Err(error) = server.check() {
        verdict.unmended.push(format!("{error:#}"));
    }
    drop(server);
    disk.unmount()?;
    fs::remove_dir_all(place)?;
    fs::remove_file(file)?;
    Ok(verdict)
}

/// Until the machine is up again: an ingest that lacks a file may be in the making for a minute.
pub(crate) fn some_time_passes(root: &Path) -> Result<()> {
    let ingests = match fs::read_dir(root.join("io.containerd.content.v1.content/ingest")) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        ingests => ingests?,
    };
    for ingest in ingests {
        File::open(ingest?.path())?.set_modified(SystemTime::now() - Duration::from_secs(120))?;
    }
    Ok(())
}

/// Imports all images again, and collects what is left of before; what is wrong then.
async fn mend(client: &Client, stored: &Stored, images: &[Image]) -> Result<Vec<String>> {
    for (number, image) in images.iter().enumerate() {
        let import = Import::begin(client, image, &format!("again-{number}")).await?;
        import.run(&mut |_fact| {}).await.with_context(|| format!("import {} again", image.name))?;
        import.end().await?;
    }
    stored.end_leases().await?;
    stored.abort_ingests().await?;
    stored.settles().await?;
    let mut wrong = stored.damage(images).await?;
    let all = images.iter().flat_map(|image| image.chains().into_iter().map(Fact::Snapshot).chain([Fact::Image(image.name.clone())]));
    wrong.extend(stored.lost(all).await?);
    Ok(wrong)
}
