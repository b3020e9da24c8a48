//! `cargo xtask dist`: one tarball for each role, for machines without Rust, unpacked and started as a check.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, bail};

use crate::cargo::{self, cargo};
use crate::files::{self, copy, copy_folder};
use crate::libtorch;

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What one tarball is made of. Whatever lies in `deploy/NAME` goes along: units, example configuration, notes.
struct Role {
    name: &'static str,
    package: &'static str,
    binary: &'static str,
    links_libtorch: bool,
    /// A folder of the repository to take along.
    examples: Option<&'static str>,
}

const ROLES: [Role; 4] = [
    Role {
        name: "server",
        package: "tributary-server",
        binary: "tributary-server",
        links_libtorch: false,
        examples: None,
    },
    Role {
        name: "client",
        package: "tributary-client",
        binary: "tributary-client",
        links_libtorch: true,
        examples: None,
    },
    Role {
        name: "sim",
        package: "tributary-simulations",
        binary: "tributary-sim",
        links_libtorch: true,
        examples: Some("jobs"),
    },
    Role {
        name: "audit",
        package: "tributary-audit",
        binary: "tributary-audit",
        links_libtorch: false,
        examples: None,
    },
];

impl Role {
    /// `tributary-client-0.1.0-x86_64-linux`: the tarball's name and its one folder.
    fn folder_name(&self) -> String {
        format!("{}-{VERSION}-{}-{}", self.binary, std::env::consts::ARCH, std::env::consts::OS)
    }
}

/// Builds, packs and checks every role's tarball in `out` (`dist` in the repository when absent).
pub(crate) fn run(repository: &Path, out: Option<&Path>) -> anyhow::Result<()> {
    let start = Instant::now();
    libtorch::set_up(repository)?;
    let out = out.map_or_else(|| repository.join("dist"), Path::to_path_buf);
    fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    let mut sums = String::new();
    for role in &ROLES {
        println!("\n== {}", role.binary);
        // Package by package: building them together would unite their features, and a binary could carry what
        // only the simulator or a test asked for.
        let mut build = cargo(repository);
        build.args(["build", "--release", "--locked", "--package", role.package, "--bin", role.binary]);
        cargo::run(build.env("TRIBUTARY_DIST", "1"))
            .with_context(|| format!("{} does not build", role.binary))?;
        let staged = stage(repository, role, &out)?;
        let tarball = pack(repository, role, &out)?;
        files::remove(&staged)?;
        verify(role, &tarball)?;
        let digest = files::sha256(&tarball)?;
        let bytes =
            fs::metadata(&tarball).with_context(|| format!("cannot read {}", tarball.display()))?.len();
        let file = tarball.file_name().unwrap_or_default().to_string_lossy().into_owned();
        println!("{file}  {}  sha256 {digest}", files::megabytes(bytes));
        sums += &format!("{digest}  {file}\n");
    }
    fs::write(out.join("SHA256SUMS"), sums)
        .with_context(|| format!("cannot write into {}", out.display()))?;
    println!("\ndist: {} in {}", out.display(), cargo::elapsed(start));
    Ok(())
}

/// Lays one role's folder out in `out`: `bin`, `lib`, `licenses`, and what `deploy` and the examples add.
fn stage(repository: &Path, role: &Role, out: &Path) -> anyhow::Result<PathBuf> {
    let folder = out.join(role.folder_name());
    files::remove(&folder)?;
    copy(&cargo::binaries("release")?.join(role.binary), &folder.join("bin").join(role.binary))?;
    let licenses = folder.join("licenses");
    for name in ["LICENSE-MIT", "LICENSE-APACHE"] {
        copy(&repository.join(name), &licenses.join(name))?;
    }
    let notices = crate_notices(repository, role)?;
    fs::write(licenses.join("rust-crates.txt"), notices)
        .with_context(|| format!("cannot write into {}", licenses.display()))?;
    if role.links_libtorch {
        for library in libtorch::runtime_libraries(repository)? {
            copy(&library, &folder.join("lib").join(library.file_name().unwrap_or_default()))?;
        }
        match libtorch::licences(repository) {
            Some(texts) => copy_folder(&texts, &licenses.join("libtorch"))?,
            None => {
                println!("no licence texts in the libtorch folder: add them before you hand this tarball on")
            }
        }
    }
    let deploy = repository.join("deploy").join(role.name);
    if deploy.is_dir() {
        copy_folder(&deploy, &folder)?;
    }
    if let Some(examples) = role.examples {
        copy_folder(&repository.join(examples), &folder.join(examples))?;
    }
    Ok(folder)
}

/// Packs a staged folder so that the same content gives the same bytes.
fn pack(repository: &Path, role: &Role, out: &Path) -> anyhow::Result<PathBuf> {
    let tarball = out.join(format!("{}.tar.gz", role.folder_name()));
    let mut tar = Command::new("tar");
    tar.args(["--create", "--gzip", "--sort=name", "--owner=0", "--group=0", "--numeric-owner"]);
    tar.arg(format!("--mtime=@{}", source_seconds(repository))).arg("--file").arg(&tarball);
    cargo::output(tar.arg("--directory").arg(out).arg(role.folder_name()))
        .with_context(|| format!("cannot pack {}", tarball.display()))?;
    Ok(tarball)
}

/// The time that every packed file carries, in Unix seconds: `SOURCE_DATE_EPOCH`, else that of the last commit,
/// else zero.
fn source_seconds(repository: &Path) -> u64 {
    let named = std::env::var("SOURCE_DATE_EPOCH").ok();
    let committed = || {
        let mut git = Command::new("git");
        cargo::output(git.current_dir(repository).args(["log", "-1", "--format=%ct"])).ok()
    };
    named.or_else(committed).and_then(|seconds| seconds.trim().parse().ok()).unwrap_or(0)
}

/// Unpacks a tarball elsewhere and starts its binary with an empty environment: what a machine without Rust does.
fn verify(role: &Role, tarball: &Path) -> anyhow::Result<()> {
    let folder = std::env::temp_dir().join(format!("tributary-dist-{}", std::process::id()));
    files::remove(&folder)?;
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut tar = Command::new("tar");
    let unpacked =
        cargo::output(tar.arg("--extract").arg("--file").arg(tarball).arg("--directory").arg(&folder));
    let binary = folder.join(role.folder_name()).join("bin").join(role.binary);
    let said = unpacked.and_then(|_| cargo::output(Command::new(&binary).arg("--version").env_clear()));
    files::remove(&folder)?;
    let said = said.with_context(|| format!("{} does not run when unpacked", tarball.display()))?;
    if !said.contains(VERSION) {
        bail!("{} says `{}` to --version, not {VERSION}", role.binary, said.trim());
    }
    println!("unpacked and started with an empty environment: {}", said.trim());
    Ok(())
}

/// The licences of every crate in a role's binary: a list, then each text once with the crates that carry it.
fn crate_notices(repository: &Path, role: &Role) -> anyhow::Result<String> {
    let mut tree = cargo(repository);
    tree.args(["tree", "--locked", "--edges", "normal", "--prefix", "none", "--format", "{p}|{l}"]);
    let listed = cargo::output(tree.args(["--package", role.package])).context("cannot list the crates")?;
    let crates = third_party(&listed);
    let sources = crate_sources();
    let mut texts: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
    for folder_name in crates.keys() {
        let places = sources.iter().map(|source| source.join(folder_name));
        for path in
            places.filter_map(|place| fs::read_dir(place).ok()).flatten().flatten().map(|entry| entry.path())
        {
            if is_notice(&path)
                && let Ok(text) = fs::read_to_string(&path)
            {
                texts.entry(text.trim().replace("\r\n", "\n")).or_default().insert(folder_name);
            }
        }
    }
    let mut page = format!(
        "Crates in {} {VERSION} and their licences. The Rust standard library is MIT OR Apache-2.0.\n\n",
        role.binary
    );
    for (folder_name, licence) in &crates {
        page += &format!("{folder_name}: {licence}\n");
    }
    for (text, carriers) in &texts {
        let carriers = carriers.iter().copied().collect::<Vec<_>>().join(", ");
        page += &format!("\n{}\n{carriers}\n\n{text}\n", "=".repeat(100));
    }
    Ok(page)
}

/// `name-version` and licence of each crate from elsewhere in the lines of `cargo tree --format {p}|{l}`.
fn third_party(listed: &str) -> BTreeMap<String, String> {
    let mut crates = BTreeMap::new();
    for line in listed.lines() {
        let Some((package, licence)) = line.split_once('|') else { continue };
        let mut words = package.split_whitespace();
        let (Some(name), Some(version)) = (words.next(), words.next()) else { continue };
        // Ours are listed with their folder: `tributary-common v0.1.0 (/path)`; `(proc-macro)` is no folder.
        if words.any(|word| word.contains('/')) {
            continue;
        }
        let licence = licence.trim().trim_end_matches("(*)").trim();
        let licence = if licence.is_empty() { "see its text" } else { licence };
        crates.insert(format!("{name}-{}", version.trim_start_matches('v')), licence.to_owned());
    }
    crates
}

/// The folders in which cargo keeps unpacked crates, one for each registry.
fn crate_sources() -> Vec<PathBuf> {
    let home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")));
    let sources = home.and_then(|home| fs::read_dir(home.join("registry").join("src")).ok());
    sources.into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn is_notice(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_uppercase();
    let starts = ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE", "UNLICENSE"];
    path.is_file() && starts.iter().any(|start| name.starts_with(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crates_from_elsewhere_are_listed_once() {
        let listed = "tributary-client v0.1.0 (/somewhere/client)|MIT OR Apache-2.0\n\
                      anyhow v1.0.104|MIT OR Apache-2.0\n\
                      clap_derive v4.6.0 (proc-macro)|MIT OR Apache-2.0\n\
                      anyhow v1.0.104|MIT OR Apache-2.0 (*)\n\
                      ring v0.17.14|Apache-2.0 AND ISC\n\
                      odd v0.1.0|\n";
        let crates = third_party(listed);
        let names: Vec<&str> = crates.keys().map(String::as_str).collect();
        assert_eq!(names, ["anyhow-1.0.104", "clap_derive-4.6.0", "odd-0.1.0", "ring-0.17.14"]);
        assert_eq!(crates["anyhow-1.0.104"], "MIT OR Apache-2.0");
        assert_eq!(crates["odd-0.1.0"], "see its text");
    }

    #[test]
    fn a_tarball_that_does_not_start_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let role = &ROLES[0];
        let binary = folder.path().join(role.folder_name()).join("bin").join(role.binary);
        let tarball_of = |script: &str| {
            fs::create_dir_all(binary.parent().unwrap()).unwrap();
            fs::write(&binary, script).unwrap();
            cargo::output(Command::new("chmod").arg("+x").arg(&binary)).unwrap();
            pack(folder.path(), role, folder.path()).unwrap()
        };
        let good = tarball_of(&format!("#!/bin/sh\necho {} {VERSION}\n", role.binary));
        verify(role, &good).unwrap();
        let other_version = tarball_of("#!/bin/sh\necho tributary-server 9.9.9\n");
        assert!(format!("{:#}", verify(role, &other_version).unwrap_err()).contains("9.9.9"));
        let broken = tarball_of("#!/bin/sh\necho 'libtorch_cpu.so: cannot open' >&2\nexit 127\n");
        assert!(format!("{:#}", verify(role, &broken).unwrap_err()).contains("cannot open"));
    }
}
