//! Which hosts are asked about a reference, in which order.
//!
//! A folder of `config_path` has one folder for each registry: with hosts.toml, or with certificates as Docker has them in certs.d.

use std::fs::{self, File};
use std::io::{ErrorKind, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::{RegistryError, Result};
use super::hosts_file::{self, Capabilities, ClientPair, Entry};
use super::url::{Origin, Scheme, Url};

/// One host, as it is configured.
#[derive(Debug, Clone)]
pub(super) struct HostConfig {
    pub(super) origin: Origin,
    /// What its paths begin with; `/v2` if nothing else is configured.
    pub(super) prefix: String,
    pub(super) capabilities: Capabilities,
    pub(super) headers: Vec<(String, String)>,
    pub(super) dial_timeout: Option<Duration>,
    pub(super) tls: TlsConfig,
    /// HTTP where the host does not speak TLS.
    pub(super) falls_back_to_http: bool,
    /// Whether it stands in for the registry: it is asked with the registry's name.
    pub(super) is_mirror: bool,
}

/// Certificates, by their files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct TlsConfig {
    pub(super) ca: Vec<PathBuf>,
    pub(super) client: Vec<ClientPair>,
    pub(super) skip_verify: bool,
}

/// The hosts of a registry: mirrors, then itself. Blocks.
pub(super) fn blocking_load(config_path: &[PathBuf], registry: &str, plain_http: Option<bool>) -> Result<Vec<HostConfig>> {
    let Some(folder) = blocking_folder(config_path, registry)? else {
        return Ok(vec![server(registry, plain_http, Entry::default(), None)?]);
    };
    let path = folder.join("hosts.toml");
    let Some(text) = blocking_text(&path)?.filter(|text| !text.is_empty()) else {
        return Ok(vec![server(registry, plain_http, blocking_certificates(&folder)?, None)?]);
    };
    let malformed = |line: usize, why: String| RegistryError::Config { path: path.clone(), line: Some(line), why };
    let file = hosts_file::parse(&folder, &text).map_err(|error| malformed(error.line, error.why))?;
    let mut hosts = Vec::new();
    for entry in file.hosts {
        let line = entry.line;
        hosts.push(configured(entry).map_err(|why| malformed(line, why))?);
    }
    let line = file.server.line;
    let last = server(registry, plain_http, file.server, Some(&path)).map_err(|error| match error {
        RegistryError::Config { why, .. } => malformed(line, why),
        other => other,
    })?;
    // a server that is a mirror too would be asked twice
    let is_listed =
        |mirror: &HostConfig| mirror.origin == last.origin && mirror.prefix == last.prefix && mirror.capabilities == last.capabilities;
    if !hosts.iter().any(is_listed) {
        hosts.push(last);
    }
    let name = if registry == HUB { HUB_SERVER } else { registry };
    for host in &mut hosts {
        host.is_mirror = Origin::of(host.origin.scheme, name).is_ok_and(|own| own.authority() != host.origin.authority());
    }
    Ok(hosts)
}

/// The registry itself.
fn server(registry: &str, plain_http: Option<bool>, entry: Entry, path: Option<&Path>) -> Result<HostConfig> {
    let wrong = |why: String| RegistryError::Config { path: path.unwrap_or(Path::new(registry)).to_owned(), line: None, why };
    if !entry.url.is_empty() {
        return configured(entry).map_err(wrong);
    }
    let (host, chosen) = if registry == HUB { (HUB_SERVER, Some(false)) } else { (registry, plain_http) };
    let as_https = Origin::of(Scheme::Https, host).map_err(|why| wrong(why.to_owned()))?;
    let port = host.rsplit_once(']').map_or(host, |(_address, rest)| rest).rsplit_once(':').map(|(_, port)| port);
    let is_https_port = matches!(port, None | Some("443"));
    let (scheme, falls_back_to_http, skips) = match chosen {
        Some(true) => (Scheme::Http, false, false),
        Some(false) => (Scheme::Https, false, false),
        // as containerd: a name of this machine is not verified; HTTP is tried where the port does not decide
        None if as_https.is_loopback() && port == Some("80") => (Scheme::Http, false, false),
        None if as_https.is_loopback() => (Scheme::Https, !is_https_port, true),
        None => (Scheme::Https, false, false),
    };
    let origin = Origin::of(scheme, host).map_err(|why| wrong(why.to_owned()))?;
    let mut tls = TlsConfig { ca: entry.ca, client: entry.client, skip_verify: entry.skip_verify.unwrap_or(skips) };
    if scheme == Scheme::Http {
        tls = TlsConfig::default();
    }
    Ok(HostConfig {
        origin,
        prefix: API.to_owned(),
        capabilities: entry.capabilities,
        headers: entry.headers,
        dial_timeout: entry.dial_timeout,
        tls,
        falls_back_to_http,
        is_mirror: false,
    })
}

/// A host with a URL. As containerd: https is the default, and one with HTTP that has certificates is tried with TLS first.
fn configured(entry: Entry) -> Result<HostConfig, String> {
    let text = if entry.url.contains("://") { entry.url.clone() } else { format!("https://{}", entry.url) };
    let url = Url::parse(&text).map_err(|why| format!("{:?}: {why}", entry.url))?;
    let has_path = text.split_once("://").is_some_and(|(_, rest)| rest.contains('/'));
    let clean = url.path.split('/').filter(|part| !part.is_empty()).map(|part| format!("/{part}")).collect::<String>();
    let prefix = match (entry.override_path, has_path) {
        (true, true) => clean,
        (true, false) => String::new(),
        (false, _) if clean.ends_with(API) => clean,
        (false, _) => format!("{clean}{API}"),
    };
    let is_configured = !entry.ca.is_empty() || !entry.client.is_empty() || entry.skip_verify.is_some();
    let falls_back_to_http = url.origin.scheme == Scheme::Http && is_configured && url.origin.port != Scheme::Http.port();
    let mut origin = url.origin;
    if falls_back_to_http {
        origin.scheme = Scheme::Https;
    }
    Ok(HostConfig {
        origin,
        prefix,
        capabilities: entry.capabilities,
        headers: entry.headers,
        dial_timeout: entry.dial_timeout,
        tls: TlsConfig { ca: entry.ca, client: entry.client, skip_verify: entry.skip_verify.unwrap_or(false) },
        falls_back_to_http,
        is_mirror: false,
    })
}

/// The first folder for a registry: `host_port_`, `host:port`, `_default`, in each of the folders.
fn blocking_folder(config_path: &[PathBuf], registry: &str) -> Result<Option<PathBuf>> {
    let with_port = registry.rsplit_once(':').filter(|(host, port)| !host.is_empty() && !port.ends_with(']'));
    let underscored = with_port.map(|(host, port)| format!("{host}_{port}_"));
    for root in config_path {
        for name in underscored.iter().map(String::as_str).chain([registry, DEFAULT]) {
            let folder = root.join(name);
            match fs::metadata(&folder) {
                Ok(about) if about.is_dir() => return Ok(Some(folder)),
                Ok(_file) => {}
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
                Err(error) => return Err(unusable(&folder, &error)),
            }
        }
    }
    Ok(None)
}

/// Certificates in a folder: `*.crt` of authorities, `*.cert` with `*.key` of clients.
fn blocking_certificates(folder: &Path) -> Result<Entry> {
    let mut entry = Entry::default();
    let mut names = Vec::new();
    for file in fs::read_dir(folder).map_err(|error| unusable(folder, &error))? {
        names.push(file.map_err(|error| unusable(folder, &error))?.path());
        if names.len() > FILES {
            return Err(RegistryError::Config { path: folder.to_owned(), line: None, why: format!("it has more than {FILES} files") });
        }
    }
    names.sort();
    for path in names {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => entry.ca.push(path),
            Some("cert") => {
                let key = Some(path.with_extension("key")).filter(|key| key.exists());
                entry.client.push(ClientPair { certificate: path, key });
            }
            _ => {}
        }
    }
    Ok(entry)
}

/// The text of a file, if it exists.
fn blocking_text(path: &Path) -> Result<Option<String>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unusable(path, &error)),
    };
    let mut text = String::new();
    file.take(FILE_BYTES + 1).read_to_string(&mut text).map_err(|error| unusable(path, &error))?;
    if text.len() as u64 > FILE_BYTES {
        return Err(RegistryError::Config { path: path.to_owned(), line: None, why: format!("it is longer than {FILE_BYTES} bytes") });
    }
    Ok(Some(text))
}

pub(super) fn unusable(path: &Path, error: &std::io::Error) -> RegistryError {
    RegistryError::Config { path: path.to_owned(), line: None, why: error.to_string() }
}

/// The name of Docker Hub in references, and its server.
pub(super) const HUB: &str = "docker.io";
const HUB_SERVER: &str = "registry-1.docker.io";
/// What paths of the API begin with.
const API: &str = "/v2";
/// The folder for registries that have none.
const DEFAULT: &str = "_default";
const FILE_BYTES: u64 = 1 << 20;
/// In a folder of certificates.
const FILES: usize = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(host: &HostConfig) -> String {
        format!("{}://{}{}", host.origin.scheme.name(), host.origin.authority(), host.prefix)
    }

    fn loaded(root: &Path, registry: &str) -> Vec<String> {
        let hosts = blocking_load(&[root.to_owned()], registry, None).unwrap_or_else(|error| panic!("{error}"));
        hosts.iter().map(shown).collect()
    }

    #[test]
    fn without_configuration_the_registry_itself_is_asked() {
        for (registry, plain_http, expected, falls_back, skips) in [
            ("docker.io", None, "https://registry-1.docker.io/v2", false, false),
            ("docker.io", Some(true), "https://registry-1.docker.io/v2", false, false),
            ("r.example", None, "https://r.example/v2", false, false),
            ("r.example:5000", None, "https://r.example:5000/v2", false, false),
            ("r.example:5000", Some(true), "http://r.example:5000/v2", false, false),
            ("[2001:db8::1]:5000", None, "https://[2001:db8::1]:5000/v2", false, false),
            ("localhost", None, "https://localhost/v2", false, true),
            ("localhost:80", None, "http://localhost/v2", false, false),
            ("localhost:443", None, "https://localhost/v2", false, true),
            ("localhost:5000", None, "https://localhost:5000/v2", true, true),
            ("127.0.0.1:5000", None, "https://127.0.0.1:5000/v2", true, true),
            ("[::1]:5000", None, "https://[::1]:5000/v2", true, true),
            ("localhost:5000", Some(false), "https://localhost:5000/v2", false, false),
        ] {
            let hosts = blocking_load(&[], registry, plain_http).expect("hosts");
            assert_eq!((hosts.len(), shown(&hosts[0]).as_str()), (1, expected), "{registry}");
            assert_eq!((hosts[0].falls_back_to_http, hosts[0].tls.skip_verify), (falls_back, skips), "{registry}");
        }
    }

    #[test]
    fn the_folder_of_a_registry_is_found_by_its_name_and_port_in_the_first_root_that_has_one() {
        let scratch = scratch::Folder::new("hosts");
        let roots = [scratch.join("a"), scratch.join("b")];
        let put = |root: &Path, name: &str| {
            let folder = root.join(name);
            fs::create_dir_all(&folder).expect("a folder");
            fs::write(
                folder.join("hosts.toml"),
                format!("server = \"https://{}.example\"", name.replace(['_', ':', '[', ']'], "-").trim_matches('-')),
            )
            .expect("a file");
        };
        let server = |registry: &str| {
            let hosts = blocking_load(&roots, registry, None).unwrap_or_else(|error| panic!("{registry}: {error}"));
            hosts.last().expect("a host").origin.host.clone()
        };
        fs::create_dir_all(&roots[0]).expect("a folder");
        assert_eq!(server("r.example:5000"), "r.example");
        put(&roots[1], "_default");
        assert_eq!(server("r.example:5000"), "default.example");
        put(&roots[1], "r.example:5000");
        assert_eq!(server("r.example:5000"), "r.example-5000.example");
        put(&roots[1], "other.example_1_");
        assert_eq!(server("other.example:1"), "other.example-1.example");
        assert_eq!(server("other.example"), "default.example");
        put(&roots[1], "[::1]_5000_");
        assert_eq!(server("[::1]:5000"), "1--5000.example");
        put(&roots[0], "r.example_5000_");
        assert_eq!(server("r.example:5000"), "r.example-5000.example");
        put(&roots[0], "_default");
        assert_eq!(server("[::1]:5000"), "default.example", "the first root that knows a registry counts");
    }

    #[test]
    fn mirrors_come_in_the_order_of_the_file_and_the_server_last() {
        let scratch = scratch::Folder::new("mirrors");
        for (text, expected) in [
            ("", vec!["https://r.example/v2"]),
            ("[host.\"https://z\"]\n[host.\"https://a\"]", vec!["https://z/v2", "https://a/v2", "https://r.example/v2"]),
            ("server = \"http://s:1\"\n[host.\"a:5\"]", vec!["https://a:5/v2", "http://s:1/v2"]),
            ("server = \"https://s/v2/\"", vec!["https://s/v2"]),
            ("server = \"https://s/v2/proxy\"", vec!["https://s/v2/proxy/v2"]),
            ("server = \"https://s/v2/proxy\"\noverride_path = true", vec!["https://s/v2/proxy"]),
            ("server = \"https://s\"\noverride_path = true", vec!["https://s"]),
            ("[host.\"http://[::1]:5000\"]", vec!["http://[::1]:5000/v2", "https://r.example/v2"]),
            ("server = \"https://r.example\"\n[host.\"https://r.example\"]", vec!["https://r.example/v2"]),
            ("[host.\"http://m:5\"]\nskip_verify = true", vec!["https://m:5/v2", "https://r.example/v2"]),
        ] {
            let folder = scratch.join("r.example");
            fs::create_dir_all(&folder).expect("a folder");
            fs::write(folder.join("hosts.toml"), text).expect("a file");
            assert_eq!(loaded(&scratch, "r.example"), expected, "{text}");
        }
    }

    #[test]
    fn a_broken_file_is_named_with_its_line() {
        let scratch = scratch::Folder::new("broken");
        let folder = scratch.join("r.example");
        fs::create_dir_all(&folder).expect("a folder");
        let path = folder.join("hosts.toml");
        for (text, expected) in [
            ("server = \"x\"\n[host.\"y\"]\ncapabilities = [\"fly\"]", ":3: a capability"),
            ("\n[host.\"ftp://y\"]", ":2: \"ftp://y\""),
            ("\n\nserver = \"http://user:password@y\"", ":3: "),
            ("server =", ":1: "),
        ] {
            fs::write(&path, text).expect("a file");
            let error = blocking_load(&[scratch.to_path_buf()], "r.example", None).expect_err(text).to_string();
            assert!(error.starts_with(&format!("{}{expected}", path.display())), "{error}");
        }
        fs::write(&path, vec![b'#'; (1 << 20) + 1]).expect("a file");
        assert!(blocking_load(&[scratch.to_path_buf()], "r.example", None).is_err());
    }

    #[test]
    fn certificates_of_docker_are_found() {
        let scratch = scratch::Folder::new("certs");
        let folder = scratch.join("r.example:5000");
        fs::create_dir_all(&folder).expect("a folder");
        for name in ["b.crt", "a.crt", "client.cert", "client.key", "other.cert", "README"] {
            fs::write(folder.join(name), "").expect("a file");
        }
        let hosts = blocking_load(&[scratch.to_path_buf()], "r.example:5000", None).expect("hosts");
        let tls = &hosts[0].tls;
        assert_eq!(tls.ca, [folder.join("a.crt"), folder.join("b.crt")]);
        let pair = |name: &str, key: Option<&str>| ClientPair { certificate: folder.join(name), key: key.map(|key| folder.join(key)) };
        assert_eq!(tls.client, [pair("client.cert", Some("client.key")), pair("other.cert", None)]);
    }
}
