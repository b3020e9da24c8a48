//! The coordinator's configuration file: what it may say, what it means, and the one that `init` writes.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use rustls::pki_types::ServerName;
use serde::Deserialize;
use tonic::transport::Uri;
use tributary_common::document::{self, DocumentError, Schema};

use crate::store::Moment;

const SCHEMA: Schema = Schema {
    keys: &[
        "listen",
        "public_url",
        "server_names",
        "data_dir",
        "maximum_connections",
        "handshake_timeout_seconds",
        "heartbeat_seconds",
        "uploads_in_flight",
        "enrolments_per_minute",
        "node_certificate_days",
        "staging_memory_bytes",
        "drain_seconds",
    ],
    tables: &[],
};

/// Longest path of a Unix socket that Linux takes, in bytes.
const SOCKET_PATH_BYTES: usize = 107;

/// Why a configuration cannot be used; one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {what}")]
pub struct ConfigError {
    path: String,
    what: String,
}

/// A coordinator's configuration, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerConfig {
    /// Where nodes connect to.
    pub listen: SocketAddr,
    /// Under which URL nodes reach it: `https://HOST[:PORT]`, without a path.
    pub public_url: String,
    /// Names and addresses in the server's certificate: the host of `public_url`, then `server_names`.
    pub server_names: Vec<String>,
    /// The folder of everything durable; relative ones are relative to the file.
    pub data_dir: PathBuf,
    /// Most connections at once, handshakes included. A node has up to two.
    pub maximum_connections: u32,
    /// How long a TLS handshake may take.
    pub handshake_timeout_seconds: u32,
    /// How often a node sends a heartbeat; three missed ones end its stream.
    pub heartbeat_seconds: u32,
    /// Most uploads received at once; further ones wait.
    pub uploads_in_flight: u32,
    /// Most requests to enrol or renew per minute from one address.
    pub enrolments_per_minute: u32,
    /// How long a node's certificate is valid.
    pub node_certificate_days: u32,
    /// Uploads under way are kept in memory up to this sum, and in files beyond it.
    pub staging_memory_bytes: u64,
    /// How long a stop waits for nodes and uploads before it cuts them off.
    pub drain_seconds: u32,
    /// For drills, and in no file: stand still at this step of a round, to be killed.
    pub pause_at: Option<Drill>,
}

/// How far a round has come when a drill kills the coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Drill {
    /// The first cohort is drawn and written down, and nobody was invited.
    Attempt,
    /// With masks: the roster is fixed, and nobody has it.
    Roster,
    /// With masks: the shares of keys are here, and not handed on.
    Shares,
    /// With masks: the updates are summed, the survivors are fixed, and nobody was asked to unmask.
    Survivors,
    /// The first round's model is on the disk, and no run names it.
    Model,
    /// The first round is committed, and nobody was told.
    Commit,
}

impl Drill {
    /// At which write, and at the how manieth of its kind.
    pub fn moment(self) -> (Moment, u32) {
        match self {
            Drill::Attempt => (Moment::AttemptWritten, 1),
            Drill::Roster => (Moment::SessionWritten, 1),
            Drill::Shares => (Moment::SessionWritten, 2),
            Drill::Survivors => (Moment::SessionWritten, 3),
            // The first that is written is the initial one.
            Drill::Model => (Moment::ModelWritten, 2),
            Drill::Commit => (Moment::RoundWritten, 1),
        }
    }
}

/// The file as it is written.
#[derive(Deserialize)]
#[serde(default)]
struct File {
    listen: String,
    public_url: Option<String>,
    server_names: Vec<String>,
    data_dir: PathBuf,
    maximum_connections: u32,
    handshake_timeout_seconds: u32,
    heartbeat_seconds: u32,
    uploads_in_flight: u32,
    enrolments_per_minute: u32,
    node_certificate_days: u32,
    staging_memory_bytes: u64,
    drain_seconds: u32,
}

impl Default for File {
    fn default() -> Self {
        Self {
            listen: "0.0.0.0:7443".to_owned(),
            public_url: None,
            server_names: Vec::new(),
            data_dir: PathBuf::from("data"),
            maximum_connections: 4096,
            handshake_timeout_seconds: 10,
            heartbeat_seconds: 15,
            uploads_in_flight: 16,
            enrolments_per_minute: 60,
            node_certificate_days: 90,
            staging_memory_bytes: 32 << 20,
            drain_seconds: 30,
        }
    }
}

impl ServerConfig {
    /// Reads and checks the file at `path`.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let wrong = |what: String| ConfigError { path: path.display().to_string(), what };
        let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
        let absolute = std::path::absolute(path).map_err(|error| wrong(error.to_string()))?;
        let folder = absolute.parent().unwrap_or(Path::new("/"));
        Self::parse(&text, folder).map_err(wrong)
    }

    /// Checks the text of a file that lies in `folder`. The error is one line.
    pub fn parse(text: &str, folder: &Path) -> Result<Self, String> {
        let file: File = document::parse(text)
            .and_then(|table| {
                document::check_keys(&table, &SCHEMA)?;
                document::read(table)
            })
            .map_err(|error: DocumentError| error.to_string())?;
        for (key, value, least, most) in [
            ("maximum_connections", u64::from(file.maximum_connections), 2, 1_000_000),
            ("handshake_timeout_seconds", u64::from(file.handshake_timeout_seconds), 1, 300),
            ("heartbeat_seconds", u64::from(file.heartbeat_seconds), 1, 3600),
            ("uploads_in_flight", u64::from(file.uploads_in_flight), 1, 10_000),
            ("enrolments_per_minute", u64::from(file.enrolments_per_minute), 1, 100_000),
            ("node_certificate_days", u64::from(file.node_certificate_days), 1, 3650),
            ("staging_memory_bytes", file.staging_memory_bytes, 0, 1 << 40),
            ("drain_seconds", u64::from(file.drain_seconds), 0, 3600),
        ] {
            if !(least..=most).contains(&value) {
                return Err(format!("`{key}` is {value}; {least} to {most} are possible"));
            }
        }
        let listen = file.listen.parse().map_err(|_| {
            format!("`listen` is {:?}; write an address and a port, such as \"0.0.0.0:7443\"", file.listen)
        })?;
        let public_url = file.public_url.ok_or("`public_url` is missing: the URL that nodes will dial")?;
        let mut server_names = vec![host(&public_url)?];
        for name in file.server_names {
            let name = certificate_name(&name)?;
            if !server_names.contains(&name) {
                server_names.push(name);
            }
        }
        let config = Self {
            listen,
            public_url: public_url.trim_end_matches('/').to_owned(),
            server_names,
            data_dir: folder.join(file.data_dir),
            maximum_connections: file.maximum_connections,
            handshake_timeout_seconds: file.handshake_timeout_seconds,
            heartbeat_seconds: file.heartbeat_seconds,
            uploads_in_flight: file.uploads_in_flight,
            enrolments_per_minute: file.enrolments_per_minute,
            node_certificate_days: file.node_certificate_days,
            staging_memory_bytes: file.staging_memory_bytes,
            drain_seconds: file.drain_seconds,
            pause_at: None,
        };
        let socket = config.admin_socket();
        if socket.as_os_str().len() > SOCKET_PATH_BYTES {
            return Err(format!(
                "`data_dir` is too deep: {} is longer than the {SOCKET_PATH_BYTES} bytes of a socket's path",
                socket.display()
            ));
        }
        Ok(config)
    }

    /// The socket on which the coordinator takes an operator's commands.
    pub fn admin_socket(&self) -> PathBuf {
        self.data_dir.join("admin.sock")
    }

    /// The text of a configuration with every key in it, as `init` writes it: `host` is the name or address
    /// under which nodes reach the coordinator, `more` are further ones.
    pub fn default_toml(listen: SocketAddr, host: &str, more: &[String]) -> String {
        let File {
            maximum_connections,
            handshake_timeout_seconds,
            heartbeat_seconds,
            uploads_in_flight,
            enrolments_per_minute,
            node_certificate_days,
            staging_memory_bytes,
            drain_seconds,
            ..
        } = File::default();
        let text = |value: &str| toml_string(value);
        let url = if host.contains(':') { format!("https://[{host}]") } else { format!("https://{host}") };
        let url = text(&format!("{url}:{}", listen.port()));
        let names = more.iter().map(|name| text(name)).collect::<Vec<_>>().join(", ");
        format!(
            r#"# A Tributary coordinator. `tributary-server check-config` checks this file.

# Where the coordinator listens for nodes.
listen = "{listen}"

# The URL that nodes dial; its host is in the coordinator's certificate.
public_url = {url}

# Other names and addresses by which nodes may reach it. After a change here, restart the coordinator: it
# issues itself a new certificate, and the nodes notice nothing.
server_names = [{names}]

# Everything durable: keys, runs, models. Relative to this file. Back it up; guard `authority/`.
data_dir = "data"

# Most connections at once. A node has up to two.
maximum_connections = {maximum_connections}

# How long a TLS handshake may take.
handshake_timeout_seconds = {handshake_timeout_seconds}

# How often a node sends a heartbeat. After three missed ones it counts as gone.
heartbeat_seconds = {heartbeat_seconds}

# Most uploads received at once; further ones wait.
uploads_in_flight = {uploads_in_flight}

# Most requests to enrol or renew per minute from one address.
enrolments_per_minute = {enrolments_per_minute}

# How long a node's certificate is valid. Nodes renew theirs in time by themselves.
node_certificate_days = {node_certificate_days}

# Uploads under way are kept in memory up to this sum, and in files beyond it.
staging_memory_bytes = {staging_memory_bytes}

# How long a stop waits for uploads before it cuts them off.
drain_seconds = {drain_seconds}
"#
        )
    }
}

/// The host of an `https://HOST[:PORT]` URL, without the brackets of an IPv6 address.
fn host(url: &str) -> Result<String, String> {
    let wrong = || format!("`public_url` is {url:?}; write https://HOST:PORT");
    let uri: Uri = url.parse().map_err(|_| wrong())?;
    let plain = uri.scheme_str() == Some("https")
        && uri.path_and_query().is_none_or(|path| path == "/")
        && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'));
    let host = uri.host().filter(|_| plain).ok_or_else(wrong)?;
    let host = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    certificate_name(host)
}

/// A DNS name or an IP address as a certificate bears it.
fn certificate_name(name: &str) -> Result<String, String> {
    match ServerName::try_from(name) {
        Ok(ServerName::DnsName(name)) => Ok(name.as_ref().to_ascii_lowercase()),
        Ok(ServerName::IpAddress(address)) => Ok(IpAddr::from(address).to_string()),
        _ => Err(format!("{name:?} is neither a DNS name nor an IP address, so no certificate can bear it")),
    }
}

fn toml_string(text: &str) -> String {
    let mut quoted = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04X}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = "public_url = 'https://fl.example.org:7443'";

    fn parse(text: &str) -> Result<ServerConfig, String> {
        ServerConfig::parse(text, Path::new("/etc/tributary"))
    }

    #[test]
    fn what_init_writes_is_what_the_defaults_are() {
        let listen = "[::]:9000".parse().unwrap();
        let names = ["localhost".to_owned(), "192.0.2.7".to_owned()];
        let written = ServerConfig::default_toml(listen, "fl.example.org", &names);
        let mut expected = parse(MINIMAL).unwrap();
        expected.listen = listen;
        expected.public_url = "https://fl.example.org:9000".to_owned();
        expected.server_names.extend(names);
        assert_eq!(parse(&written).unwrap(), expected);
        for key in SCHEMA.keys {
            assert!(written.contains(&format!("\n{key} = ")), "{key} is not explained");
        }
        let six = parse(&ServerConfig::default_toml(listen, "2001:db8::1", &[])).unwrap();
        assert_eq!(
            (six.public_url.as_str(), six.server_names),
            ("https://[2001:db8::1]:9000", vec!["2001:db8::1".to_owned()])
        );
        assert!(
            parse(&ServerConfig::default_toml(listen, "a\"\nb", &[])).unwrap_err().contains("public_url")
        );
    }

    #[test]
    fn paths_are_relative_to_the_file() {
        let config = parse(MINIMAL).unwrap();
        assert_eq!(config.data_dir, Path::new("/etc/tributary/data"));
        assert_eq!(config.admin_socket(), Path::new("/etc/tributary/data/admin.sock"));
        let elsewhere = parse(&format!("{MINIMAL}\ndata_dir = '/srv/fl'")).unwrap();
        assert_eq!(elsewhere.data_dir, Path::new("/srv/fl"));

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("server.toml");
        let missing = ServerConfig::load(&path).unwrap_err().to_string();
        assert!(missing.contains("server.toml: No such file"), "{missing}");
        std::fs::write(&path, MINIMAL).unwrap();
        assert_eq!(ServerConfig::load(&path).unwrap().data_dir, folder.path().join("data"));
        std::fs::write(&path, "public_url = ").unwrap();
        let broken = ServerConfig::load(&path).unwrap_err().to_string();
        assert!(broken.contains("server.toml: not TOML: line 1"), "{broken}");
    }

    #[test]
    fn each_mistake_is_named_in_one_line() {
        let deep = format!("data_dir = '/{}'", "d".repeat(100));
        for (line, why) in [
            ("lisen = '0.0.0.0:1'", "unknown key `lisen`; did you mean `listen`?"),
            ("listen = '7443'", "`listen` is \"7443\"; write an address and a port"),
            ("listen = 7443", "listen"),
            ("maximum_connections = 0", "`maximum_connections` is 0; 2 to 1000000 are possible"),
            ("maximum_connections = -1", "maximum_connections"),
            ("node_certificate_days = 36500", "`node_certificate_days` is 36500"),
            ("server_names = ['a b']", "\"a b\" is neither a DNS name nor an IP address"),
            (deep.as_str(), "`data_dir` is too deep"),
        ] {
            let message = parse(&format!("{MINIMAL}\n{line}")).unwrap_err();
            assert!(message.contains(why) && !message.contains('\n'), "{line}: {message}");
        }
        assert!(parse("").unwrap_err().contains("`public_url` is missing"));
        for url in
            ["", "fl.example.org:7443", "http://a:1", "https://", "https://a/b", "https://u@a", "https://a b"]
        {
            let message = parse(&format!("public_url = '{url}'")).unwrap_err();
            assert!(message.contains("public_url") || message.contains("certificate"), "{url}: {message}");
        }
    }

    #[test]
    fn the_certificate_bears_the_host_of_the_url_once() {
        let config =
            parse("public_url = 'https://A.org/'\nserver_names = ['b.org', 'a.org', '0:0::1']").unwrap();
        assert_eq!(config.public_url, "https://A.org");
        assert_eq!(config.server_names, ["a.org", "b.org", "::1"]);
    }
}
