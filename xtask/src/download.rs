//! The pinned Python wheels that hold libtorch: fetched with pip, checked by digest, unpacked with Python.

use std::fs::{self, File};
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::cargo;
use crate::files::{self, megabytes};
use crate::libtorch;

/// One wheel, and what is taken from it.
struct Wheel {
    /// As people know it.
    name: &'static str,
    requirement: &'static str,
    platform: &'static str,
    file: &'static str,
    bytes: u64,
    sha256: &'static str,
    /// `member=path` pairs for `unpack.py`; a slash at the end stands for a folder.
    take: &'static [&'static str],
}

/// libtorch differs between the wheels for different Pythons, and bits with it: always the cp311 wheel, whatever
/// Python is installed. The two CUDA stubs are what `libtorch_cpu.so` of this wheel is linked against; no GPU is
/// used.
const WHEELS: [Wheel; 3] = [
    Wheel {
        name: "torch 2.13.0",
        requirement: "torch==2.13.0",
        platform: "manylinux_2_28_x86_64",
        file: "torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl",
        bytes: 526_574_961,
        sha256: "60fcdcb2f3876e21146cb4524ef06397d727ca9ad5f020818547e25075fe3cb7",
        take: &[
            "torch/include/=include",
            "torch/lib/libtorch_cpu.so=lib/libtorch_cpu.so",
            "torch/lib/libc10.so=lib/libc10.so",
            "torch/lib/libtorch.so=lib/libtorch.so",
            "torch/lib/libgomp.so.1=lib/libgomp.so.1",
            "torch-2.13.0.dist-info/licenses/=licenses/torch",
        ],
    },
    Wheel {
        name: "nvidia-cuda-cupti 13.0.85",
        requirement: "nvidia-cuda-cupti==13.0.85",
        platform: "manylinux_2_25_x86_64",
        file: "nvidia_cuda_cupti-13.0.85-py3-none-manylinux_2_25_x86_64.whl",
        bytes: 10_715_597,
        sha256: "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8",
        take: &[
            "nvidia/cu13/lib/libcupti.so.13=lib/libcupti.so.13",
            "nvidia_cuda_cupti-13.0.85.dist-info/licenses/=licenses/nvidia-cuda-cupti",
        ],
    },
    Wheel {
        name: "nvidia-cuda-runtime 13.0.96",
        requirement: "nvidia-cuda-runtime==13.0.96",
        platform: "manylinux2014_x86_64",
        file: "nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        bytes: 2_243_632,
        sha256: "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
        take: &[
            "nvidia/cu13/lib/libcudart.so.13=lib/libcudart.so.13",
            "nvidia_cuda_runtime-13.0.96.dist-info/licenses/=licenses/nvidia-cuda-runtime",
        ],
    },
];

const UNPACK: &str = include_str!("unpack.py");

/// How often a download that broke off is started again.
const ATTEMPTS: u32 = 3;

/// How often the growing file is looked at.
const WATCH_INTERVAL: Duration = Duration::from_millis(200);

/// Fetches the wheels that are not yet in `downloads` and unpacks libtorch from them into `folder`.
///
/// The caller holds the cache's lock. A wheel that is there with the right digest is not fetched again, so a
/// broken start goes on at the wheel where it broke.
pub(crate) fn unpack_wheels(downloads: &Path, folder: &Path) -> anyhow::Result<()> {
    let python = python()?;
    fs::create_dir_all(downloads).with_context(|| format!("cannot make {}", downloads.display()))?;
    let mut pip = None;
    for wheel in &WHEELS {
        let path = downloads.join(wheel.file);
        if !is_pinned(&path, wheel)? {
            let pip = match &pip {
                Some(pip) => pip,
                None => pip.insert(find_pip(python)?),
            };
            fetch(pip, wheel, downloads)?;
            if !is_pinned(&path, wheel)? {
                let _ = fs::remove_file(&path);
                bail!(
                    "the {} that pip brought is not the pinned one (SHA-256 {}); check the package index that pip \
                     uses, or set LIBTORCH to a libtorch {} folder",
                    wheel.name,
                    wheel.sha256,
                    libtorch::VERSION
                );
            }
        }
        eprintln!("unpacking {}", wheel.name);
        unpack(python, &path, folder, wheel.take)?;
    }
    Ok(())
}

/// Whether the wheel is on the disk with its pinned digest. The size is compared first: it costs nothing.
fn is_pinned(path: &Path, wheel: &Wheel) -> anyhow::Result<bool> {
    match fs::metadata(path) {
        Ok(file) if file.len() == wheel.bytes => Ok(files::sha256(path)? == wheel.sha256),
        Ok(_) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

fn unpack(python: &str, wheel: &Path, folder: &Path, take: &[&str]) -> anyhow::Result<()> {
    cargo::output(Command::new(python).args(["-c", UNPACK]).arg(wheel).arg(folder).args(take))
        .with_context(|| format!("cannot unpack {} into {}", wheel.display(), folder.display()))?;
    Ok(())
}

fn python() -> anyhow::Result<&'static str> {
    ["python3", "python"]
        .into_iter()
        .find(|name| cargo::answers(name, &["-c", "import sys, zipfile; sys.exit(sys.version_info < (3, 6))"]))
        .with_context(|| {
            format!(
                "no Python 3 answers (tried python3, python), and libtorch comes with its pip; install Python, or \
                 set LIBTORCH to a libtorch {} folder",
                libtorch::VERSION
            )
        })
}

/// How pip is started here: `python3 -m pip`, or a `pip` of its own.
fn find_pip(python: &str) -> anyhow::Result<Vec<String>> {
    let candidates = [vec![python, "-m", "pip"], vec!["pip3"], vec!["pip"]];
    let found = candidates.into_iter().find(|words| {
        words
            .split_first()
            .is_some_and(|(program, rest)| cargo::answers(program, &[rest, &["--version"]].concat()))
    });
    let words = found.with_context(|| {
        format!(
            "no pip answers (tried {python} -m pip, pip3, pip); install it (for example `apt install python3-pip`), \
             or set LIBTORCH to a libtorch {} folder",
            libtorch::VERSION
        )
    })?;
    Ok(words.into_iter().map(str::to_owned).collect())
}

/// The arguments that bring exactly this wheel.
fn pip_arguments(wheel: &Wheel) -> Vec<&str> {
    let abi: &[&str] =
        if wheel.file.contains("-cp311-") { &["--implementation", "cp", "--abi", "cp311"] } else { &[] };
    // Without pip's own cache: it would keep a second half gigabyte.
    let mut arguments =
        vec!["download", "--no-deps", "--no-cache-dir", "--only-binary=:all:", "--progress-bar=off"];
    arguments.extend(["--retries", "3", "--python-version", "3.11"]);
    arguments.extend(abi);
    arguments.extend(["--platform", wheel.platform, wheel.requirement]);
    arguments
}

/// Downloads one wheel into `downloads`, with progress, and starts again when it breaks off in the middle.
fn fetch(pip: &[String], wheel: &Wheel, downloads: &Path) -> anyhow::Result<()> {
    let (program, words) = pip.split_first().context("pip is not known")?;
    // pip writes the growing file under TMPDIR; there it can be watched, and the disk is the one that must hold it.
    let partial = downloads.join("partial");
    let log = downloads.join("pip.log");
    let mut attempt = 1;
    loop {
        files::remove(&partial)?;
        let opened = fs::create_dir_all(&partial).and_then(|()| File::create(&log));
        let output = opened.with_context(|| format!("cannot write into {}", downloads.display()))?;
        let errors = output.try_clone().context("cannot share pip's log")?;
        let _ = fs::remove_file(downloads.join(wheel.file));
        eprintln!("downloading {} ({})", wheel.name, megabytes(wheel.bytes));
        let start = Instant::now();
        let child = Command::new(program)
            .args(words)
            .args(pip_arguments(wheel))
            .arg("--dest")
            .arg(downloads)
            .env("TMPDIR", &partial)
            .env("PIP_DISABLE_PIP_VERSION_CHECK", "1")
            .env_remove("PIP_REQUIRE_VIRTUALENV")
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .with_context(|| format!("cannot start {program}"))?;
        let (succeeded, seen_bytes) = watch(child, &partial, wheel)?;
        files::remove(&partial)?;
        if succeeded {
            eprintln!("downloaded {} in {}", wheel.name, cargo::elapsed(start));
            return Ok(());
        }
        let said = fs::read_to_string(&log).unwrap_or_default();
        if attempt < ATTEMPTS && seen_bytes > 0 && !is_out_of_space(&said) {
            attempt += 1;
            eprintln!("the download broke off after {}; starting it again", megabytes(seen_bytes));
            continue;
        }
        bail!(complaint(wheel, &said));
    }
}

fn is_out_of_space(said: &str) -> bool {
    said.contains("No space left on device")
}

/// One line for what pip said at length: what is wrong, and what to do.
fn complaint(wheel: &Wheel, said: &str) -> String {
    let what = format!("cannot download {} ({}) with pip", wheel.name, megabytes(wheel.bytes));
    let otherwise = format!("or set LIBTORCH to a libtorch {} folder", libtorch::VERSION);
    if is_out_of_space(said) {
        return format!(
            "{what}: no space left on the disk of the cache; make room, point XDG_CACHE_HOME elsewhere, {otherwise}"
        );
    }
    // pip that cannot reach its index ends in "no version found"; what it warned about before tells the difference.
    let unreachable =
        ["NewConnectionError", "ConnectTimeout", "ReadTimeout", "Connection refused", "ConnectionError"]
            .into_iter()
            .chain([
                "Temporary failure in name resolution",
                "ProxyError",
                "Network is unreachable",
                "Max retries exceeded",
            ])
            .any(|sign| said.contains(sign));
    if unreachable {
        return format!("{what}: no network? Connect once, {otherwise}");
    }
    let error = said.lines().rev().find(|line| line.contains("ERROR") || line.contains("Error"));
    let last = error.or_else(|| said.lines().rev().find(|line| !line.trim().is_empty()));
    let last = last.unwrap_or("it said nothing").trim().trim_start_matches("ERROR: ");
    format!("{what}: {last}; check pip's settings and its index, {otherwise}")
}

/// Waits for pip and shows how far the file has grown: one rewritten line on a terminal, a line for every tenth
/// elsewhere. Gives whether pip succeeded, and the most bytes seen.
fn watch(mut pip: Child, partial: &Path, wheel: &Wheel) -> anyhow::Result<(bool, u64)> {
    let terminal = io::stderr().is_terminal();
    let start = Instant::now();
    let (mut most_bytes, mut tenths_shown) = (0, 0);
    let status = loop {
        if let Some(status) = pip.try_wait().context("cannot wait for pip")? {
            break status;
        }
        std::thread::sleep(WATCH_INTERVAL);
        most_bytes = most_bytes.max(largest_file(partial)).min(wheel.bytes);
        if most_bytes == 0 {
            continue;
        }
        let line = progress(most_bytes, wheel.bytes, start.elapsed());
        let tenths = most_bytes * 10 / wheel.bytes;
        if terminal {
            eprint!("\r\x1b[K{line}");
            // A progress line that cannot be shown is no reason to stop.
            let _ = io::stderr().flush();
        } else if tenths > tenths_shown {
            tenths_shown = tenths;
            eprintln!("{line}");
        }
    };
    if terminal && most_bytes > 0 {
        eprint!("\r\x1b[K");
    }
    Ok((status.success(), most_bytes))
}

/// `  40 % of 526.6 MB, 35.1 MB/s`.
fn progress(bytes: u64, total_bytes: u64, elapsed: Duration) -> String {
    let rate = (bytes as f64 / elapsed.as_secs_f64().max(0.001)) as u64;
    format!("  {:3} % of {}, {}/s", bytes * 100 / total_bytes.max(1), megabytes(total_bytes), megabytes(rate))
}

/// The size of the largest file in pip's temporary folders: the wheel on its way.
fn largest_file(folder: &Path) -> u64 {
    let mut folders: Vec<PathBuf> = vec![folder.to_owned()];
    let mut largest = 0;
    while let Some(folder) = folders.pop() {
        // pip moves and removes these while we look; what is gone does not count.
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(data) if data.is_dir() => folders.push(entry.path()),
                Ok(data) => largest = largest.max(data.len()),
                Err(_) => {}
            }
        }
    }
    largest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pip_is_asked_for_exactly_the_pinned_wheels() {
        let [torch, cupti, runtime] = WHEELS.each_ref().map(|wheel| pip_arguments(wheel).join(" "));
        assert!(torch.contains("--python-version 3.11 --implementation cp --abi cp311"), "{torch}");
        assert!(torch.ends_with("--platform manylinux_2_28_x86_64 torch==2.13.0"), "{torch}");
        assert!(cupti.ends_with("--platform manylinux_2_25_x86_64 nvidia-cuda-cupti==13.0.85"), "{cupti}");
        assert!(!cupti.contains("--abi"), "{cupti}");
        assert!(
            runtime.ends_with("--platform manylinux2014_x86_64 nvidia-cuda-runtime==13.0.96"),
            "{runtime}"
        );
        for wheel in &WHEELS {
            assert_eq!(wheel.sha256.len(), 64);
        }
    }

    #[test]
    fn a_wheel_with_another_digest_or_size_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("small.whl");
        let sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let wheel = Wheel { bytes: 3, sha256, ..WHEELS[2] };
        assert!(!is_pinned(&path, &wheel).unwrap(), "absent");
        for (content, expected) in [("abc", true), ("abd", false), ("ab", false)] {
            fs::write(&path, content).unwrap();
            assert_eq!(is_pinned(&path, &wheel).unwrap(), expected, "{content}");
        }
    }

    #[test]
    fn every_failure_is_one_line_that_says_what_to_do() {
        let offline = "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...)'\n\
                       ERROR: Could not find a version that satisfies the requirement torch==2.13.0 (from versions: none)\n\
                       ERROR: No matching distribution found for torch==2.13.0\n";
        let withdrawn = "Looking in indexes: ...\nERROR: No matching distribution found for torch==2.13.0\n";
        let full =
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n";
        for (said, named) in [
            (offline, "no network? Connect once"),
            (withdrawn, "No matching distribution found"),
            (full, "make room"),
            ("", "it said nothing"),
        ] {
            let line = complaint(&WHEELS[0], said);
            assert!(line.starts_with("cannot download torch 2.13.0 (526.6 MB) with pip: "), "{line}");
            assert!(line.contains(named) && line.contains("set LIBTORCH"), "{line}");
            assert_eq!(line.lines().count(), 1, "{line}");
        }
    }

    #[test]
    fn chosen_members_are_unpacked_and_missing_ones_named() {
        let Ok(python) = python() else {
            eprintln!("skipped: no Python here");
            return;
        };
        let folder = tempfile::tempdir().unwrap();
        let wheel = folder.path().join("small.whl");
        let make = "import sys, zipfile\nwith zipfile.ZipFile(sys.argv[1], 'w') as z:\n    \
                    [z.writestr(n, n) for n in ('p/include/a.h', 'p/include/b/c.h', 'p/lib/l.so', 'p/other')]";
        cargo::output(Command::new(python).args(["-c", make]).arg(&wheel)).unwrap();
        let out = folder.path().join("out");
        unpack(python, &wheel, &out, &["p/include/=include", "p/lib/l.so=lib/l.so"]).unwrap();
        assert_eq!(fs::read_to_string(out.join("include/b/c.h")).unwrap(), "p/include/b/c.h");
        assert_eq!(fs::read_to_string(out.join("lib/l.so")).unwrap(), "p/lib/l.so");
        assert_eq!(fs::read_dir(&out).unwrap().count(), 2, "nothing else is taken");
        let error = format!("{:#}", unpack(python, &wheel, &out, &["p/gone.so=lib/gone.so"]).unwrap_err());
        assert!(error.contains("small.whl has no p/gone.so"), "{error}");
    }

    #[test]
    fn progress_is_the_largest_file_against_the_pinned_size() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(largest_file(&folder.path().join("absent")), 0);
        fs::create_dir_all(folder.path().join("pip-unpack")).unwrap();
        fs::write(folder.path().join("pip-unpack/torch.whl"), vec![0; 4_000]).unwrap();
        fs::write(folder.path().join("note"), "x").unwrap();
        assert_eq!(largest_file(folder.path()), 4_000);
        let line = progress(210_000_000, 526_574_961, Duration::from_secs(6));
        assert_eq!(line, "   39 % of 526.6 MB, 35.0 MB/s");
    }
}
