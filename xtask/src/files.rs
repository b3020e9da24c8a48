//! Files and folders: copies, removal, digests, sizes.

use std::path::Path;
use std::process::Command;
use std::{fs, io};

use anyhow::{Context, bail};

use crate::cargo;

/// Copies one file, its permissions included, and makes the folders above it.
pub(crate) fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let cannot = || format!("cannot copy {} to {}", from.display(), to.display());
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).with_context(cannot)?;
    }
    fs::copy(from, to).with_context(cannot)?;
    Ok(())
}

/// Copies everything in one folder into another.
pub(crate) fn copy_folder(from: &Path, to: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(from).with_context(|| format!("cannot list {}", from.display()))? {
        let path = entry.with_context(|| format!("cannot list {}", from.display()))?.path();
        let target = to.join(path.file_name().unwrap_or_default());
        if path.is_dir() {
            copy_folder(&path, &target)?;
        } else {
            copy(&path, &target)?;
        }
    }
    Ok(())
}

/// Removes a folder with everything in it; none there is fine.
pub(crate) fn remove(folder: &Path) -> anyhow::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// SHA-256 of a file in lower-case hexadecimal, by coreutils: it is on every machine that has the wheels' one
/// platform, reads half a gigabyte in a second, and costs this crate no dependency.
pub(crate) fn sha256(path: &Path) -> anyhow::Result<String> {
    let line = cargo::output(Command::new("sha256sum").arg("--").arg(path))?;
    // A leading backslash marks a file name that sha256sum had to escape.
    let digest = line.trim_start_matches('\\').split_whitespace().next().unwrap_or_default();
    if digest.len() != 64 {
        bail!("sha256sum gave no digest for {}", path.display());
    }
    Ok(digest.to_owned())
}

/// Bytes for people: `526.6 MB`.
pub(crate) fn megabytes(bytes: u64) -> String {
    let tenths = (bytes + 50_000) / 100_000;
    format!("{}.{} MB", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_of_a_known_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a file\\with odd name");
        std::fs::write(&path, "abc").unwrap();
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256(&path).unwrap(), expected);
        assert!(sha256(&folder.path().join("absent")).is_err());
    }

    #[test]
    fn sizes_for_people() {
        assert_eq!(megabytes(526_574_961), "526.6 MB");
        assert_eq!(megabytes(254_009), "0.3 MB");
    }

    #[test]
    fn a_folder_is_copied_whole_and_removed_once_or_twice() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::create_dir_all(from.join("deep/er")).unwrap();
        fs::write(from.join("deep/er/file"), "content").unwrap();
        copy_folder(&from, &to).unwrap();
        assert_eq!(fs::read_to_string(to.join("deep/er/file")).unwrap(), "content");
        remove(&to).unwrap();
        remove(&to).unwrap();
        assert!(!to.exists());
        assert!(copy_folder(&folder.path().join("absent"), &to).is_err());
    }
}
