//! The figures as tables, and which aims they meet.

use std::collections::BTreeMap;

use shim_tests::beside::median;

use crate::{CASES, Plan};

/// Figures by their name: of each [`crate::Server`], in each round.
pub(crate) type Figures = BTreeMap<String, [Vec<f64>; 3]>;

/// What is measured of a case.
pub(crate) const SECONDS: &str = "s";
pub(crate) const PEAK: &str = "peak of the daemon, MiB";
pub(crate) const STATE: &str = "State, 99 %, ms";

/// Prints them.
pub(crate) fn print(plan: &Plan, figures: &Figures) {
    println!("# Images: x-manager beside containerd 2.1\n");
    println!(
        "Images of {} MiB of text-like files in {} layers, stored and unpacked for containerd's own clients; the median of {} rounds, in turns. By",
        plan.images.mib, plan.images.layers, plan.images.rounds
    );
    println!(
        "`make bench-images` (`tests/src/bin/images-bench.rs`). A ratio above 1 is in x-manager's favour. With igzip in its PATH, containerd leaves"
    );
    println!("gzip to that program, whose memory is not counted; Debian's containerd comes without it.\n");
    println!("| | containerd | with igzip | x-manager | containerd / x-manager | with igzip / x-manager |");
    println!("| --- | ---: | ---: | ---: | ---: | ---: |");
    for (name, all) in figures {
        let [theirs, igzip, ours] = all.each_ref().map(|values| median(values));
        let [one, other, own] = [theirs, igzip, ours].map(shown);
        println!("| {name} | {one} | {other} | {own} | {} | {} |", shown(theirs / ours), shown(igzip / ours));
    }
    aims(figures);
}

fn aims(figures: &Figures) {
    println!("\n## Aims\n\n| | aim | measured | |\n| --- | --- | ---: | --- |");
    for case in CASES {
        let medians = |what: &str| figures.get(&format!("{}: {what}", case.name)).map(|all| all.each_ref().map(|values| median(values)));
        let Some([theirs, _igzip, ours]) = medians(SECONDS) else { continue };
        if let Some(aim) = case.times_faster {
            line(case.name, &format!("at least {aim} times as fast"), theirs / ours, theirs / ours >= aim);
        }
        if let Some([theirs, _igzip, ours]) = medians(PEAK) {
            line(case.name, "at most half of the memory", ours / theirs, ours / theirs <= 0.5);
        }
        if let Some([.., ours]) = medians(STATE) {
            line(case.name, "State answered within 20 ms (99 %)", ours, ours < 20.0);
        }
    }
}

fn line(name: &str, aim: &str, measured: f64, is_met: bool) {
    println!("| {name} | {aim} | {measured:.2} | {} |", if is_met { "met" } else { "**missed**" });
}

fn shown(value: f64) -> String {
    if value.is_finite() { format!("{value:.2}") } else { "–".to_owned() }
}
