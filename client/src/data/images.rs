//! From pixels and integer labels, as image files hold them, to the features and classes of a split.

use std::path::Path;

use tributary_common::limits::CLASSES;

use super::config::config;
use super::{DataConfig, DataError, EXAMPLES, PerChannel, VALUES, file, record};

/// Most channels of an image.
const CHANNELS: usize = 65_536;

/// Refuses a shape that is empty or beyond the limits; gives examples × values per example.
///
/// `shape` is examples first.
pub(super) fn volume(path: &Path, what: &str, shape: &[usize]) -> Result<usize, DataError> {
    let values = shape.iter().try_fold(1usize, |product, size| product.checked_mul(*size));
    match (shape.first(), values) {
        (Some(0) | None, _) | (_, Some(0)) => Err(file(path, format!("{what} is empty: shape {shape:?}"))),
        (Some(examples), Some(values)) if *examples <= EXAMPLES && values <= VALUES => Ok(values),
        _ => Err(file(path, format!("{what} promises shape {shape:?}, above the limit of {VALUES} values"))),
    }
}

/// The public constants of each channel.
pub(super) struct Normalisation {
    /// (mean, standard deviation) per channel.
    constants: Vec<(f64, f64)>,
}

impl Normalisation {
    /// Reads `mean` and `standard_deviation` for images with `channels` channels.
    pub(super) fn new(data: &DataConfig, channels: usize) -> Result<Self, DataError> {
        if !(1..=CHANNELS).contains(&channels) {
            return Err(DataError::Misfit(format!(
                "images with {channels} channels: 1 to {CHANNELS} are possible"
            )));
        }
        let spread = |key, constants: &Option<PerChannel>, default| match constants {
            None => Ok(vec![default; channels]),
            Some(PerChannel::One(value)) => Ok(vec![*value; channels]),
            Some(PerChannel::Each(values)) if values.len() == channels => Ok(values.clone()),
            Some(PerChannel::Each(values)) => Err(config(
                key,
                format!("lists {} numbers, the images have {channels} channels", values.len()),
            )),
        };
        let means = spread("mean", &data.mean, 0.0)?;
        let deviations = spread("standard_deviation", &data.standard_deviation, 1.0)?;
        Ok(Self { constants: means.into_iter().zip(deviations).collect() })
    }

    /// Features of 8-bit images, examples × `channels` × `plane`: (x / 255 - mean) / standard deviation,
    /// in `f64`, rounded once.
    pub(super) fn bytes(&self, pixels: &[u8], plane: usize) -> Vec<f32> {
        let tables: Vec<[f32; 256]> = self
            .constants
            .iter()
            .map(|(mean, deviation)| std::array::from_fn(|x| ((x as f64 / 255.0 - mean) / deviation) as f32))
            .collect();
        let planes = pixels.chunks(plane.max(1)).zip(tables.iter().cycle());
        let mut features = Vec::with_capacity(pixels.len());
        for (plane, table) in planes {
            features.extend(plane.iter().map(|x| table[usize::from(*x)]));
        }
        features
    }

    /// Features of images that are numbers already: (x - mean) / standard deviation.
    ///
    /// # Errors
    /// The index of the first value that is not finite, before or after.
    pub(super) fn numbers(&self, values: impl Iterator<Item = f64>, plane: usize) -> Result<Vec<f32>, usize> {
        let mut features = Vec::new();
        for (index, x) in values.enumerate() {
            let channel = index / plane.max(1) % self.constants.len().max(1);
            let (mean, deviation) = self.constants.get(channel).copied().unwrap_or((0.0, 1.0));
            let value = ((x - mean) / deviation) as f32;
            if !value.is_finite() {
                return Err(index);
            }
            features.push(value);
        }
        Ok(features)
    }
}

/// Turns integer labels into classes.
///
/// # Errors
/// The first label that is negative, at or above `declared` classes, or above the limit.
pub(super) fn labels(
    path: &Path,
    what: &str,
    declared: Option<usize>,
    values: impl Iterator<Item = i64>,
) -> Result<Vec<i64>, DataError> {
    let classes = declared.unwrap_or(CLASSES);
    let mut labels = Vec::new();
    for (index, label) in values.enumerate() {
        if usize::try_from(label).is_ok_and(|label| label < classes) {
            labels.push(label);
        } else {
            return Err(record(path, format!("{what} {index}"), out_of_range(label, classes)));
        }
    }
    Ok(labels)
}

/// What is wrong with a label outside the classes.
pub(super) fn out_of_range(label: i64, classes: usize) -> String {
    let last = classes.saturating_sub(1);
    format!("{label} is not a class: {classes} classes are 0 to {last}; correct the label, or `classes`")
}

/// Refuses labels, or whatever `what` says, that are not as many as the images.
pub(super) fn paired(
    path: &Path,
    name: &str,
    what: &str,
    found: usize,
    images: usize,
) -> Result<(), DataError> {
    if found == images {
        return Ok(());
    }
    Err(file(
        path,
        format!("{name} holds {found} {what} for {images} images: take both from the same release"),
    ))
}
