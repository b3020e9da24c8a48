//! `init`: a new coordinator's folder.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

use tributary_common::time::Clock;

use super::{CONFIG_FILE, Failure};
use crate::authority::Authority;
use crate::config::ServerConfig;
use crate::store::SledStore;

/// Makes the folder, and returns what to tell the operator.
pub(super) fn init(dir: &Path, names: &[String], listen: SocketAddr) -> Result<String, Failure> {
    let Some((host, more)) = names.split_first() else {
        return Err(Failure::usage("give --name: the name under which nodes reach the coordinator"));
    };
    let path = dir.join(CONFIG_FILE);
    let failed = |error: std::io::Error| Failure::failed(format!("{}: {error}", path.display()));
    let text = ServerConfig::default_toml(listen, host, more);
    // Checked before anything is written.
    let absolute = std::path::absolute(dir).map_err(failed)?;
    let config = ServerConfig::parse(&text, &absolute).map_err(Failure::usage)?;
    if path.exists() {
        return Err(Failure::usage(format!(
            "{} exists already: this is a coordinator's folder",
            path.display()
        )));
    }
    fs::create_dir_all(dir).map_err(failed)?;
    DirBuilder::new().recursive(true).mode(0o700).create(&config.data_dir).map_err(failed)?;
    Authority::create(&config.data_dir, &config.server_names, Clock.now()).map_err(Failure::failed)?;
    drop(SledStore::open(&config.data_dir.join("store")).map_err(Failure::failed)?);
    // The configuration last: with it the folder is whole.
    let written = OpenOptions::new().write(true).create_new(true).open(&path).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    match written {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            return Err(Failure::usage(format!("{} exists already", path.display())));
        }
        other => other.map_err(failed)?,
    }
    let config_path = path.display();
    Ok(format!(
        "A coordinator is ready in {}; nodes will dial {}.

Start it:
  tributary-server serve --config {config_path}
Invite a node:
  tributary-server token create --config {config_path} --name NAME
Submit a job:
  tributary-server run submit JOB.toml --config {config_path} --watch
",
        dir.display(),
        config.public_url,
    ))
}
