//! NPZ files in MedMNIST's layout: `train_images`, `train_labels`, and the same for `val` and `test`.
//!
//! The `.npy` header is parsed here, because its length, its nesting and its shape come from the file and
//! must be bounded before anything is allocated. Format: NEP 1, and numpy's `lib.format`.

use std::collections::BTreeSet;
use std::io::{BufReader, Read, Seek};
use std::path::Path;
use std::sync::Arc;

use zip::ZipArchive;
use zip::result::ZipError;

use super::config::config as config_error;
use super::images::{Normalisation, labels, paired, volume};
use super::{
    DataConfig, DataError, Dataset, Groups, HeldOut, Split, classes, damaged, file, open, read_exactly,
    record,
};

/// Most bytes of a `.npy` header; numpy's own limit.
const HEADER_BYTES: usize = 10_000;
/// Most bytes of an archive: the limit on values, at eight bytes each.
const ARCHIVE_BYTES: u64 = 32 << 30;

/// Loads the training half and the held-out half of `path`; without the latter the test set is empty.
pub(super) fn load(config: &DataConfig, path: &Path) -> Result<Dataset, DataError> {
    let (opened, length) = open(path)?;
    if length > ARCHIVE_BYTES {
        return Err(file(path, format!("is larger than {ARCHIVE_BYTES} bytes")));
    }
    read(config, path, BufReader::new(opened))
}

/// Reads an archive.
pub(super) fn read(config: &DataConfig, path: &Path, reader: impl Read + Seek) -> Result<Dataset, DataError> {
    let mut archive = ZipArchive::new(reader).map_err(|cause| {
        file(path, format!("is not a readable NPZ (zip) archive: {cause}; fetch it again"))
    })?;
    let (shape, train, train_groups) = half(config, path, &mut archive, "train")?;
    let prefix = match config.held_out {
        Some(HeldOut::Val) => "val",
        Some(HeldOut::Test) | None => "test",
    };
    let present = ["images", "labels"].iter().any(|what| {
        let name = format!("{prefix}_{what}.npy");
        archive.file_names().any(|member| member.is_ok_and(|member| member == name))
    });
    let test = if present {
        let (test_shape, test, test_groups) = half(config, path, &mut archive, prefix)?;
        if test_shape != shape {
            let problem =
                format!("{prefix}_images holds images of {test_shape:?}, train_images of {shape:?}");
            return Err(file(path, problem));
        }
        let trained: BTreeSet<i64> = train_groups.into_iter().collect();
        if let Some(row) = test_groups.iter().position(|group| trained.contains(group)) {
            let problem = "its group has training examples too: keep a group in one half";
            let name = config.group.as_deref().unwrap_or_default();
            return Err(record(path, format!("{prefix}_{name}.npy, row {row}"), problem));
        }
        test
    } else if config.held_out.is_some() {
        return Err(config_error("held_out", format!("{} has no {prefix}_images.npy", path.display())));
    } else {
        Split::default()
    };
    Ok(Dataset {
        example_shape: shape,
        classes: classes(config.classes, [&train, &test]),
        train: Arc::new(train),
        test: Arc::new(test),
        sites: None,
    })
}

/// Reads one half: the shape of an image, the examples, and the group of each as the file has it.
fn half<R: Read + Seek>(
    config: &DataConfig,
    path: &Path,
    archive: &mut ZipArchive<R>,
    prefix: &str,
) -> Result<(Vec<usize>, Split, Vec<i64>), DataError> {
    let name = format!("{prefix}_images.npy");
    let images = member(path, archive, &name)?;
    let (count, height, width, channels, shape) = match *images.shape.as_slice() {
        [n, values] => (n, 1, values, 1, vec![values]),
        [n, h, w] => (n, h, w, 1, vec![1, h, w]),
        [n, h, w, c] => (n, h, w, c, vec![c, h, w]),
        _ => {
            let problem = "images are N×H×W, N×H×W×C, or N×values";
            return Err(record(path, name, format!("has shape {:?}; {problem}", images.shape)));
        }
    };
    let normalisation = Normalisation::new(config, channels)?;
    let plane = height * width;
    let features = match images.element {
        Element::U8 => normalisation.bytes(&channels_first(&images.bytes, channels, plane), plane),
        Element::F32 | Element::F64 => {
            let values: Vec<f64> = images.floats().collect();
            normalisation.numbers(channels_first(&values, channels, plane).iter().copied(), plane).map_err(
                |index| {
                    let image = index / (plane * channels).max(1);
                    record(
                        path,
                        format!("{name}, image {image}"),
                        "holds NaN or an infinite value; remove the image",
                    )
                },
            )?
        }
        other => {
            let problem =
                format!("images of {} are not possible: store uint8 (0 to 255) or float32", other.name());
            return Err(record(path, name, problem));
        }
    };
    drop(images);

    let name = format!("{prefix}_labels.npy");
    let values = integers(path, archive, &name, ["labels", "class"], count)?;
    let labels = labels(path, &format!("{name}, label"), config.classes, values.into_iter())?;
    let persons = match &config.group {
        Some(group) => integers(path, archive, &format!("{prefix}_{group}.npy"), ["groups", "group"], count)?,
        None => Vec::new(),
    };
    let mut ids = Groups::default();
    let groups = persons.iter().map(|person| ids.id(*person)).collect();
    Ok((shape, Split { features, labels, groups }, persons))
}

/// Reads an array of one integer per image: of `what`, each of which is a `one`.
fn integers<R: Read + Seek>(
    path: &Path,
    archive: &mut ZipArchive<R>,
    name: &str,
    [what, one]: [&str; 2],
    images: usize,
) -> Result<Vec<i64>, DataError> {
    let array = member(path, archive, name)?;
    let found = match *array.shape.as_slice() {
        [n] | [n, 1] => n,
        _ => {
            let problem = format!("has shape {:?}; {what} are N×1, or N: one {one} per image", array.shape);
            return Err(record(path, name, problem));
        }
    };
    paired(path, name, what, found, images)?;
    let Some(values) = array.integers() else {
        let problem = format!("{what} of {} are not possible: store integers", array.element.name());
        return Err(record(path, name, problem));
    };
    Ok(values.collect())
}

/// Examples × height × width × channels to examples × channels × height × width.
fn channels_first<T: Copy>(values: &[T], channels: usize, plane: usize) -> Vec<T> {
    if channels == 1 {
        return values.to_vec();
    }
    let mut moved = Vec::with_capacity(values.len());
    for image in values.chunks((channels * plane).max(1)) {
        for channel in 0..channels {
            moved.extend(image.iter().skip(channel).step_by(channels));
        }
    }
    moved
}

/// Reads one member of the archive, checked to be a plain array in C order.
fn member<R: Read + Seek>(path: &Path, archive: &mut ZipArchive<R>, name: &str) -> Result<Array, DataError> {
    let mut reader = archive.by_name(name).map_err(|cause| match cause {
        ZipError::FileNotFound => {
            file(path, format!("has no {name}: MedMNIST's layout needs train_images, train_labels and so on"))
        }
        other => record(path, name, format!("cannot be read ({other}); save it with numpy.savez")),
    })?;
    let header = Header::read(&mut reader).map_err(|cause| match cause {
        HeaderError::Io(cause) => damaged(path, name, &cause),
        HeaderError::Wrong(problem) => record(path, name, problem),
    })?;
    let values = volume(path, name, &header.shape)? as u64;
    let bytes = read_exactly(path, name, values * header.element.size() as u64, reader)?;
    Ok(Array { shape: header.shape, element: header.element, big_endian: header.big_endian, bytes })
}

/// The type of one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Element {
    Bool,
    U8,
    U16,
    U32,
    U64,
    I8,
    I16,
    I32,
    I64,
    F32,
    F64,
}

impl Element {
    const ALL: [(Element, &'static str, &'static str, usize); 11] = [
        (Element::Bool, "b1", "bool", 1),
        (Element::U8, "u1", "uint8", 1),
        (Element::U16, "u2", "uint16", 2),
        (Element::U32, "u4", "uint32", 4),
        (Element::U64, "u8", "uint64", 8),
        (Element::I8, "i1", "int8", 1),
        (Element::I16, "i2", "int16", 2),
        (Element::I32, "i4", "int32", 4),
        (Element::I64, "i8", "int64", 8),
        (Element::F32, "f4", "float32", 4),
        (Element::F64, "f8", "float64", 8),
    ];

    fn entry(self) -> (&'static str, usize) {
        let entry = Element::ALL.iter().find(|(element, ..)| *element == self);
        entry.map_or(("unknown", 1), |(_, _, name, size)| (name, *size))
    }

    fn name(self) -> &'static str {
        self.entry().0
    }

    /// Bytes of one number.
    fn size(self) -> usize {
        self.entry().1
    }
}

/// One array, its bytes as stored.
struct Array {
    shape: Vec<usize>,
    element: Element,
    big_endian: bool,
    bytes: Vec<u8>,
}

impl Array {
    /// The bits of each number, widened to 64.
    fn words(&self) -> impl Iterator<Item = u64> + '_ {
        self.bytes.chunks(self.element.size()).map(|chunk| {
            let fold = |word: u64, byte: &u8| word << 8 | u64::from(*byte);
            if self.big_endian { chunk.iter().fold(0, fold) } else { chunk.iter().rev().fold(0, fold) }
        })
    }

    fn floats(&self) -> impl Iterator<Item = f64> + '_ {
        let single = self.element == Element::F32;
        self.words().map(
            move |word| {
                if single { f64::from(f32::from_bits(word as u32)) } else { f64::from_bits(word) }
            },
        )
    }

    /// The numbers, or `None` for floats. A `u64` above the range of `i64` turns negative: no class either way.
    fn integers(&self) -> Option<impl Iterator<Item = i64> + '_> {
        let element = self.element;
        let float = matches!(element, Element::F32 | Element::F64);
        (!float).then(|| {
            self.words().map(move |word| match element {
                Element::I8 => i64::from(word as u8 as i8),
                Element::I16 => i64::from(word as u16 as i16),
                Element::I32 => i64::from(word as u32 as i32),
                _ => word as i64,
            })
        })
    }
}

/// What stands before the data of a `.npy` file.
#[derive(Debug, PartialEq)]
struct Header {
    element: Element,
    big_endian: bool,
    shape: Vec<usize>,
}

#[derive(Debug)]
enum HeaderError {
    Io(std::io::Error),
    Wrong(String),
}

impl Header {
    fn read(reader: &mut impl Read) -> Result<Self, HeaderError> {
        let mut start = [0; 8];
        reader.read_exact(&mut start).map_err(HeaderError::Io)?;
        let [magic @ .., major, _minor] = start;
        if magic != *b"\x93NUMPY" {
            return Err(HeaderError::Wrong("is not a .npy array: wrong magic bytes".into()));
        }
        let length = match major {
            1 => {
                let mut bytes = [0; 2];
                reader.read_exact(&mut bytes).map_err(HeaderError::Io)?;
                usize::from(u16::from_le_bytes(bytes))
            }
            2 | 3 => {
                let mut bytes = [0; 4];
                reader.read_exact(&mut bytes).map_err(HeaderError::Io)?;
                u32::from_le_bytes(bytes) as usize
            }
            _ => return Err(HeaderError::Wrong(format!("has .npy version {major}; 1 to 3 are known"))),
        };
        if length > HEADER_BYTES {
            return Err(HeaderError::Wrong(format!(
                "has a header of {length} bytes; at most {HEADER_BYTES}"
            )));
        }
        let mut bytes = vec![0; length];
        reader.read_exact(&mut bytes).map_err(HeaderError::Io)?;
        let text = std::str::from_utf8(&bytes).ok().ok_or_else(|| HeaderError::Wrong(unreadable("")))?;
        Self::parse(text).map_err(HeaderError::Wrong)
    }

    /// Parses `{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }`, keys in any order.
    fn parse(text: &str) -> Result<Self, String> {
        let after = |key: &str| {
            let found = text.split_once(&format!("'{key}':")).map(|(_, rest)| rest.trim_start());
            found.ok_or_else(|| unreadable(text))
        };
        let descr = after("descr")?
            .strip_prefix('\'')
            .and_then(|rest| rest.split_once('\''))
            .map(|(descr, _)| descr)
            .ok_or("holds records or objects; store a plain array of numbers")?;
        let (order, kind) = descr.split_at_checked(1).ok_or_else(|| unreadable(text))?;
        let big_endian = match order {
            "<" | "|" | "=" => false,
            ">" => true,
            _ => return Err(unreadable(text)),
        };
        let element = Element::ALL
            .iter()
            .find(|(_, code, ..)| *code == kind)
            .map(|(element, ..)| *element)
            .ok_or_else(|| format!("has dtype '{descr}'; store integers, float32 or float64"))?;
        let fortran = after("fortran_order")?;
        if fortran.starts_with("True") {
            return Err("is in Fortran order; save it with numpy.ascontiguousarray".into());
        }
        if !fortran.starts_with("False") {
            return Err(unreadable(text));
        }
        let inside = after("shape")?
            .strip_prefix('(')
            .and_then(|rest| rest.split_once(')'))
            .map(|(inside, _)| inside)
            .ok_or_else(|| unreadable(text))?;
        let shape = inside
            .split(',')
            .map(str::trim)
            .filter(|size| !size.is_empty())
            .map(|size| size.parse::<usize>().map_err(|_| unreadable(text)))
            .collect::<Result<Vec<usize>, String>>()?;
        Ok(Self { element, big_endian, shape })
    }
}

fn unreadable(text: &str) -> String {
    let start: String = text.chars().take(80).filter(|c| !c.is_control()).collect();
    format!("has an unreadable .npy header \"{start}\"; save it with numpy.save")
}
