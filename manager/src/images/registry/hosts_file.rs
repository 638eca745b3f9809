//! The format of `hosts.toml`, as containerd has it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// What a file says. It is read once, and bounded by its size.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct File {
    /// Mirrors, in the order of the file.
    pub(crate) hosts: Vec<Entry>,
    /// The registry itself. Its URL is empty if the file has none.
    pub(crate) server: Entry,
}

/// How one host is reached.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Where it is in the file, from 1 on.
    pub(crate) line: usize,
    pub(crate) url: String,
    pub(crate) capabilities: Capabilities,
    pub(crate) ca: Vec<PathBuf>,
    pub(crate) client: Vec<ClientPair>,
    pub(crate) skip_verify: Option<bool>,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) override_path: bool,
    pub(crate) dial_timeout: Option<Duration>,
}

/// A client's certificate, and its key where that is in another file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ClientPair {
    pub(crate) certificate: PathBuf,
    pub(crate) key: Option<PathBuf>,
}

/// What a host may be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Capabilities {
    pub(crate) pull: bool,
    pub(crate) resolve: bool,
    pub(crate) push: bool,
}

/// Why a file cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Malformed {
    pub(crate) line: usize,
    pub(crate) why: String,
}

impl Capabilities {
    pub(crate) const ALL: Self = Self { pull: true, resolve: true, push: true };
}

impl Default for Entry {
    fn default() -> Self {
        Self {
            line: 1,
            url: String::new(),
            capabilities: Capabilities::ALL,
            ca: Vec::new(),
            client: Vec::new(),
            skip_verify: None,
            headers: Vec::new(),
            override_path: false,
            dial_timeout: None,
        }
    }
}

type Result<T> = std::result::Result<T, Malformed>;

/// Parses a file in that folder, which relative paths start from. Keys that are not known are passed over, as containerd does.
pub(crate) fn parse(folder: &Path, text: &str) -> Result<File> {
    let reader = Reader { folder, text };
    let document = DeTable::parse(text)
        .map_err(|error| Malformed { line: error.span().map_or(1, |span| reader.line(span.start)), why: error.message().to_owned() })?;
    let table = document.get_ref();
    let mut file = File { server: reader.entry(table, 1)?, hosts: Vec::new() };
    if let Some(server) = get(table, "server") {
        file.server.line = reader.line(server.span().start);
        file.server.url = reader.string("server", server)?;
    }
    if let Some(hosts) = get(table, "host") {
        let DeValue::Table(hosts_table) = hosts.get_ref() else { return Err(reader.wrong(hosts, "host is no table")) };
        let mut found = Vec::new();
        for (url, value) in hosts_table {
            let DeValue::Table(host) = value.get_ref() else { return Err(reader.wrong(value, "a host is no table")) };
            let line = reader.line(url.span().start);
            found.push((url.span().start, Entry { url: url.get_ref().to_string(), ..reader.entry(host, line)? }));
        }
        found.sort_by_key(|(at, _entry)| *at);
        file.hosts = found.into_iter().map(|(_at, entry)| entry).collect();
    }
    Ok(file)
}

struct Reader<'a> {
    folder: &'a Path,
    text: &'a str,
}

type Value<'a> = Spanned<DeValue<'a>>;

fn get<'t, 'a>(table: &'t DeTable<'a>, name: &str) -> Option<&'t Value<'a>> {
    table.iter().find(|(key, _)| key.get_ref().as_ref() == name).map(|(_, value)| value)
}

impl Reader<'_> {
    fn entry(&self, table: &DeTable<'_>, line: usize) -> Result<Entry> {
        let mut entry = Entry { line, ..Entry::default() };
        if let Some(value) = get(table, "capabilities") {
            entry.capabilities = self.capabilities(value)?;
        }
        if let Some(value) = get(table, "ca") {
            entry.ca = self.strings("ca", value)?.into_iter().map(|path| self.folder.join(path)).collect();
        }
        if let Some(value) = get(table, "client") {
            entry.client = self.client(value)?;
        }
        if let Some(value) = get(table, "skip_verify") {
            entry.skip_verify = Some(self.boolean("skip_verify", value)?);
        }
        if let Some(value) = get(table, "header") {
            entry.headers = self.headers(value)?;
        }
        if let Some(value) = get(table, "override_path") {
            entry.override_path = self.boolean("override_path", value)?;
        }
        if let Some(value) = get(table, "dial_timeout") {
            let text = self.string("dial_timeout", value)?;
            if !text.is_empty() {
                let limit = duration(&text).ok_or_else(|| self.wrong(value, "dial_timeout is no duration, like \"3s\""))?;
                entry.dial_timeout = Some(limit);
            }
        }
        Ok(entry)
    }

    fn capabilities(&self, value: &Value<'_>) -> Result<Capabilities> {
        let names = self.strings("capabilities", value)?;
        if names.is_empty() {
            return Ok(Capabilities::ALL);
        }
        let mut found = Capabilities { pull: false, resolve: false, push: false };
        for name in names {
            match name.to_ascii_lowercase().as_str() {
                "pull" => found.pull = true,
                "resolve" => found.resolve = true,
                "push" => found.push = true,
                _ => return Err(self.wrong(value, "a capability is none of pull, resolve and push")),
            }
        }
        Ok(found)
    }

    /// A file, a list of files, or a list of pairs of files.
    fn client(&self, value: &Value<'_>) -> Result<Vec<ClientPair>> {
        let single = |path: String| ClientPair { certificate: self.folder.join(path), key: None };
        let DeValue::Array(items) = value.get_ref() else { return Ok(vec![single(self.string("client", value)?)]) };
        let mut pairs = Vec::new();
        for item in items.iter() {
            pairs.push(match item.get_ref() {
                DeValue::Array(_) => match self.strings("client", item)?.as_slice() {
                    [certificate, key] => ClientPair { certificate: self.folder.join(certificate), key: Some(self.folder.join(key)) },
                    _ => return Err(self.wrong(item, "a pair of client is no certificate and key")),
                },
                _ => single(self.string("client", item)?),
            });
        }
        Ok(pairs)
    }

    fn headers(&self, value: &Value<'_>) -> Result<Vec<(String, String)>> {
        let DeValue::Table(table) = value.get_ref() else { return Err(self.wrong(value, "header is no table")) };
        let mut headers = Vec::new();
        for (name, value) in table {
            for value in self.strings("a header", value)? {
                headers.push((name.get_ref().to_string(), value));
            }
        }
        Ok(headers)
    }

    /// A string, or a list of strings.
    fn strings(&self, name: &str, value: &Value<'_>) -> Result<Vec<String>> {
        match value.get_ref() {
            DeValue::Array(items) => items.iter().map(|item| self.string(name, item)).collect(),
            _ => Ok(vec![self.string(name, value)?]),
        }
    }

    fn string(&self, name: &str, value: &Value<'_>) -> Result<String> {
        match value.get_ref() {
            DeValue::String(text) => Ok(text.to_string()),
            _ => Err(self.wrong(value, &format!("{name} is no string"))),
        }
    }

    fn boolean(&self, name: &str, value: &Value<'_>) -> Result<bool> {
        match value.get_ref() {
            DeValue::Boolean(is) => Ok(*is),
            _ => Err(self.wrong(value, &format!("{name} is neither true nor false"))),
        }
    }

    fn wrong(&self, value: &Value<'_>, why: &str) -> Malformed {
        Malformed { line: self.line(value.span().start), why: why.to_owned() }
    }

    fn line(&self, at: usize) -> usize {
        1 + self.text.bytes().take(at).filter(|byte| *byte == b'\n').count()
    }
}

/// A duration that is not negative.
pub(crate) fn duration(text: &str) -> Option<Duration> {
    u64::try_from(crate::duration::nanos(text)?).ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> File {
        parse(Path::new("/etc/x"), text).unwrap_or_else(|error| panic!("{text}: line {}: {}", error.line, error.why))
    }

    #[test]
    fn every_key_of_containerd_is_read() {
        let file = parsed(
            r#"
server = "https://registry.example"
ca = "ca.pem"
skip_verify = false
some_future_key = [1, 2]

[host."https://z.example:5000/mirror"]
  capabilities = ["Pull", "resolve"]
  ca = ["/ca/a.pem", "b.pem"]
  client = [["client.cert", "/keys/client.key"], ["all.pem", "all.key"]]
  skip_verify = true
  override_path = true
  dial_timeout = "1m30s"
  [host."https://z.example:5000/mirror".header]
    x-one = "1"
    x-more = ["2", "3"]

[host."http://a.example"]
  client = "both.pem"

[host."[::1]:5000"]
  client = ["one.pem", "two.pem"]
  dial_timeout = "1.5s"
"#,
        );
        let path = |text: &str| PathBuf::from(text);
        let pair = |certificate: &str, key: Option<&str>| ClientPair { certificate: path(certificate), key: key.map(path) };
        assert_eq!((file.server.url.as_str(), file.server.line), ("https://registry.example", 2));
        assert_eq!((&file.server.ca, file.server.skip_verify), (&vec![path("/etc/x/ca.pem")], Some(false)));
        let urls: Vec<&str> = file.hosts.iter().map(|host| host.url.as_str()).collect();
        assert_eq!(urls, ["https://z.example:5000/mirror", "http://a.example", "[::1]:5000"], "the order is the file's");
        let first = &file.hosts[0];
        assert_eq!(first.capabilities, Capabilities { pull: true, resolve: true, push: false });
        assert_eq!(first.ca, [path("/ca/a.pem"), path("/etc/x/b.pem")]);
        assert_eq!(first.client, [pair("/etc/x/client.cert", Some("/keys/client.key")), pair("/etc/x/all.pem", Some("/etc/x/all.key"))]);
        assert_eq!((first.skip_verify, first.override_path, first.dial_timeout), (Some(true), true, Some(Duration::from_secs(90))));
        let mut headers: Vec<String> = first.headers.iter().map(|(name, value)| format!("{name}: {value}")).collect();
        headers.sort();
        assert_eq!(headers, ["x-more: 2", "x-more: 3", "x-one: 1"]);
        assert_eq!(file.hosts[1].client, [pair("/etc/x/both.pem", None)]);
        assert_eq!(file.hosts[1].capabilities, Capabilities::ALL);
        assert_eq!(file.hosts[2].client, [pair("/etc/x/one.pem", None), pair("/etc/x/two.pem", None)]);
        assert_eq!(file.hosts[2].dial_timeout, Some(Duration::from_millis(1500)));
    }

    #[test]
    fn a_file_without_hosts_has_the_server_alone() {
        assert_eq!(parsed(""), File::default());
        assert!(parsed("[host]").hosts.is_empty());
        assert_eq!(parsed("server = \"x\"\n").server.url, "x");
        assert_eq!(parsed("capabilities = []").server.capabilities, Capabilities::ALL);
    }

    #[test]
    fn a_broken_file_is_refused_with_the_line() {
        for (text, line, why) in [
            ("server = \"x\"\n[host.\"y\"]\n  capabilities = [\"pul\"]", 3, "capability"),
            ("server = \"x\"\n\nserver = \"y\"", 3, "duplicate"),
            ("server = [", 1, ""),
            ("a = 1\nserver = 5", 2, "server is no string"),
            ("host = 5", 1, "host is no table"),
            ("[host]\nx = 5", 2, "a host is no table"),
            ("skip_verify = \"yes\"", 1, "neither true nor false"),
            ("dial_timeout = \"3\"", 1, "duration"),
            ("dial_timeout = \"soon\"", 1, "duration"),
            ("dial_timeout = \"-1s\"", 1, "duration"),
            ("client = [[\"a\"]]", 1, "pair"),
            ("ca = [1]", 1, "ca is no string"),
            ("header = 1", 1, "header is no table"),
            ("[header]\na = 1", 2, "header is no string"),
        ] {
            let error = parse(Path::new("/"), text).expect_err(text);
            assert_eq!(error.line, line, "{text}: {}", error.why);
            assert!(error.why.contains(why), "{text}: {}", error.why);
        }
    }
}
