//! IDX files as MNIST publishes them: a magic number, big-endian sizes, then bytes; plain or gzip.
//!
//! Format: <http://yann.lecun.com/exdb/mnist/>, "the IDX file format".

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flate2::bufread::GzDecoder;

use super::images::{Normalisation, labels, paired, volume};
use super::{DataConfig, DataError, Dataset, Split, classes, damaged, file, open, read_exactly};

/// Unsigned bytes in three dimensions: images × height × width.
const IMAGES: u32 = 0x0803;
/// Unsigned bytes in one dimension.
const LABELS: u32 = 0x0801;
/// Deflate never expands by more than 1032; a header that promises more is wrong before anything is read.
const GZIP_EXPANSION: u64 = 1032;

/// Loads `train-*` and `t10k-*` from `folder`; without the latter the test set is empty.
pub(super) fn load(config: &DataConfig, folder: &Path) -> Result<Dataset, DataError> {
    let find = |stem: &str| {
        [folder.join(stem), folder.join(format!("{stem}.gz"))].into_iter().find(|path| path.exists())
    };
    let read = |images: PathBuf, labels: PathBuf| {
        let (image_file, image_bytes) = open(&images)?;
        let (label_file, label_bytes) = open(&labels)?;
        half(
            config,
            (&images, image_bytes, BufReader::new(image_file)),
            (&labels, label_bytes, BufReader::new(label_file)),
        )
    };
    let required = |stem: &str| {
        find(stem).ok_or_else(|| {
            file(folder, format!("has neither {stem} nor {stem}.gz: check [data] path, or give --data DIR"))
        })
    };
    let (shape, train) = read(required("train-images-idx3-ubyte")?, required("train-labels-idx1-ubyte")?)?;
    let test = match (find("t10k-images-idx3-ubyte"), find("t10k-labels-idx1-ubyte")) {
        (None, None) => Split::default(),
        _ => {
            let images = required("t10k-images-idx3-ubyte")?;
            let (test_shape, test) = read(images.clone(), required("t10k-labels-idx1-ubyte")?)?;
            if test_shape != shape {
                let problem = format!("test images are {test_shape:?}, training images {shape:?}");
                return Err(file(&images, problem));
            }
            test
        }
    };
    Ok(Dataset {
        example_shape: shape,
        classes: classes(config.classes, [&train, &test]),
        train: Arc::new(train),
        test: Arc::new(test),
        sites: None,
    })
}

/// A path, the file's length in bytes, and its content.
type Input<'a, R> = (&'a Path, u64, R);

/// Reads one pair of files: the shape of one image, and the examples.
pub(super) fn half<R: BufRead>(
    config: &DataConfig,
    images: Input<'_, R>,
    label_input: Input<'_, R>,
) -> Result<(Vec<usize>, Split), DataError> {
    let (image_path, label_path) = (images.0, label_input.0);
    let (sizes, pixels) = read(images, IMAGES, "images", 3)?;
    let (label_sizes, label_bytes) = read(label_input, LABELS, "labels", 1)?;
    let [count, height, width] = sizes.as_slice() else {
        return Err(file(image_path, "is not a file of images"));
    };
    paired(label_path, "this file", "labels", label_sizes.first().copied().unwrap_or(0), *count)?;
    let values = label_bytes.iter().map(|label| i64::from(*label));
    let split = Split {
        labels: labels(label_path, "label", config.classes, values)?,
        features: Normalisation::new(config, 1)?.bytes(&pixels, height * width),
        groups: Vec::new(),
    };
    Ok((vec![1, *height, *width], split))
}

/// Reads one file: its sizes and its bytes.
fn read<R: BufRead>(
    (path, length, mut reader): Input<'_, R>,
    magic: u32,
    what: &str,
    dimensions: usize,
) -> Result<(Vec<usize>, Vec<u8>), DataError> {
    let head = reader.fill_buf().map_err(|cause| damaged(path, "the file", &cause))?;
    if head.is_empty() {
        return Err(file(path, "is empty; fetch it again"));
    }
    // The second byte of an IDX file is 0, so the first alone would tell; a buffer may begin with one byte.
    if head.first() != Some(&0x1f) {
        return content(path, length, length, reader, magic, what, dimensions);
    }
    let mut decoder = GzDecoder::new(reader);
    let most = length.saturating_mul(GZIP_EXPANSION);
    let found = content(path, length, most, &mut decoder, magic, what, dimensions)?;
    match decoder.get_mut().fill_buf() {
        Ok([]) => Ok(found),
        Ok(_) => Err(file(path, "is too long: bytes follow the gzip data; fetch it again")),
        Err(cause) => Err(damaged(path, "the file", &cause)),
    }
}

/// Reads the content of a file of `length` bytes, which can hold at most `most` bytes of content.
fn content(
    path: &Path,
    length: u64,
    most: u64,
    mut reader: impl Read,
    magic: u32,
    what: &str,
    dimensions: usize,
) -> Result<(Vec<usize>, Vec<u8>), DataError> {
    let mut word = || {
        let mut bytes = [0; 4];
        reader.read_exact(&mut bytes).map_err(|cause| damaged(path, "the header", &cause))?;
        Ok::<u32, DataError>(u32::from_be_bytes(bytes))
    };
    let found = word()?;
    if found != magic {
        let problem =
            format!("is not an IDX file of {what}: its magic number is {found:#010x}, not {magic:#010x}");
        return Err(file(path, problem));
    }
    let mut sizes = Vec::with_capacity(dimensions);
    for _ in 0..dimensions {
        sizes.push(word()? as usize);
    }
    let bytes = volume(path, "the file", &sizes)? as u64;
    let header = 4 + 4 * dimensions as u64;
    if bytes > most.saturating_sub(header) {
        let problem =
            format!("is truncated: its header promises {bytes} bytes of data, a file of {length} bytes");
        return Err(file(path, format!("{problem} cannot hold them; fetch it again")));
    }
    let data = read_exactly(path, "the file", bytes, reader)?;
    Ok((sizes, data))
}
