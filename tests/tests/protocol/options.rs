//! Options in messages that containerd's Go client sends to runtimes that are not runc's.

use std::path::Path;

use anyhow::{Result, ensure};
use containerd_shim_protos::api;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use shim_tests::eventually::SOON;
use shim_tests::runner::needs_criu;
use shim_tests::stand::Stand;
use shim_tests::suite::{Runtime, Suite};
use shim_tests::{proc, programs};

/// Up to containerd 1.7: the numbers of the two paths are not those of runc's shims.
pub(crate) async fn older_options_of_a_checkpoint_put_image_and_log_where_they_belong(stand: Stand) -> Result<()> {
    needs_criu(&Suite::Forky.program("criu"))?;
    let (image, log) = (stand.folder().join("image"), stand.folder().join("criu-log"));
    let field = |number: u8, path: &Path| {
        let text = path.display().to_string();
        [&[number << 3 | 2, u8::try_from(text.len()).expect("a short path")], text.as_bytes()].concat()
    };
    for runtime in Runtime::programs() {
        let real = Suite::Forky.runtime(runtime);
        let text = format!("#!/bin/sh\nPATH={}:$PATH exec {} \"$@\"\n", Suite::Forky.bin().display(), real.display());
        let with_criu = programs::script(stand.folder(), runtime.name(), &text)?;
        let container = stand.bundle(runtime.name(), &["sleep", "1000"]).runtime(&with_criu).run().await?;
        proc::executes(container.pid, "sleep").await?;
        let (image, log) = (image.join(runtime.name()), log.join(runtime.name()));
        let options = Any {
            type_url: "containerd.linux.runc.CheckpointOptions".to_owned(),
            value: [field(8, &log), field(9, &image)].concat(),
            ..Any::default()
        };
        let request = api::CheckpointTaskRequest { id: container.id.clone(), options: MessageField::some(options), ..Default::default() };
        container.task.call::<api::Empty>("Checkpoint", &request, SOON * 3).await?;
        ensure!(image.join("inventory.img").exists(), "{runtime}: no image in {}", image.display());
        ensure!(log.join("dump.log").exists(), "{runtime}: no log in {}", log.display());
        container.shut_down().await?;
    }
    Ok(())
}
