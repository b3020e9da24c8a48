//! Models as `.safetensors` files, for other tools to read and for runs to start from.

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::{Layout, from_bytes, to_bytes};

/// Why a `.safetensors` file is not this job's model.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The bytes are not a `.safetensors` file.
    #[error("not a .safetensors file: {0}")]
    Format(String),
    /// A tensor that the architecture needs is not there.
    #[error("tensor `{0}` is missing; the architecture needs it")]
    Missing(String),
    /// A tensor has another shape or type than the architecture's.
    #[error("tensor `{name}` is {found}, but the architecture needs F32 {expected:?}")]
    Mismatch {
        /// The tensor.
        name: String,
        /// Its shape in the architecture.
        expected: Vec<usize>,
        /// Type and shape in the file.
        found: String,
    },
    /// A tensor that the architecture does not know.
    #[error("tensor `{0}` is not part of the architecture")]
    Unknown(String),
    /// A value is NaN or infinite.
    #[error("tensor `{0}` holds a value that is not finite")]
    NotFinite(String),
}

/// The bytes of a `.safetensors` file with the tensors of `layout`.
pub fn export(layout: &Layout, values: &[f32]) -> Result<Vec<u8>, ImportError> {
    let bytes = to_bytes(values);
    let format = |error: safetensors::SafeTensorError| ImportError::Format(error.to_string());
    let views = layout.tensors().iter().map(|tensor| {
        let range = tensor.range();
        let part = bytes.get(range.start * 4..range.end * 4).unwrap_or_default();
        Ok((tensor.name(), TensorView::new(Dtype::F32, tensor.shape().to_vec(), part).map_err(format)?))
    });
    let views = views.collect::<Result<Vec<_>, ImportError>>()?;
    safetensors::serialize(views, None).map_err(format)
}

/// Reads the flat vector of `layout` from the bytes of a `.safetensors` file: the same tensors, no more, all finite.
pub fn import(layout: &Layout, bytes: &[u8]) -> Result<Vec<f32>, ImportError> {
    let file = SafeTensors::deserialize(bytes).map_err(|error| ImportError::Format(error.to_string()))?;
    if let Some(name) = file.names().into_iter().find(|name| layout.tensor(name).is_none()) {
        return Err(ImportError::Unknown(name.to_owned()));
    }
    let mut values = Vec::with_capacity(layout.parameters());
    for tensor in layout.tensors() {
        let name = || tensor.name().to_owned();
        let view = file.tensor(tensor.name()).map_err(|_| ImportError::Missing(name()))?;
        if view.dtype() != Dtype::F32 || view.shape() != tensor.shape() {
            let found = format!("{:?} {:?}", view.dtype(), view.shape());
            return Err(ImportError::Mismatch { name: name(), expected: tensor.shape().to_vec(), found });
        }
        let part = from_bytes(view.data()).unwrap_or_default();
        if part.iter().any(|value| !value.is_finite()) {
            return Err(ImportError::NotFinite(name()));
        }
        values.extend(part);
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::super::Architecture;
    use super::*;

    #[test]
    fn a_model_reads_back_and_another_model_is_refused() {
        let cnn = Architecture::SmallCnn.network(&[1, 28, 28], 10, &[], &[]).unwrap().layout();
        let values = cnn.initial(7);
        let file = export(&cnn, &values).unwrap();
        assert_eq!(import(&cnn, &file).unwrap(), values);

        let other = Architecture::SmallCnn.network(&[1, 28, 28], 9, &[], &[]).unwrap().layout();
        assert!(import(&other, &file).unwrap_err().to_string().contains("architecture needs F32"));
        let logistic = Architecture::Logistic.network(&[4], 2, &[], &[]).unwrap().layout();
        assert!(matches!(import(&logistic, &file), Err(ImportError::Unknown(_))));
        assert!(matches!(import(&cnn, &file[..20]), Err(ImportError::Format(_))));
        let mut poisoned = values.clone();
        poisoned[5] = f32::NAN;
        let file = export(&cnn, &poisoned).unwrap();
        assert!(matches!(import(&cnn, &file), Err(ImportError::NotFinite(_))));
    }
}
