//! libtorch 2.13.0 for this repository: the per-user cache, its check at each start, and the link to it.
//!
//! Builds know one path, the git-ignored link `libtorch` in the repository's root. It points to the folder that
//! the user named in `LIBTORCH`, or else to `$XDG_CACHE_HOME/tributary/libtorch-2.13.0-cpu`.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

use crate::{download, files};

/// The version that tch 0.26 binds.
pub(crate) const VERSION: &str = "2.13.0";

/// A shared library of the cache, and its size in the pinned wheel.
type Library = (&'static str, u64);

const LIBRARIES: [Library; 6] = [
    ("libc10.so", 1_623_185),
    ("libcudart.so.13", 704_288),
    ("libcupti.so.13", 4_152_208),
    ("libgomp.so.1", 254_009),
    ("libtorch.so", 89_185),
    ("libtorch_cpu.so", 438_418_417),
];

/// Present when the headers are.
const HEADER: &str = "include/torch/csrc/api/include/torch/torch.h";

/// Makes `libtorch` in the repository usable: fills or heals the cache if that is needed, and sets the link.
/// Quick (a few file sizes) when everything is there.
pub(crate) fn set_up(repository: &Path) -> anyhow::Result<()> {
    check_compiler()?;
    let link = repository.join("libtorch");
    let folder = match own_folder(&link) {
        Some(folder) => check_own(&folder)?,
        None if link.is_dir() && !link.is_symlink() => {
            check_own(&link)?;
            eprintln!("libtorch {VERSION}: {} (a folder of your own)", link.display());
            return Ok(());
        }
        None => filled_cache()?,
    };
    point(&link, &folder)?;
    eprintln!("libtorch {VERSION}: {}", folder.display());
    Ok(())
}

/// The folder that the user set in `LIBTORCH`. Cargo itself sets it to the link for what it runs: not a choice.
fn own_folder(link: &Path) -> Option<PathBuf> {
    let named = PathBuf::from(std::env::var_os("LIBTORCH")?);
    (!named.as_os_str().is_empty() && named != link).then_some(named)
}

/// Checks a folder that the user brings. Its build may differ from the pinned wheel (CUDA, another platform), so
/// sizes are not compared; the version is.
fn check_own(folder: &Path) -> anyhow::Result<PathBuf> {
    let found = folder.canonicalize().with_context(|| {
        format!("LIBTORCH={} cannot be read; name a libtorch {VERSION} folder or unset it", folder.display())
    })?;
    if !["libtorch_cpu.so", "libtorch_cpu.dylib"].iter().any(|name| found.join("lib").join(name).is_file()) {
        bail!(
            "LIBTORCH={} has no lib/libtorch_cpu.so; name a libtorch {VERSION} folder or unset it",
            found.display()
        );
    }
    if !found.join(HEADER).is_file() {
        bail!("LIBTORCH={} has no {HEADER}; name a libtorch {VERSION} folder or unset it", found.display());
    }
    match fs::read_to_string(found.join("build-version")) {
        // The official archives say `2.13.0+cpu` or `2.13.0+cu130`.
        Ok(version) if version.trim().split('+').next() != Some(VERSION) => bail!(
            "LIBTORCH={} is libtorch {}, Tributary needs {VERSION}; name such a folder or unset it",
            found.display(),
            version.trim()
        ),
        _ => Ok(found),
    }
}

/// The per-user cache, checked, and filled first where it is missing or broken.
fn filled_cache() -> anyhow::Result<PathBuf> {
    let home = cache_home()?;
    let folder = home.join(format!("libtorch-{VERSION}-cpu"));
    if check(&folder, &LIBRARIES).is_ok() {
        return Ok(folder);
    }
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        bail!(
            "libtorch is fetched for x86_64 Linux only; set LIBTORCH to a libtorch {VERSION} folder for this machine"
        );
    }
    fs::create_dir_all(&home).with_context(|| format!("cannot make the cache folder {}", home.display()))?;
    let _lock = lock(&home.join(format!("libtorch-{VERSION}-cpu.lock")))?;
    // Whoever held the lock may have filled it meanwhile.
    let Err(fault) = check(&folder, &LIBRARIES) else { return Ok(folder) };
    if folder.exists() {
        eprintln!("{} is broken ({fault}); filling it again", folder.display());
    }
    let partial = home.join(format!("libtorch-{VERSION}-cpu.partial"));
    files::remove(&partial)?;
    download::unpack_wheels(&home.join("downloads"), &partial)?;
    fs::write(partial.join("build-version"), format!("{VERSION}\n"))
        .with_context(|| format!("cannot write into {}", partial.display()))?;
    if let Err(fault) = check(&partial, &LIBRARIES) {
        bail!(
            "the unpacked wheels are not what was pinned: {fault}; remove {} and start again",
            home.display()
        );
    }
    files::remove(&folder)?;
    fs::rename(&partial, &folder).with_context(|| format!("cannot rename into {}", folder.display()))?;
    // Half a gigabyte that nothing needs any more; failing to remove it harms nobody.
    let _ = fs::remove_dir_all(home.join("downloads"));
    Ok(folder)
}

/// `$XDG_CACHE_HOME/tributary`, or `~/.cache/tributary`. A relative `XDG_CACHE_HOME` is ignored, as its
/// specification asks.
fn cache_home() -> anyhow::Result<PathBuf> {
    let named = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let base = match named {
        Some(base) => base,
        None => {
            let home = std::env::var_os("HOME").filter(|home| !home.is_empty());
            PathBuf::from(home.context("neither XDG_CACHE_HOME nor HOME is set; set one, or LIBTORCH")?)
                .join(".cache")
        }
    };
    Ok(base.join("tributary"))
}

/// Whether a cache folder is complete: its version, its headers, and each library's size. Digests were checked
/// when it was filled; hashing half a gigabyte at each start would cost a second.
///
/// The error says what is wrong with which file.
fn check(folder: &Path, libraries: &[Library]) -> Result<(), String> {
    let version =
        fs::read_to_string(folder.join("build-version")).map_err(|_| "no build-version".to_owned())?;
    if version.trim() != VERSION {
        return Err(format!("build-version says {}", version.trim()));
    }
    if !folder.join(HEADER).is_file() {
        return Err(format!("no {HEADER}"));
    }
    for (name, bytes) in libraries {
        match fs::metadata(folder.join("lib").join(name)) {
            Ok(file) if file.len() == *bytes => {}
            Ok(file) => return Err(format!("lib/{name} has {} bytes instead of {bytes}", file.len())),
            Err(_) => return Err(format!("no lib/{name}")),
        }
    }
    Ok(())
}

/// Takes the lock that only one filler may hold; waits, and says so. The operating system gives it back when its
/// holder ends in whatever way, so it cannot go stale.
fn lock(path: &Path) -> anyhow::Result<File> {
    let cannot = || format!("cannot lock {}", path.display());
    let file = File::options().create(true).truncate(false).write(true).open(path).with_context(cannot)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            eprintln!("another cargo xtask is fetching libtorch; waiting for it");
            file.lock().with_context(cannot)?;
        }
        Err(TryLockError::Error(error)) => return Err(error).with_context(cannot),
    }
    Ok(file)
}

/// Points the repository's link at a folder, in one step, so that a build beside us never misses it.
fn point(link: &Path, folder: &Path) -> anyhow::Result<()> {
    if fs::read_link(link).is_ok_and(|target| target == folder) {
        return Ok(());
    }
    let fresh = link.with_extension(format!("new-{}", std::process::id()));
    let pointed = symlink(folder, &fresh).and_then(|()| fs::rename(&fresh, link));
    if pointed.is_err() {
        let _ = fs::remove_file(&fresh);
    }
    pointed.with_context(|| {
        format!("cannot link {} to {}; is something else there?", link.display(), folder.display())
    })
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(not(unix))]
fn symlink(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "links need a Unix system"))
}

/// Says early, and in one line, what torch-sys would say late and in a hundred.
fn check_compiler() -> anyhow::Result<()> {
    let named = std::env::var("CXX").ok();
    let candidates = named.as_deref().into_iter().chain(["c++", "g++", "clang++"]);
    // CXX may carry a wrapper or flags: `ccache g++`.
    let works = candidates.into_iter().any(|candidate| {
        let mut words = candidate.split_whitespace();
        words.next().is_some_and(|program| {
            Command::new(program)
                .args(words)
                .arg("--version")
                .output()
                .is_ok_and(|output| output.status.success())
        })
    });
    if !works {
        bail!(
            "no C++ compiler answers (tried c++, g++, clang++); install one, for example `apt install g++`"
        );
    }
    Ok(())
}

/// The libraries that a binary needs beside it at run time: those of the pinned wheel or their counterparts in a
/// folder of the user's own.
pub(crate) fn runtime_libraries(repository: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let folder = repository.join("libtorch").join("lib");
    let mut found = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry.with_context(|| format!("cannot list {}", folder.display()))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if ["libtorch_cpu.", "libc10.", "libgomp", "libcupti", "libcudart"]
            .iter()
            .any(|start| name.starts_with(start))
        {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// The licence texts that came with libtorch, or none for a folder of the user's own.
pub(crate) fn licences(repository: &Path) -> Option<PathBuf> {
    Some(repository.join("libtorch").join("licenses")).filter(|folder| folder.is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: [Library; 2] = [("liba.so", 3), ("libb.so", 5)];

    /// A complete cache folder of `SMALL` libraries.
    fn complete() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        fs::create_dir_all(path.join("lib")).unwrap();
        fs::create_dir_all(path.join(HEADER).parent().unwrap()).unwrap();
        fs::write(path.join(HEADER), "").unwrap();
        fs::write(path.join("build-version"), "2.13.0\n").unwrap();
        fs::write(path.join("lib/liba.so"), "abc").unwrap();
        fs::write(path.join("lib/libb.so"), "abcde").unwrap();
        folder
    }

    #[test]
    fn a_complete_cache_passes_and_each_damage_is_named() {
        assert_eq!(check(complete().path(), &SMALL), Ok(()));
        type Damage = fn(&Path);
        let damages: [(Damage, &str); 5] = [
            (
                |path| fs::write(path.join("lib/libb.so"), "abc").unwrap(),
                "lib/libb.so has 3 bytes instead of 5",
            ),
            (|path| fs::remove_file(path.join("lib/liba.so")).unwrap(), "no lib/liba.so"),
            (|path| fs::remove_file(path.join(HEADER)).unwrap(), "no include/"),
            (|path| fs::write(path.join("build-version"), "2.12.0").unwrap(), "says 2.12.0"),
            (|path| fs::remove_file(path.join("build-version")).unwrap(), "no build-version"),
        ];
        for (damage, named) in damages {
            let folder = complete();
            damage(folder.path());
            let fault = check(folder.path(), &SMALL).unwrap_err();
            assert!(fault.contains(named), "{fault}");
        }
    }

    #[test]
    fn a_folder_of_the_users_own_needs_the_right_version() {
        let folder = complete();
        let complaint = |path: &Path| format!("{:#}", check_own(path).unwrap_err());
        assert!(complaint(folder.path()).contains("no lib/libtorch_cpu.so"));
        fs::write(folder.path().join("lib/libtorch_cpu.so"), "").unwrap();
        for version in ["2.13.0\n", "2.13.0+cu130"] {
            fs::write(folder.path().join("build-version"), version).unwrap();
            assert!(check_own(folder.path()).is_ok(), "{version}");
        }
        for version in ["2.13.1", "2.1.0+cpu"] {
            fs::write(folder.path().join("build-version"), version).unwrap();
            assert!(complaint(folder.path()).contains(version));
        }
        assert!(complaint(&folder.path().join("absent")).contains("cannot be read"));
    }

    #[test]
    fn the_link_follows_the_choice_and_spares_a_real_folder() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second, link) =
            (folder.path().join("1"), folder.path().join("2"), folder.path().join("libtorch"));
        fs::create_dir_all(&first).unwrap();
        fs::create_dir_all(&second).unwrap();
        for target in [&first, &second, &second] {
            point(&link, target).unwrap();
            assert_eq!(&fs::read_link(&link).unwrap(), target);
        }
        fs::remove_file(&link).unwrap();
        fs::create_dir_all(link.join("lib")).unwrap();
        assert!(point(&link, &first).is_err());
        assert!(link.join("lib").is_dir());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3, "no half-made link stays behind");
    }

    #[test]
    fn the_lock_is_exclusive_and_ends_with_its_holder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let held = lock(&path).unwrap();
        let other = File::options().write(true).open(&path).unwrap();
        assert!(matches!(other.try_lock(), Err(TryLockError::WouldBlock)));
        drop(held);
        assert!(other.try_lock().is_ok());
    }
}
