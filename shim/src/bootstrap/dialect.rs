//! The two protocols of `start`, by version of containerd.
//!
//! Owns the decoding of standard input and the bytes of the answer.
//!
//! | containerd | on standard input | answer |
//! | --- | --- | --- |
//! | 1.6 … 2.2 | nothing, or the options: an `Any` | the address, as text |
//! | 2.3 … | `BootstrapParams` | `BootstrapResult` |
//!
//! Both inputs are protobuf and use the same field numbers, so one may parse as the other. `BootstrapParams` repeats the id and the
//! namespace of the command line; options do not.
//!
//! **Invariant:** the answer is text unless the input was certainly a `BootstrapParams`: older daemons cannot read the other.
use std::path::PathBuf;

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use log::LevelFilter;
use protobuf::Message;
use protobuf::well_known_types::any::Any;

use crate::invocation::Flags;

/// The version of the task service that the shim chooses on 2.3 and later.
///
/// The socket serves both. With 3, containerd runs no `start` for a pod's later containers, and no `delete` when the shim
/// dies; with 2, it runs `start` for each container, and `delete` when the connection closes.
const TASK_VERSION: i32 = 2;

/// containerd's request to `start`.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Question {
    pub(crate) dialect: Dialect,
    /// The folder for sockets that the daemon chooses.
    pub(crate) socket_dir: Option<PathBuf>,
    /// containerd's gRPC and ttrpc sockets, where the input names them.
    pub(crate) grpc_address: Option<String>,
    pub(crate) ttrpc_address: Option<String>,
    pub(crate) log_level: Option<LevelFilter>,
    /// The runtime options, which the container's Create repeats.
    pub(crate) options: Option<Any>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// 1.6 to 2.2.
    #[default]
    Text,
    /// 2.3 and later.
    Protobuf,
}

impl Question {
    /// Decodes standard input. Never fails: input that is neither of the two counts as empty. Create repeats options that cannot be
    /// decoded, and refuses them by name.
    pub(crate) fn parse(input: &[u8], flags: &Flags) -> Self {
        if let Some(params) = bootstrap_params(input, flags) {
            return Self::from_params(params);
        }
        let options = Any::parse_from_bytes(input).ok().filter(are_options);
        Self { options, ..Self::default() }
    }

    fn from_params(params: BootstrapParams) -> Self {
        let text = |value: String| Some(value).filter(|value| !value.is_empty());
        Self {
            dialect: Dialect::Protobuf,
            socket_dir: params.socket_dir.and_then(text).map(PathBuf::from),
            grpc_address: text(params.containerd_grpc_address),
            ttrpc_address: text(params.containerd_ttrpc_address),
            log_level: Some(level_of(params.log_level.value())),
            options: params.extensions.into_iter().filter_map(|extension| extension.value.into_option()).find(are_options),
        }
    }
}

impl Dialect {
    /// The answer: the address for containerd.
    pub(crate) fn answer(self, address: &str) -> Vec<u8> {
        match self {
            Self::Text => address.as_bytes().to_vec(),
            Self::Protobuf => {
                let mut result = BootstrapResult::new();
                result.version = TASK_VERSION;
                result.address = address.to_owned();
                result.protocol = "ttrpc".to_owned();
                result.write_to_bytes().expect("a message of short strings can be encoded")
            }
        }
    }
}

/// Whether this is an options message, by its type name, with or without a prefix.
fn are_options(any: &Any) -> bool {
    any.type_url.rsplit('/').next().is_some_and(|name| name.ends_with(".Options"))
}

fn bootstrap_params(input: &[u8], flags: &Flags) -> Option<BootstrapParams> {
    if input.is_empty() {
        return None;
    }
    let params = BootstrapParams::parse_from_bytes(input).ok()?;
    (params.instance_id == flags.id && params.namespace == flags.namespace).then_some(params)
}

/// Levels in between count as the less verbose one; 2.3 calls 0 "info", and lower is more verbose.
fn level_of(level: i32) -> LevelFilter {
    match level {
        ..=-8 => LevelFilter::Trace,
        -7..=-4 => LevelFilter::Debug,
        -3..=3 => LevelFilter::Info,
        4..=7 => LevelFilter::Warn,
        8.. => LevelFilter::Error,
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::bootstrap_api::{Extension, LogLevel};
    use containerd_shim_protos::shim::oci::Options;
    use protobuf::{EnumOrUnknown, MessageField};

    use super::*;

    fn flags() -> Flags {
        Flags { id: "c1".into(), namespace: "n1".into(), ..Flags::default() }
    }

    fn options() -> Any {
        let mut options = Options::new();
        options.shim_cgroup = "/s".into();
        options.binary_name = "/usr/bin/crun".into();
        let mut any = Any::new();
        any.type_url = "containerd.runc.v1.Options".into();
        any.value = options.write_to_bytes().expect("encodes");
        any
    }

    fn params() -> BootstrapParams {
        let mut params = BootstrapParams::new();
        params.instance_id = "c1".into();
        params.namespace = "n1".into();
        params.containerd_ttrpc_address = "/t".into();
        params.containerd_grpc_address = "/g".into();
        params.socket_dir = Some("/short".into());
        params.log_level = EnumOrUnknown::new(LogLevel::LOG_LEVEL_DEBUG);
        let mut other = Extension::new();
        other.value = MessageField::some(Any { type_url: "containerd.io/cri.v1.PodSandboxConfig".into(), ..Any::new() });
        params.extensions.push(other);
        let mut extension = Extension::new();
        extension.value = MessageField::some(options());
        params.extensions.push(extension);
        params
    }

    #[test]
    fn bootstrap_params_are_understood_and_answered_in_kind() {
        let question = Question::parse(&params().write_to_bytes().expect("encodes"), &flags());
        assert_eq!(question.dialect, Dialect::Protobuf);
        assert_eq!(question.socket_dir, Some("/short".into()));
        assert_eq!((question.grpc_address.as_deref(), question.ttrpc_address.as_deref()), (Some("/g"), Some("/t")));
        assert_eq!(question.log_level, Some(LevelFilter::Debug));
        assert_eq!(question.options, Some(options()));
        let answer = BootstrapResult::parse_from_bytes(&question.dialect.answer("unix:///a")).expect("protobuf");
        assert_eq!((answer.version, answer.address.as_str(), answer.protocol.as_str()), (2, "unix:///a", "ttrpc"));
    }

    #[test]
    fn older_daemons_get_the_plain_address() {
        for (name, any) in [
            ("options", options()),
            ("prefixed", {
                let mut any = options();
                any.type_url = format!("types.googleapis.com/{}", any.type_url);
                any
            }),
        ] {
            let question = Question::parse(&any.write_to_bytes().expect("encodes"), &flags());
            assert_eq!(question.dialect, Dialect::Text, "{name}");
            assert_eq!(question.options, Some(any), "{name}");
        }
        let question = Question::parse(b"", &flags());
        assert_eq!(question, Question::default());
        assert_eq!(question.dialect.answer("unix:///a"), b"unix:///a");
    }

    #[test]
    fn params_of_another_container_are_not_params() {
        // An `Any` whose type url is an id and whose value is a namespace would be one; no options have such a type.
        for change in [|p: &mut BootstrapParams| p.instance_id = "c2".into(), |p: &mut BootstrapParams| p.namespace = "n2".into()] {
            let mut params = params();
            change(&mut params);
            let question = Question::parse(&params.write_to_bytes().expect("encodes"), &flags());
            assert_eq!(question, Question::default());
        }
    }

    #[test]
    fn bytes_that_are_no_options_are_ignored() {
        for bytes in [b"garbage".as_slice(), &[0x0a, 0x03, b'a', b'b', b'c'], &[0xff; 64]] {
            assert_eq!(Question::parse(bytes, &flags()), Question::default());
        }
    }

    #[test]
    fn levels_map_to_the_nearest_one() {
        let levels = [(i32::MIN, LevelFilter::Trace), (-8, LevelFilter::Trace), (-4, LevelFilter::Debug), (0, LevelFilter::Info)];
        for (level, filter) in levels.into_iter().chain([(4, LevelFilter::Warn), (8, LevelFilter::Error), (i32::MAX, LevelFilter::Error)]) {
            assert_eq!(level_of(level), filter, "{level}");
        }
    }

    #[test]
    fn no_bytes_on_standard_input_make_it_panic() {
        // A small generator is enough: every prefix and every changed byte of good messages, and noise.
        let mut seeds = vec![params().write_to_bytes().expect("encodes"), options().write_to_bytes().expect("encodes")];
        let mut noise = 0x2545_f491_4f6c_dd1du64;
        for length in 0..200 {
            seeds.push(
                (0..length)
                    .map(|_| {
                        noise ^= noise << 13;
                        noise ^= noise >> 7;
                        noise ^= noise << 17;
                        noise as u8
                    })
                    .collect(),
            );
        }
        for seed in &seeds {
            for at in 0..seed.len() {
                let _ = Question::parse(&seed[..at], &flags());
                for flip in [0x01, 0x80, 0xff] {
                    let mut changed = seed.clone();
                    changed[at] ^= flip;
                    let _ = Question::parse(&changed, &flags());
                }
            }
        }
    }
}
