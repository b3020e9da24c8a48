//! `backup` and `restore`: the files on both sides, and what an operator must know after a restore.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use tributary_common::ids::RunId;
use tributary_common::time::Clock;
use tributary_proto::admin as wire;

use super::{ConfigArg, Failure, print, show};
use crate::admin::{self, SocketError};
use crate::backup::{self, BackupError, Restored};
use crate::store::SledStore;

impl From<BackupError> for Failure {
    fn from(error: BackupError) -> Self {
        Self::failed(error)
    }
}

/// Makes a backup of a coordinator, which may be running.
pub(super) async fn backup(out: PathBuf, config: ConfigArg) -> Result<ExitCode, Failure> {
    let loaded = config.load()?;
    let config_toml = std::fs::read_to_string(&config.path)
        .map_err(|error| Failure::usage(format!("{}: {error}", config.path.display())))?;
    let bytes = match admin::connect(&loaded.admin_socket()).await {
        Ok(mut client) => {
            backup::create(&out, async |file| {
                let mut parts = client.backup(wire::BackupRequest { config_toml }).await?.into_inner();
                while let Some(part) = parts.message().await? {
                    let failed = |error| Failure::failed(format!("{}: {error}", out.display()));
                    file.write_all(&part.data).map_err(failed)?;
                }
                Ok::<_, Failure>(())
            })
            .await?
        }
        Err(SocketError::NotRunning { .. }) => {
            let store_dir = loaded.data_dir.join("store");
            if !store_dir.is_dir() {
                return Err(Failure::failed(format!(
                    "{}: no coordinator's store is here",
                    store_dir.display()
                )));
            }
            let store = SledStore::open(&store_dir).map_err(Failure::failed)?;
            backup::create(&out, async |file| {
                backup::write(
                    &store,
                    &loaded.data_dir,
                    &config_toml,
                    Clock.now(),
                    std::io::BufWriter::new(file),
                )
            })
            .await?
        }
        Err(error) => return Err(Failure::failed(error)),
    };
    print(&format!("{} ({bytes} bytes)\n", out.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// Restores a backup, and returns what to tell the operator.
pub(super) fn restore(from: &Path, dir: &Path) -> Result<String, Failure> {
    Ok(told(&backup::restore(from, dir)?, dir))
}

fn told(restored: &Restored, dir: &Path) -> String {
    let Restored { config, made, nodes, going_on, stopped } = restored;
    let or_none = |names: Vec<String>| if names.is_empty() { "none".to_owned() } else { names.join(" ") };
    let ids = |runs: &[RunId]| or_none(runs.iter().map(ToString::to_string).collect());
    format!(
        "Restored into {}, as it was at {}. All that came later is not in it:

nodes that may connect   {}
  Revoke again whom you revoked since. Who enrolled since, or again with a new key, needs a new token.
tokens                   none
  Make those anew that were not used.
runs that go on          {}
runs that were stopped   {}
  Masked or private, and not over: rounds published since must not be done twice. Submit them anew.

The old coordinator must not run any more. Start this one:
  tributary-server serve --config {}
",
        dir.display(),
        show::moment(made.0 / 1000),
        or_none(nodes.iter().map(ToString::to_string).collect()),
        ids(going_on),
        ids(stopped),
        config.display(),
    )
}
