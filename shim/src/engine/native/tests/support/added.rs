//! Processes that are added to a container: for tests and the benchmark.
use x_engine::perform::{self, Descriptors};
use x_engine::{Host, plan, spec};

use crate::keeper::{Made, Streams, chain, report, text};

impl Made {
    /// Adds a process.
    pub(crate) fn exec(&self, process: &[u8], host: &Host, streams: Streams) -> Result<u32, String> {
        let process = spec::parse_process(process).map_err(|error| chain(&error))?;
        let plan = plan::exec(&process, &self.container, host).map_err(|error| chain(&error))?;
        let encoded = minicbor::to_vec(plan).map_err(|error| error.to_string())?;
        let init = x_engine::open_process(self.init).map_err(text)?;
        report(|report| {
            let descriptors = Descriptors { stdio: streams.stdio, report, gate: None, console: streams.console };
            perform::exec(&encoded, init, descriptors)
        })
    }
}
