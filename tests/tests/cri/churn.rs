//! Many pods at once, and nothing left of them.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use shim_tests::context::Context;
use shim_tests::cri::{Cri, NOT_READY, READY, Sandboxer};
use shim_tests::times::repeated;
use tokio::task::{JoinSet, LocalSet};

/// How many are made and removed at the same time.
const AT_ONCE: usize = 8;

/// 24 of them, `X_TIMES` times as many on request. containerd forgets the name of a pod only when each step of its removal has succeeded.
pub(crate) async fn many_pods_are_made_and_removed_at_once(cx: Context) -> Result<()> {
    let (count, begin) = (repeated(24), Instant::now());
    let cri = Cri::start_as(&cx, Sandboxer::Shim).await?;
    let local = LocalSet::new();
    let mut lanes = JoinSet::new();
    for lane in 0..AT_ONCE {
        let cri = cri.clone();
        lanes.spawn_local_on(
            async move {
                for number in (lane..count).step_by(AT_ONCE) {
                    one(&cri, number).await.with_context(|| format!("pod {number}"))?;
                }
                anyhow::Ok(())
            },
            &local,
        );
    }
    local
        .run_until(async {
            while let Some(done) = lanes.join_next().await {
                done??;
            }
            anyhow::Ok(())
        })
        .await?;
    let log = cri.daemon().log();
    let failed: Vec<_> = log.lines().filter(|line| line.contains("level=error") || line.contains("ttrpc: closed")).collect();
    eprintln!("{count} pods, {AT_ONCE} at once: {:.1} s, {} complaints of containerd", begin.elapsed().as_secs_f64(), failed.len());
    ensure!(cri.pods().await?.is_empty());
    ensure!(failed.is_empty(), "{failed:#?}");
    cri.leaves_nothing().await
}

async fn one(cri: &Cri, number: usize) -> Result<()> {
    // the same name again and again: it is free only after a whole removal
    let name = format!("pod{}", number % AT_ONCE);
    let pod = cri.run_pod(&name).await?;
    let code = 3 + i32::try_from(number % 100)?;
    let ends = cri.run(&pod, "ends", &["sh", "-c", &format!("echo {number}; exit {code}")]).await?;
    cri.run(&pod, "runs", &["sleep", "100000"]).await?;
    ensure!(cri.pod_status(&pod).await?.state == READY);
    let status = cri.ended(&ends).await?;
    ensure!(status.exit_code == code, "{status:?}");
    cri.stop_pod(&pod).await?;
    ensure!(cri.pod_status(&pod).await?.state == NOT_READY);
    cri.remove_pod(&pod).await
}
